"""Hands a finished run to an experiment tracker. Neither tracker is imported unless the configuration asks for it."""

from __future__ import annotations

import importlib

from lqer.config.schema import TrackingConfig
from lqer.errors import ConfigError
from lqer.report.results import Results


def track(settings: TrackingConfig, results: Results) -> None:
    """Log configuration and headline numbers as one run (wandb and trackio share this interface).

    Raises ConfigError if the tracker is not installed.
    """
    try:
        backend = importlib.import_module(settings.backend)
    except ImportError:
        raise ConfigError(
            f"tracking.backend: {settings.backend!r} is not installed (pip install {settings.backend})"
        ) from None
    run = backend.init(project=settings.project, name=results["tag"], config=results["config"])
    numbers: dict[str, float] = {f"bits/{key}": value for key, value in results["bits"].items()}  # type: ignore[misc]
    for row in results["perplexity"]:
        for kind in ("original", "plain", "quantized"):
            if row[kind] is not None:  # type: ignore[literal-required]
                numbers[f"perplexity/{row['dataset']}/{row['protocol']}/{kind}"] = row[kind]  # type: ignore[literal-required]
    for task in results["downstream"]:
        numbers[f"{task['task']}/{task['metric']}"] = task["quantized"]
    run.log(numbers)
    run.finish()
