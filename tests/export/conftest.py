"""Checkpoints of tiny models, and templates of GGUF files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lqer.checkpoint.pack import DETAILS_FILE
from lqer.formats import MXInt, NumberFormat
from lqer.methods import LinearPlan, RoundingOnly
from lqer.store.files import hash_file, write_json
from lqer.store.names import block_file
from lqer.store.records import MANIFEST


@pytest.fixture(scope="session")
def rounded() -> Callable[..., LinearPlan]:
    """`rounded(weight, **changes)`: a plan that rounds to nearest and does nothing else, unless changed."""

    def plan(weight: NumberFormat, **changes: object) -> LinearPlan:
        settings = {
            "method": RoundingOnly(), "weight": weight, "activation": None, "bias": None, "rank": 0,
            "factor": MXInt(bits=8), "factor_axis": "reduction", **changes,
        }  # fmt: skip
        return LinearPlan(**settings)

    return plan


@pytest.fixture(scope="session")
def checkpoint_of(random_model, run_stages, rounded) -> Callable[..., Path]:
    """`checkpoint_of(weight, architecture="llama", **changes of the plan)`: the folder of a checkpoint, made once.

    Besides changes, `skip` names linears that stay as they are, and `sizes` changes the model's.
    """
    made: dict[str, Path] = {}

    def checkpoint(weight: NumberFormat, architecture: str = "llama", **changes: object) -> Path:
        key = repr((weight, architecture, changes))
        if key not in made:
            skip, sizes = changes.pop("skip", ()), changes.pop("sizes", {})
            model = random_model(architecture, **sizes)
            made[key] = run_stages(model, rounded(weight, **changes), skip=skip).checkpoint.path
        return made[key]

    return checkpoint


@pytest.fixture
def edited(tmp_path) -> Callable[..., Path]:
    """`edited(checkpoint, name, change)`: a copy of a checkpoint whose JSON file `name` was changed in place."""

    def copy(checkpoint: Path, name: str, change: Callable[[dict], object]) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(checkpoint, folder)
        content = json.loads((folder / name).read_text())
        change(content)
        write_json(folder / name, content)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = hash_file(folder / name)
        write_json(folder / MANIFEST, manifest)
        return folder

    return copy


@pytest.fixture
def mixed(tmp_path) -> Callable[..., Path]:
    """`mixed(checkpoint, other, linear)`: the first checkpoint of one model with that linear of the second."""

    def join(checkpoint: Path, other: Path, linear: str) -> Path:
        folder = tmp_path / "mixed"
        shutil.copytree(checkpoint, folder)
        changed = [DETAILS_FILE, block_file(int(linear.split(".")[2]))]
        details, others = (json.loads((one / DETAILS_FILE).read_text()) for one in (checkpoint, other))
        details["linears"][linear] = others["linears"][linear]
        write_json(folder / DETAILS_FILE, details)
        kept, taken = (load_file(one / changed[1]) for one in (checkpoint, other))
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith(linear)}
        save_file(kept | {name: taken[name] for name in taken if name.startswith(linear)}, folder / changed[1])
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"] |= {name: hash_file(folder / name) for name in changed}
        write_json(folder / MANIFEST, manifest)
        return folder

    return join


@pytest.fixture
def template(tmp_path) -> Path:
    """A GGUF file with the hyperparameters of `random_model("llama")` and no tensor of use."""
    path = tmp_path / "template.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(80)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{index}" for index in range(80)])
    writer.add_token_scores([0.0] * 80)
    writer.add_token_types([1] * 80)
    writer.add_file_type(2)
    writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
