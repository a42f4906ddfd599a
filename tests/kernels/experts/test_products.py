"""The kernels for experts against the layer's formula in float64: routes, formats, shapes, determinism, graphs.

Shapes: T tokens, K experts of a token, E experts, M tokens of one expert, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_layers import DEVICE, DTYPE, ON_GPU, Layer, build_layer, random_input, relative_error
from torch import Tensor
from torch.nn import functional as F

from lqer.formats import Int, MXInt, NumberFormat
from lqer.kernels import GroupedExperts, PackedExperts, PackedLinear
from lqer.kernels.experts.launch import most_tiles, pairs_of_tile, route, run_down, run_up, sorted_pairs
from lqer.kernels.experts.reference import ACTIVATIONS, reference_down, reference_up
from lqer.kernels.layout.groups import fits_groups
from lqer.kernels.tuning import GemmLaunch

X8 = MXInt(8)
EXPERTS = 5
# Two roundings to the dtype lie between x and y: of hidden, and of an expert's output.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
# A rounded value on the edge of two levels takes the other one where sums differ in their order.
ROUNDED_TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 1e-2}
INTEGERS = [Int(bits, group) for bits in (2, 3, 4, 8) for group in (32, "row")]
FORMATS = [*INTEGERS, Int(4, 64, symmetric=True), *(MXInt(bits) for bits in (2, 3, 4, 8)), Int(4, 16), Int(6, "row")]


def linear_of(number_format: NumberFormat, n: int, k: int, seed: int, **options) -> Layer:
    """A linear that differs from others of its shape in weight and factors."""
    layer = build_layer(number_format, n, k, **options)
    generator = torch.Generator().manual_seed(seed)

    def other(part, axis: int):
        if part is None:
            return None
        values = torch.randn(part.shape, generator=generator) * part.dequantize().std().cpu()
        return part.format.quantize(values.to(DEVICE), axis=axis)

    weight, a, b = other(layer.weight, 1), other(layer.a, 0), other(layer.b, 0)
    packed = PackedLinear.pack(weight, a, b, layer.bias_O, layer.activation, DTYPE)
    return replace(layer, weight=weight, a=a, b=b, packed=packed)


@dataclass(frozen=True)
class Experts:
    """Linears of all experts: gate and up, or up alone; down."""

    up: list[list[Layer]]
    down: list[list[Layer]]

    @classmethod
    def random(cls, number_format: NumberFormat, n: int = 48, k: int = 64, halves: int = 2, **options) -> Experts:
        """n hidden features, k of x and y."""
        up = [[linear_of(number_format, n, k, 2 * e + h, **options) for h in range(halves)] for e in range(EXPERTS)]
        return cls(up, [[linear_of(number_format, k, n, 100 + e, **options)] for e in range(EXPERTS)])

    def grouped(self, gate: str) -> GroupedExperts:
        stacks = (PackedExperts.stack([[one.packed for one in each] for each in part]) for part in (self.up, self.down))
        return GroupedExperts(*stacks, gate)

    def exact(self, x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """y (T, I) in float64, of an activation of halves (M, H, F); integer groups are not rounded to the dtype."""
        y_TI = torch.zeros(x_TI.shape, dtype=torch.float64, device=x_TI.device)
        for expert, (up, (down,)) in enumerate(zip(self.up, self.down, strict=True)):
            for token, place in (index_TK == expert).nonzero().tolist():
                x_1I = x_TI[token : token + 1]
                halves = torch.stack([exact_of(linear, x_1I) for linear in up], dim=1)
                hidden = activate(halves).to(DTYPE)
                y_TI[token] += weights_TK[token, place].double() * exact_of(down, hidden)[0]
        return y_TI


def exact_of(linear: Layer, x_MI: Tensor) -> Tensor:
    return linear.exact(x_MI, torch.float32 if fits_groups(linear.weight.format) else None)


def routes_of(tokens: int, places: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different experts for each token, and weights."""
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(places).indices
    return index_TK.to(DEVICE), torch.rand(tokens, places, generator=generator).to(DEVICE)


