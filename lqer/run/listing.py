"""`lqer ls`: what a configuration can name, and finished runs; one line each, but for folders of many presets."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from lqer.components import Component, did_you_mean
from lqer.config.presets import FOLDERS, RECOMMENDED, preset_names, presets_like, read_summary
from lqer.data.datasets import HUB_TEXTS
from lqer.data.python_texts import PYTHON_TEXTS
from lqer.errors import ConfigError
from lqer.formats import NumberFormat
from lqer.methods import Method
from lqer.results import RESULTS_FILE
from lqer.rounding import Rounding
from lqer.statistics import Statistic
from lqer.transforms import Transform

Row = tuple[str, str]


def list_items(words: Sequence[str]) -> list[str]:
    """The lines for the words after `lqer ls`. Raises ConfigError for other words."""
    what, *rest = words or [""]
    if what in LISTS and not rest:
        return _aligned(LISTS[what]())
    if what == "presets" and len(rest) <= 1:
        return _aligned(map(_preset, presets_like(rest[0]))) if rest else _preset_sections()
    if what == "runs" and len(rest) <= 1:
        return _aligned(_runs(Path(rest[0] if rest else "checkpoints")))
    allowed = (*LISTS, "presets", "runs")
    raise ConfigError(
        f"ls: unknown list {' '.join(words)!r}; allowed: {', '.join(allowed)}{did_you_mean(what, allowed)}"
    )


def _aligned(rows: Iterable[Row], width: int = 0) -> list[str]:
    """The rows, one a line, with names padded to one width, at least `width`."""
    rows = list(rows)
    width = max((width, *(len(name) for name, _ in rows)))
    return [f"{name:{width}}  {line}".rstrip() for name, line in rows]


def _components(family: type[Component], of_module: bool = False) -> Callable[[], Iterator[Row]]:
    """The components with the first line of each class, or of its module for families with one component in a file."""

    def rows() -> Iterator[Row]:
        for kind, cls in sorted(family.registry.items()):
            yield kind, _first_line((of_module and sys.modules[cls.__module__].__doc__) or cls.__doc__) + _settings(cls)

    return rows


def _settings(cls: type[Component]) -> str:
    """The fields that a configuration may set, with their defaults as TOML; without one where it is not a value."""
    settings = [
        field.name if field.default in (MISSING, None) else f"{field.name} = {json.dumps(field.default)}"
        for field in fields(cls)
    ]
    return f" Settings: {', '.join(settings)}." if settings else ""


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


def _datasets() -> Iterator[Row]:
    for name, text in HUB_TEXTS.items():
        yield name, f"{text.repository}{f' ({text.name})' if text.name else ''}, Hugging Face Hub"
    for name, python_text in PYTHON_TEXTS.items():
        yield name, python_text.summary


def _preset(name: str) -> Row:
    return name, read_summary(name)


def _preset_sections() -> list[str]:
    """The presets that are recommended, those of methods, and the folders of all others, in a line each."""
    names = preset_names()
    counts = Counter(name.partition("/")[0] for name in names)
    sections = {
        "Recommended:": [_preset(name) for name in RECOMMENDED],
        "Methods:": [_preset(name) for name in names if "/" not in name and name not in RECOMMENDED],
        "Folders, each listed by `lqer ls presets FOLDER/`:": [
            (f"{folder}/", f"{line} ({counts[folder]})") for folder, line in FOLDERS.items()
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = [line for title, rows in sections.items() for line in ("", title, *_aligned(rows, width))]
    return lines[1:]


def _targets() -> Iterator[Row]:
    # The other lists do not wait for transformers.
    from lqer.export import Target

    yield from _components(Target)()


def _runs(folder: Path) -> Iterator[Row]:
    if not folder.is_dir():
        raise ConfigError(f"ls runs: no such folder: {folder}")
    for path in sorted(folder.glob(f"*/{RESULTS_FILE}")):
        results = json.loads(path.read_text(encoding="utf-8"))
        texts = [f"{row['dataset']} {row['quantized']:.4g} ({row['protocol']})" for row in results["perplexity"]]
        bits = f"{results['bits']['average']:.3f} bits"
        yield path.parent.name, ", ".join([results["model"]["name"], bits, *texts])


LISTS: dict[str, Callable[[], Iterator[Row]]] = {
    "methods": _components(Method),
    "roundings": _components(Rounding, of_module=True),
    "transforms": _components(Transform, of_module=True),
    "formats": _components(NumberFormat, of_module=True),
    "statistics": _components(Statistic),
    "targets": _targets,
    "datasets": _datasets,
}
