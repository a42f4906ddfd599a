"""Runs on a cluster of two workers of this machine: the bytes of one process, whoever is killed."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clusters import ENVIRONMENT, config_of, kill_workers, needs_ray, ranks_of, the_worker
from holding import holding, is_held, let_go, wait_until_held
from stored_files import stored

from lqer.cli import main
from lqer.config import read_config
from lqer.config.cluster import ClusterConfig
from lqer.config.sweep import plan_sweep
from lqer.errors import ConfigError, RunFailedError, StoreError
from lqer.jobs.graph import Job, Schedule
from lqer.jobs.here import run_here
from lqer.jobs.on_ray import run_on_ray
from lqer.run import cluster as cluster_module
from lqer.run import pipeline
from lqer.run.cluster import _Told, fill_store, marked, sweep_on_cluster
from lqer.run.jobs import jobs_of
from lqer.run.preflight import check_run
from lqer.run.worker import Parts, all_jobs_of, perform
from lqer.store import locks
from lqer.store.keeper import Keeper
from lqer.store.store import Store

pytestmark = needs_ray


def told(config, device: str = "cpu", token: str = "", **cluster) -> str:
    """What a worker that sees the run's folder is told."""
    context = SimpleNamespace(device=torch.device(device))
    telling = _Told(ClusterConfig(address="auto", **cluster), (), token, Parts(1, 1, 1))
    return telling.of(config, SimpleNamespace(context=context), has_folder=True)


