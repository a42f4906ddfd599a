"""Export a checkpoint: refuse what the target cannot hold, write beside, read back, compare, rename.

OUT appears complete and verified, or not at all. A killed export leaves a hidden folder next to OUT, which the next
one with the same OUT removes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lqer.components import component_from_dict
from lqer.errors import ConfigError, ExportError
from lqer.export.base import Target
from lqer.export.card import CARD_FILE, render_card
from lqer.export.source import Outline, Source
from lqer.export.verify import Check, Outcome, check_export, read_text
from lqer.store.files import fsync, hash_file, write_json, write_text

RECORD_FILE = "lqer_export.json"
# Raised when a target writes other files of the same checkpoint and settings: those of an earlier run are not kept.
VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".gguf")

log = logging.getLogger(__name__)


def make_target(kind: str, settings: Mapping[str, Any]) -> Target:
    """The target of that kind. Raises ConfigError for an unknown kind, setting or value."""
    try:
        return component_from_dict(Target, {**settings, "kind": kind})
    except ValueError as error:
        raise ConfigError(f"export: {error}") from None


def export(
    checkpoint: Path,
    target: Target,
    out: Path,
    text: Path | None = None,
    check: bool = True,
    device: torch.device | None = None,
    results: Mapping[str, Any] | None = None,
) -> Check | None:
    """Write the checkpoint, or that of a run's folder, to the new folder `out`. Returns what was measured.

    text: a file whose tokens the comparison runs on, by default what the checkpoint itself writes. check: whether to
    read the files back and compare. device: where the comparison runs, by default the CPU. results: of the run that
    made the checkpoint, for the card, where its folder does not have them yet.

    Raises ExportError if `out` exists or the target cannot hold some linear, and DifferentExportError if the files do
    not compute what the checkpoint does; nothing is then left of them.
    """
    source, words = Source(checkpoint, results), None if text is None else read_text(text)
    refuse_unsupported(source, target)
    with _new_folder(out, source.path) as folder:
        try:
            written = target.write(source, folder)
        except ExportError as error:
            raise ExportError(f"{error}; {_others(source, target)}") from None
        unverified, measured = _reason_not_to_check(target, check), None
        if unverified is None:
            measured = check_export(target, written, source, folder, words, device or torch.device("cpu"))
        outcome = Outcome(written, measured, unverified)
        record = {"version": VERSION, "checkpoint": source.key, "target": target.to_dict(), **outcome.record()}
        write_json(folder / RECORD_FILE, record | {"files": hashes(folder)})
        write_card(source, target, record, folder, out.name)
    _report(source, target, outcome)
    return measured


def refuse_unsupported(model: Outline, target: Target) -> None:
    """Raise ExportError, naming the first linear that the target cannot hold and the targets that can."""
    found = first_unsupported(model, target)
    if found is not None:
        name, reason = found
        raise ExportError(f"{target.kind} cannot hold {name}: {reason}; {_others(model, target)}")


def first_unsupported(model: Outline, target: Target) -> tuple[str, str] | None:
    """The first linear that the target cannot hold, and why; None if it can hold the model."""
    for spec in model.specs.values():
        if (reason := target.unsupported(spec)) is not None:
            return spec.name, reason
    return target.unsupported_experts(model) or target.unsupported_model(model)


def _others(model: Outline, target: Target) -> str:
    """Which other targets would do."""
    others = {kind: cls() for kind, cls in Target.registry.items() if kind != target.kind}
    kinds = [kind for kind, other in others.items() if first_unsupported(model, other) is None]
    return f"targets that can: {', '.join(kinds)}" if kinds else "no other target can"


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file of an export, by its path in the folder, but for the card and the record."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: hash_file(file) for name, file in files.items() if name not in (CARD_FILE, RECORD_FILE)}


def weight_bytes(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHT_SUFFIXES)


def write_card(source: Source, target: Target, record: Mapping[str, Any], folder: Path, out: str) -> None:
    """Write README.md of an export that will be called `out`. record: its lqer_export.json."""
    card = render_card(source, target, Outcome.from_record(record), out, weight_bytes(folder))
    write_text(folder / CARD_FILE, card)


def _reason_not_to_check(target: Target, check: bool) -> str | None:
    if not check:
        return "the comparison was switched off (--no-check)"
    missing = target.missing_reader()
    return None if missing is None else f"{missing}, which reads such files, was not installed"


def _report(source: Source, target: Target, outcome: Outcome) -> None:
    check = outcome.check
    dropped = sum(not target.keeps_activation(spec) for spec in source.specs.values())
    if dropped:
        log.warning("export: activation quantization of %d linears is not exported", dropped)
    if target.drops_attention(source):
        log.warning("export: quantization of attention operands is not exported")
    for note in outcome.written.notes:
        log.info("export: %s", note)
    if check is None:
        log.warning("export: not verified: %s", outcome.unverified)
        return
    log.info(
        "export: verified: logits differ by up to %.3g (of up to %.3g), perplexity %.6g, the checkpoint's %.6g, on %d "
        "windows of %d tokens (%s)",
        *(check.logit_difference, check.largest_logit, check.exported_perplexity, check.perplexity),
        *(check.windows, check.tokens_per_window, check.text),
    )


@contextmanager
def _new_folder(out: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends, and is deleted if that fails."""
    if not out.name or out.name == "..":
        raise ExportError(f"{out} cannot name a new folder")
    if os.path.lexists(out):
        raise ExportError(f"{out} already exists: choose a new name")
    if out.absolute().resolve().is_relative_to(checkpoint.resolve()):
        raise ExportError(f"{out} lies in the checkpoint's own folder, which must stay as it is")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, lock_file = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "lock"))
    try:
        lock = FileLock(lock_file)
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(f"{out}: another export is writing it") from None
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            fsync(file)
        fsync(partial)
        if os.path.lexists(out):
            raise ExportError(f"{out} was created meanwhile: choose a new name")
        partial.rename(out)
        fsync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()
