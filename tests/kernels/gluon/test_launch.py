"""Which linears the kernels in Gluon take, and what runs before them."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, build_layer, random_input

from lqer.formats import Int, MXInt
from lqer.kernels import launch, runtime
from lqer.kernels.dequantize_launch import low_rank_buffers, project, write_low_rank
from lqer.kernels.gluon.launch import fits_gluon, prepare
from lqer.kernels.input_launch import round_activations

FITTING = [(Int(4, 128), torch.float16), (Int(4, "row", symmetric=True), torch.bfloat16), (MXInt(4), torch.bfloat16)]


def test_other_groups_and_machines_use_other_kernels():
    x_MI = torch.zeros(1, 512, device=DEVICE)
    assert not fits_gluon(build_layer(Int(4, 64), 64, 512).packed, x_MI)
    assert not fits_gluon(build_layer(Int(4, 128), 64, 512, rank=16).packed, x_MI)
    assert not fits_gluon(build_layer(MXInt(4), 64, 512, dtype=torch.float16).packed, x_MI)
    assert not fits_gluon(build_layer(MXInt(3), 64, 512).packed, x_MI)
    assert not fits_gluon(build_layer(Int(3, 128), 64, 512).packed, x_MI)
    assert not fits_gluon(build_layer(Int(4, 128), 64, 512).packed, x_MI.cpu())


@pytest.mark.parametrize(("number_format", "dtype"), FITTING, ids=str)
def test_numbers_of_tokens_have_kernels_of_their_own(number_format, dtype, monkeypatch):
    layer = build_layer(number_format, 64, 512, dtype=dtype)
    monkeypatch.setattr(runtime, "is_hopper", lambda x: True)
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)
    for name in ("run_stream", "run_tall", "run_wide", "run_groups", "run_gemm", "run_dequantized"):
        monkeypatch.setattr(launch, name, lambda *_, name=name, **__: name)
    few = "run_gemm" if isinstance(number_format, MXInt) else "run_wide"
    taken = [launch.run_layer(torch.zeros(m, 512, dtype=dtype), layer.packed) for m in (32, 33, 128, 129, 512, 513)]
    assert taken == [few, "run_stream", "run_stream", "run_tall", "run_tall", "run_dequantized"]


@pytest.mark.parametrize("rank", [0, 16])
def test_a_branch_needs_rounded_tokens(rank, monkeypatch):
    monkeypatch.setattr(runtime, "is_hopper", lambda x: True)
    x_MI = torch.zeros(1, 512, device=DEVICE)
    assert fits_gluon(build_layer(Int(4, 128), 64, 512, rank=rank, activation=MXInt(8)).packed, x_MI)
    assert fits_gluon(build_layer(Int(4, 128), 64, 512, rank=rank).packed, x_MI) == (rank == 0)


@pytest.mark.parametrize("number_format", [Int(4, 128), MXInt(4)], ids=str)
def test_tokens_are_rounded_and_in_order_and_outputs_hold_the_branch(number_format):
    packed = build_layer(number_format, 100, 560, rank=32, activation=MXInt(8), bias=True).packed
    for m in (3, 40):
        x_MI = random_input(m, 560, DTYPE)
        prepared = prepare(x_MI, packed, None)
        assert torch.equal(prepared.x_MI, round_activations(x_MI, packed.spec, ordered=True))
        rounded_MI, projection_MR, branch_MO = low_rank_buffers(x_MI, packed)
        project(x_MI, packed, rounded_MI, projection_MR)
        write_low_rank(projection_MR, packed, branch_MO)
        assert branch_MO.any()
        assert torch.equal(prepared.y_MO, branch_MO)
        assert prepared.adds
        assert prepared.bias_O is None
        assert (packed.workspace == 0).all()


def test_without_a_branch_the_product_adds_the_bias():
    packed = build_layer(MXInt(4), 100, 560, bias=True).packed
    prepared = prepare(random_input(3, 560, DTYPE), packed, None)
    assert not prepared.adds
    assert prepared.bias_O is packed.bias_O
