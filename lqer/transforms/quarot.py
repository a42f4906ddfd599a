"""QuaRot (Ashkboos et al., arXiv 2404.00456): rotate a model so that its activations have no outliers.

    fold        the gain of every norm goes into the linears that read its output; the norm then commutes with rotations
    rotate      x -> x Q on the residual stream: Q goes into the weights of the modules that write to it (embedding, o,
                down) and of those that read from it (q, k, v, gate, up, head)
    head-wise   the values of every head are rotated in v's rows and back in o's columns; a rotation across heads, which
                v cannot absorb, is applied to o's input at run time
    online      down's input, after a nonlinearity, is rotated at run time, and back in down's columns

Without the last step and the rotation across heads nothing is left to do at run time: the result is a plain model of
its architecture, norm gains of 1 and a head of its own, and o's and down's inputs keep what outliers they have.

Readers are the linears whose input is a norm's output; writers are the others whose output is as wide as the stream.
Which writers follow an attention is found by trying: the head-wise rotation does not change their block's output. No
architecture is named, and a model whose structure is misunderstood is detected by its logits, which are compared at
the end. Everything is computed in float64 and stored in the parameters' dtypes.

Unlike here, QuaRot's code also subtracts the mean of the embedding, which changes a model with RMS norms.

A rotation is a function x -> x R on the last axis, R orthogonal. Shapes: O out_features, I in_features, D hidden size,
H heads, B sequences, T tokens, N vectors of the residual stream, K rows of a value head, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lqer.components import ADDED
from lqer.transforms.base import Level, Transform
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.folding import GAIN_OFFSETS, NO_ROW, Site, find_sites
from lqer.transforms.tracing import Trace, hooked, output_stays, trace

RotationFunction = Callable[[Tensor], Tensor]

LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Quarot(Transform):
    """`quarot` as a configuration names it; the residual rotation's signs are drawn from the experiment's seed.

    online: whether inputs are rotated at run time as well; otherwise every rotation is absorbed by weights.
    """

    kind = "quarot"
    level: ClassVar[Level] = "model"

    online: bool = field(default=True, metadata=ADDED)


class RotationError(ValueError):
    """The model cannot be rotated; the message names the part that prevents it."""


@dataclass(frozen=True)
class OnlineRotation:
    """Rotates the inputs of a linear at run time: over all channels, or across `heads` heads of equal width."""

    rotation: RotationFunction
    heads: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (..., I) of any float dtype, in float32 or, if it is that, in float64."""
        wide = x if x.dtype == torch.float64 else x.to(torch.float32)
        if self.heads is None:
            return self.rotation(wide).to(x.dtype)
        heads = wide.unflatten(-1, (self.heads, -1)).transpose(-1, -2)
        return self.rotation(heads).transpose(-1, -2).flatten(-2).to(x.dtype)

    def before(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook that `attach` registers."""
        return (self(args[0]), *args[1:])


def attach(linear: nn.Module, online: OnlineRotation) -> RemovableHandle:
    """Rotate the inputs of a linear from now on, before any hook that is registered later sees them."""
    return linear.register_forward_pre_hook(online.before)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Attach to `new`, which takes the place of `old`, the rotation that is attached to that."""
    for hook in old._forward_pre_hooks.values():
        online = getattr(hook, "__self__", None)
        if isinstance(online, OnlineRotation):
            attach(new, online)


@torch.no_grad()
def rotate_model(
    model: Any,
    blocks: nn.ModuleList,
    ids_BT: Tensor,
    residual: RotationFunction,
    rotation: RotationFunction,
    online: bool = True,
) -> dict[str, OnlineRotation]:
    """Rotate a causal language model in place; returns the online rotations, by the linear's full name, attached.

    ids_BT: int64 token ids, at least two sequences of a few tokens, on which the model is examined. residual: Q, mostly
    a randomized Hadamard transform of the hidden size. rotation: of heads and of inputs, for a last axis of any length.
    online: see `Quarot`; if it is false none is returned.

    Raises RotationError before anything is changed where a norm of the residual stream subtracts the mean, has a bias,
    or has a gain that no linear can take; and, with the model changed, where its logits differ afterwards.
    """
    before = model(input_ids=ids_BT, use_cache=False).logits
    parts = _examine(model, blocks, ids_BT, residual, rotation)
    _untie(model)
    for norm, linears in parts.readers.items():
        for name in linears:
            weight_OI = model.get_submodule(name).weight
            gain_I = model.get_submodule(norm).weight.double() + parts.offsets[norm]
            weight_OI.copy_(residual(weight_OI.double() * gain_I))
        model.get_submodule(norm).weight.fill_(1 - parts.offsets[norm])
    embedding = model.get_input_embeddings()
    embedding.weight.copy_(residual(embedding.weight.double()))
    for name in parts.writers:
        _rotate_outputs(model.get_submodule(name), residual)
    _rotate_values(model, parts, rotation)
    at_run_time = _rotate_inputs(model, parts, rotation) if online else {}
    for name, rotated in at_run_time.items():
        attach(model.get_submodule(name), rotated)
    after = model(input_ids=ids_BT, use_cache=False).logits
    change = float(torch.linalg.vector_norm((after - before).double()) / torch.linalg.vector_norm(before.double()))
    if not change <= max(LOGIT_TOLERANCE, 10 * torch.finfo(before.dtype).eps):
        raise RotationError(f"the rotation changes the logits of {type(model).__name__} by {change:.1%}")
    return at_run_time


@dataclass(frozen=True)
class _Parts:
    """A model's norms and linears by their role at the residual stream, by full names."""

    readers: dict[str, list[str]]  # norm: the linears that read it
    offsets: dict[str, float]  # norm: what it adds to its weight
    writers: list[str]
    values: dict[str, tuple[str, Tensor]]  # writer after an attention: the linear of its values, and their rows (K, d)


def _examine(
    model: Any, blocks: nn.ModuleList, ids_BT: Tensor, residual: RotationFunction, rotation: RotationFunction
) -> _Parts:
    """Find the parts without changing them. Raises RotationError for a part that cannot be rotated."""
    seen, calls = _watched_pass(model, blocks, ids_BT)
    readers, offsets = _norms_of_stream(model, seen, residual)
    reading = {linear for linears in readers.values() for linear in linears}
    names = {module: name for name, module in model.named_modules()}
    if names[model.get_output_embeddings()] not in reading:
        raise RotationError(f"{names[model.get_output_embeddings()]} does not read the output of a norm")
    width = model.get_input_embeddings().weight.shape[1]
    writers, values = [], {}
    for block, (call, hidden_BTD) in zip(blocks, calls, strict=True):
        for site in find_sites(call, hidden_BTD):
            full = [f"{names[block]}.{name}" for name in site.linears]
            if reading.isdisjoint(full):
                writers += [name for name in full if model.get_submodule(name).out_features == width]
                rows_Kd = _value_rows(call, hidden_BTD, site, _head_dim(model), rotation)
                if rows_Kd is not None and site.fold is not None:
                    values[full[0]] = (f"{names[block]}.{site.fold.source}", rows_Kd)
    return _Parts(readers, offsets, writers, values)


def _watched_pass(
    model: Any, blocks: nn.ModuleList, ids_BT: Tensor
) -> tuple[Trace, list[tuple[BlockFunction, Tensor]]]:
    """What the linears and norms of the model see, and by block, how it is called and on which hidden states."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[block] = args, kwargs

    with hooked(block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks):
        seen = trace(model, lambda: model(input_ids=ids_BT, use_cache=False))
    recorded = []
    for block in blocks:
        (hidden_BTD, *args), kwargs = calls[block]
        recorded.append((BlockFunction(block, tuple(args), kwargs), hidden_BTD))
    return seen, recorded


def _norms_of_stream(
    model: Any, seen: Trace, residual: RotationFunction
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The linears that read each norm of the residual stream, and what the norm adds to its weight."""
    width = model.get_input_embeddings().weight.shape[1]
    readers: dict[str, list[str]] = {}
    for name in seen.inputs:
        for norm in seen.norms_before(name):
            readers.setdefault(norm, []).append(name)
    offsets = {}
    for norm, output in seen.outputs.items():
        if output.tensor.shape[-1] == width:
            offsets[norm] = _check_norm(norm, model.get_submodule(norm), width, residual)
            if norm not in readers:
                raise RotationError(f"{norm} scales channels that no linear reads: its gain cannot be folded away")
    return {norm: readers[norm] for norm in offsets}, offsets


def _check_norm(name: str, norm: nn.Module, width: int, residual: RotationFunction) -> float:
    """The offset the norm adds to its weight. Raises RotationError unless it commutes with rotations at a gain of 1."""
    weight = norm.get_parameter("weight")
    if getattr(norm, "bias", None) is not None:
        raise RotationError(f"{name} ({type(norm).__name__}) has a bias: only RMS norms can be rotated")

    def normed(x: Tensor, gain: float) -> Tensor:
        return functional_call(norm, {"weight": torch.full_like(weight, gain)}, (x,))

    x_ND = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(weight)
    offset = next((offset for offset in GAIN_OFFSETS if not normed(x_ND, -offset).any()), None)
    if offset is None:
        raise RotationError(f"{name} ({type(norm).__name__}) is not linear in its weight")
    rotated_ND = normed(residual(x_ND.double()).to(weight), 1 - offset).double()
    expected_ND = residual(normed(x_ND, 1 - offset).double())
    difference = torch.linalg.vector_norm(rotated_ND - expected_ND) / torch.linalg.vector_norm(expected_ND)
    if difference > torch.finfo(weight.dtype).eps ** 0.5:
        raise RotationError(
            f"{name} ({type(norm).__name__}) does not commute with rotations: only RMS norms do, "
            "a LayerNorm subtracts the mean"
        )
    return offset


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _value_rows(
    call: BlockFunction,
    hidden_BTD: Tensor,
    site: Site,
    head_dim: int,
    rotation: RotationFunction,
) -> Tensor | None:
    """The rows (K, head_dim) of the K value heads that a site reads, if it reads those of an attention."""
    if site.fold is None or len(site.linears) > 1 or len(site.fold.rows_I) % head_dim:
        return None
    rows_Kd = site.fold.rows_I.view(-1, head_dim).unique(dim=0)
    if (rows_Kd == NO_ROW).any() or len(rows_Kd.unique()) < rows_Kd.numel():
        return None
    parameters = dict(call.block.named_parameters())
    changed = _head_wise(parameters, site.fold.source, site.linears[0], rows_Kd, rotation)
    plain, rotated = call({}, hidden_BTD), call(changed, hidden_BTD)
    return rows_Kd if output_stays(rotated, plain, hidden_BTD) else None


def _head_wise(
    parameters: Mapping[str, Tensor], source: str, reader: str, rows_Kd: Tensor, rotation: RotationFunction
) -> dict[str, Tensor]:
    """The parameters that change when every value head is rotated in the source's rows and back in the reader."""
    weight_OI, reader_weight = parameters[f"{source}.weight"].double(), parameters[f"{reader}.weight"].double()
    weight_OI = weight_OI.clone()
    weight_OI[rows_Kd] = rotation(weight_OI[rows_Kd].transpose(-1, -2)).transpose(-1, -2)
    per_head = reader_weight.unflatten(1, (-1, rows_Kd.shape[1]))
    changed = {f"{source}.weight": weight_OI, f"{reader}.weight": rotation(per_head).flatten(1)}
    if f"{source}.bias" in parameters:
        bias_O = parameters[f"{source}.bias"].double().clone()
        bias_O[rows_Kd] = rotation(bias_O[rows_Kd])
        changed[f"{source}.bias"] = bias_O
    return changed


def _rotate_values(model: Any, parts: _Parts, rotation: RotationFunction) -> None:
    """Rotate the values of every head, in the weights that make and read them."""
    for name, (source, rows_Kd) in parts.values.items():
        changed = _head_wise(dict(model.named_parameters()), source, name, rows_Kd, rotation)
        for parameter, tensor in changed.items():
            model.get_parameter(parameter).copy_(tensor)


def _rotate_inputs(model: Any, parts: _Parts, rotation: RotationFunction) -> dict[str, OnlineRotation]:
    """Rotate the columns of the writers, across heads or as a whole; their inputs are rotated alike at run time."""
    online = {}
    for name in parts.writers:
        writer = model.get_submodule(name)
        if name in parts.values:
            online[name] = OnlineRotation(rotation, writer.in_features // parts.values[name][1].shape[1])
        else:
            online[name] = OnlineRotation(rotation)
        writer.weight.copy_(online[name](writer.weight.double()))
    return online


def _rotate_outputs(linear: nn.Linear, rotation: RotationFunction) -> None:
    linear.weight.copy_(rotation(linear.weight.double().T).T)
    if linear.bias is not None:
        linear.bias.copy_(rotation(linear.bias.double()))


def _untie(model: Any) -> None:
    """Give the head a weight of its own: it takes the final norm's gain, the embedding does not."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
