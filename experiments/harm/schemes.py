"""GPTQ's weights of a model in memory, under one choice of inputs, tokens, order, target and format.

What the stage "quantize" does with error propagation (lqer/stages/quantize_sequential.py), on the same functions; the
weights stay dense, so that any of them can be put in place of the original's.

Shapes: O out_features, I in_features, S windows, T tokens of a window, D hidden size.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from harm.subject import SEED, Parameters, Subject
from harm.tokens import HessianOfTokens
from lqer.formats import Int, MXInt, NumberFormat, Trellis
from lqer.methods import LinearPlan, QuantizedWeight
from lqer.methods.block import reconstruct_block
from lqer.methods.gptq import GptqMethod
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun, embed
from lqer.rounding import Gptq
from lqer.rounding.scale_search import Scales
from lqer.stages.gather import CalibrationText, TokenWeights, observe_block
from lqer.stages.quantize_in_turn import turns_of
from lqer.stages.quantize_linears import Order
from lqer.stages.reconstruct_block import block_problem
from lqer.statistics import Hessian, Mismatch, Statistic
from lqer.statistics.site import SiteStatistics
from lqer.transforms import Balance, BlockTransform, Hadamard, LinearTransform, Sort

FACTOR = MXInt(8)
WIDER = 2  # bits


@dataclass(frozen=True)
class Scheme:
    """propagate: whether inputs are those of the quantized model. rule: of `tokens.RULES`; None where tokens count as
    `token_weights` says. finer: how many groups a group of the format is divided into. wider: weights that
    have two more bits. weight: a format in place of integers.
    """

    scales: Scales = "minmax"
    propagate: bool = True
    order: Order = "block"
    token_weights: TokenWeights = "none"
    rule: str | None = None
    asymmetric: float = 0.0
    descent: int = 0
    transforms: tuple[BlockTransform, ...] = ()
    transform: LinearTransform | None = None
    rank: int = 0
    finer: int = 1
    wider: tuple[str, ...] = ()
    weight: NumberFormat | None = None

    def plan(self, number_format: Int, name: str = "") -> LinearPlan:
        """Of a weight. number_format: in groups, where the scheme names no other."""
        assert isinstance(number_format.block_size, int), "groups of a row"
        bits = number_format.bits + WIDER * any(fnmatchcase(name, pattern) for pattern in self.wider)
        integers = replace(number_format, bits=bits, block_size=number_format.block_size // self.finer)
        return LinearPlan(
            GptqMethod(), self.weight or integers, rounding=Gptq(scales=self.scales, descent=self.descent),
            transform=self.transform, asymmetric=self.asymmetric, rank=self.rank, factor=FACTOR,
        )  # fmt: skip

    def hessian(self, seq_len: int) -> Hessian | HessianOfTokens:
        return Hessian() if self.rule is None else HessianOfTokens(self.rule, seq_len)


def schemes(scales: Scales) -> dict[str, Scheme]:
    """One choice changed at a time, the most telling first. scales: of all but those that name another.

    The first one's seconds are more than its own on a GPU, where kernels are compiled.
    """
    found = {
        "inputs of the original": Scheme(propagate=False),
        "GPTQ": Scheme(),
        "C(0.25)": Scheme(asymmetric=0.25),
        "W": Scheme(token_weights="residual"),
        "B": Scheme(order="sequential"),
        "v_proj 2 bits wider": Scheme(wider=("*.v_proj.weight",)),
        "first tokens as 10%": Scheme(rule="first tokens as 10%"),
        "massive tokens left out": Scheme(rule="massive tokens left out"),
        "E": Scheme(transforms=(Balance(),)),
        "S": Scheme(transforms=(Sort(),)),
        "rank 32 in 8 bits": Scheme(rank=32),
        "groups of half the size": Scheme(finer=2),
        "groups of a fourth": Scheme(finer=4),
        "D(2)": Scheme(descent=2),
        "E D(2)": Scheme(transforms=(Balance(),), descent=2),
        "C(1)": Scheme(asymmetric=1.0),
        "W C(0.25)": Scheme(token_weights="residual", asymmetric=0.25),
        "k_proj and v_proj 2 bits wider": Scheme(wider=("*.k_proj.weight", "*.v_proj.weight")),
        "first tokens as 0%": Scheme(rule="first tokens as 0%"),
        "first tokens as 1%": Scheme(rule="first tokens as 1%"),
        "first tokens as 50%": Scheme(rule="first tokens as 50%"),
        "tokens capped at 4 medians": Scheme(rule="tokens capped at 4 medians"),
        "Hadamard": Scheme(transform=Hadamard()),
    }
    found = {name: replace(scheme, scales=scales) for name, scheme in found.items()}
    others: dict[str, Scales] = {
        "scales min-max": "minmax", "A": "search", "A(least squares)": "least-squares",
    }  # fmt: skip
    found |= {name: Scheme(other) for name, other in others.items() if other != scales}
    trellis = Scheme(transform=Hadamard(), weight=Trellis(3))
    return found | {"trellis, 3 bits": trellis, "trellis, 3 bits, rank 32 in 8 bits": replace(trellis, rank=32)}


@dataclass
class Quantized:
    """parameters: dequantized weights, and what transforms have changed, in the model's dtypes. bits: of all linears,
    everything that is stored. seconds: of everything from the embedding on.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    bits: int = 0
    values: int = 0
    seconds: float = 0.0

    @property
    def average_bits(self) -> float:
        return self.bits / self.values

    def add(self, name: str, weight: QuantizedWeight, weight_OI: Tensor) -> None:
        stored = weight.weight_OI.code_bits + weight.metadata_bits
        self.bits += stored + (0 if weight.low_rank is None else weight.low_rank.bits)
        self.values += weight_OI.numel()
        self.parameters[name] = weight_OI


