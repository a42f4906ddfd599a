"""Which linears of a decoder block are quantized at once: a layer's experts, where shape and plan are the same.

An expert is so small that a GPU waits for the launches of one; all others are quantized one after the other. What is
not quantized at once can be quantized by different processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from lqer.methods import Plans
from lqer.nn.experts import expert_of_linear
from lqer.stages.gather import BlockStatistics
from lqer.statistics.site import SiteStatistics

# What linears that are quantized at once may hold on the device.
BATCH_BYTES = {"cuda": 8_000_000_000, "cpu": 1_000_000_000}
# For each entry of a Hessian: E[x xᵀ]; rotated, and its factor, both in float64; twice the float32 matrix made of that.
HESSIAN_BYTES = 4 + 8 + 8 + 2 * 4
# For each weight, in float32: itself, rotated, beside the others, its errors and values; int64 states of a trellis.
WEIGHT_BYTES = 5 * 4 + 8


def units_of(linears: Iterable[str]) -> dict[str, list[str]]:
    """The linears of a block, by their names within it, that processes can share out among them, by unit.

    A unit is one linear, called by its name, or all experts of a layer, called by the name of the module that has them:
    sums of other batches of them may end in other bits.
    """
    units: dict[str, list[str]] = {}
    for name in linears:
        of_expert = expert_of_linear(name)
        units.setdefault(of_expert[0] if of_expert else name, []).append(name)
    return units


def batches_of(
    full_names: Collection[str],
    statistics: BlockStatistics,
    plans: Plans,
    shapes: Mapping[str, torch.Size],
    device: torch.device,
) -> list[list[str]]:
    """The linears in the batches that they are quantized in; those that share inputs follow each other.

    shapes: (out_features, in_features) by full name. The batches do not depend on how many processes there are.
    """
    alike: dict[object, list[str]] = {}
    for name in full_names:
        plan, mixture = plans[name], name.rsplit(".", 2)[0]
        several = plan and plan.method.takes_several(plan) and statistics.routed_tokens(name) is not None
        alike.setdefault((mixture, shapes[name], plan) if several else name, []).append(name)
    most = BATCH_BYTES.get(device.type, BATCH_BYTES["cpu"])
    return [batch for names in alike.values() for batch in _cut(names, statistics, shapes, most)]


def with_statistics(
    batches: Collection[list[str]], statistics: BlockStatistics, device: torch.device
) -> Iterator[list[tuple[str, SiteStatistics]]]:
    """The linears of each batch with their statistics on the device; first those that are quantized alone."""
    alone = [batch[0] for batch in batches if len(batch) == 1]
    yield from ([found] for found in statistics.by_site(alone, device))
    for batch in batches:
        if len(batch) > 1:
            yield list(statistics.by_site(batch, device))


def _cut(
    names: list[str], statistics: BlockStatistics, shapes: Mapping[str, torch.Size], most: int
) -> Iterator[list[str]]:
    """Batches of at most `most` bytes, with linears of one site together; a site that needs more is a batch."""
    batch: list[str] = []
    held = 0
    for members in statistics.members(names).values():
        out_features, in_features = shapes[members[0]]
        needed = in_features * (HESSIAN_BYTES * in_features + WEIGHT_BYTES * out_features * len(members))
        if batch and held + needed > most:
            yield batch
            batch, held = [], 0
        batch += members
        held += needed
    yield batch
