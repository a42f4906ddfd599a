"""Where the inverse of an input scale can be folded: found by probing a block, whatever its architecture.

Multiplying the columns of some linears by c changes nothing if their input channels are divided by c. The source of
those channels can be

    a norm       whose output is the linears' input: its gain, or 1 + weight, is divided by c, and its bias
    a linear     whose outputs reach the linears channel by channel, through products only: v before o, up before down,
                 fc1 before fc2 around a ReLU. Its rows and bias are divided by c

Which row of which linear feeds which channel is found by probing: rows are scaled, and the channels that scale by as
much are fed by them. Powers of two scale exactly, so the comparison is exact. The rows of a fused projection are
distinguished at the first token, which attends only to itself, whatever its query and key. One row may feed several
channels (grouped queries). A fold is accepted only if the block's output stays the same under random scales.

Shapes: B sequences, T tokens, D hidden size, I input channels of a site, O rows of a source,
N tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqer.transforms.block_function import BlockFunction
from lqer.transforms.tracing import Trace, output_stays, trace

NO_ROW = -1
GAIN_OFFSETS = (0.0, 1.0)
RATIO_TOLERANCE = 0.01
# A row's number is read four bits at a time, as a factor up to 2^15; float16 has no room for more than doubling.
DIGIT_BITS, DIGIT_BITS_OF_HALF = 4, 1


@dataclass(frozen=True)
class Fold:
    """source: a norm or linear of the block. rows_I: int64, the row of it that feeds each input channel.

    NO_ROW marks a channel that was zero at every token: it is not scaled. offset: what a norm adds to its weight.
    """

    source: str
    rows_I: Tensor
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Linears of one block that are called with the same tensor, and the fold of their input scale, if there is one."""

    linears: tuple[str, ...]
    fold: Fold | None


def find_sites(call: BlockFunction, hidden_BTD: Tensor, seed: int = 0) -> list[Site]:
    """The input sites of a block in the order of their use, each with its fold or None.

    hidden_BTD: hidden states of real text; they are shuffled over positions, so that first tokens differ. The block is
    probed in its own dtype, outside of any autocast.
    """
    first = next(call.block.parameters())
    hidden_BTD = hidden_BTD.to(first.device, first.dtype)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(hidden_BTD.shape[0] * hidden_BTD.shape[1], generator=generator).to(hidden_BTD.device)
    probe = _Probe(call, hidden_BTD.flatten(0, 1)[order].view_as(hidden_BTD), generator)
    return [Site(linears, probe.find_fold(linears)) for linears in probe.trace.sites()]


def fold_scale(parameters: Mapping[str, Tensor], site: Site, scale_I: Tensor) -> dict[str, Tensor]:
    """The parameters of a block that change when the columns of a site's linears are multiplied by `scale_I`.

    scale_I > 0, equal on channels that share a row. Computed in float32; the parameters' dtypes are kept.
    """
    if site.fold is None:
        raise ValueError(f"no norm or linear of the block can absorb the inverse scale of {', '.join(site.linears)}")
    fold = site.fold
    fed_I = fold.rows_I != NO_ROW
    scale_I = torch.where(fed_I, scale_I.to(torch.float32), 1.0)
    changed = {f"{name}.weight": parameters[f"{name}.weight"].float() * scale_I for name in site.linears}
    weight = parameters[f"{fold.source}.weight"].float()
    scale_O = weight.new_ones(len(weight))
    scale_O[fold.rows_I[fed_I]] = scale_I[fed_I]
    if not torch.equal(scale_O[fold.rows_I[fed_I]], scale_I[fed_I]):
        raise ValueError(f"the scale of {', '.join(site.linears)} differs between channels that share a row")
    changed[f"{fold.source}.weight"] = (weight + fold.offset) / _along_rows(scale_O, weight) - fold.offset
    if f"{fold.source}.bias" in parameters:
        changed[f"{fold.source}.bias"] = parameters[f"{fold.source}.bias"].float() / scale_O
    return {name: tensor.to(parameters[name].dtype) for name, tensor in changed.items()}


def tied(x_I: Tensor, rows_I: Tensor) -> Tensor:
    """The mean of the channels that share a row, for each of them: what a scale that can be folded is made from.

    Channels without a row (NO_ROW) are zero and are not scaled; they get the mean of the others, so that they do not
    widen the range of scales.
    """
    fed_I = rows_I != NO_ROW
    rows = int(rows_I.max()) + 1
    sums = x_I.new_zeros(rows).index_add_(0, rows_I[fed_I], x_I[fed_I])
    counts = x_I.new_zeros(rows).index_add_(0, rows_I[fed_I], torch.ones_like(x_I[fed_I]))
    tied_I = torch.full_like(x_I, float(x_I[fed_I].mean()))
    tied_I[fed_I] = (sums / counts)[rows_I[fed_I]]
    return tied_I


def _along_rows(scale_O: Tensor, weight: Tensor) -> Tensor:
    return scale_O if weight.ndim == 1 else scale_O.unsqueeze(-1)


