"""A quantized model on packed tensors agrees with its emulation."""

from __future__ import annotations

import json

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, build_layer, random_input
from safetensors.torch import load_file

import lqer
from lqer.checkpoint.pack import DETAILS_FILE
from lqer.formats import E8P, Int, MXInt, QuantizedTensor, Trellis, format_from_dict
from lqer.kernels import PackedLinear, TritonLinear, packed_linear
from lqer.kernels.layout.lattice import PackedLattice
from lqer.kernels.layout.trellis import PackedTrellis
from lqer.methods import Caldera, LinearPlan, LqerAct
from lqer.nn.linear import HadamardLinear, QuantizedLinear
from lqer.rounding.ldlq import Ldlq
from lqer.store.names import block_file
from lqer.transforms import Hadamard
from lqer.transforms.hadamard import random_hadamard

PLAN = LinearPlan(
    method=LqerAct(), weight=MXInt(4), activation=MXInt(8), bias=MXInt(8), rank=8, factor=MXInt(8),
    factor_axis="reduction",
)  # fmt: skip


def packed_modules(checkpoint) -> dict[str, TritonLinear]:
    """Every quantized linear of a checkpoint folder, packed for the kernels."""
    details = json.loads((checkpoint / DETAILS_FILE).read_text())
    modules = {}
    for index in range(details["blocks"]["count"]):
        tensors = load_file(checkpoint / block_file(index))
        for name, entry in details["linears"].items():
            if not name.startswith(f"{details['blocks']['name']}.{index}."):
                continue

            def part(role, name=name, entry=entry, tensors=tensors) -> QuantizedTensor | None:
                if role not in entry:
                    return None
                prefix, described = f"{name}.{role}.", entry[role]
                packed = {
                    key.removeprefix(prefix): t.to(DEVICE) for key, t in tensors.items() if key.startswith(prefix)
                }
                return format_from_dict(described["format"]).unpack(packed, described["shape"], described["axis"])

            bias, activation = part("bias"), format_from_dict(entry["activation"])
            bias_O = None if bias is None else bias.dequantize(DTYPE)
            factors = part("low_rank_a"), part("low_rank_b")
            modules[name] = TritonLinear(PackedLinear.pack(part("weight"), *factors, bias_O, activation, DTYPE))
    return modules


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@torch.no_grad()
def test_a_model_on_packed_weights_agrees_with_its_emulation(architecture, random_model, run_stages, windows_WT):
    checkpoint = run_stages(random_model(architecture), PLAN).checkpoint.path
    exact = lqer.load_quantized(checkpoint, DEVICE, torch.float32, "emulate")
    model = lqer.load_quantized(checkpoint, DEVICE, DTYPE, "emulate")
    ids_WT = windows_WT[:2].to(DEVICE)
    expected, emulated = exact(ids_WT).logits.double(), model(ids_WT).logits.double()
    modules = packed_modules(checkpoint)
    assert modules.keys() == {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, module in modules.items():
        model.set_submodule(name, module)
    packed = model(ids_WT).logits.double()
    # Rounding activations again amplifies the error of the dtype: kernels may have as large an error as emulation.
    assert (packed - expected).norm() < 1.2 * (emulated - expected).norm()


@pytest.mark.skipif(not ON_GPU, reason="backend triton needs a GPU")
@torch.no_grad()
def test_load_quantized_builds_modules_of_the_kernels_without_dequantized_weights(random_model, run_stages, windows_WT):
    checkpoint = run_stages(random_model("llama"), PLAN).checkpoint.path
    model = lqer.load_quantized(checkpoint, DEVICE, DTYPE, "triton")
    assert any(isinstance(module, TritonLinear) for module in model.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    ids_WT = windows_WT.to(DEVICE)
    expected, emulated = (
        lqer.load_quantized(checkpoint, DEVICE, dtype, "emulate")(ids_WT).logits.double()
        for dtype in (torch.float32, DTYPE)
    )
    assert (model(ids_WT).logits.double() - expected).norm() < 1.2 * (emulated - expected).norm()


@torch.no_grad()
@pytest.mark.parametrize(("weight", "packing"), [(E8P(2), PackedLattice), (Trellis(2), PackedTrellis)])
def test_a_caldera_checkpoint_on_packed_codes_agrees_with_emulation(
    weight, packing, random_model, run_stages, windows_WT, monkeypatch
):
    plan = LinearPlan(
        Caldera(), weight, None, None, 8, Int(4, 32, symmetric=True), "outer", rounding=Ldlq(),
        transform=Hadamard(), iterations=2,
    )  # fmt: skip
    checkpoint = run_stages(random_model("llama"), plan).checkpoint.path
    # Without a GPU the interpreter runs the backend that is refused otherwise.
    monkeypatch.setattr("lqer.checkpoint.backend.resolve_backend", lambda wanted, *_: wanted)
    exact, emulation, kernels = (
        lqer.load_quantized(checkpoint, DEVICE, dtype, backend)
        for dtype, backend in ((torch.float32, "emulate"), (DTYPE, "emulate"), (DTYPE, "triton"))
    )
    packed = [module for module in kernels.modules() if isinstance(module, TritonLinear)]
    assert len(packed) == sum(isinstance(module, QuantizedLinear) for module in emulation.modules())
    assert all(isinstance(module.packed.weight, packing) for module in packed)
    assert not any(isinstance(module, QuantizedLinear | HadamardLinear) for module in kernels.modules())
    # Few tokens, and more than the kernel of the product supports.
    for ids_WT in (windows_WT[:1], windows_WT[:2]):
        expected, emulated, found = (model(ids_WT.to(DEVICE)).logits.double() for model in (exact, emulation, kernels))
        assert (found - expected).norm() < 1.5 * (emulated - expected).norm()


@torch.no_grad()
def test_a_rotated_linear_runs_its_kernels_between_the_rotations():
    layer = build_layer(MXInt(4), 96, 128, rank=16, activation=MXInt(8))
    basis = random_hadamard(96, 128, seed=0)
    weight_OI, a_IR, b_RO = (part.dequantize(DTYPE) for part in (layer.weight, layer.a, layer.b))
    emulation, kernels = QuantizedLinear(weight_OI, None, a_IR, b_RO, MXInt(8)), TritonLinear(layer.packed)
    x_MI, bias_O = random_input(3, 128), torch.ones(96, dtype=DTYPE)
    emulated, packed = (HadamardLinear(module, basis, bias_O).to(DEVICE) for module in (emulation, kernels))
    torch.testing.assert_close(packed(x_MI), emulated(x_MI), rtol=2e-2, atol=2e-2)


def test_the_module_equals_the_function_and_its_state_dict_holds_every_tensor():
    layer = build_layer(MXInt(4), 80, 128, rank=16, activation=MXInt(8), bias=True)
    module = TritonLinear(layer.packed)
    x_MI = random_input(3, 128)
    assert torch.equal(module(x_MI), packed_linear(x_MI, layer.packed))
    assert module.state_dict().keys() == dict(module.named_buffers()).keys() != set()
    assert "rank=16" in repr(module)


def test_the_module_tells_the_dtype_of_its_weight():
    weight_OI = TritonLinear(build_layer(MXInt(4), 80, 128).packed).weight
    assert (weight_OI.shape, weight_OI.dtype, weight_OI.is_meta) == ((80, 128), DTYPE, True)
