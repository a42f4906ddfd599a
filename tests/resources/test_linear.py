"""Memory of linears that are quantized at once."""

from __future__ import annotations

from lqer.resources.linear import batch_bytes
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