class _Probe:
    """Runs a block with changed rows and compares its tensors."""

    def __init__(self, call: BlockFunction, hidden_BTD: Tensor, generator: torch.Generator):
        self._call, self._hidden_BTD, self._generator = call, hidden_BTD, generator
        self._parameters = {name: parameter.detach() for name, parameter in call.block.named_parameters()}
        self.trace = self._run({})

    def find_fold(self, linears: tuple[str, ...]) -> Fold | None:
        """The first source that accepts an inverse scale without a change of the block's output."""
        for fold in itertools.chain(self._norm_folds(linears[0]), self._linear_folds(linears[0])):
            if self._keeps_the_function(Site(linears, fold)):
                return fold
        return None

    def _norm_folds(self, reader: str) -> Iterator[Fold]:
        for name in self.trace.norms_before(reader):
            rows_I = torch.arange(len(self._parameters[f"{name}.weight"]), device=self._hidden_BTD.device)
            yield from (Fold(name, rows_I, offset) for offset in GAIN_OFFSETS)

    def _linear_folds(self, reader: str) -> Iterator[Fold]:
        """The folds into linears called before, the latest first: all rows of one, or either half of a fused one.

        An expert, whose linears see tokens of its own, is fed by itself alone.
        """
        called = [*self.trace.inputs]
        before = [name for name in called[: called.index(reader)] if self._expert(name) == self._expert(reader)]
        for source in reversed(before):
            rows = len(self._parameters[f"{source}.weight"])
            for part in (range(rows), range(rows // 2, rows), range(rows // 2)):
                rows_I = self._feeding_rows(source, part, reader)
                if rows_I is not None:
                    yield Fold(source, rows_I)

    def _expert(self, linear: str) -> str:
        """The module around a linear that sees some of the tokens; empty for one that sees all of them."""
        rows = self.trace.inputs[linear].tensor.flatten(0, -2)
        return linear.rpartition(".")[0] if len(rows) < self._hidden_BTD.shape[0] * self._hidden_BTD.shape[1] else ""

    def _feeding_rows(self, source: str, rows: range, reader: str) -> Tensor | None:
        """Which of `rows` feeds each input channel of `reader`; None if they do not do so channel by channel.

        Every row has a number: the channels that scale by 2^d when all rows with digit d at some place do have it too.
        """
        number_O = torch.arange(rows.stop - rows.start, device=self._hidden_BTD.device)
        ratio_BTI = self._ratio(source, rows, torch.ones_like(number_O), reader)
        tokens = next((t for t in (slice(None), slice(0, 1)) if _is(2, ratio_BTI[:, t]).all()), None)
        if tokens is None:
            return None
        alive_I = ~ratio_BTI[:, tokens].isnan().flatten(0, 1).all(0)
        rows_I = torch.full_like(alive_I, rows.start, dtype=torch.int64)
        digit_bits = DIGIT_BITS_OF_HALF if self._hidden_BTD.dtype == torch.float16 else DIGIT_BITS
        for place in range(0, (len(rows) - 1).bit_length(), digit_bits):
            digit_O = number_O >> place & ((1 << digit_bits) - 1)
            ratio_NI = self._ratio(source, rows, digit_O, reader)[:, tokens].flatten(0, 1)
            digit_I = ratio_NI.nan_to_num(nan=0.0).amax(0).clamp(1, 1 << ((1 << digit_bits) - 1)).log2().round()
            if not _is(digit_I.exp2(), ratio_NI).all():
                return None
            rows_I += digit_I.to(torch.int64) << place
        return rows_I.masked_fill(~alive_I, NO_ROW) if alive_I.any() else None

    def _ratio(self, source: str, rows: range, exponent_O: Tensor, reader: str) -> Tensor:
        """The factor on the reader's input (B, T, I) when `rows` of `source` scale by 2^exponent; NaN for 0 / 0."""
        changed = {}
        for name in (f"{source}.weight", f"{source}.bias"):
            if name in self._parameters:
                changed[name] = self._parameters[name].clone()
                scaled = changed[name][rows.start : rows.stop]
                scaled *= _along_rows(exponent_O.exp2(), scaled).to(scaled)
        x, changed_x = (trace.inputs[reader].tensor for trace in (self.trace, self._run(changed)))
        shape = (1, -1) if self._expert(reader) else self._hidden_BTD.shape[:2]
        return (changed_x / x).reshape(*shape, x.shape[-1])

    def _keeps_the_function(self, site: Site) -> bool:
        assert site.fold is not None
        rows_I = site.fold.rows_I
        rows = len(self._parameters[f"{site.fold.source}.weight"])
        scale_O = 2.0 ** torch.randint(-1, 2, (rows,), generator=self._generator).to(rows_I.device)
        changed = self._run(fold_scale(self._parameters, site, scale_O[rows_I])).result
        return output_stays(changed, self.trace.result, self._hidden_BTD)

    def _run(self, parameters: Mapping[str, Tensor]) -> Trace:
        return trace(self._call.block, lambda: self._call(parameters, self._hidden_BTD))


def _is(value: int | Tensor, ratio: Tensor) -> Tensor:
    """Where a ratio is that power of two, or undefined."""
    return ((ratio / value - 1).abs() < RATIO_TOLERANCE) | ratio.isnan()
