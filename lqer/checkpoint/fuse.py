"""Fuses norms, gates and residual additions of a compiled model into the launches of its packed linears.

A pass over the graph that torch.compile hands to Inductor. It changes

    y = packed_linear(RMSNorm(h))          to    y = packed_linear(h, norm=..)
    y = packed_linear(silu(gate) * up)     to    y = packed_linear(gate, up=up)
    z = residual + packed_linear(x)        to    z = packed_linear(x, residual=..)

where kernels take that (lqer/kernels/fusion.py) and nothing else needs what they take in. It looks at arithmetic
and at no module, so no architecture is named; what has another form stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lqer.kernels import launch
from lqer.kernels.launch import adds_residual, makes_inputs
from lqer.kernels.linear import OPERATOR
from lqer.kernels.spec import decode_spec

aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default
ARGUMENTS = [argument.name for argument in OPERATOR._schema.arguments]


class FuseIntoLinears(str, CustomGraphPass):
    """The pass. A string, because transformers copies, compares and prints as JSON the settings that hold it."""

    def __call__(self, graph: Graph) -> None:
        for linear in graph.find_nodes(op="call_function", target=OPERATOR):
            fuse_input(linear)
            fuse_residual(linear)

    def uuid(self) -> Any:
        """A hash of the code that decides: graphs that Inductor compiled with another version of it are not used."""
        return get_hash_for_files((__file__, launch.__file__))


FUSE_INTO_LINEARS = FuseIntoLinears("fuse_into_linears")


@dataclass(frozen=True)
class Norm:
    """x = h / sqrt(mean(h²) + eps) ⊙ (offset + weight), of nodes h and weight."""

    h: Node
    weight: Node
    eps: float
    offset: float


def fuse_input(linear: Node) -> None:
    """Let a linear, and all others that read the same normed or gated tensor, make it themselves."""
    x: Any = linear.args[0]
    if not all(_only_multiplies(user, x) and _takes(makes_inputs, user) for user in x.users):
        return
    if norm := norm_of(x):
        changed = {"x": norm.h, "norm": norm.weight, "norm_eps": norm.eps, "norm_offset": norm.offset}
    elif gate := gate_of(x):
        changed = {"x": gate[0], "up": gate[1]}
    else:
        return
    for user in list(x.users):
        _set(user, **changed)
    _erase_unused(x)


def fuse_residual(linear: Node) -> None:
    """Let a linear add to its output what the graph adds, if that is all that the output is used for."""
    if len(linear.users) != 1 or not _takes(adds_residual, linear):
        return
    (addition,) = linear.users
    residual = _other(_operands(addition, aten.add.Tensor), linear)
    if not isinstance(residual, Node) or not _alike(residual, linear):
        return
    # To where the sum was: the residual may come after what the linear reads.
    addition.prepend(linear)
    addition.replace_all_uses_with(linear)
    addition.graph.erase_node(addition)
    _set(linear, residual=residual)


def norm_of(x: Node) -> Norm | None:
    """The RMSNorm that a node is the result of, in the order of operations of Llama or of Gemma; None if it is none."""
    for normed in (factors := _operands(_uncast(x), aten.mul.Tensor)):
        found, weight = _normed(_uncast(normed)), _other(factors, normed)
        if found is None or not isinstance(weight, Node):
            continue
        (h, eps), (weight, offset) = found, _with_offset(_uncast(weight))
        if _alike(h, x) and _value(weight).shape == _value(x).shape[-1:] and _value(weight).dtype == _value(x).dtype:
            return Norm(h, weight, eps, offset)
    return None


def gate_of(x: Node) -> tuple[Node, Node] | None:
    """The nodes gate and up where a node is silu(gate) * up; None if it is none."""
    for silu in (factors := _operands(_uncast(x), aten.mul.Tensor)):
        gate32, below = _operands(_uncast(silu), aten.div.Tensor) or (None, None)
        exponential = _other(_operands(below, aten.add.Tensor), 1)
        (minus,) = _operands(exponential, aten.exp.default) or (None,)
        gate, up = _uncast(gate32), _other(factors, silu)
        if _operands(minus, aten.neg.default) == (gate32,) and isinstance(up, Node) and _alike(gate, up):
            return (gate, up) if _alike(gate, x) else None
    return None


def _normed(node: Any) -> tuple[Node, float] | None:
    """The node h, and eps, where a node is h / sqrt(mean(h²) + eps) in float32."""
    for inverse in (factors := _operands(node, aten.mul.Tensor)):
        # What is no such node has no operands.
        h32, (total,) = _other(factors, inverse), _operands(inverse, aten.rsqrt.default) or (None,)
        mean, eps = _operands(total, aten.add.Tensor, aten.add.Scalar) or (None, None)
        squares, *over = _operands(mean, aten.mean.dim) or (None,)
        h, *dtype = _operands(h32, cast) or (None,)
        squared = _operands(squares, aten.pow.Tensor_Scalar) == (h32, 2)
        if squared and isinstance(eps, float) and isinstance(h, Node) and dtype == [torch.float32]:
            return (h, eps) if over in ([[-1], True], [[_value(h).ndim - 1], True]) else None
    return None


def _with_offset(weight: Node) -> tuple[Node, float]:
    """A weight and the number that is added to it; 0 if a node is no such sum."""
    for offset in (terms := _operands(weight, aten.add.Tensor)):
        if isinstance(offset, int | float) and isinstance(own := _other(terms, offset), Node):
            return _uncast(own), float(offset)
    return weight, 0.0


def _operands(node: Any, *operations: Any) -> tuple[Any, ...]:
    """The arguments of a node that is one of these operations, else none."""
    return node.args if isinstance(node, Node) and node.target in operations and not node.kwargs else ()


def _other(pair: Sequence[Any], one: Any) -> Any:
    """The one of two operands that is not `one`; None if there are not two, or both are `one`."""
    others = [operand for operand in pair if operand is not one]
    return others[0] if len(pair) == 2 and len(others) == 1 else None


def _uncast(node: Any) -> Any:
    """What a node is a value of in another dtype."""
    while arguments := _operands(node, cast):
        node = arguments[0]
    return node


def _value(node: Node) -> torch.Tensor:
    return node.meta["val"]


def _alike(one: Node, other: Node) -> bool:
    return _value(one).shape == _value(other).shape and _value(one).dtype == _value(other).dtype


def _given(linear: Node) -> dict[str, Any]:
    """All arguments of a linear by name."""
    defaults = {argument.name: argument.default_value for argument in OPERATOR._schema.arguments}
    return defaults | dict(zip(ARGUMENTS, linear.args, strict=False))


def _only_multiplies(node: Node, x: Node) -> bool:
    """Whether a node is a linear that multiplies x as it is, and does nothing else with it."""
    if node.target != OPERATOR or node.args[0] is not x or node.args.count(x) > 1:
        return False
    return _given(node)["norm"] is None and _given(node)["up"] is None


def _takes(what: Any, linear: Node) -> bool:
    given = _given(linear)
    tokens = _value(linear).numel() // _value(linear).shape[-1]
    if not isinstance(tokens, int):
        return False
    return what(decode_spec(given["spec"]), given["input_signs"] is not None, tokens)


def _set(linear: Node, **changed: Any) -> None:
    """Change arguments of a linear."""
    given = _given(linear) | changed
    linear.args = tuple(given[name] for name in ARGUMENTS)
    # Inductor gives an operator tensors of these strides.
    linear.meta["eager_input_vals"] = map_arg(linear.args, _value), {}


def _erase_unused(node: Node) -> None:
    """Erase what only served a node that nothing uses any more."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for before in inputs:
        _erase_unused(before)
