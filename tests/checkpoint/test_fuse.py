"""Which norms and additions of a graph become arguments of packed linears, and that its outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from kernel_layers import DEVICE, DTYPE, build_layer, random_input, random_trellis, relative_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.nn.functional import gelu, silu
from transformers import CompileConfig, GenerationConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lqer.checkpoint.decode import inductor_options
from lqer.checkpoint.fuse import ARGUMENTS, FUSE_INTO_LINEARS, FuseIntoLinears
from lqer.formats import Int, Trellis
from lqer.kernels import PackedLinear, TritonLinear
from lqer.kernels.linear import OPERATOR
from lqer.transforms.hadamard import random_hadamard

COLUMNS = 256
TOLERANCE = 8e-3  # torch rounds what it norms and what it adds to
NORMS = {"Llama": LlamaRMSNorm, "Gemma": GemmaRMSNorm, "torch": nn.RMSNorm}


def linear(rows: int = COLUMNS, seed: int = 1) -> TritonLinear:
    weight = random_trellis(Trellis(2, table="bytes"), rows, COLUMNS)
    rotation = random_hadamard(rows, COLUMNS, seed)
    return TritonLinear(PackedLinear.pack(weight, None, None, None, None, DTYPE, rotation))


def norm(kind: str = "Llama") -> nn.Module:
    made = NORMS[kind](COLUMNS, eps=1e-3).to(DEVICE, DTYPE)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 1.5, COLUMNS) - float(kind == "Gemma"))
    return made


@torch.no_grad()
def fused(run, x: torch.Tensor) -> list[dict]:
    """The arguments of the linears in the fused graph of `run`, whose outputs are compared with those of `run`."""
    found: list[dict] = []

    def fuse(module: GraphModule, _: list[torch.Tensor]):
        FUSE_INTO_LINEARS(module.graph)
        module.graph.lint()
        module.recompile()
        additions = len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor))
        for node in module.graph.find_nodes(op="call_function", target=OPERATOR):
            given = dict(zip(ARGUMENTS, node.args, strict=False))
            found.append({name: getattr(value, "name", value) for name, value in given.items()})
            found[-1]["additions"] = additions
        return make_boxed_func(module.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=fuse, decompositions=select_decomp_table())
    outputs = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)(x)
    assert relative_error(outputs, run(x).double()) < TOLERANCE
    return found


def tokens(m: int = 2) -> torch.Tensor:
    return 0.02 * random_input(m, COLUMNS).view(1, m, COLUMNS)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_goes_into_all_linears_that_read_it(kind):
    before, one, other = norm(kind), linear(), linear(seed=2)
    h = tokens()
    arguments = fused(lambda h: one(x := before(h)) + other(x), h)
    assert len({given["x"] for given in arguments}) == 1
    assert [given["norm_eps"] for given in arguments] == pytest.approx([1e-3] * 2)
    assert [given["norm_offset"] for given in arguments] == [float(kind == "Gemma")] * 2
    # One of the two also adds what the other gives.
    assert [given["residual"] is None for given in arguments].count(True) == 1


def test_the_residual_and_the_next_norm_of_a_block_are_folded():
    first, second, before, after = linear(), linear(seed=2), norm(), norm()

    def block(h):
        h = h + first(before(h))
        return h + second(after(h))

    attention, mlp = fused(block, tokens())
    assert attention["x"] == attention["residual"]
    assert mlp["x"] == mlp["residual"] == "packed_linear"
    assert mlp["additions"] == 0


@pytest.mark.parametrize("joined", [False, True])
def test_the_gate_of_an_mlp_is_folded(joined):
    gate, up, down = linear(), linear(seed=2), linear(seed=3)
    if joined:
        both = torch.cat([torch.eye(COLUMNS), -torch.eye(COLUMNS)]).to(DEVICE, DTYPE)
        (given,) = fused(lambda h: down(silu((y := h @ both.T)[..., :COLUMNS]) * y[..., COLUMNS:]), 50 * tokens())
        assert given["x"] != given["up"]
        return
    *_, given = fused(lambda h: down(silu(gate(h)) * up(h)), tokens())
    assert {given["x"], given["up"]} == {"packed_linear", "packed_linear_1"}
    assert given["norm"] is None


def test_other_gates_stay():
    down = linear()
    for activate in (gelu, torch.sigmoid, lambda x: silu(2 * x) / 2):
        (given,) = fused(lambda h, activate=activate: down(activate(h) * h), 50 * tokens())
        assert given.get("up") is None


def test_a_norm_that_something_else_reads_stays():
    before, one = norm(), linear()
    (given,) = fused(lambda h: one(x := before(h)) * x, tokens())
    assert given.get("norm") is None


def test_a_norm_of_a_norm_and_one_that_is_a_residual_too_are_not_mistaken():
    """Two linears that read a normed tensor which one of them adds, and one behind two norms."""
    outer, inner, one, other = norm(), norm("Gemma"), linear(), linear(seed=2)
    first, second = fused(lambda h: ((x := inner(h)) + one(x)) * other(x), tokens())
    assert first["residual"] == first["x"] == second["x"]
    assert first["norm"] is second.get("norm") is None
    first, second = fused(lambda h: one(x := outer(inner(h))) * other(x), tokens())
    assert first["x"] == second["x"]
    assert first["norm_offset"] == second["norm_offset"] == 0.0
    first, second = fused(lambda h: one(outer(x := inner(h))) * other(x), tokens())
    assert (first["norm_offset"], second.get("norm")) == (0.0, None)


def test_an_output_that_something_else_reads_is_not_added_to():
    one = linear()
    (given,) = fused(lambda h: (y := one(h)) * (h + y), tokens())
    assert given.get("residual") is None


def test_other_arithmetic_stays():
    """A norm of another mean, an addition of another shape, twice the output, and layers that kernels do not norm."""
    one, before, weight_I = linear(), norm(), norm().weight

    def centred(h):
        h32 = h.float()
        return one(
            (h32 * torch.rsqrt((h32 - h32.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True))).to(h) * weight_I
        )

    for run, m in (
        (centred, 2),
        (lambda h: one(h) + h[:, :1], 2),
        (lambda h: (y := one(h)) + y, 2),
        (lambda h: one(before(h)) + h, 65),
    ):
        (given,) = fused(run, tokens(m))
        assert given.get("norm") is None
        assert given.get("residual") is None


def test_integer_weights_take_residuals_but_no_norms():
    before, one = norm(), TritonLinear(build_layer(Int(4, 32), COLUMNS, COLUMNS).packed)
    (given,) = fused(lambda h: h + one(before(h)), tokens())
    assert given["norm"] is None
    assert given["residual"] is not None


def test_settings_that_hold_the_pass_are_copied_compared_and_printed():
    settings = GenerationConfig()
    settings.compile_config = CompileConfig(mode=None, options=inductor_options())
    copied = copy.deepcopy(settings)
    assert copied.compile_config == settings.compile_config
    assert FUSE_INTO_LINEARS in repr(settings)
    (fuse,) = (value for value in copied.compile_config.to_dict()["options"].values() if value == FUSE_INTO_LINEARS)
    assert isinstance(fuse, FuseIntoLinears)
    assert fuse.uuid() == FUSE_INTO_LINEARS.uuid()
