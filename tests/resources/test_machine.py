"""What the machine has, as the operating system reports it."""

from __future__ import annotations

import shutil

import psutil

from lqer.resources import machine


def test_free_disk_is_that_of_the_folders_file_system_whether_or_not_it_exists(tmp_path):
    free = machine.free_disk(tmp_path / "not" / "there" / "yet")
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1e9
    assert not (tmp_path / "not").exists()


def test_ram_is_the_machines_or_what_a_control_group_allows(tmp_path, monkeypatch):
    limit, unlimited = tmp_path / "memory.max", tmp_path / "other"
    limit.write_text("123456\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(unlimited), str(tmp_path / "absent")))
    assert machine.usable_ram() == psutil.virtual_memory().total
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(unlimited), str(limit)))
    assert machine.usable_ram() == 123456
