"""Whether a run fits the machine: its needs as a table, and the one line that refuses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lqer.errors import LqerError
from lqer.resources.machine import Machine
from lqer.resources.workload import Need, StageMemory, total

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class DoesNotFitError(LqerError):
    """The run needs more than is available; the message names the stage, the largest need and the key that helps."""


def table(stages: Sequence[StageMemory], machine: Machine) -> str:
    """The needs of each stage and what is available, as lines of text."""
    rows = [("stage", "RAM", "GPU memory", "disk")]
    for stage in stages:
        gpu = "–" if machine.device is None else shown(total(stage.device))
        rows.append((stage.name, shown(machine.resident + total(stage.ram)), gpu, shown(total(stage.disk))))
    has_gpu = "–" if machine.device is None else shown(machine.device)
    rows.append(("available", shown(machine.ram), has_gpu, shown(machine.disk)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["Estimated memory and disk (with an empty store):", *lines])


def refuse_what_cannot_fit(
    stages: Sequence[StageMemory], machine: Machine, stored: Mapping[str, int] | None = None
) -> None:
    """Raise DoesNotFitError if a stage certainly needs more RAM, GPU memory or disk than is available.

    Estimated working memory does not count. stored: bytes that the store already holds of a stage's files, by stage.
    """
    stored = stored or {}
    for stage in stages:
        _refuse(stage, stage.ram, machine.ram, "RAM", machine.resident)
        if machine.device is not None:
            share = "" if machine.card_share == 1 else f" (cluster.gpus_per_job {machine.card_share:g})"
            _refuse(stage, stage.device, machine.device, f"GPU memory{share}", 0)
    free = machine.disk
    for stage in stages:
        needed = max(total(stage.disk, certain=True) - stored.get(stage.name, 0), 0)
        if needed > free:
            raise DoesNotFitError(
                f"{stage.name} writes about {shown(needed)} under output_dir but only {shown(free)} is free. "
                f"{_remedy(stage.disk)}."
            )
        free -= needed


def _refuse(stage: StageMemory, needs: Sequence[Need], available: int, where: str, resident: int) -> None:
    needed = resident + total(needs, certain=True)
    if needed <= available:
        return
    largest = max((need for need in needs if need.certain), key=lambda need: need.bytes, default=None)
    share = f" ({largest.what}: {shown(largest.bytes)})" if largest else ""
    remedy = _remedy(needs)
    advice = f". {remedy}." if remedy else ""
    rule = f"needs at least {shown(needed)} of {where} but only {shown(available)} is available"
    raise DoesNotFitError(f"{stage.name} {rule}{share}{advice}")


def _remedy(needs: Sequence[Need]) -> str | None:
    """The remedy of the largest certain need that has one."""
    helped = [need for need in needs if need.remedy is not None and need.certain]
    return max(helped, key=lambda need: need.bytes).remedy if helped else None


def shown(size: float) -> str:
    """Bytes with two or three digits: 4.2 GB, 310 MB."""
    power = 0
    while size >= 999.5 and power + 1 < len(UNITS):
        size, power = size / 1000, power + 1
    return f"{size:.0f} {UNITS[power]}" if size >= 9.95 or power == 0 else f"{size:.1f} {UNITS[power]}"
