"""A block's tensors are read when they are needed, so that a large block is never in memory as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import random_mixture
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqer.models import reading
from lqer.models.coded import Encoded, Mxfp4
from lqer.models.loaders import OpenedModel
from lqer.models.reading import TORCH_DTYPES, Place, StoredTensor, StoredTensors, read_in_place, read_tensors
from lqer.models.source import resolve_model
from lqer.models.streaming import open_model
from lqer.nn.stacked import Piece

CPU = torch.device("cpu")
SIZE = 4 * 8 * 4
NAMES = [f"experts.{index}.{linear}.weight" for index in range(10) for linear in ("down_proj", "gate_proj")]


@pytest.fixture
def wanted(tmp_path) -> dict[str, StoredTensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 8, generator=generator) for name in NAMES}
    save_file(tensors, tmp_path / "model.safetensors")
    return {name: StoredTensor(Place(tmp_path / "model.safetensors", name), SIZE) for name in NAMES}


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The bytes of the stored tensors of each reading, in order."""
    found: list[int] = []

    def counted(wanted, pinned=False):
        tensors = read_tensors(wanted, pinned)
        found.append(sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, Tensor)))
        return tensors

    monkeypatch.setattr(reading, "read_tensors", counted)
    return found


def test_a_large_block_is_filled_in_parts_of_bounded_size(wanted, reads, monkeypatch):
    monkeypatch.setattr(reading, "READ_WHOLE_BYTES", 20 * SIZE - 1)
    monkeypatch.setattr(reading, "READ_AT_ONCE_BYTES", 3 * SIZE)
    tensors, expected = StoredTensors(wanted, ahead=True), load_file(wanted[NAMES[0]].place.file)
    assert not reads
    for name in sorted(wanted):
        assert torch.equal(tensors.pop(name), expected[name])
    assert reads == [3 * SIZE] * 6 + [2 * SIZE]
    assert len(tensors) == 0


def test_a_small_block_is_read_whole_before_it_is_used(wanted, reads, monkeypatch):
    monkeypatch.setattr(reading, "READ_WHOLE_BYTES", 20 * SIZE)
    tensors = StoredTensors(wanted, ahead=True)
    assert reads == [20 * SIZE]
    assert {name: tensors.pop(name).shape for name in sorted(tensors)} == dict.fromkeys(NAMES, (4, 8))
    assert reads == [20 * SIZE]


def test_a_tensor_that_is_asked_for_is_read_alone_and_not_held(wanted, reads):
    tensors = StoredTensors(wanted)
    assert NAMES[3] in tensors
    assert "experts.99.gate_proj.weight" not in tensors
    assert tensors.get("experts.99.gate_proj.weight") is None
    assert not reads
    assert torch.equal(tensors[NAMES[3]], tensors[NAMES[3]])
    assert reads == [SIZE, SIZE]


def test_of_a_stack_one_expert_is_read_for_both_of_its_halves(tmp_path, reads):
    """Gate and up of three experts lie in one tensor."""
    stack, file = torch.randn(3, 8, 5), tmp_path / "stack.safetensors"
    save_file({"gate_up_proj": stack}, file)
    wanted = {
        f"{expert}.{name}": StoredTensor(
            Place(file, "gate_up_proj", expert), 8 * 5 * 4, piece=Piece(expert, half, False, True)
        )
        for expert in range(3)
        for half, name in enumerate(("gate", "up"))
    }
    tensors = StoredTensors(wanted)
    assert torch.equal(tensors["1.gate"], stack[1, :4])
    assert torch.equal(tensors["1.up"], stack[1, 4:])
    assert reads == [8 * 5 * 4]


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3", "qwen3_moe", "granitemoe"])
def test_values_are_those_that_a_block_is_filled_with(kind, dtype, tmp_path, monkeypatch):
    """Experts stacked or one by one, some parameters kept in float32."""
    random_mixture(kind).bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "READ_AT_ONCE_BYTES", 5000)
    opened = opened_from(tmp_path, dtype)
    indices = range(len(opened.blocks))
    filled = {
        f"{index}.{name}": tensor.clone()
        for index, block in opened.loader.load_each(opened.blocks, indices, CPU)
        for name, tensor in block.state_dict().items()
    }
    values = {
        f"{index}.{name}": tensor
        for index, found in opened.loader.values_of_each(opened.blocks, indices)
        for name, tensor in found.items()
    }
    assert values.keys() == filled.keys()
    assert {name: tensor.dtype for name, tensor in values.items()} == {name: t.dtype for name, t in filled.items()}
    assert all(torch.equal(values[name], tensor) for name, tensor in filled.items())


def test_codes_of_an_expert_are_read_without_those_of_the_others(tmp_path):
    codes, scales = torch.arange(2 * 4 * 3 * 16, dtype=torch.uint8).view(2, 4, 3, 16), torch.full((2, 4, 3), 127)
    file = tmp_path / "codes.safetensors"
    save_file({"down_proj_blocks": codes, "down_proj_scales": scales.to(torch.uint8)}, file)
    piece, places = Piece(1, None, True, True), [Place(file, f"down_proj_{part}", 1) for part in ("blocks", "scales")]
    stored = StoredTensor(places[0], 4 * 3 * 16, piece=piece, scheme=Mxfp4(), scales=places[1])
    found = StoredTensors({"1.down_proj.weight": stored})["1.down_proj.weight"]
    assert isinstance(found, Encoded)
    assert found.codes.untyped_storage().nbytes() == codes[1].nbytes
    whole = Mxfp4().decode(codes, scales.to(torch.uint8), piece)
    assert torch.equal(found.decode(torch.float32), whole)


def opened_from(folder: Path, dtype: torch.dtype | str) -> OpenedModel:
    return open_model(resolve_model(str(folder)), dtype, CPU)


def test_tensors_read_in_place_are_those_that_the_library_reads(tmp_path):
    """Of every dtype and shape, also none and of no values."""
    codes = torch.arange(240, dtype=torch.uint8)
    tensors = {str(dtype): codes.remainder(2).bool() if dtype is torch.bool else codes.clone().view(dtype)
               for dtype in TORCH_DTYPES.values()}  # fmt: skip
    tensors |= {"scalar": torch.tensor(3.5), "nothing": torch.empty(0, 7), "matrix": torch.randn(6, 5)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    found = read_in_place(file, [Place(file, name) for name in tensors], pinned=False)
    expected = load_file(file)
    for place, read in found.items():
        assert (read.dtype, read.shape) == (expected[place.name].dtype, expected[place.name].shape)
        as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (read, expected[place.name])]
        assert torch.equal(*as_bytes)


def test_an_expert_of_a_stack_is_read_in_place_alone(tmp_path):
    stack_EOI, file = torch.randn(5, 4, 3), tmp_path / "model.safetensors"
    save_file({"before": torch.ones(7), "stack": stack_EOI}, file)
    (found_1OI,) = read_in_place(file, [Place(file, "stack", expert=3)], pinned=False).values()
    assert torch.equal(found_1OI, stack_EOI[3:4])