def gated(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda halves: ACTIVATIONS[kind](halves[:, 0]) * halves[:, 1]


def swish_of_limits(halves: Tensor) -> Tensor:
    """An activation that the kernels do not know, as that of gpt-oss."""
    gate, up = halves[:, 0].clamp(max=1.0), halves[:, 1].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def tiles_of(order_P: Tensor, tiles_3P: Tensor, bound: int) -> list[tuple[int, list[int]]]:
    """Expert and pairs of every tile that is not empty."""
    pairs = order_P.tolist()
    return [(e, pairs[first:end]) for e, first, end in tiles_3P[:, :bound].T.tolist() if first < end]


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("block_m", [8, 16])
def test_every_pair_lies_in_one_tile_of_its_expert_in_order(tokens, block_m):
    index_TK, _ = routes_of(tokens, 3)
    index_TK[0, 1], index_TK[-1, 0] = EXPERTS, -1  # none
    chosen = index_TK.flatten().tolist()
    bound = most_tiles(len(chosen), EXPERTS, block_m)
    order_P, tiles_3P, counters = route(index_TK, EXPERTS, block_m, 77)
    tiles = tiles_of(order_P, tiles_3P, bound)
    expected = [pair for e in range(EXPERTS) for pair, expert in enumerate(chosen) if expert == e]
    assert [pair for _, pairs in tiles for pair in pairs] == expected
    assert all(len(pairs) <= block_m and {chosen[pair] for pair in pairs} == {e} for e, pairs in tiles)
    assert counters.tolist() == [0] * 77
    sorted_P, other_3P = sorted_pairs(index_TK, EXPERTS, block_m)
    assert tiles_of(sorted_P, other_3P, bound) == tiles


def test_no_more_tiles_are_needed_than_a_launch_has():
    for sizes in ([1] * EXPERTS, [8, 0, 0, 0, 0], [9, 1, 1, 1, 1], [17, 17, 0, 0, 1], [40, 0, 0, 0, 0]):
        used = sum(-(-size // 8) for size in sizes)
        assert used <= most_tiles(sum(sizes), EXPERTS, 8)


@pytest.mark.parametrize(
    ("number_format", "activation"),
    [*((f, None) for f in FORMATS), *((f, X8) for f in (FORMATS if ON_GPU else (Int(4, 32), MXInt(4), Int(6, "row"))))],
    ids=str,
)
def test_every_format_gives_the_formula(number_format, activation):
    experts = Experts.random(number_format, rank=16, activation=activation)
    x_TI, (index_TK, weights_TK) = random_input(3, 64), routes_of(3)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
    y_TI = experts.grouped("silu")(x_TI, index_TK, weights_TK, swish_of_limits)
    tolerance = ROUNDED_TOLERANCE if activation else TOLERANCE
    assert relative_error(y_TI, exact) < tolerance[DTYPE]


@pytest.mark.parametrize("gate", [*ACTIVATIONS, ""])
@pytest.mark.parametrize("number_format", [Int(4, 32), MXInt(4)], ids=str)
def test_activations_are_computed_between_the_launches_or_within(number_format, gate):
    experts = Experts.random(number_format, bias=True)
    x_TI, (index_TK, weights_TK) = random_input(3, 64), routes_of(3)
    activate = gated(gate) if gate else swish_of_limits
    exact = experts.exact(x_TI, index_TK, weights_TK, activate)
    y_TI = experts.grouped(gate)(x_TI, index_TK, weights_TK, swish_of_limits)
    assert relative_error(y_TI, exact) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("number_format", [Int(4, 32), MXInt(4)], ids=str)
def test_experts_without_a_gate_have_one_half(number_format):
    experts = Experts.random(number_format, halves=1, rank=16)
    x_TI, (index_TK, weights_TK) = random_input(3, 64), routes_of(3)

    def activate(halves: Tensor) -> Tensor:
        return F.relu(halves[:, 0]).square()

    exact = experts.exact(x_TI, index_TK, weights_TK, activate)
    assert relative_error(experts.grouped("")(x_TI, index_TK, weights_TK, activate), exact) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("number_format", [Int(4, 32), MXInt(4)], ids=str)
def test_an_expert_has_no_token_or_one_or_many_and_none_is_sent_nowhere(number_format):
    experts = Experts.random(number_format, rank=16, bias=True)
    tokens = 10
    index_TK = torch.full((tokens, 2), 3)
    index_TK[:, 1] = EXPERTS  # no expert
    index_TK[4] = torch.tensor([1, 0])
    index_TK[6] = EXPERTS
    x_TI, weights_TK = random_input(tokens, 64), torch.rand(tokens, 2)
    index_TK, weights_TK = index_TK.to(DEVICE), weights_TK.to(DEVICE)
    y_TI = experts.grouped("silu")(x_TI, index_TK, weights_TK, swish_of_limits)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
    assert relative_error(y_TI, exact) < TOLERANCE[DTYPE]
    assert not y_TI[6].any()


@pytest.mark.parametrize(("n", "k"), [(16, 20), (75, 70), (130, 33)])
@pytest.mark.parametrize("number_format", [Int(4, 32), Int(3, 64), MXInt(4)], ids=str)
def test_shapes_need_not_be_multiples_of_a_tile(number_format, n, k):
    experts = Experts.random(number_format, n, k, rank=16, activation=X8)
    x_TI, (index_TK, weights_TK) = random_input(3, k), routes_of(3)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("gelu"))
    error = relative_error(experts.grouped("gelu")(x_TI, index_TK, weights_TK, swish_of_limits), exact)
    assert error < ROUNDED_TOLERANCE[DTYPE]


@pytest.mark.parametrize("activation", [MXInt(8, 32), MXInt(6, 64, "floor")], ids=str)
def test_blocks_of_activations_may_be_longer_than_the_rows_of_a_program(activation):
    experts = Experts.random(Int(4, 32), 128, 96, rank=64, activation=activation)
    x_TI, (index_TK, weights_TK) = random_input(2, 96), routes_of(2)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
    # Six bits round more coarsely, and so do their flips.
    error = relative_error(experts.grouped("silu")(x_TI, index_TK, weights_TK, swish_of_limits), exact)
    assert error < 3 * ROUNDED_TOLERANCE[DTYPE]


@pytest.mark.parametrize(
    ("number_format", "launch"),
    [
        (Int(4, 32), GemmLaunch(32, 8, 2, 2, 4)),
        (Int(4, 32), GemmLaunch(64, 32, 1, 2, 4)),
        (MXInt(4), GemmLaunch(128, 16, 2, 2, 4)),
    ],
    ids=str,
)
def test_every_launch_gives_the_formula(number_format, launch):
    experts = Experts.random(number_format, 48, 272, rank=16)
    up, down = (stack.packed for stack in (experts.grouped("silu").up, experts.grouped("silu").down))
    x_TI, (index_TK, weights_TK) = random_input(3, 272), routes_of(3)
    hidden, *routes = run_up(x_TI, index_TK, up, down.spec, "silu", launch)
    y_TI = run_down(hidden, *routes, index_TK, weights_TK, down, up.spec, True, launch)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
    assert relative_error(y_TI, exact) < TOLERANCE[DTYPE]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes long")
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64, 130, 600, 2100])
@pytest.mark.parametrize("number_format", [Int(4, 128), Int(3, 64), MXInt(4)], ids=str)
@pytest.mark.parametrize("activation", [None, X8], ids=str)
def test_every_number_of_tokens_gives_what_plain_torch_gives(number_format, activation, tokens):
    experts = Experts.random(number_format, 384, 520, rank=32, activation=activation, bias=True)
    grouped = experts.grouped("silu")
    up, down = grouped.up.packed, grouped.down.packed
    x_TI, (index_TK, weights_TK) = random_input(tokens, 520), routes_of(tokens)
    hidden, *routes = reference_up(x_TI, index_TK, up, down.spec, "silu")
    expected = reference_down(hidden, *routes, index_TK, weights_TK, down, up.spec, True)
    y_TI = grouped(x_TI, index_TK, weights_TK, swish_of_limits)
    assert relative_error(y_TI, expected.double()) < 2 * ROUNDED_TOLERANCE[DTYPE]


