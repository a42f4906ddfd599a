"""Whether a run fits the machine: its estimate as a table, and the one line that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lqer.errors import LqerError
from lqer.resources import Piece, Stage, total
from lqer.resources.machine import Machine

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class DoesNotFitError(LqerError):
    """The run needs more than there is; the message says of what, for what, and which key helps."""


def table(stages: Sequence[Stage], machine: Machine) -> str:
    """The estimate in a few lines of text."""
    rows = [("stage", "RAM", "GPU memory", "disk", "time")]
    for stage in stages:
        gpu = "–" if machine.device is None else shown(total(stage.device))
        ram = shown(machine.resident + total(stage.ram))
        rows.append((stage.name, ram, gpu, shown(total(stage.disk)), shown_time(seconds(stage, machine))))
    has_gpu = "–" if machine.device is None else shown(machine.device)
    rows.append(("there is", shown(machine.ram), has_gpu, shown(machine.disk), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"estimated for a run with an empty store, at {machine.rates.flops / 1e9:.0f} GFLOP/s:", *lines])


def seconds(stage: Stage, machine: Machine) -> float:
    """A rough time: its operations at the rates that were measured; other work of Python comes on top."""
    rates = machine.rates
    return stage.flops / rates.flops + stage.moved / rates.bytes + stage.calls / rates.calls


def refuse_what_cannot_fit(stages: Sequence[Stage], machine: Machine, stored: Mapping[str, int] | None = None) -> None:
    """Raise DoesNotFitError where a stage surely needs more RAM, GPU memory or disk than there is.

    Guessed working memory does not count. stored: bytes by stage that the store holds already of what the stage writes.
    """
    stored = stored or {}
    for stage in stages:
        _refuse(stage, stage.ram, machine.ram, "of RAM", machine.resident)
        if machine.device is not None:
            _refuse(stage, stage.device, machine.device, "of GPU memory", 0)
    free = machine.disk
    for stage in stages:
        needed = max(total(stage.disk, sure=True) - stored.get(stage.name, 0), 0)
        if needed > free:
            remedy = _remedy(stage.disk)
            raise DoesNotFitError(
                f"{stage.name} writes about {shown(needed)} under output_dir, whose disk has {shown(free)} left: "
                f"use {remedy}"
            )
        free -= needed


def _refuse(stage: Stage, pieces: Sequence[Piece], there_is: int, where: str, besides: int) -> None:
    needed = besides + total(pieces, sure=True)
    if needed <= there_is:
        return
    largest = max((piece for piece in pieces if piece.sure), key=lambda piece: piece.bytes, default=None)
    remedy = _remedy(pieces)
    most = f"; the most for {largest.what}, {shown(largest.bytes)}" if largest else ""
    advice = f": use {remedy}" if remedy else ""
    raise DoesNotFitError(
        f"{stage.name} needs at least {shown(needed)} {where}, there are {shown(there_is)}{most}{advice}"
    )


def _remedy(pieces: Sequence[Piece]) -> str | None:
    """What to do about the largest piece that something can be done about."""
    helped = [piece for piece in pieces if piece.remedy is not None and piece.sure]
    return max(helped, key=lambda piece: piece.bytes).remedy if helped else None


def shown(size: float) -> str:
    """Bytes with two or three digits: 4.2 GB, 310 MB."""
    power = 0
    while size >= 999.5 and power + 1 < len(UNITS):
        size, power = size / 1000, power + 1
    return f"{size:.0f} {UNITS[power]}" if size >= 9.95 or power == 0 else f"{size:.1f} {UNITS[power]}"


def shown_time(rough: float) -> str:
    """Seconds to a digit or two, in the unit that suits."""
    units: list[tuple[float, str, Callable[[float], float]]] = [
        (90, "s", lambda s: s), (5400, "min", lambda s: s / 60), (float("inf"), "h", lambda s: s / 3600)
    ]  # fmt: skip
    _, unit, scale = next(found for found in units if rough < found[0])
    value = scale(rough)
    return "~1 s" if rough < 1 else f"~{value:.0f} {unit}" if value >= 9.5 else f"~{value:.1f} {unit}"
