"""Runs and sweeps go where [cluster] says, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import lqer
from lqer.cli import main
from lqer.config import read_config
from lqer.config.sweep import SweepPlan, plan_sweep
from lqer.run import cluster as cluster_module
from lqer.run import engine, pipeline
from lqer.run.sweep import SweepOutcome


class StoppedError(Exception):
    """Nothing is run."""


def by_call(experiment) -> None:
    lqer.quantize("some/model", str(experiment.config), tag="run", cluster={"address": "local"})


def by_command(experiment) -> None:
    main([str(experiment.config), "run", "--cluster.address=local"], "")


@pytest.mark.parametrize("ask", [by_call, by_command])
def test_a_cluster_makes_what_a_run_needs_before_the_run_itself(experiment, monkeypatch, ask: Callable[[Any], None]):
    seen: list[str] = []

    def run_chunk(config, chunk) -> None:
        seen.append("run" if config.ray is None else "run on a cluster")
        raise StoppedError

    monkeypatch.setattr(cluster_module, "fill_store", lambda config, plugins: seen.append(config.ray.address))
    monkeypatch.setattr(pipeline, "run_chunk", run_chunk)
    # The command answers with a line.
    with suppress(StoppedError):
        ask(experiment)
    assert seen == ["local", "run"]


@pytest.mark.parametrize("address", ["off", "auto"])
def test_a_sweep_is_run_where_its_configuration_says(experiment, monkeypatch, address):
    plan = plan_sweep("atlas", experiment.config, "atlas", [f"--cluster.address={address}"]).part("cheap-cpu")
    asked: list[tuple[str, Any]] = []

    def outcome(where: str, *rest: Any) -> SweepOutcome:
        asked.append((where, rest))
        return SweepOutcome(plan.runs, {}, ())

    def on_cluster(plan: SweepPlan, cluster, log_folder, plugins) -> SweepOutcome:
        return outcome(cluster.address, log_folder.name, plugins)

    monkeypatch.setattr(cluster_module, "sweep_on_cluster", on_cluster)
    monkeypatch.setattr(engine, "run_sweep", lambda plan, execute: outcome("off", execute.plugins))
    assert engine.sweep(plan, "atlas", ["its.py"]).finished == plan.runs
    expected = {"off": [("off", (("its.py",),))], "auto": [("auto", ("atlas-table", ["its.py"]))]}
    assert asked == expected[address]


def test_without_a_cluster_a_run_is_the_pipelines(experiment, monkeypatch):
    monkeypatch.setattr(pipeline, "run_chunk", lambda config, chunk: (config, chunk))
    config = read_config(experiment.config, "run", [])
    assert engine.run(config) == (config, None)