@pytest.mark.parametrize("number_format", [Int(4, 32), MXInt(4)], ids=str)
def test_results_are_the_same_bit_for_bit_and_do_not_depend_on_other_tokens(number_format):
    grouped = Experts.random(number_format, rank=16, activation=X8).grouped("silu")
    x_TI, (index_TK, weights_TK) = random_input(4, 64), routes_of(4)
    y_TI = grouped(x_TI, index_TK, weights_TK, swish_of_limits)
    for _ in range(20 if ON_GPU else 1):
        assert torch.equal(grouped(x_TI, index_TK, weights_TK, swish_of_limits), y_TI)
    back = torch.arange(3, -1, -1, device=DEVICE)
    assert torch.equal(grouped(x_TI[back], index_TK[back], weights_TK[back], swish_of_limits)[back], y_TI)


def test_ranks_of_experts_may_differ():
    experts = Experts.random(MXInt(4), rank=32)
    experts.up[1][0] = linear_of(MXInt(4), 48, 64, 7, rank=16)
    experts.down[2][0] = linear_of(MXInt(4), 64, 48, 8, rank=5)
    x_TI, (index_TK, weights_TK) = random_input(4, 64), routes_of(4, 3)
    exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
    y_TI = experts.grouped("silu")(x_TI, index_TK, weights_TK, swish_of_limits)
    assert relative_error(y_TI, exact) < TOLERANCE[DTYPE]


