"""What the machine has, as the operating system reports it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch

from lqer.resources import machine


def test_free_disk_is_that_of_the_folders_file_system_whether_or_not_it_exists(tmp_path):
    free = machine.free_disk(tmp_path / "not" / "there" / "yet")
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1e9
    assert not (tmp_path / "not").exists()


def test_a_worker_that_shares_a_card_has_its_share_of_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80_000))
    found = [machine.read_machine(torch.device("cuda"), tmp_path, *share).device for share in ((), (0.25,))]
    assert found == [80_000, 20_000]
    assert machine.read_machine(torch.device("cpu"), tmp_path, 0.25).device is None


@pytest.mark.parametrize(
    ("own", "limited", "file"),
    [
        ("0::/job_7/step_0\n", "job_7/step_0", "memory.max"),
        ("0::/job_7/step_0\n", "job_7", "memory.max"),
        ("0::/somewhere/on/the/host\n", "", "memory.max"),
        ("4:cpu,cpuacct:/job\n9:memory:/slurm/job_7\n", "memory/slurm", "memory.limit_in_bytes"),
        ("9:memory:/elsewhere\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_ram_is_what_the_control_groups_of_a_job_allow(tmp_path, monkeypatch, own, limited, file):
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    assert machine.usable_ram() == psutil.virtual_memory().total
    (tmp_path / "cgroup" / limited).mkdir(parents=True)
    (tmp_path / "cgroup" / limited / file).write_text("123456\n")
    assert machine.usable_ram() == 123456


def test_a_control_group_without_a_limit_allows_all_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert machine.usable_ram() == psutil.virtual_memory().total