def test_relative_paths_are_those_of_the_process_that_was_started(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(experiment.folder)
    config = read_config(experiment.config, "run", ["--output_dir=relative", "--calibration.dataset=calibration.txt"])
    with marked(experiment.folder / "relative") as token:
        text = told(config, token=token)
        monkeypatch.chdir(tmp_path.parent)
        problem = perform("no such job", text, None).problem
    assert problem.startswith("KeyError")
    assert Path.cwd() == experiment.folder


@pytest.mark.parametrize(
    ("method", "store", "gang", "split"),
    [
        ("lqer-act", "driver", 1, "auto"),
        ("lqer-act", "shared", 1, "linears"),
        ("gptq", "driver", 1, "auto"),
        ("gptq", "shared", 2, "auto"),
    ],
)
def test_a_run_on_a_cluster_stores_the_bytes_of_one_process(experiment, address, method, store, gang, split):
    more = ["--quantize.low_rank.rank=0"] if method == "gptq" else experiment.task()[1]
    more += [f"--quantize.method={method}", '--evaluation.baselines=["original"]']
    there = [f"--cluster.store={store}", f"--cluster.gang={gang}", f"--cluster.split={split}"]
    fill_store(config_of(experiment, "there", address, *there, *more))
    pipeline.run(config_of(experiment, "here", None, *more))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")
    # What workers log is the run's, with node, process and job.
    logged = (experiment.folder / "there" / "run" / "run.log").read_text()
    linear = r" \d/4 mlp\.up_proj" if split == "linears" else r"( \d/\d)?"
    assert re.search(rf"{re.escape(platform.node())}/\d+, quantize-\w+{linear}: done in", logged)


def test_killed_workers_cost_the_jobs_in_hand(experiment, address, caplog):
    """Whatever they are at: statistics, blocks, windows, requests."""
    caplog.set_level("INFO", logger="lqer")
    stages = ("calibrate", "quantize", "downstream", "perplexity")
    _, task = experiment.task()
    killer = kill_workers(experiment.folder, *stages)
    fill_store(config_of(experiment, "there", address, *task), [holding(experiment.folder, *stages)])
    killer.join(1)
    assert not killer.is_alive()
    for stage in stages:
        assert re.search(rf"{stage}-\w+( \d+/\d+)?: its worker was lost; done again \(1 of 3\)", caplog.text), stage
    pipeline.run(config_of(experiment, "here", None, *task))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")


def test_a_killed_worker_costs_the_linear_in_hand(experiment, address, caplog):
    caplog.set_level("INFO", logger="lqer")
    overrides = ["--quantize.method=qera-exact", "--evaluation.baselines=[]"]
    killer = kill_workers(experiment.folder, "quantize")
    config = config_of(experiment, "there", address, "--cluster.split=linears", *overrides)
    fill_store(config, [holding(experiment.folder, "quantize")])
    killer.join(1)
    assert not killer.is_alive()
    lost = re.findall(r"quantize-\w+ (\d/4 \S+): its worker was lost; done again \(1 of 3\)", caplog.text)
    done = re.findall(r"quantize-\w+ (\d/4 \S+): done in", caplog.text)
    assert lost
    assert len(done) == len(set(done)) == 4 * 7
    pipeline.run(config_of(experiment, "here", None, *overrides))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")


@pytest.mark.parametrize(("victims", "reason"), [(ranks_of, "process 2 of 2 was killed"), (the_worker, "actor")])
def test_a_killed_process_of_a_gang_costs_the_block_in_hand(experiment, address, caplog, victims, reason):
    caplog.set_level("INFO", logger="lqer")
    overrides = ["--quantize.method=gptq", "--quantize.low_rank.rank=0", "--evaluation.baselines=[]"]
    killer = kill_workers(experiment.folder, "quantize", victims=victims)
    config = config_of(experiment, "there", address, "--cluster.gang=2", "--cluster.store=shared", *overrides)
    fill_store(config, [holding(experiment.folder, "quantize")])
    killer.join(1)
    assert not killer.is_alive()
    assert re.search(rf"quantize-\w+: its worker was lost; done again \(1 of 3\): .*{reason}", caplog.text)
    pipeline.run(config_of(experiment, "here", None, *overrides))
    assert stored(experiment.folder / "there") == stored(experiment.folder / "here")


@pytest.fixture
def two_nodes(tmp_path, monkeypatch) -> Iterator[tuple[Any, list[Any]]]:
    """A head without CPUs, and two nodes of one CPU, each with a folder for temporary files of its own."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # A node that is gone is noticed after three seconds instead of fifteen.
    noticing = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    size = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size, "_system_config": noticing})
    nodes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        size["env_vars"] = {"TMPDIR": str(tmp_path / name)}
        nodes.append(cluster.add_node(num_cpus=1, **size))
    try:
        yield cluster, nodes
    finally:
        cluster.shutdown()


def test_two_nodes_without_a_common_folder_of_which_one_is_lost_store_the_bytes_of_one_process(
    experiment, two_nodes, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO", logger="lqer")
    cluster, nodes = two_nodes
    output = experiment.folder / "there"
    told: list[str] = []

    def heard(schedule, texts, *rest):
        told.extend(texts.values())
        run_on_ray(schedule, texts, *rest)

    monkeypatch.setattr("lqer.run.cluster.run_on_ray", heard)

    # What the two nodes are at first: one gathers statistics, the other finds the original's losses.
    stages = ("calibrate", "perplexity")

    def lose_a_node() -> None:
        wait_until_held(experiment.folder, *stages)
        cluster.remove_node(nodes[1], allow_graceful=False)
        let_go(experiment.folder, *stages)

    loser = threading.Thread(target=lose_a_node, daemon=True)
    loser.start()
    fill_store(config_of(experiment, "there", cluster.address), [holding(experiment.folder, *stages)])
    loser.join(1)
    assert not loser.is_alive()
    assert "its worker was lost; done again" in caplog.text
    assert told
    assert not any(str(output) in text for text in told)
    pipeline.run(config_of(experiment, "here", None))
    assert stored(output) == stored(experiment.folder / "here")
    # A worker that is not killed takes its copies with it.
    assert not list((tmp_path / "first").glob("lqer-worker-*"))


def test_a_killed_run_goes_on_where_it_was(experiment, address):
    output = experiment.folder / "there"
    plugin = holding(experiment.folder, "quantize")
    command = experiment.command("run", f"--output_dir={output}", f"--cluster.address={address}", "--device=cpu")
    process = subprocess.Popen([*command, "--cluster.cpus_per_job=1", "--plugin", plugin], stdout=subprocess.DEVNULL)
    while not is_held(experiment.folder, "quantize"):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    fill_store(config_of(experiment, "there", address))
    pipeline.run(config_of(experiment, "here", None))
    assert stored(output) == stored(experiment.folder / "here")


def test_a_damaged_artifact_ends_the_run_with_its_line_and_is_not_tried_again(experiment, address, caplog):
    caplog.set_level("INFO", logger="lqer")
    output = experiment.folder / "there"
    checked = check_run(config_of(experiment, "there", None), lambda line: None)
    run_here(jobs_of(checked.experiment, 4).preparing, checked.store)
    damaged = next(output.glob("store/calibrate-*/block-00001.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFailedError, match=r"block-00001\.safetensors is damaged"):
        fill_store(config_of(experiment, "there", address))
    assert "done again" not in caplog.text


def test_a_mistake_that_only_workers_see_ends_the_run_with_its_line_and_is_not_tried_again(
    experiment, address, caplog, monkeypatch
):
    caplog.set_level("INFO", logger="lqer")
    tasks, downstream = experiment.task()

    def without_the_task(*arguments) -> None:
        # A node that lacks what the driver has.
        shutil.rmtree(tasks)
        run_on_ray(*arguments)

    monkeypatch.setattr("lqer.run.cluster.run_on_ray", without_the_task)
    with pytest.raises(RunFailedError, match=r"evaluation\.downstream\.data_dir must hold 'arc_easy/test\.jsonl'"):
        fill_store(config_of(experiment, "there", address, *downstream))
    assert "done again" not in caplog.text


def test_a_sweep_makes_once_what_its_runs_share(experiment, address, caplog):
    caplog.set_level("INFO", logger="lqer")
    sweep = experiment.folder / "sweep.toml"
    sweep.write_text('keep_going = true\n[grid]\nquantize.weight = ["w4", "w3", "w2"]\n')
    overrides = [f"--cluster.address={address}", "--cluster.cpus_per_job=1", "--device=cpu"]
    # As many parts as batches: two.
    overrides.append("--evaluation.perplexity.batch_size=64")
    plan = plan_sweep(sweep, experiment.config, "tag", overrides)
    killer = kill_workers(experiment.folder, "quantize")
    plugins = [holding(experiment.folder, "quantize")]
    outcome = sweep_on_cluster(plan, plan.runs[0].config.cluster, experiment.folder / "log", plugins)
    assert not outcome.failed
    assert [run.name for run in outcome.finished] == ["w4", "w3", "w2"]
    assert not outcome.not_started
    killer.join(1)
    assert "its worker was lost; done again" in caplog.text
    assert len(re.findall("calibrate: done in", caplog.text)) == 1
    # Each model's windows and each checkpoint's blocks are shared out.
    assert len(re.findall(r"perplexity-\w+ 2/2: done in", caplog.text)) == 1 + 2 * 3
    assert len(re.findall(r"quantize-\w+ 4/4: done in", caplog.text)) == 2 * 3
    for weight in ("w4", "w3", "w2"):
        results = json.loads((experiment.output / f"tag-{weight}" / "results.json").read_text())
        alone = pipeline.run(config_of(experiment, "here", None, f"--quantize.weight={weight}", overrides[-1]))
        assert results["perplexity"] == alone["perplexity"]
        assert "cluster" not in results["config"]
    # Nothing is left to do: no cluster is asked.
    again = sweep_on_cluster(plan, ClusterConfig(address="nowhere:1"), experiment.folder / "log")
    assert again.finished == outcome.finished


def test_runs_of_a_sweep_have_the_fewer_parts_the_more_there_are():
    shared, driver = (ClusterConfig(address="auto", store=store) for store in ("shared", "driver"))
    for cluster in (shared, driver):
        assert [cluster_module.parts_of(cluster, runs).blocks for runs in (0, 1, 3, 12, 100)] == [64, 64, 21, 5, 1]
    # The blocks are a gang's own to share out.
    assert cluster_module.parts_of(ClusterConfig(address="auto", gang=2), 1) == Parts(1, 64, 8, "blocks")
    # Linears stay together where blocks do, unless they are asked for.
    for split, (few, many) in {"auto": ("auto", "blocks"), "linears": ("linears",) * 2}.items():
        cluster = ClusterConfig(address="auto", split=split)
        assert [cluster_module.parts_of(cluster, runs).split for runs in (12, 100)] == [few, many]


@pytest.mark.parametrize(
    ("gpus", "share", "all_parts", "walking"),
    [(4, 1, 16, 4), (4, 2, 8, 2), (16, 1, 64, 8), (1, 2, 4, 1), (0, 1, 12, 3)],
)
def test_there_are_four_parts_for_each_worker_of_this_machine_and_one_of_what_reads_the_whole_model(
    monkeypatch, gpus, share, all_parts, walking
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    cluster = ClusterConfig(address="local", gpus_per_job=share, cpus_per_job=2)
    parts = cluster_module.parts_of(cluster, 1)
    assert parts == Parts(parts.blocks, parts.blocks, walking, "auto")
    assert parts.blocks == all_parts


@pytest.mark.parametrize(
    ("override", "quantizing", "measuring"),
    [
        ("--evaluation.blockwise=true", 4, 2),
        ("--calibration.keep=false", 2, 5),
        ("--quantize.method=gptq", 0, 5),
        ("--seed=0", 4, 5),
    ],
)
def test_what_reads_all_blocks_is_made_in_fewer_parts(experiment, override, quantizing, measuring):
    rank = ["--quantize.low_rank.rank=0"] if "gptq" in override else []
    config = config_of(experiment, "there", None, override, *rank, "--evaluation.baselines=[]")
    jobs = all_jobs_of(check_run(config, lambda line: None), Parts(8, 5, 2))
    assert sum("/" in job.name for job in jobs.quantizing) == quantizing
    assert sum("/" in job.name for job in jobs.measuring) == measuring


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    schedule = Schedule([Job("quantize-1", (), (), lambda store: None)])
    with pytest.raises(ConfigError, match=r'cluster.address: Ray is not installed \(pip install "lqer\[cluster\]"\)'):
        run_on_ray(schedule, {"quantize-1": ""}, perform, ClusterConfig(address="local"), Store(Path("nowhere")))


def test_a_worker_that_sees_another_folder_says_so(experiment):
    problem = perform("quantize-1", told(config_of(experiment, "there", None), token="none"), None).problem
    assert "must be the same folder on every node" in problem


def test_a_worker_whose_node_has_locks_of_its_own_says_so(experiment, monkeypatch):
    config = config_of(experiment, "there", None)
    with marked(Path(config.output_dir)) as token:
        monkeypatch.setattr(locks.FileLock, "acquire", lambda *arguments, **options: nullcontext())
        problem = perform("quantize-1", told(config, token=token), None).problem
    assert "whose locks do not exclude other nodes: set output_dir" in problem


def test_a_sweep_refuses_a_folder_whose_locks_exclude_nobody(experiment, monkeypatch):
    sweep = experiment.folder / "sweep.toml"
    sweep.write_text('[grid]\nquantize.weight = ["w4"]\n')
    plan = plan_sweep(sweep, experiment.config, "tag", [])
    monkeypatch.setattr(locks.FileLock, "acquire", lambda *arguments, **options: nullcontext())
    with pytest.raises(StoreError, match="locks exclude nobody: set output_dir"):
        sweep_on_cluster(plan, ClusterConfig(address="nowhere:1"), experiment.folder / "log")


def test_a_worker_with_another_kind_of_device_says_so(experiment):
    text = told(config_of(experiment, "there", None), device="cuda")
    assert perform("quantize-1", text, Keeper(experiment.folder / "kept")).problem == (
        "device: the driver computes on cuda, this node on cpu; start the driver on the same kind of device, "
        "or set device"
    )


@pytest.mark.parametrize(("gpus_per_job", "share"), [(2, 1.0), (1, 1.0), (0.25, 0.25)])
def test_a_worker_checks_its_share_of_a_card(experiment, monkeypatch, gpus_per_job, share):
    found: list[float] = []

    def check_run(config, say, card_share) -> None:
        found.append(card_share)
        raise ConfigError("refused")

    monkeypatch.setattr("lqer.run.worker.check_run", check_run)
    text = told(config_of(experiment, "there", None), gpus_per_job=gpus_per_job)
    assert perform("quantize-1", text, Keeper(experiment.folder / "kept")).problem == "refused"
    assert found == [share]


def test_chunks_and_a_cluster_exclude_each_other(experiment, capsys):
    assert main([str(experiment.config), "run", "--cluster.address=local", "--chunk", "1/2"], "") == 2
    assert "--chunk: a cluster shares out the blocks itself" in capsys.readouterr().err