def test_up_and_down_may_be_of_different_formats():
    up, down = Experts.random(Int(4, 32)).up, Experts.random(MXInt(8), rank=16).down
    x_TI, (index_TK, weights_TK) = random_input(3, 64), routes_of(3)
    for experts in (Experts(up, down), Experts(Experts.random(MXInt(4)).up, Experts.random(Int(3, 64)).down)):
        exact = experts.exact(x_TI, index_TK, weights_TK, gated("silu"))
        y_TI = experts.grouped("silu")(x_TI, index_TK, weights_TK, swish_of_limits)
        assert relative_error(y_TI, exact) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: linear_of(MXInt(3), 48, 64, 0), "linears of experts differ"),
        (lambda: linear_of(MXInt(4), 48, 64, 0, bias=True), "not all have bias"),
        (lambda: linear_of(MXInt(4), 48, 64, 0, rank=16), "linears of experts differ"),
        (lambda: linear_of(MXInt(4), 48, 64, 0, activation=X8), "linears of experts differ"),
    ],
)
def test_linears_of_other_kinds_are_not_stacked(other, reason):
    one = linear_of(MXInt(4), 48, 64, 0).packed
    with pytest.raises(ValueError, match=reason):
        PackedExperts.stack([[one], [other().packed]])


def test_another_dtype_is_refused():
    grouped = Experts.random(MXInt(4)).grouped("silu")
    with pytest.raises(ValueError, match="x must be in"):
        grouped(random_input(1, 64).float(), *routes_of(1), swish_of_limits)


def test_tiles_hold_an_experts_pairs_and_fit_the_product():
    integers, codes = (Experts.random(f).grouped("silu").up.spec for f in (Int(4, 32), MXInt(4)))
    assert [pairs_of_tile(pairs, integers, integers, 128) for pairs in (8, 512, 1024, 10**6)] == [8, 8, 16, 32]
    assert [pairs_of_tile(pairs, codes, codes, 128) for pairs in (8, 1024, 10**6)] == [16, 16, 64]
    assert [pairs_of_tile(pairs, integers, codes, 128) for pairs in (8, 10**6)] == [16, 32]


@pytest.mark.parametrize("gate", ["silu", ""])
def test_a_graph_of_torch_holds_the_operators_whole(gate):
    grouped = Experts.random(Int(4, 32)).grouped(gate)

    def call(x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return grouped(x_TI, index_TK, weights_TK, swish_of_limits)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (2, 3):
        x_TI, (index_TK, weights_TK) = random_input(tokens, 64), routes_of(tokens)
        assert torch.equal(compiled(x_TI, index_TK, weights_TK), call(x_TI, index_TK, weights_TK))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("gate", ["silu", ""])
@pytest.mark.parametrize("number_format", [Int(4, 32), MXInt(4)], ids=str)
def test_a_cuda_graph_and_compiled_code_follow_other_routes(number_format, gate):
    grouped = Experts.random(number_format, rank=16, activation=X8).grouped(gate)

    def call(x_TI: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return grouped(x_TI, index_TK, weights_TK, swish_of_limits)

    compiled = torch.compile(call, fullgraph=True)
    x_TI, (index_TK, weights_TK) = random_input(9, 64), routes_of(9)
    call(x_TI, index_TK, weights_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TI = call(x_TI, index_TK, weights_TK)
    for seed in range(3):
        other_index, other_weights = routes_of(9, seed=seed)
        index_TK.copy_(other_index)
        weights_TK.copy_(other_weights)
        graph.replay()
        expected = call(x_TI, index_TK, weights_TK)
        assert torch.equal(y_TI, expected)
        torch.testing.assert_close(compiled(x_TI, index_TK, weights_TK), expected, rtol=2e-2, atol=2e-2)
