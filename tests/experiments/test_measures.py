"""What several scripts measure on and with: texts, seconds, errors."""

from __future__ import annotations

import time

import pytest
import torch
from measures.errors import relative_error
from measures.seconds import least_seconds
from measures.texts import text_spec

from lqer.errors import ConfigError


def test_seconds_are_the_least_of_the_repeats_and_the_first_run_is_left_out(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work() -> int:
        calls.append(len(calls))
        now[0] += (1, 5, 3, 4)[calls[-1]]
        return calls[-1]

    assert least_seconds(work, 3, torch.device("cpu")) == (3, 3)


def test_an_error_is_that_of_the_outputs_over_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight_OI, error_OI, x_TI = (torch.randn(n, 16, generator=generator) for n in (8, 8, 100))
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    of_outputs = (x_TI @ error_OI.T).square().sum() / (x_TI @ weight_OI.T).square().sum()
    assert relative_error(weight_OI, weight_OI + error_OI, hessian_II) == pytest.approx(float(of_outputs), rel=1e-5)
    assert relative_error(weight_OI, weight_OI, hessian_II) == 0


def test_a_text_is_a_path_with_rows_behind_an_at():
    assert text_spec("c4.jsonl@:90%").label == "c4.jsonl[:90%]"
    assert text_spec("c4.jsonl").rows is None
    with pytest.raises(ConfigError, match="rows is '90'"):
        text_spec("c4.jsonl@90")
