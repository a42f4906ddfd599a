"""What tests of stages quantize on, and by what plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measured_spectra import SIZES as SPECTRA_SIZES
from measured_spectra import MeasuredSpectra
from measured_widths import SIZES as WIDTHS_SIZES
from measured_widths import MeasuredWidths
from torch import Tensor

from lqer.formats import Int
from lqer.methods import LinearPlan, RoundingOnly
from lqer.rounding import Gptq
from lqer.stages.gather import CalibrationText


@pytest.fixture(scope="session")
def text(windows_WT: Tensor) -> CalibrationText:
    """Batches of two windows; output errors on 24 tokens."""
    return CalibrationText(windows_WT, 2, 24)


@pytest.fixture(scope="session")
def gptq_plan(plan: LinearPlan) -> LinearPlan:
    """GPTQ to 3-bit integers, without factors."""
    return replace(plan, method=RoundingOnly(), rank=0, weight=Int(bits=3, block_size=16), rounding=Gptq())


@pytest.fixture(scope="session")
def measured_spectra(random_model, windows_WT, tmp_path_factory) -> MeasuredSpectra:
    return MeasuredSpectra.of(random_model("llama", **SPECTRA_SIZES), windows_WT, tmp_path_factory.mktemp("spectra"))


@pytest.fixture(scope="session")
def measured_widths(random_model, windows_WT, tmp_path_factory) -> MeasuredWidths:
    return MeasuredWidths.of(random_model("llama", **WIDTHS_SIZES), windows_WT, tmp_path_factory.mktemp("widths"))
