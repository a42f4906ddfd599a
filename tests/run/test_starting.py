"""The files that start a cluster elsewhere: what they run is a sweep that is there, with keys that are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lqer.config import read_config

SWEEPS = Path(__file__).parents[2] / "sweeps"


def entrypoint(name: str) -> list[str]:
    """The words of the one command of ours in a file, without what its shell fills in."""
    task = yaml.safe_load((SWEEPS / name).read_text())
    text = task["run"] if "run" in task else task["spec"]["entrypoint"]
    for key, value in task.get("envs", {}).items():
        text = text.replace(f"${key}", value)
    (command,) = re.findall(r"lqer sweep .*", text)
    return shlex.split(command)


@pytest.mark.parametrize("name", ["kuberay.yaml", "skypilot.yaml"])
def test_what_runs_is_a_sweep_whose_files_travel_to_its_node(name):
    _, _, sweep, _, _, *overrides = entrypoint(name)
    assert (SWEEPS / Path(sweep).name).is_file()
    config = read_config(SWEEPS.parent / "configs/template/llama-2-7b.toml", "tag", overrides)
    assert not config.cluster.shares_folder


def test_pods_of_kubernetes_are_of_one_kind():
    cluster = yaml.safe_load((SWEEPS / "kuberay.yaml").read_text())["spec"]["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    for key in ("image", "resources", "env"):
        assert head[key] == worker[key]
    # Only the head has the claim; whatever a container mounts, its pod has.
    for pod in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        spec = pod["template"]["spec"]
        containers = [*spec["containers"], *spec["initContainers"]]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
    assert "out" not in {mount["name"] for mount in worker["volumeMounts"]}
