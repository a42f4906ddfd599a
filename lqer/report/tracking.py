"""Logs a finished run to an experiment tracker, which is imported only if the configuration asks for it."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

from lqer.config.schema import TrackingConfig
from lqer.errors import ConfigError
from lqer.results import Results


def require_tracker(settings: TrackingConfig) -> None:
    """Raise ConfigError if the tracker is not installed; it is not imported."""
    name = settings.backend
    if name not in sys.modules and find_spec(name) is None:
        raise ConfigError(f"tracking.backend: {name!r} is not installed (pip install {name})")


def track(settings: TrackingConfig, results: Results) -> None:
    """Log configuration and headline numbers as one run (wandb and trackio share this interface)."""
    backend = importlib.import_module(settings.backend)
    run = backend.init(project=settings.project, name=results["tag"], config=results["config"])
    numbers = {
        "bits/average": results["bits"]["average"],
        "bits/weight": results["bits"]["weight"],
        "bits/low_rank": results["bits"]["low_rank"],
        "bits/metadata": results["bits"]["metadata"],
    }
    for row in results["perplexity"]:
        measured = {"original": row["original"], "rtn": row["rtn"], "quantized": row["quantized"]}
        for kind, perplexity in measured.items():
            if perplexity is not None:
                numbers[f"perplexity/{row['dataset']}/{row['protocol']}/{kind}"] = perplexity
        info = row["divergence"]
        if info is not None and (kl_mean := info["quantized"]["kl_mean"]) is not None:
            numbers[f"kl/{row['dataset']}/{row['protocol']}/top{info['top_k']}/quantized"] = kl_mean
    for task in results["downstream"]:
        numbers[f"{task['task']}/{task['metric']}"] = task["quantized"]
    run.log(numbers)
    run.finish()
