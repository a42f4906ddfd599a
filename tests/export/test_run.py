"""An export as a whole: OUT appears complete and verified or not at all, whatever fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lqer.cli import console
from lqer.errors import ExportError, ModelError
from lqer.export import Dense, Gptq, Source, export
from lqer.export.card import CARD_FILE, front_matter
from lqer.export.run import RECORD_FILE
from lqer.export.shards import Shards
from lqer.formats import Int, MXInt

WEIGHT = MXInt(bits=4, block_size=32)
INT4 = Int(bits=4, block_size=32, symmetric=True)


@pytest.fixture
def checkpoint(checkpoint_of):
    return checkpoint_of(WEIGHT)


def test_the_folder_holds_the_model_a_card_and_a_record(checkpoint, tmp_path):
    out = tmp_path / "new" / "out"
    check = export(checkpoint, Dense(), out)
    names = {"README.md", "config.json", "generation_config.json", "lqer_export.json", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == {*names, "tokenizer.json", "tokenizer_config.json"}
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["check"] == asdict(check)
    assert record["checkpoint"] == Source(checkpoint).key
    card = (out / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "- largest difference of a logit: 0, of" in card
    assert "- expected of these files: the checkpoint's logits to the last bit" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("is_reachable", [True, False])
def test_the_card_names_the_original_on_the_hub_and_its_licence(checkpoint, tmp_path, monkeypatch, is_reachable):
    def download(name: str, file: str, **options: object) -> str:
        assert (name, file) == ("some/model", "README.md")
        if not is_reachable:
            raise OSError("no network")
        (tmp_path / file).write_text("---\nlicense: apache-2.0\n---\n# Model\n")
        return str(tmp_path / file)

    monkeypatch.setattr("lqer.export.card.hf_hub_download", download)
    written = tmp_path / "card.md"
    source = Source(checkpoint)
    source.results = {"model": {"name": "some/model"}}
    written.write_text(f"---\n{front_matter(source, Dense()).to_yaml()}\n---\n")
    data = ModelCard.load(written).data
    assert (data.base_model, data.base_model_relation, data.quantized_by) == ("some/model", "quantized", "lqer")
    assert data.library_name == "transformers"
    assert {"lqer", "mxint"} <= set(data.tags)
    assert data.license == ("apache-2.0" if is_reachable else None)


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(ExportError, match=r"missing: no such folder$"):
        Source(tmp_path / "missing")
    with pytest.raises(ExportError, match=r"has no lqer\.json: .* nor a run that is finished$"):
        Source(tmp_path)


def test_files_that_compute_something_else_are_deleted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("lqer.export.dense.effective_weight", lambda linear: linear.weight_OI.dequantize() * 1.001)
    with pytest.raises(ExportError, match="do not compute what the checkpoint does: logits differ by up to"):
        export(checkpoint, Dense(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read_back_are_deleted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Dense, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, Dense(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_card_says_not_verified(checkpoint_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Gptq, "readers", ("no_such_reader",))
    assert export(checkpoint_of(INT4), Gptq(), tmp_path / "out") is None
    card = (tmp_path / "out" / CARD_FILE).read_text()
    assert "Not verified: no_such_reader, which reads such files, was not installed." in card


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_left_alone(checkpoint, tmp_path, kind):
    out = tmp_path / "out"
    make = {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}
    make[kind]()
    with pytest.raises(ExportError, match="already exists: choose a new name"):
        export(checkpoint, Dense(), out)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_checkpoints_own_folder_is_refused_also_through_a_link(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(checkpoint)
    for out in (checkpoint / "out", tmp_path / "link" / "out"):
        with pytest.raises(ExportError, match="lies in the checkpoint's own folder"):
            export(checkpoint, Dense(), out)


def test_two_exports_to_one_folder_do_not_meet(checkpoint, tmp_path):
    with FileLock(tmp_path / ".out.lock"), pytest.raises(ExportError, match="another export is writing it"):
        export(checkpoint, Dense(), tmp_path / "out")


def test_a_killed_export_leaves_no_folder_and_the_next_one_clears_up(checkpoint, tmp_path):
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from lqer.export import Dense, export, shards
def killed(*_):
    os.kill(os.getpid(), {int(signal.SIGKILL)})
shards.Shards.close = killed
export(Path({str(checkpoint)!r}), Dense(), Path({str(out)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.partial").exists()
    assert not out.exists()
    export(checkpoint, Dense(), out, check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, edited, tmp_path):
    copy = edited(checkpoint, "config.json", lambda _: None)
    file = copy / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelError, match=r"block-00001\.safetensors is damaged"):
        export(copy, Dense(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_quantized_linear_is_refused(checkpoint, edited, tmp_path):
    copy = edited(checkpoint, "lqer.json", lambda details: details["linears"].clear())
    with pytest.raises(ExportError, match="has no quantized linear"):
        export(copy, Dense(), tmp_path / "out")


def test_large_models_are_written_in_shards(tmp_path):
    shards = Shards(tmp_path, shard_bytes=100)
    tensors = {f"t{index}": torch.full((10,), float(index)) for index in range(5)}
    for name, tensor in tensors.items():
        shards.add({name: tensor})
    shards.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    with pytest.raises(ExportError, match="two tensors"):
        shards.add({"t1": torch.zeros(1)})


class TestCommand:
    @pytest.fixture
    def lqer(self, monkeypatch, capsys):
        def call(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["lqer", "export", *map(str, arguments)])
            return console(), *capsys.readouterr()

        return call

    def test_it_takes_the_settings_of_the_target_and_a_text(self, lqer, checkpoint, tmp_path):
        text, out = tmp_path / "text.txt", tmp_path / "out"
        text.write_text("abc, " * 100)
        status, printed, said = lqer(checkpoint, "dense", out, "--dtype=bfloat16", "--text", text, "--device=cpu")
        assert (status, printed) == (0, f"{out}\n")
        assert "on 7 windows of 64 tokens (text.txt)" in said
        assert load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["dense"], "export: expected CHECKPOINT TARGET OUT; found"),
            (["desne", "OUT"], "did you mean 'dense'?"),
            (["dense", "OUT", "--dtyp=float16"], "unknown key 'dtyp' of export target \"dense\"; allowed: dtype"),
            (["dense", "OUT", "--dtype=int8"], "dtype 'int8' is not one of"),
            (["dense", "OUT", "--check"], "--check: a setting of a target has the form --key=value"),
            (["dense", "OUT", "--text"], "--text: expected a value"),
            (["dense", "OUT", "--text=absent.txt"], "--text: absent.txt cannot be read"),
        ],
    )
    def test_mistakes_are_one_line_with_status_2(self, lqer, checkpoint, tmp_path, arguments, line):
        words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
        status, _, said = lqer(checkpoint, *words)
        assert status == 2
        assert said.startswith("error: ")
        assert line in said
        assert said.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
