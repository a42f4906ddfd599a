"""One scene on the CPU, with loops in place of graphs: checks, refusals and reports. Times are faked."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_benchmark import measure, peers, timing
from kernel_benchmark.contenders import VARIANTS, Contender, Operands
from kernel_benchmark.results import Scene

from lqer.formats import MXInt

SCENE = Scene(64, 48, 3)
SETTINGS = measure.Settings(1.0, warm=True, bytes_per_second=4e12, operations_per_second=8e14)


@pytest.fixture
def operands() -> Operands:
    return Operands(SCENE.k, SCENE.n, torch.device("cpu"))


@pytest.fixture
def on_cpu(monkeypatch):
    """Loops in place of graphs, constant times, and allocated memory that grows with every query."""
    allocated = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(timing, "graph_of", lambda calls, _: SimpleNamespace(replay=timing.loop_of(calls, 1)))
    monkeypatch.setattr(timing, "rounds_for", lambda calls, microseconds: 1)
    monkeypatch.setattr(timing, "durations_us", lambda run, count: [run() or 5.0 for _ in range(count)])


def broken(change):
    """bf16 with a changed product."""
    product = VARIANTS["bf16"].make

    def make(operands, variant, m):
        contender = product(operands, variant, m)
        return Contender(contender.state, lambda state, x_MI: change(contender.run(state, x_MI)))

    return replace(VARIANTS["bf16"], make=make)


def test_a_correct_contender_gets_a_time_an_error_and_a_floor(on_cpu):
    dense, emulation = measure.run_scene(SCENE, ["bf16", "emulation-w4a8-r32"], SETTINGS, {})
    for row in (dense, emulation):
        assert row.problem is None
        assert 0 < row.error < 5e-3
        assert row.microseconds == pytest.approx(5.0 / row.copies)
        assert row.spread == 0.0
        assert row.floor_microseconds > 0
    assert dense.warm_microseconds is not None
    assert emulation.warm_microseconds is None


@pytest.mark.parametrize("package", ["gemlite", "humming"])
def test_a_peer_that_is_not_installed_is_a_row_that_names_it(on_cpu, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    peer, dense = measure.run_scene(SCENE, [f"{package}-int4-g16", "bf16"], SETTINGS, {})
    assert peer.microseconds is None
    assert peer.problem.startswith("not installed: ")
    assert package in peer.problem
    assert dense.problem is None


@pytest.mark.parametrize(
    "change", [lambda y: y * 1.02, lambda y: y.roll(1, 0), lambda y: y.fill_(torch.nan), torch.zeros_like]
)
def test_a_wrong_result_is_refused_before_it_is_timed(on_cpu, monkeypatch, change):
    monkeypatch.setitem(VARIANTS, "bf16", broken(change))
    (row,) = measure.run_scene(SCENE, ["bf16"], SETTINGS, {})
    assert row.microseconds is None
    assert row.problem.startswith("ValueError: wrong result: relative error")


def test_a_contender_that_fails_while_it_is_timed_does_not_stop_the_others(on_cpu, monkeypatch):
    calls = []

    def fails_late(y):
        calls.append(None)
        if len(calls) > 100:
            raise RuntimeError("out of luck\nand of lines")
        return y

    monkeypatch.setitem(VARIANTS, "w4a16", broken(fails_late))
    late, dense = measure.run_scene(SCENE, ["w4a16", "bf16"], SETTINGS, {})
    assert (late.microseconds, late.problem) == (None, "RuntimeError: out of luck")
    assert dense.problem is None


def test_a_contender_with_a_known_problem_is_not_run(on_cpu, monkeypatch):
    def tried(operands, variant, m):
        raise AssertionError

    monkeypatch.setitem(VARIANTS, "bf16", replace(VARIANTS["bf16"], make=tried))
    (row,) = measure.run_scene(SCENE, ["bf16"], SETTINGS, {"bf16": "its trial process died"})
    assert row.problem == "its trial process died"


def test_rows_at_both_ends_of_a_long_input_are_checked(operands):
    x_MI = operands.input(300)
    variant = VARIANTS["bf16"]
    y_MO = torch.nn.functional.linear(x_MI, operands.weight_OI)
    assert measure.checked_error(operands, variant, y_MO, x_MI) < 5e-3
    for row in (0, 299):
        wrong = y_MO.clone()
        wrong[row] = 0
        with pytest.raises(ValueError, match="wrong result"):
            measure.checked_error(operands, variant, wrong, x_MI)


def test_copies_that_share_memory_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    with pytest.raises(RuntimeError, match="share"):
        measure.copies_of(torch.zeros(1000), 3, 4000.0)


def test_copies_do_not_share_storage(monkeypatch):
    allocated = iter((0, 8000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    states = measure.copies_of({"weight": torch.arange(1000.0)}, 3, 4000.0)
    assert len({state["weight"].data_ptr() for state in states}) == 3
    assert all(torch.equal(state["weight"], states[0]["weight"]) for state in states)


def test_the_number_of_copies_follows_from_the_smallest_weights_of_a_scene():
    scene = Scene(4096, 11008, 1)
    copies = measure.copies_for(scene, ["bf16", "w4a16"])
    assert copies * scene.k * scene.n * 4.5 / 8 >= measure.ROTATED_BYTES
    assert (copies - 1) * scene.k * scene.n * 4.5 / 8 < measure.ROTATED_BYTES
    assert measure.copies_for(Scene(65536, 65536, 1), ["bf16"]) == measure.FEWEST_COPIES


def test_the_floor_of_one_row_is_the_bytes_and_that_of_many_the_operations():
    variant = VARIANTS["w4a8-r32"]
    k, n = 4096, 11008
    stored = k * n * 4.5 / 8 + 32 * (k + n) * 8.5 / 8
    assert variant.floor_us(Scene(k, n, 1), 4e12, 8e14) == pytest.approx((stored + 2 * (k + n)) / 4e6)
    operations = 2 * 8192 * (k * n + 32 * (k + n))
    assert variant.floor_us(Scene(k, n, 8192), 4e12, 8e14) == pytest.approx(operations / 8e8)


def test_the_reference_is_the_product_in_float64(operands):
    x_MI = operands.input(5)
    expected = x_MI.double() @ operands.quantized(MXInt(4)).dequantize().double().T
    assert torch.equal(operands.reference(VARIANTS["w4a16"], x_MI), expected)


def test_the_low_rank_product_is_a_tenth_of_the_weights(operands):
    a_IR, b_RO = operands.factors(32)
    branch = a_IR.dequantize() @ b_RO.dequantize()
    assert branch.norm() / operands.weight_OI.float().norm() == pytest.approx(0.1, rel=0.2)


def test_codes_and_scales_for_the_peers_equal_the_quantized_weight(operands):
    weight = operands.quantized(MXInt(4))
    codes_OI, scales_OG = peers.offset_codes_and_scales(weight)
    assert codes_OI.dtype == torch.uint8
    assert int(codes_OI.max()) <= 15
    values = (codes_OI.int() - 8) * scales_OG.float().repeat_interleave(16, 1)
    assert torch.equal(values, weight.dequantize())


def test_peers_refuse_other_formats(operands):
    for number_format in (MXInt(3), VARIANTS["int4-g128-a16"].weight):
        with pytest.raises(ValueError, match="MXINT4"):
            peers.offset_codes_and_scales(operands.quantized(number_format))
