"""Which linears the kernels in Gluon take."""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, build_layer

from lqer.formats import Int, MXInt
from lqer.kernels import launch, runtime
from lqer.kernels.gluon_launch import fits_gluon

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
        monkeypatch.setattr(launch, name, lambda *_, name=name: name)
    few = "run_gemm" if isinstance(number_format, MXInt) else "run_wide"
    taken = [launch.run_layer(torch.zeros(m, 512, dtype=dtype), layer.packed) for m in (32, 33, 128, 129, 512, 513)]
    assert taken == [few, "run_stream", "run_stream", "run_tall", "run_tall", "run_dequantized"]
