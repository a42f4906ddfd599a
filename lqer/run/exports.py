"""The last step of a run: its checkpoint in the files of other programs, in <output_dir>/<tag>/export/<target>.

An export that an earlier run left there is kept if it is of the same checkpoint, target and settings; its card is
written anew, since it shows this run's numbers.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lqer.errors import ConfigError, ExportError, RunFolderError
from lqer.export import Source, Target, export
from lqer.export.run import RECORD_FILE, VERSION, hashes, weight_bytes, write_card
from lqer.phases import in_phase
from lqer.results import ExportRow, Results

EXPORT_FOLDER = "export"

log = logging.getLogger(__name__)


def check_export_folders(folder: Path, targets: Sequence[Target]) -> None:
    """Raise RunFolderError for a folder that an export would have to replace and that no export made."""
    for target in targets:
        out = folder / EXPORT_FOLDER / target.kind
        if out.exists() and not (out / RECORD_FILE).is_file():
            raise RunFolderError(f"{out} was not made by an export: move it away")


@in_phase("export")
def export_all(
    folder: Path, checkpoint: Path, targets: Sequence[Target], results: Results, device: torch.device
) -> list[ExportRow]:
    """Write every target that is not there yet. What one of them cannot hold is said in its row.

    folder: the run's. results: for the cards. Raises RunFolderError for an export that was changed meanwhile.
    """
    return [_export_one(folder, checkpoint, target, results, device) for target in targets]


def _export_one(folder: Path, checkpoint: Path, target: Target, results: Results, device: torch.device) -> ExportRow:
    place = Path(EXPORT_FOLDER) / target.kind
    out, source = folder / place, Source(checkpoint, results)
    settings = {key: value for key, value in target.to_dict().items() if key != "kind"}
    if (record := _kept(out, source, target)) is not None:
        log.info("export: reused %s", out)
        write_card(source, target, record, out, out.name)
    else:
        shutil.rmtree(out, ignore_errors=True)
        log.info("export: %s", target.kind)
        try:
            export(checkpoint, target, out, device=device, results=results)
        except (ConfigError, ExportError) as error:
            log.error("export: %s", error)
            return _row(target.kind, settings, refused=str(error))
        record = _record(out)
    check = record["check"] or {}
    return _row(
        target.kind,
        settings,
        folder=place.as_posix(),
        not_verified=record["not_verified"],
        weight_bytes=weight_bytes(out),
        closeness=record["closeness"],
        **{key: check.get(key) for key in ("logit_difference", "largest_logit", "perplexity", "exported_perplexity")},
    )


def _row(target: str, settings: dict[str, Any], **found: Any) -> ExportRow:
    nothing: dict[str, Any] = dict.fromkeys(ExportRow.__annotations__)
    return ExportRow(**{**nothing, "target": target, "settings": settings, **found})  # type: ignore[typeddict-item]


def _record(out: Path) -> dict[str, Any]:
    return json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))


def _kept(out: Path, source: Source, target: Target) -> dict[str, Any] | None:
    """The record of an earlier export that is what would be written now; None if there is none."""
    if not out.exists():
        return None
    record = _record(out)
    if record.get("files") != hashes(out):
        raise RunFolderError(f"{out} was changed since it was exported: move it away")
    wanted = {"version": VERSION, "checkpoint": source.key, "target": target.to_dict()}
    if any(record.get(key) != value for key, value in wanted.items()):
        return None
    # One that could not be compared is written again where it can be.
    is_comparable = record["not_verified"] is not None and target.missing_reader() is None
    return None if is_comparable else record


def raise_refusals(results: Results) -> None:
    """Raise ExportError if an export that was asked for is not there."""
    refused = [row["refused"] for row in results["exports"] if row["refused"] is not None]
    if refused:
        raise ExportError(f"the run is complete but for its exports: {'; '.join(refused)}")
