from __future__ import annotations

import pytest
import torch
from helpers import first_block

from lqer.formats import Int
from lqer.models.structure import block_linears
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.transforms import Sort
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult
from lqer.transforms.block_transform import no_progress, save_nothing
from lqer.transforms.sort import movable, moved

W3 = Int(bits=3, block_size=16, scale_dtype="float32")


def problem(model, windows_WT) -> BlockProblem:
    block, call, hidden = first_block(model, windows_WT)
    return BlockProblem(call, hidden, hidden, dict.fromkeys(block_linears(block), W3), batch_size=2)


def test_the_function_of_every_architecture_stays(architecture, random_model, windows_WT):
    block, call, hidden = first_block(random_model(architecture), windows_WT)
    parameters = dict(block.named_parameters())
    for reader, writers in movable(call, hidden).items():
        order_I = torch.randperm(block.get_submodule(reader).in_features, generator=torch.Generator().manual_seed(1))
        changed = moved(parameters, reader, writers, order_I)
        torch.testing.assert_close(call(changed, hidden), call({}, hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "phi3"])
def test_channels_inside_the_mlp_can_be_moved(architecture, random_model, windows_WT):
    _, call, hidden = first_block(random_model(architecture), windows_WT)
    assert len(movable(call, hidden)) == 1


def test_channels_between_up_gate_and_down_are_found(random_model, windows_WT):
    block = problem(random_model("llama"), windows_WT)
    assert movable(block.call, block.inputs_STD) == {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")}


def test_inputs_of_down_are_in_order_of_their_squares(random_model, windows_WT):
    block = problem(random_model("llama"), windows_WT)
    result = Sort().apply(block, BlockResult(), no_progress, save_nothing)
    mlp, seen = block.call.block.mlp, []
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].square().flatten(0, -2).mean(0)))
    block.call(result.parameters, block.inputs_STD)
    hook.remove()
    assert (seen[0][:-1] >= seen[0][1:] * (1 - 1e-4)).all()
    assert not torch.equal(result.parameters["mlp.up_proj.weight"], mlp.up_proj.weight)


def test_rows_of_halves_move_alike():
    rows_O = torch.arange(8.0)
    parameters = {"up.weight": rows_O.unsqueeze(1), "up.bias": rows_O, "down.weight": torch.eye(4)}
    order_I = torch.tensor([2, 0, 3, 1])
    changed = moved(parameters, "down", ("up",), order_I)
    assert changed["up.bias"].tolist() == [2, 0, 3, 1, 6, 4, 7, 5]
    assert changed["up.weight"].flatten().tolist() == changed["up.bias"].tolist()
    assert torch.equal(changed["down.weight"] @ torch.arange(4.0)[order_I], torch.arange(4.0))


def test_sorted_columns_are_rounded_in_activation_order_with_scales_that_follow_the_feedback():
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(32, 64, generator=generator)
    x_TI = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x_TI *= torch.randn(64, generator=generator).mul(1.5).exp()
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    order_I = hessian_II.diagonal().argsort(descending=True)

    def loss(error_OI, hessian_II):
        return float(((error_OI @ hessian_II) * error_OI).sum())

    plain = loss(gptq(weight_OI, damp(hessian_II), W3).dequantize() - weight_OI, hessian_II)
    sorted_OI, sorted_II = weight_OI[:, order_I], hessian_II[order_I][:, order_I]
    found = gptq(sorted_OI, damp(sorted_II), W3)
    assert loss(found.dequantize() - sorted_OI, sorted_II) < 0.8 * plain