@torch.no_grad()
def quantize(subject: Subject, scheme: Scheme, number_format: Int, beside: Parameters | None = None) -> Quantized:
    """All linears of the model, which stays as it is. beside: parts of weights that are not rounded."""
    opened, text = subject.opened, replace(subject.text, token_weights=scheme.token_weights)
    started, found = time.monotonic(), Quantized()
    batches = text.windows_WT.split(text.batch_size)
    originals = embed(opened, batches)
    hidden = embed(opened, batches) if scheme.propagate else originals
    for index, block in enumerate(opened.blocks):
        name = f"{opened.name}.{index}"
        original = BlockRun(index, name, block, originals, opened.device)
        run = BlockRun(index, name, copy.deepcopy(block), hidden, opened.device)
        if scheme.transforms:
            changed = _transformed(run, scheme, number_format, text.batch_size)
            found.parameters |= changed
            put(run, changed)
        for turn in turns_of(run) if scheme.order == "sequential" else [list(block_linears(run.block))]:
            _round(found, run, original, turn, text, scheme, number_format, beside or {})
            put(run, found.parameters)
        if scheme.propagate:
            run.forward()
        original.forward()
    if opened.device.type == "cuda":
        torch.cuda.synchronize(opened.device)
    found.seconds = time.monotonic() - started
    return found


def put(run: BlockRun, parameters: Parameters) -> None:
    """Let the block compute with those of the parameters that are its own."""
    for name, parameter in run.block.named_parameters():
        if (full_name := f"{run.name}.{name}") in parameters:
            parameter.data = parameters[full_name]


def _round(
    found: Quantized,
    run: BlockRun,
    original: BlockRun,
    linears: Sequence[str],
    text: CalibrationText,
    scheme: Scheme,
    number_format: Int,
    beside: Parameters,
) -> None:
    """Add some linears of a block, on the inputs that it computes now."""
    hessian = scheme.hessian(text.windows_WT.shape[1])
    statistics: set[Statistic] = {hessian} | ({Mismatch()} if scheme.asymmetric else set())
    observed = observe_block(run, original, text, statistics, linears=linears)
    for site, names in observed.members(f"{run.name}.{linear}" for linear in linears).items():
        of_site = {"hessian": observed.tensors[f"{site}.{hessian.kind}"]}
        if scheme.asymmetric:
            of_site["mismatch"] = observed.tensors[f"{site}.mismatch"]
        shared = SiteStatistics(of_site)
        for name in (f"{linear}.weight" for linear in names):
            weight_OI = run.block.get_parameter(name.removeprefix(f"{run.name}.")).detach()
            kept_OI = beside.get(name, torch.zeros((), device=weight_OI.device))
            weight = scheme.plan(number_format, name).quantize(weight_OI.float() - kept_OI, shared)
            found.add(name, weight, (weight.effective_weight() + kept_OI).to(weight_OI.dtype))


def _transformed(run: BlockRun, scheme: Scheme, number_format: Int, batch_size: int) -> dict[str, Tensor]:
    """The parameters that the scheme's transforms change, by full names."""
    plans = {name: scheme.plan(number_format, f"{run.name}.{name}.weight") for name in block_linears(run.block)}
    stored = dict(run.block.named_parameters())
    # These transforms read no targets, and draw nothing.
    targets_STD = run.hidden.synchronized(run.device)
    problem = block_problem(run, targets_STD, plans, stored, batch_size, SEED)
    changed = reconstruct_block(problem, scheme.transforms, None).parameters
    return {f"{run.name}.{name}": tensor.to(stored[name].dtype) for name, tensor in changed.items()}
