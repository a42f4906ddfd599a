"""Linears quantized one input site after the other, against a whole model whose weights are replaced in that order.

Shapes: I in_features, T tokens of the whole text.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import inputs_of_linears, quantize_in_memory, resident, settings_for
from mixtures import random_mixture

from lqer.checkpoint.load import load_quantized
from lqer.formats import MXInt
from lqer.models.structure import block_linears, prepare_model
from lqer.models.walker import walk_blocks
from lqer.rounding import Gptq
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.stages import gather
from lqer.stages.gather import CalibrationText
from lqer.stages.quantize_in_turn import turns_of
from lqer.statistics.site import SiteStatistics
from lqer.store.names import block_file, layers_file
from lqer.transforms import Hadamard

CPU = torch.device("cpu")
LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
TURNS = {
    "llama": LLAMA,
    "gemma3": LLAMA,
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}


@pytest.mark.parametrize("architecture", TURNS)
def test_turns_are_input_sites_in_the_order_of_their_calls(architecture, random_model, windows_WT):
    block_run = next(walk_blocks(resident(random_model(architecture)), windows_WT, 2))
    assert [sorted(turn) for turn in turns_of(block_run)] == [sorted(turn) for turn in TURNS[architecture]]


@pytest.mark.parametrize("kind", ["qwen2_moe", "hy_v4"])
def test_every_linear_that_is_quantized_has_a_turn_and_no_other(kind, windows_WT):
    """Not the gate of a shared expert, nor what weights the heads of an indexer."""
    model = random_mixture(kind)
    prepare_model(model)
    for run in walk_blocks(resident(model), windows_WT, 2):
        turns = turns_of(run)
        assert sorted(name for turn in turns for name in turn) == sorted(block_linears(run.block))
        run.forward()


def test_experts_take_their_turn_together_and_what_is_not_reached_comes_last(random_model, windows_WT):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(32, 3)
            self.ups, self.downs = ([torch.nn.Linear(32, 32) for _ in range(3)] for _ in range(2))
            self.ups, self.downs = torch.nn.ModuleList(self.ups), torch.nn.ModuleList(self.downs)
            self.unused = torch.nn.Linear(4, 4)

        def forward(self, hidden_BTD, *args, **kwargs):
            self.gate(hidden_BTD)
            for i in range(2):
                hidden_BTD = hidden_BTD + self.downs[i](self.ups[i](hidden_BTD.relu()).relu())
            return hidden_BTD

    block_run = next(walk_blocks(resident(random_model("llama")), windows_WT, 2)).with_block(Experts())
    names = ["gate"], ["ups.0", "ups.1", "ups.2"], ["downs.0", "downs.1", "downs.2"], ["unused"]
    assert turns_of(block_run) == list(names)


def test_codes_are_those_of_a_whole_model_whose_weights_are_replaced_turn_by_turn(
    random_model, letter_tokenizer, text, gptq_plan, tmp_path
):
    model = random_model("llama")
    usual, found = (
        quantize_in_memory(tmp_path / order, model, letter_tokenizer, text, settings_for(model, gptq_plan, order=order))
        for order in ("block", "sequential")
    )
    moving = copy.deepcopy(model)
    agreeing = []
    for i, block in enumerate(moving.model.layers):
        for turn in LLAMA:
            inputs = inputs_of_linears(moving, text.windows_WT, text.batch_size)[f"model.layers.{i}.{turn[0]}"]
            x_TI = torch.cat(inputs).double()
            for name in turn:
                linear = block.get_submodule(name)
                expected = gptq(linear.weight.detach(), damp(x_TI.T @ x_TI / len(x_TI)), gptq_plan.weight)
                packed = found.tensors(block_file(i))[f"model.layers.{i}.{name}.weight.codes"]
                agreeing.append((packed == expected.pack()["codes"]).double().mean())
                linear.weight.data = expected.dequantize()
    assert torch.stack(agreeing).min() > 0.99
    names = {key for key in usual.tensors(block_file(0)) if key.endswith("weight.codes")}
    first = {key for key in names if torch.equal(usual.tensors(block_file(0))[key], found.tensors(block_file(0))[key])}
    assert {key.split(".")[-3] for key in first} == {"q_proj", "k_proj", "v_proj"}
    rows = [[row["name"] for row in made.json(layers_file(0))] for made in (found, usual)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("rotated", [False, True])
def test_all_parts_go_together(random_model, letter_tokenizer, windows_WT, gptq_plan, tmp_path, rotated):
    model, text = random_model("llama"), CalibrationText(windows_WT, 2, 24, "residual")
    plan = replace(
        gptq_plan, rounding=Gptq(scales="search"), asymmetric=0.25, activation=MXInt(8), bias=MXInt(8),
        transform=Hadamard() if rotated else None,
    )  # fmt: skip
    settings = settings_for(model, plan, skip=["0.mlp.up_proj"], order="sequential")
    made = quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    linears = [f"model.layers.0.{name}" for name in block_linears(model.model.layers[0]) if name != "mlp.up_proj"]
    assert [row["name"] for row in made.json(layers_file(0))] == linears
    logits = load_quantized(tmp_path, CPU, verify=False)(windows_WT).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("order", "at_once", "of_a_pass"), [("block", 10, 2), ("sequential", 4, 1)])
def test_experts_are_quantized_pass_by_pass_with_the_statistics_of_one_pass_in_memory(
    order, at_once, of_a_pass, text, letter_tokenizer, gptq_plan, tmp_path, monkeypatch
):
    """By input site: those of attention, and two of each of four experts."""
    model = random_mixture("qwen3_moe")
    prepare_model(model)
    settings = settings_for(model, gptq_plan, order=order)
    seen: list[weakref.ref] = []
    held: list[int] = []

    def noted(site: SiteStatistics, statistics) -> None:
        made(site, statistics)
        seen.append(weakref.ref(statistics["hessian"]))
        held.append(len({id(tensor) for one in seen if (tensor := one()) is not None}))

    made = SiteStatistics.__init__
    monkeypatch.setattr(SiteStatistics, "__init__", noted)
    quantize_in_memory(tmp_path / "once", model, letter_tokenizer, text, settings)
    assert max(held) == at_once
    held.clear()
    monkeypatch.setattr(gather, "passes_of", one_module_at_a_time)
    quantize_in_memory(tmp_path / "in-passes", model, letter_tokenizer, text, settings)
    assert max(held) == of_a_pass
    for name in [*map(block_file, range(2)), *map(layers_file, range(2))]:
        assert (tmp_path / "in-passes" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name


def one_module_at_a_time(_, names, statistics) -> list[list[str]]:
    of_modules: dict[str, list[str]] = {}
    for name in names:
        of_modules.setdefault(name.rpartition(".")[0], []).append(name)
    return list(of_modules.values())
