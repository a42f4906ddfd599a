"""A sweep: one TOML file that expands into a list of experiments. Nothing here runs them.

    name = "{quantize.weight}-{input}"       # of a run of the grid; default: the values, joined by "-"
    keep_going = true                        # after a run that fails
    parameters = { steps = 250 }             # "$steps" below; --parameters.steps=25 on the command line
    parts = { cheap = ["w4-*"] }             # runs by name, which --part cheap picks
    set = { quantize.method = "lqer-act" }   # of every run

    [grid]                                   # every combination
    quantize.weight = ["w4", "w3"]
    input = [{ name = "x8", quantize = { activation = "x8", attention = "x8" } }, ...]

    [[run]]                                  # under every combination of the grid; may have a grid of its own
    name = "serve-3"
    extends = "preset:serve-3"
    set = { quantize.weight = "w3g64" }

Later layers win: CONFIG, the row's `extends`, `set`, the row's `set`, the grid, the command line. A row that extends
presets takes its scheme from them alone: CONFIG's [quantize] and [finetune] are left out, and of the presets only what
belongs to a scheme is taken. So all rows share CONFIG's calibration text, seed and evaluation; a preset that trains
does so on that text too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lqer.components import did_you_mean
from lqer.config.files import read_toml
from lqer.config.grid import Choice, axes_of, named, substituted
from lqer.config.presets import sweep_path
from lqer.config.reader import Layer, Layers, config_of, parse_override, read_layers
from lqer.config.schema import CalibrationConfig, Config
from lqer.errors import ConfigError

# Keys of a configuration that make a scheme; all others say what is quantized and how it is measured.
SCHEME_SECTIONS = ("quantize", "finetune")
SCHEME_CALIBRATION = ("round_inputs", "token_weights", "experts")
MOST_RUNS = 10_000


class SweepSection(BaseModel):
    """A table of a sweep file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(SweepSection):
    """A run, or with a grid several; `name` may hold the names of axes, "{quantize.weight}"."""

    name: Annotated[str, Field(min_length=1)]
    extends: tuple[str, ...] | str = ()
    set: dict[str, Any] = {}
    grid: dict[str, Any] = {}

    @property
    def presets(self) -> tuple[str, ...]:
        return (self.extends,) if isinstance(self.extends, str) else self.extends


class Sweep(SweepSection):
    """The file, as it is written."""

    name: str | None = None
    keep_going: bool = False
    parameters: dict[str, Any] = {}
    parts: dict[str, tuple[str, ...]] = {}
    set: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    run: tuple[Row, ...] = ()


