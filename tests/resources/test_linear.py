"""Memory of linears that are quantized at once."""

from __future__ import annotations

from lqer.formats import MXInt
from lqer.lowrank.krylov_graphs import MOST_RECORDINGS
from lqer.methods import LinearPlan, RoundingOnly
from lqer.resources.linear import batch_bytes, recorded_bytes
from lqer.stages.alike import BATCH_BYTES, HESSIAN_BYTES, WEIGHT_BYTES


def mixture(experts: int, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(2) for expert in range(experts)]
    return {**dict.fromkeys(names, (out_features, in_features)), "model.layers.0.self_attn.q_proj": (9999, 9999)}


def test_a_batch_holds_the_experts_of_one_layer():
    needed = 4 * 32 * (HESSIAN_BYTES * 32 + WEIGHT_BYTES * 16)
    assert batch_bytes(mixture(4, 16, 32), "model.layers", "cuda") == needed


def test_a_batch_is_bounded_by_what_batches_may_hold():
    for device, most in BATCH_BYTES.items():
        assert batch_bytes(mixture(256, 2048, 7168), "model.layers", device) == most


def test_a_block_is_no_expert():
    assert batch_bytes({"model.layers.0.fc1": (64, 16), "model.layers.1.fc1": (64, 16)}, "model.layers", "cpu") == 0


def test_errors_of_the_same_shape_are_recorded_once_and_no_more_kinds_than_may_be():
    plan, space = LinearPlan(RoundingOnly(), weight=MXInt(bits=4), rank=32), 14 * 24
    of_one = 4 * 4096 * (4096 + 1) + space * (8 + 4) * 4096
    assert recorded_bytes([(4096, 4096, plan)] * 3, has_hessian=False) == of_one
    with_hessian = of_one + 4 * 4096 * (4096 - 1)
    assert recorded_bytes([(4096, 4096, plan)], has_hessian=True) == with_hessian
    shapes = [(4096 - 8 * step, 4096, plan) for step in range(MOST_RECORDINGS + 1)]
    assert recorded_bytes(shapes, has_hessian=False) == recorded_bytes(shapes[:-1], has_hessian=False)


def test_large_errors_small_ones_and_linears_without_factors_are_not_recorded():
    plan, alone = (
        LinearPlan(RoundingOnly(), weight=MXInt(bits=4), rank=32),
        LinearPlan(RoundingOnly(), weight=MXInt(bits=4), rank=0),
    )
    unrecorded = [(28672, 8192, plan), (512, 512, plan), (4096, 4096, alone)]
    assert recorded_bytes(unrecorded, has_hessian=False) == 0
