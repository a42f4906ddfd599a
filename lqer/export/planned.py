"""The exports that a configuration asks for, and why one of them cannot be written, as far as that is known before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lqer.config import Config
from lqer.errors import ConfigError
from lqer.export.base import Target
from lqer.export.run import make_target, refuse_unsupported
from lqer.export.source import LinearSpec, Outline, modules_of
from lqer.formats import NumberFormat
from lqer.methods import Plans
from lqer.models.source import ModelSource, load_model_config
from lqer.models.summary import ModelSummary
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation


def planned_targets(config: Config) -> list[Target]:
    """The targets of [export]. Raises ConfigError for an unknown kind, setting or value."""
    found = []
    for index, described in enumerate(() if config.export is None else config.export.targets):
        settings: dict[str, Any] = {"kind": described} if isinstance(described, str) else dict(described)
        try:
            found.append(make_target(settings.pop("kind", ""), settings))
        except ConfigError as error:
            raise ConfigError(f"export.targets.{index}: {str(error).removeprefix('export: ')}") from None
    return found


def check_planned(
    config: Config,
    source: ModelSource,
    summary: ModelSummary,
    plans: Plans,
    choices: Mapping[str, Sequence[NumberFormat]],
) -> list[Target]:
    """The targets of [export], each of which can hold the checkpoint as far as plans tell.

    choices: the formats of linears that have several. Values are known only afterwards: a target may still refuse a
    scale or a zero point. Raises ConfigError or ExportError.
    """
    targets = planned_targets(config)
    if not targets:
        return []
    specs = _planned_specs(config, summary, plans)
    outline = Outline(specs, modules_of(load_model_config(source)))
    for target in targets:
        target.check_inputs()
        if not choices:
            refuse_unsupported(outline, target)
            continue
        for name, spec in specs.items():
            possible = [replace(spec, format=one) for one in choices.get(name, (spec.format,))]
            if all(target.unsupported(one) is not None for one in possible):
                refuse_unsupported(Outline({name: possible[0]}, outline.modules), target)
    return targets


def _planned_specs(config: Config, summary: ModelSummary, plans: Plans) -> dict[str, LinearSpec]:
    rotation = config.quantize.model_transform
    # Which linears QuaRot rotates at run time is found by running the model; the last of each block is one of them.
    last = {name.removeprefix(f"{summary.blocks_name}.").split(".")[0]: name for name in summary.linears}
    rotated = set(last.values()) if rotation is not None and rotation.online else set()
    return {
        name: LinearSpec(
            name,
            plan.weight,
            *summary.linears[name],
            # Under a budget ranks are not known yet, but that there are some.
            rank=1 if plan.rank is None else plan.rank,
            activation=plan.activation,
            is_rotated=plan.transform is not None,
            online=OnlineRotation(hadamard) if name in rotated else None,
        )
        for name, plan in plans.items()
        if plan is not None
    }
