"""The experiment as a Python call, and the examples of docstrings."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import lqer
from lqer.errors import ConfigError
from lqer.run import call

ROOT = Path(__file__).parents[2]


def test_the_example_in_the_docstring_runs_as_shown(tiny_model, experiment):
    names = {
        "model": str(tiny_model),
        "text": str(experiment.folder / "calibration.txt"),
        "folder": str(experiment.output),
    }
    found = doctest.testmod(call, extraglobs=names, optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
    assert (found.failed, found.attempted) == (0, 6)


def test_a_configuration_file_is_a_preset_of_ones_own(experiment):
    found = call.read_config(experiment.config, None, values={"quantize": {"low_rank": {"rank": 4}}})
    assert found.quantize.low_rank.rank == 4
    with pytest.raises(ConfigError, match=r"the call: quantize\.low_rank\.rnak: unknown key"):
        lqer.quantize("some/model", str(experiment.config), quantize={"low_rank": {"rnak": 4}})


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lqer.quantise


def test_everything_public_can_be_completed_and_found():
    assert {"load_quantized", "quantize"} <= set(dir(lqer))
    assert all(getattr(lqer, name) is not None for name in dir(lqer))
