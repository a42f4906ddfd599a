"""The files that start a sweep on Kubernetes and on rented machines: whole, and with commands that lqer takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lqer.config.cluster import ClusterConfig
from lqer.config.sweep import plan_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"


def cluster_of(words: list[str], experiment, output: str) -> ClusterConfig:
    """That of every run of a command `lqer sweep`, whose configuration stands for the one that it names."""
    command, what, sweep, _, tag, *overrides = words
    assert (command, what, tag) == ("lqer", "sweep", "atlas")
    runs = plan_sweep(SWEEPS / Path(sweep).name, experiment.config, tag, overrides).runs
    assert {run.config.output_dir for run in runs} == {output}
    (cluster,) = {run.config.cluster for run in runs}
    return cluster


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((SWEEPS / "kuberay.yaml").read_text())["spec"]


@pytest.fixture
def task() -> Any:
    return yaml.safe_load((SWEEPS / "skypilot.yaml").read_text())


def pods(job: Any) -> dict[str, Any]:
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {name: part["template"]["spec"] for name, part in (("head", cluster["headGroupSpec"]), ("worker", workers))}


def test_the_job_on_kubernetes_is_a_sweep_whose_files_travel(job, experiment):
    cluster = cluster_of(shlex.split(job["entrypoint"]), experiment, "/out")
    assert (cluster.address, cluster.shares_folder) == ("auto", False)


def test_every_pod_has_the_volumes_that_it_mounts_and_the_head_alone_the_claim(job):
    for pod in pods(job).values():
        there = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for part in ("containers", "initContainers") for one in pod[part]
                   for mount in one["volumeMounts"]}  # fmt: skip
        assert mounted == there
    claims = {
        name: [one for one in pod["volumes"] if "persistentVolumeClaim" in one] for name, pod in pods(job).items()
    }
    assert {name: len(found) for name, found in claims.items()} == {"head": 1, "worker": 0}


def test_pods_are_alike_in_what_names_and_bytes_depend_on(job):
    ((head,), (worker,)) = (pod["containers"] for pod in pods(job).values())
    for part in ("image", "resources", "env"):
        assert head[part] == worker[part]
    folders = {variable["value"] for variable in head["env"]}
    (made,) = ({*one["command"][2:]} for one in pods(job)["head"]["initContainers"])
    assert folders == made


def test_the_head_has_the_sweep_where_the_command_says(job):
    (container,) = pods(job)["head"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    sweep, config = shlex.split(job["entrypoint"])[2:4]
    assert {str(Path(sweep).parent), str(Path(config).parent)} <= mounts
    told = re.findall(r"--from-file=(\S+)", (SWEEPS / "kuberay.yaml").read_text())
    assert told == [Path(sweep).name, Path(config).name]


def test_the_first_rented_node_starts_a_sweep_whose_files_travel(task, experiment, tmp_path):
    """Its script is run with commands in place of SkyPilot's and ours, which note what they are called with."""
    home = tmp_path / "home"
    for path, text in {
        "lqer/bin/activate": f"PATH={tmp_path}:$PATH\n",
        "sky_templates/ray/start_cluster": "#!/bin/sh\necho ray >> $HOME/calls\n",
    }.items():
        (home / path).parent.mkdir(parents=True)
        (home / path).write_text(text)
        (home / path).chmod(0o755)
    (tmp_path / "lqer").write_text('#!/bin/sh\necho "lqer $*" >> $HOME/calls\n')
    (tmp_path / "lqer").chmod(0o755)
    calls = []
    for rank in range(task["num_nodes"]):
        environment = {**task["envs"], "HOME": str(home), "PATH": "/usr/bin:/bin", "SKYPILOT_NODE_RANK": str(rank)}
        subprocess.run(["bash", "-euc", task["run"]], env=environment, check=True)
        calls.append((home / "calls").read_text().splitlines())
        (home / "calls").unlink()
    assert calls[1:] == [["ray"]] * (task["num_nodes"] - 1)
    started, command = calls[0]
    assert started == "ray"
    cluster = cluster_of(shlex.split(command), experiment, str(home / "out"))
    assert (cluster.address, cluster.shares_folder) == ("127.0.0.1:6379", False)
