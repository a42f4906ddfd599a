"""Single weights of early linears that write to the residual stream, and the massive activations that they make.

    candidates:    the largest |W_oi| max_t |x_ti|  over these linears

Shapes: O out_features, I in_features, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from harm.schemes import Scheme, quantize
from harm.subject import Harm, Parameters, Subject, replaced
from lqer.formats import Int
from lqer.stages.calibrate import gather_blocks
from lqer.stages.observe import NOT_ROUNDED
from lqer.statistics import MaxAbs


@dataclass(frozen=True)
class SuperWeight:
    """weight: W_oi. largest: max_t |x_ti|. Their product is what the weight adds at most to output `row`."""

    linear: str
    row: int
    column: int
    weight: float
    largest: float

    @property
    def product(self) -> float:
        return abs(self.weight) * self.largest


def early(subject: Subject, pattern: str) -> list[str]:
    """The linears that the pattern names, of the first third of the blocks."""
    first = tuple(f"{subject.opened.name}.{i}." for i in range(-(-len(subject.opened.blocks) // 3)))
    return [name for name in _named(subject, pattern) if name.startswith(first)]


def _named(subject: Subject, pattern: str) -> list[str]:
    names = (name.removesuffix(".weight") for name in subject.weights())
    return [name for name in names if fnmatchcase(name, pattern)]


def super_weights(subject: Subject, linears: list[str], count: int) -> list[SuperWeight]:
    """The candidates of these linears, the largest first."""
    weights, found = subject.weights(), []
    indices = range(len(subject.opened.blocks))
    for statistics in gather_blocks(subject.opened, subject.text, {MaxAbs()}, NOT_ROUNDED, indices):
        for name in set(linears) & statistics.sites.keys():
            weight_OI = weights[f"{name}.weight"].float()
            largest_I = statistics.of(name)[MaxAbs.kind].to(weight_OI.device)
            places = (weight_OI.abs() * largest_I).flatten().topk(count).indices.tolist()
            for row, column in (divmod(place, weight_OI.shape[1]) for place in places):
                one = SuperWeight(name, row, column, weight_OI[row, column].item(), largest_I[column].item())
                found.append(one)
    return sorted(found, key=lambda one: -one.product)[:count]


def alone(subject: Subject, chosen: list[SuperWeight]) -> dict[str, Tensor]:
    """The weights of their linears in float32, zero but for the chosen ones."""
    weights = subject.weights()
    found = {
        name: torch.zeros_like(weights[name], dtype=torch.float32)
        for name in {f"{one.linear}.weight" for one in chosen}
    }
    for one in chosen:
        found[f"{one.linear}.weight"][one.row, one.column] = one.weight
    return found


def largest_state(subject: Subject, parameters: Parameters) -> float:
    """The largest magnitude in the residual stream behind any block, on the first window of the first text."""
    model, ruler = subject.opened.model, next(iter(subject.rulers.values()))
    with replaced(model, parameters), torch.inference_mode():
        ids_BT = ruler.windows[0].to(model.device)
        states = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    # The last one has passed the final norm.
    return max(state.abs().max().item() for state in states[:-1])


def rows(
    subject: Subject, pattern: str, scheme: Scheme, number_format: Int, chosen: list[SuperWeight]
) -> Iterator[tuple[str, float, list[Harm]]]:
    """What is kept or taken away, with the largest state and the harm on every text."""
    weights, kept, count = subject.weights(), alone(subject, chosen), len(chosen)

    def row(label: str, parameters: Parameters) -> tuple[str, float, list[Harm]]:
        return label, largest_state(subject, parameters), subject.harms(parameters)

    def without(parts: Parameters) -> dict[str, Tensor]:
        return {name: (weights[name] - part).to(weights[name].dtype) for name, part in parts.items()}

    yield row("original", {})
    yield row("original, without the first", without(alone(subject, chosen[:1])))
    yield row(f"original, without {count}", without(kept))
    quantized = quantize(subject, scheme, number_format).parameters
    yield row("quantized", quantized)
    yield row(f"quantized, {count} kept", quantize(subject, scheme, number_format, kept).parameters)
    near, all_of_them = early(subject, pattern), _named(subject, pattern)
    for which, linears in ((f"{len(near)} early", near), (f"all {len(all_of_them)}", all_of_them)):
        rest = {name: x for name, x in quantized.items() if name.removesuffix(".weight") not in linears}
        yield row(f"quantized, {which} {pattern} kept", rest)
