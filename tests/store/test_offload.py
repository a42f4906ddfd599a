"""Tensors beyond a budget of memory are in files, with the same values; nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lqer.store.offload import Offload, parse_bytes


def open_files_under(folder: Path) -> int:
    """How many mappings of this process are of files that were created under the folder."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_tensors_stay_in_memory_up_to_the_budget_and_their_bytes_become_free_again(tmp_path):
    offload = Offload(1000, tmp_path)
    first = offload.empty([100], torch.float32)
    second = offload.empty([150], torch.float32)
    assert open_files_under(tmp_path) == 0
    third = offload.empty([1], torch.float32)
    assert open_files_under(tmp_path) == 1
    del second
    offload.empty([150], torch.float32)
    assert open_files_under(tmp_path) == 1
    del third
    assert open_files_under(tmp_path) == 0
    assert first.shape == (100,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_on_disk_keeps_its_values_when_its_pages_are_released(tmp_path, dtype):
    offload = Offload(0, tmp_path)
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = offload.empty(x.shape, dtype)
    stored.copy_(x)
    offload.release_pages()
    assert torch.equal(stored, x)
    stored[1] += 1
    offload.release_pages()
    assert torch.equal(stored[1], x[1] + 1)
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_itself_within_the_budget_and_a_copy_on_disk_beyond_it(tmp_path):
    offload = Offload(1000, tmp_path)
    first, second = torch.randn(150), torch.randn(150)
    assert offload.kept(first) is first
    on_disk = offload.kept(second)
    assert on_disk is not second
    assert torch.equal(on_disk, second)
    assert open_files_under(tmp_path) == 1
    del first, on_disk
    assert open_files_under(tmp_path) == 0
    assert offload.kept(second) is second
    assert Offload().kept(second) is second


def test_zeros_are_zeros_in_memory_and_on_disk(tmp_path):
    for offload in (Offload(), Offload(0, tmp_path)):
        assert not offload.zeros([4, 4], torch.float64).any()


def test_a_tensor_without_elements_needs_no_file(tmp_path):
    assert Offload(0, tmp_path / "absent").empty([0, 4], torch.float32).shape == (0, 4)
    assert not (tmp_path / "absent").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '400 bytes under {tmp_path}'"):
        Offload(0, tmp_path).empty([100], torch.float32)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(4000, 4000), ("4000", 4000), ("4GB", 4 * 10**9), ("3.5 GiB", 3.5 * 2**30), ("512mib", 2**29), ("1 kB", 1000)],
)
def test_sizes_are_read(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "4 apples", "-1", "1e9", True, 2.5, None])
def test_other_spellings_of_sizes_are_refused(size):
    with pytest.raises(ValueError, match='must be bytes or a size such as "4GB" or "512MiB"'):
        parse_bytes(size)
