"""The files of a model: which are read, which are refused, and that the fingerprint covers them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file

from lqer.errors import ModelError
from lqer.models.files import Header, hub_headers, largest_block, read_header, reported_as
from lqer.models.source import load_model, load_model_config, resolve_model, stored_block_bytes

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(random_model, letter_tokenizer, tmp_path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "model")
    letter_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def move_weights(folder: Path, shard: str) -> None:
    """Leave an index that names one shard, a path relative to the folder."""
    tensors = load_file(folder / WEIGHTS)
    (folder / shard).parent.mkdir(exist_ok=True)
    shutil.move(folder / WEIGHTS, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is damaged"), ("{}", "is damaged"), ("[]", "is damaged"), ("null", "is damaged"),
    ('{"weight_map": {"a": 3}}', "is damaged"), ('{"weight_map": {}}', "names no files"),
    ('{"weight_map": {"a": "absent.safetensors"}}', "names absent.safetensors, which does not exist"),
    ('{"weight_map": {"a": "weights.bin"}}', "names weights.bin: only .safetensors files are read, never a pickle"),
    ('{"weight_map": {"a": "../other/1.safetensors"}}', "outside the model's folder"),
    ('{"weight_map": {"a": "/etc/1.safetensors"}}', "outside the model's folder"),
])  # fmt: skip
def test_an_index_that_is_damaged_or_names_other_files_is_refused(folder, text, message):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_shards_in_a_sub_folder_are_read_and_count_towards_the_fingerprint(folder):
    expected = load_file(folder / WEIGHTS)["model.norm.weight"]
    move_weights(folder, "weights/1.safetensors")
    source = resolve_model(str(folder))
    assert torch.equal(load_model(source, torch.float32, CPU).model.norm.weight, expected)
    tensors = load_file(folder / "weights/1.safetensors")
    tensors["model.norm.weight"] *= 3
    save_file(tensors, folder / "weights/1.safetensors", metadata={"format": "pt"})
    assert resolve_model(str(folder)).fingerprint != source.fingerprint


@pytest.mark.parametrize("name", [
    "chat_template.jinja", "merges.txt", "vocab.txt", "qwen.tiktoken", "spiece.model", "generation_config.json",
    "additional_chat_templates/rag.jinja", "vocab.bpe", "vocabulary",
])  # fmt: skip
def test_every_file_that_loading_may_read_counts_towards_the_fingerprint(folder, name):
    found = {resolve_model(str(folder)).fingerprint}
    (folder / name).parent.mkdir(exist_ok=True)
    for text in ("one", "another"):
        (folder / name).write_text(text)
        found.add(resolve_model(str(folder)).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "modeling.py", ".gitattributes"])
def test_a_file_that_nothing_reads_does_not_count(folder, name):
    before = resolve_model(str(folder)).fingerprint
    (folder / name).write_text("something")
    assert resolve_model(str(folder)).fingerprint == before


def test_files_next_to_a_gguf_file_count_too(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"one")
    before = resolve_model(str(tmp_path / "a.gguf")).fingerprint
    (tmp_path / "generation_config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "a.gguf")).fingerprint != before


def test_a_link_to_nothing_is_named(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to a missing file"):
        resolve_model(str(folder))
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors is not a file"):
        resolve_model(str(folder))


def test_a_linked_folder_of_the_hubs_cache_is_read(folder, tmp_path):
    blobs = folder.rename(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert resolve_model(str(tmp_path / "snapshot")).fingerprint == resolve_model(str(blobs)).fingerprint


def test_an_adapter_next_to_the_base_model_is_refused_with_what_to_do(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has a LoRA adapter .*: merge it .* \(peft: merge_and_unload\)"):
        resolve_model(str(folder))


def test_the_state_of_a_distributed_training_run_is_refused(folder):
    (folder / "shard-00000-model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="holds a distributed checkpoint"):
        resolve_model(str(folder))


@pytest.mark.parametrize("damage", ["cut", "longer than the file", "no header"])
def test_a_header_that_lies_is_refused_by_the_files_name(folder, damage):
    whole = (folder / WEIGHTS).read_bytes()
    damaged = {"cut": whole[:-1], "longer than the file": (2**60).to_bytes(8, "little") + whole[8:], "no header": b"x"}
    (folder / WEIGHTS).write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
        read_header(folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
        load_model(resolve_model(str(folder)), torch.float32, CPU)


@pytest.mark.parametrize("entry", [
    {"hidden_size": 63}, {"num_hidden_layers": "2"}, {"dtype": "nope"}, {"num_attention_heads": 0}, {"vocab_size": -1},
    {"model_type": "unheard-of"}, {"model_type": [1]}, {"transformers_weights": "other.safetensors"},
    {"quantization_config": [1]},
])  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused_in_one_line(folder, entry):
    config = json.loads((folder / "config.json").read_text()) | entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        load_model(resolve_model(str(folder)), torch.float32, CPU)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "somebody/kernel"])
def test_an_attention_that_needs_a_package_or_code_of_the_hub_is_not_used(folder, key, value):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve_model(str(folder))
    assert load_model_config(source)._attn_implementation is None
    assert load_model(source, torch.float32, CPU).config._attn_implementation == "sdpa"


def test_a_librarys_error_of_many_lines_becomes_one_line():
    with pytest.raises(ModelError, match=r"^model: it broke: KeyError: 'a'$"), reported_as("model: it broke"):
        raise KeyError("a")
    with pytest.raises(ModelError, match=r"^model: it broke: one two$"), reported_as("model: it broke"):
        raise ValueError("one\n\n  two\n")
    with pytest.raises(MemoryError), reported_as("model: it broke"):
        raise MemoryError


def test_headers_of_the_hub_are_those_of_the_files(folder, monkeypatch):
    def from_folder(repository: str, revision: str | None) -> SafetensorsRepoMetadata:
        assert (repository, revision) == ("someone/model", "main")
        header = read_header(folder / WEIGHTS)
        tensors = {
            name: TensorInfo(dtype=header.dtypes[name], shape=list(shape), data_offsets=(0, 0))
            for name, shape in header.shapes.items()
        }
        return SafetensorsRepoMetadata(None, False, {}, {WEIGHTS: SafetensorsFileMetadata({}, tensors)})

    monkeypatch.setattr("lqer.models.files.get_safetensors_metadata", from_folder)
    assert hub_headers("someone/model", "main") == [read_header(folder / WEIGHTS)]


def test_the_largest_block_is_counted_over_all_files_in_its_stored_dtypes():
    codes = Header({"model.layers.0.x.weight": (4, 6), "model.layers.0.x.scale": (2,)},
                   {"model.layers.0.x.weight": "F8_E4M3", "model.layers.0.x.scale": "F32"})  # fmt: skip
    others = Header(
        {"model.layers.0.experts.7.up": (3,), "model.layers.1.x.weight": (5,), "model.norm": (99, 99)},
        {"model.layers.0.experts.7.up": "BF16", "model.layers.1.x.weight": "F32", "model.norm": "F32"},
    )
    assert largest_block([codes, others]) == 4 * 6 + 2 * 4 + 3 * 2
    assert largest_block([Header({"norm": (2,)}, {"norm": "F32"})]) == 0


def test_a_models_largest_block_is_known_from_its_headers(folder):
    tensors = load_file(folder / WEIGHTS)
    blocks = [[x.nbytes for name, x in tensors.items() if name.startswith(f"model.layers.{i}.")] for i in range(2)]
    assert stored_block_bytes(resolve_model(str(folder))) == max(map(sum, blocks)) > 0