@dataclass(frozen=True)
class SweepRun:
    """One experiment of a sweep. extends and scheme: presets, and keys that the sweep sets on top of them."""

    name: str
    config: Config
    extends: tuple[str, ...]
    scheme: Mapping[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep in the order of the file, every configuration valid.

    path: as it was named. parts: patterns of names of runs, by the name of the part.
    """

    path: str
    keep_going: bool
    runs: tuple[SweepRun, ...]
    parts: Mapping[str, tuple[str, ...]]

    @property
    def output_dir(self) -> Path:
        """The output_dir of all runs, since they share a store. Raises ConfigError if they name several."""
        found = sorted({run.config.output_dir for run in self.runs})
        if len(found) > 1:
            raise ConfigError(f"{self.path}: output_dir: must be the same for all runs; found {', '.join(found)}")
        return Path(found[0])

    def part(self, name: str) -> SweepPlan:
        """The runs of a part. Raises ConfigError if the file names none like that."""
        if name not in self.parts:
            told = f"has {', '.join(self.parts)}" if self.parts else "has none"
            raise ConfigError(f"--part {name}: no such part; {self.path} {told}{did_you_mean(name, tuple(self.parts))}")
        return self.only(self.parts[name])

    def only(self, patterns: Sequence[str]) -> SweepPlan:
        """The runs whose names match one of the patterns; all where there is none. Raises ConfigError if none does."""
        for pattern in patterns:
            if not any(fnmatchcase(run.name, pattern) for run in self.runs):
                names = [run.name for run in self.runs]
                raise ConfigError(f"--only {pattern}: no such run; {self.path} has {', '.join(names)}")
        kept = [run for run in self.runs if any(fnmatchcase(run.name, pattern) for pattern in patterns or "*")]
        return replace(self, runs=tuple(kept))


def plan_sweep(path: str | Path, config: str | Path, tag: str, overrides: Sequence[str] = ()) -> SweepPlan:
    """Expand the sweep `path`, a file or the name of one of the package, over the configuration `config`.

    The tag of a run is TAG-name.

    overrides: "--key=value", of the sweep's keep_going and parameters, else of every configuration. Raises ConfigError,
    one line, for a mistake in the sweep or in any of its configurations.
    """
    parsed = [(override, parse_override(override)) for override in overrides]
    file = sweep_path(path)
    sweep = _read(file, [layer for layer in parsed if _is_of_sweep(layer)])
    of_runs = [layer for layer in parsed if not _is_of_sweep(layer)]
    base = read_layers(config)
    runs = tuple(_run(str(file), base, tag, sweep, *cell, of_runs) for cell in _cells(str(file), sweep))
    _refuse_duplicates(str(file), runs)
    return SweepPlan(str(path), sweep.keep_going, runs, sweep.parts)


def _is_of_sweep(layer: Layer) -> bool:
    return next(iter(layer[1])) in ("keep_going", "parameters")


def _read(path: Path, overrides: Sequence[Layer]) -> Sweep:
    layers = Layers()
    layers.merge(read_toml(path), str(path))
    known = tuple(layers.values.get("parameters", {}))
    for origin, values in overrides:
        for name in values.get("parameters", {}):
            if name not in known:
                told = f"allowed: {', '.join(known)}" if known else f"{path} has none"
                raise ConfigError(f"{origin}: unknown parameter; {told}{did_you_mean(name, known)}")
        layers.merge(values, origin)
    try:
        sweep = Sweep.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explained(error)}") from None
    if not sweep.grid and not sweep.run:
        raise ConfigError(f"{path}: has no run: write a [grid] or a [[run]]")
    return sweep


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg'].replace('Input should be', 'must be').replace('Field required', 'is missing')}"
    model = Row if first["loc"][0] == "run" else Sweep
    allowed = tuple(model.model_fields)
    return f"{key}: unknown key; allowed: {', '.join(allowed)}{did_you_mean(str(first['loc'][-1]), allowed)}"


def _cells(path: str, sweep: Sweep) -> Iterator[tuple[Row | None, dict[str, Choice]]]:
    """Every row under every combination of the grids; None as the row of a sweep that has none."""
    axes = axes_of(path, "grid", sweep.grid, sweep.parameters)
    for count, choices in enumerate(itertools.product(*axes.values())):
        if count >= MOST_RUNS:
            raise ConfigError(f"{path}: grid: more than {MOST_RUNS} combinations")
        cell = dict(zip(axes, choices))
        if not sweep.run:
            yield None, cell
        for i, row in enumerate(sweep.run):
            own = axes_of(path, f"run.{i}.grid", row.grid, sweep.parameters)
            for inner in itertools.product(*own.values()):
                yield row, cell | dict(zip(own, inner))


def _run(
    path: str,
    base: Sequence[Layer],
    tag: str,
    sweep: Sweep,
    row: Row | None,
    cell: Mapping[str, Choice],
    overrides: Sequence[Layer],
) -> SweepRun:
    template = (sweep.name or "-".join(f"{{{axis}}}" for axis in cell)) if row is None else row.name
    name = named(path, template, cell)
    where = f"{path}: run {name!r}"
    presets = () if row is None else row.presets
    own = [
        substituted(path, "set", sweep.set, sweep.parameters),
        substituted(path, f"run {name!r}: set", {} if row is None else row.set, sweep.parameters),
        *(choice.values for choice in cell.values()),
    ]
    later = [*((where, values) for values in own), *overrides]
    first = _with_schemes(presets, Path(path).parent, base, later, where) if presets else base
    config = config_of([*first, *later, ("the command line", {"tag": f"{tag}-{name}"})])
    set_here = Layers()
    for values in own:
        set_here.merge(values, where)
    return SweepRun(name, config, presets, _scheme_of(set_here.values))


def _with_schemes(
    presets: Sequence[str], folder: Path, base: Sequence[Layer], later: Sequence[Layer], where: str
) -> Sequence[Layer]:
    """`base` with the schemes of presets in the place of its own; what they train, they train on the calibration text.

    later: the layers behind them, which may name another text. where: what a message calls the run.
    """
    schemes = [layer for preset in presets for layer in read_layers(preset, folder)]
    layers = [(origin, _without_scheme(values)) for origin, values in base]
    layers += [(origin, _scheme_of(values)) for origin, values in schemes]
    if any("finetune" in values for _, values in schemes):
        layers.append((where, {"finetune": {"dataset": _calibration_text([*base, *later])}}))
    return layers


def _without_scheme(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name not in SCHEME_SECTIONS}
    if isinstance(calibration := kept.get("calibration"), dict):
        kept["calibration"] = {key: value for key, value in calibration.items() if key not in SCHEME_CALIBRATION}
    return kept


def _scheme_of(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name in ("formats", *SCHEME_SECTIONS)}
    if isinstance(calibration := values.get("calibration"), dict):
        own = {key: value for key, value in calibration.items() if key in SCHEME_CALIBRATION}
        kept |= {"calibration": own} if own else {}
    return kept


def _calibration_text(layers: Sequence[Layer]) -> Any:
    """The calibration text that the layers name."""
    merged = Layers()
    for origin, values in layers:
        merged.merge({"calibration": values.get("calibration", {})}, origin)
    return merged.values["calibration"].get("dataset", CalibrationConfig().dataset.path)


def _refuse_duplicates(path: str, runs: Sequence[SweepRun]) -> None:
    counted = Counter(run.name for run in runs)
    for name, count in counted.items():
        if count > 1:
            raise ConfigError(f"{path}: {count} runs are named {name!r}: a name must hold every axis of its grid")
