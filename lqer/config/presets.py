"""Presets: the configurations that come with the package, named `preset:NAME` wherever a config file is named.

They are the files of configs/ at the top of the repository, which an installed package holds as lqer/presets. The files
of sweeps/ come with it as lqer/sweeps; a sweep is named without an ending.
"""

from __future__ import annotations

import itertools
import re
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from lqer.components import did_you_mean
from lqer.errors import ConfigError

PREFIX = "preset:"
# Named without their folder.
METHODS_FOLDER = "methods"
# The advice of docs/choosing.md.
RECOMMENDED = ("best-2", "best-3", "best-4", "best-w4a8", "serve-3", "serve-4")
# What the other folders hold.
FOLDERS = {
    "paper": "experiments with the models, texts and settings of their papers",
    "template": "a model each, with L2QER in W4A8 MXINT and rank 32",
    "formats": "number formats by name, to extend",
    "protocols": "texts of calibration and evaluation, to extend",
    "finetune": "training after quantization, to extend",
}


def preset_path(name: str) -> Path:
    """The file of the preset `name`, such as "lqer-act" or "paper/tesseraq-w2". Raises ConfigError if there is none."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"{PREFIX}{name}: no such preset (lqer ls presets lists them){did_you_mean(name, names)}")
    root = _root()
    path = root / METHODS_FOLDER / f"{name}.toml"
    return path if path.exists() else root / f"{name}.toml"


def preset_names() -> list[str]:
    """Every preset: those of methods by their name alone, the others by their path."""
    names = [path.relative_to(_root()).with_suffix("").as_posix() for path in _root().rglob("*.toml")]
    return sorted(name.removeprefix(f"{METHODS_FOLDER}/") for name in names)


def presets_like(pattern: str) -> list[str]:
    """The presets with `pattern`, which may have shell wildcards, in their names, in either case.

    Raises ConfigError if there is none.
    """
    names = preset_names()
    found = [name for name in names if fnmatchcase(name.lower(), f"*{pattern.lower()}*")]
    if not found:
        raise ConfigError(f"ls presets: none has {pattern!r} in its name{did_you_mean(pattern, names)}")
    return found


def read_summary(name: str) -> str:
    """The first sentence of the comment at the head of a preset."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.) ", comment)[0]


def sweep_path(name: str | Path) -> Path:
    """The file of a sweep: one that exists, or one of the package by its name. Raises ConfigError for another name."""
    path = Path(name)
    if path.suffix or path.exists() or len(path.parts) > 1:
        return path
    names = sweep_names()
    if str(name) not in names:
        raise ConfigError(f"{name}: no such sweep; the package has {', '.join(names)}{did_you_mean(str(name), names)}")
    return _sweeps() / f"{name}.toml"


def sweep_names() -> list[str]:
    """Every sweep of the package."""
    return sorted(path.stem for path in _sweeps().glob("*.toml"))


def _root() -> Path:
    return Path(str(files("lqer") / "presets"))


def _sweeps() -> Path:
    return Path(str(files("lqer") / "sweeps"))
