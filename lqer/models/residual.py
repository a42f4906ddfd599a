"""Which linears of a decoder block write to its residual stream, and how large the stream is after them.

Found by watching a run of the block, whatever its architecture:

    point     hidden states that a norm of the stream's width reads, or the block's output
    writer    a linear of the stream's width that reads no norm's output; what the writers put out since the last point
              is what the stream has changed by at the next one, up to a factor

So o_proj writes to the point before the second norm, down_proj to the block's output; where attention and MLP run in
parallel, both write to the output. The experts of a layer are one writer. The next norm divides by ‖h_t‖, h_t being the
stream of token t at the writer's point, so an error of the writer's output counts relative to that: 1 / ‖h_t‖² is the
weight of its square.

Shapes: D hidden size, N tokens of a batch; hidden states are of any shape with D last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lqer.errors import ModelError
from lqer.models.recorder import HIDDEN_DIMENSIONS
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun
from lqer.nn.experts import experts_of
from lqer.transforms.tracing import Seen, hooked

# The point after the last norm; a norm of the block goes by its name.
OUTPUT = ""
# Least cosine between what the writers put out and what the stream changed by. In half precision the stream is rounded
# when they are added, at its largest channels by more than they add.
SURELY_ADDED = 0.9


@dataclass(frozen=True)
class _Call:
    """One call of a linear or norm. Tensors are kept, so that an address belongs to one of them."""

    name: str
    is_linear: bool
    x: Seen
    y: Seen


def find_writers(run: BlockRun) -> dict[str, str]:
    """The point of every writer of a block, by name; one batch is run.

    Raises ModelError, with the reason, for a block without writers or one that is built otherwise.
    """
    start, calls, output = _watched(run)
    if start.ndim != HIDDEN_DIMENSIONS[0]:
        raise _refused(run, "a token has several hidden states there, and its linears write to all")
    normed = [call.y for call in calls if not call.is_linear]
    points: dict[str, str] = {}
    stream = start
    # What was put out since the last point, by writer.
    written: dict[str, Seen] = {}
    for call in [*calls, _Call(OUTPUT, False, Seen.now(output), Seen.now(output))]:
        if call.is_linear:
            if _writes(run, call, start, normed):
                written[call.name] = call.y
            continue
        if writer := next((name for name, y in written.items() if y.same(call.x)), None):
            raise _refused(run, f"the output of {writer} passes a norm before it is added to the residual stream")
        after = _as_stream(call.x.tensor, start)
        if after is None or torch.equal(after, stream):
            continue
        if written and _cosine(after - stream, [y.tensor for y in written.values()]) < SURELY_ADDED:
            names = ", ".join(written)
            raise _refused(run, f"the residual stream does not change by the outputs of {names}")
        points |= dict.fromkeys(written, call.name)
        stream, written = after, {}
    if not points:
        raise _refused(run, "none of its linears writes to the residual stream")
    return points


def _writes(run: BlockRun, call: _Call, start: Tensor, normed: Sequence[Seen]) -> bool:
    """Whether a linear is a writer. Raises ModelError for one that does not see every token."""
    y = call.y.tensor
    if y.shape[-1] != start.shape[-1] or any(call.x.same(norm) for norm in normed):
        return False
    if y.numel() != start.numel():
        raise _refused(run, f"{call.name} does not see every token")
    return True


def _as_stream(x: Tensor, start: Tensor) -> Tensor | None:
    """What a norm reads, in the shape of the stream; None where that is something else, such as heads."""
    return x.reshape(start.shape) if x.shape[-1] == start.shape[-1] and x.numel() == start.numel() else None


def inverse_squares(stream: Tensor) -> Tensor:
    """w_t = 1 / ‖h_t‖² of hidden states (..., D), float32 (N,); 0 for a token whose stream is zero."""
    square_N = stream.to(torch.float32).square().sum(-1).flatten()
    return torch.where(square_N > 0, 1 / square_N, 0.0)


@contextmanager
def watched_points(block: nn.Module, writers: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """While active, w_t at the points that a norm reads, by the norm's name, filled in as the block runs."""
    weights: dict[str, Tensor] = {}

    def hook(point: str) -> Callable[..., None]:
        return lambda module, args: weights.__setitem__(point, inverse_squares(args[0]))

    points = {point for point in writers.values() if point != OUTPUT}
    with hooked(block.get_submodule(point).register_forward_pre_hook(hook(point)) for point in points):
        yield weights


def _watched(run: BlockRun) -> tuple[Tensor, list[_Call], Tensor]:
    """The block's input on its first batch, the calls of its linears and norms in their order, and its output."""
    calls: list[_Call] = []
    starts: list[Tensor] = []

    def see(name: str, is_linear: bool) -> Callable[..., None]:
        return lambda module, args, output: calls.append(_Call(name, is_linear, Seen.now(args[0]), Seen.now(output)))

    layers = experts_of(run.block)
    # Not routers, which may return more than a tensor.
    linears = {*block_linears(run.block), *layers}
    inside = tuple(f"{name}." for name in layers)

    def hooks() -> Iterator[RemovableHandle]:
        yield run.block.register_forward_pre_hook(lambda module, args: starts.append(args[0].clone()))
        for name, module in run.block.named_modules():
            weight, is_linear = getattr(module, "weight", None), name in linears
            if not name.startswith(inside) and (is_linear or (isinstance(weight, Tensor) and weight.ndim == 1)):
                yield module.register_forward_hook(see(name, is_linear))

    with hooked(hooks()):
        output = run.output(0)
    return starts[0], calls, output


def _cosine(change: Tensor, outputs: list[Tensor]) -> float:
    written = torch.stack([y.reshape(change.shape).double() for y in outputs]).sum(0)
    return float(torch.cosine_similarity(change.double().flatten(), written.flatten(), dim=0))


def _refused(run: BlockRun, reason: str) -> ModelError:
    return ModelError(f'calibration.token_weights: {run.name}: {reason}; use token_weights = "none"')
