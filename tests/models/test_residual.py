"""Which linears write to the residual stream, for blocks of several architectures, and which blocks are refused.

Shapes: T tokens of the whole text, I in_features, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from helpers import resident
from mixtures import random_mixture
from torch import nn

from lqer.errors import ModelError
from lqer.models.residual import OUTPUT, find_writers, inverse_squares, watched_points
from lqer.models.structure import prepare_model
from lqer.models.walker import walk_blocks

LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT}
WRITERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": OUTPUT},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": OUTPUT},
    # Attention and MLP read the same stream.
    "gpt-neox": {"attention.dense": OUTPUT, "mlp.dense_4h_to_h": OUTPUT},
}


def first_run(model, windows_WT):
    return next(walk_blocks(resident(model), windows_WT, 2))


@pytest.mark.parametrize("architecture", WRITERS)
def test_writers_are_followed_by_the_next_point_of_the_stream(architecture, random_model, windows_WT):
    assert find_writers(first_run(random_model(architecture), windows_WT)) == WRITERS[architecture]


def test_half_precision_changes_nothing(random_model, windows_WT):
    assert find_writers(first_run(random_model("llama").bfloat16(), windows_WT)) == LLAMA


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma3", "the output of self_attn.o_proj passes a norm before it is added"),
        ("opt-350m", "the residual stream does not change by the outputs of self_attn.q_proj, .*self_attn.out_proj"),
    ],
)
def test_blocks_that_are_built_otherwise_are_refused_with_the_reason(architecture, reason, random_model, windows_WT):
    match = rf'^calibration.token_weights: model.*\.0: {reason}.*; use token_weights = "none"$'
    with pytest.raises(ModelError, match=match):
        find_writers(first_run(random_model(architecture), windows_WT))


class Bottleneck(nn.Module):
    """A linear whose result is added by another module than a linear of the stream's width."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(32, 8)

    def forward(self, hidden_BTD, *args, **kwargs):
        return hidden_BTD + self.down(hidden_BTD).repeat(1, 1, 4)


def test_a_block_without_writers_is_refused(random_model, windows_WT):
    run = first_run(random_model("llama"), windows_WT)
    with pytest.raises(ModelError, match="none of its linears writes to the residual stream"):
        find_writers(run.with_block(Bottleneck()))


def test_a_block_between_which_tokens_have_several_streams_is_refused(windows_WT):
    model = random_mixture("hy_v4")
    prepare_model(model)
    with pytest.raises(ModelError, match="a token has several hidden states there"):
        find_writers(first_run(model, windows_WT))


def test_weights_are_inverse_squares_of_the_stream_and_zero_for_an_empty_token():
    stream = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])
    assert inverse_squares(stream).tolist() == [pytest.approx(1 / 25), 0.0, 1.0, 0.25]


@torch.no_grad()
def test_watched_points_are_what_their_norm_reads(random_model, windows_WT):
    run = first_run(random_model("llama"), windows_WT)
    seen = []
    norm = run.block.post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with watched_points(run.block, LLAMA) as weights:
        run.output(0)
    handle.remove()
    run.output(0)
    assert len(seen) == 1
    assert weights.keys() == {"post_attention_layernorm"}
    assert torch.equal(weights["post_attention_layernorm"], inverse_squares(seen[0]))


def test_experts_write_where_each_token_is_sent_to_one_of_them(windows_WT):
    """Of Llama 4, whose router is a linear that returns more than a tensor, and whose experts get a row a choice."""
    model = random_mixture("llama4_text", num_experts_per_tok=1)
    prepare_model(model)
    assert find_writers(first_run(model, windows_WT)) == {
        "self_attn.o_proj": "post_attention_layernorm",
        "feed_forward.experts": OUTPUT,
        "feed_forward.shared_expert.down_proj": OUTPUT,
    }
    model = random_mixture("llama4_text")
    prepare_model(model)
    with pytest.raises(ModelError, match=r"feed_forward\.experts does not see every token"):
        find_writers(first_run(model, windows_WT))
