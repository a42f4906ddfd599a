"""Shared fixtures: the folder of real models and texts, where there is one, and tiny random models of every family.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import os
import signal
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

# Before anything imports the kernels: where there is no GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import quantize, resident
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from lqer.formats import MXInt
from lqer.methods import LinearPlan, LqerAct
from lqer.models.structure import block_linears, find_blocks, prepare_model
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings, requested_statistics
from lqer.store.store import Artifact, Store, Workspace

# Real models, texts and tasks that are too large for the repository.
ASSETS = Path(os.environ.get("LQER_TEST_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
CPU = torch.device("cpu")
BATCH_SIZE = 2
ERROR_TOKENS = 24

SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that logits differ visibly between tokens.
    "initializer_range": 0.2,
    **SPECIAL_TOKENS,
}
OPT_SIZES = {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    **SPECIAL_TOKENS,
}
GPT2_SIZES = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows of attention are shorter than the windows of text, so that they are seen to matter.
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], Mapping[str, Any]]] = {
    "llama": (LlamaConfig, SIZES),
    "mistral": (MistralConfig, {**SIZES, "sliding_window": 6}),
    "qwen3": (Qwen3Config, {**SIZES, "head_dim": 16}),
    "opt": (OPTConfig, {**OPT_SIZES, "word_embed_proj_dim": 32}),
    "opt-350m": (OPTConfig, {**OPT_SIZES, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt-neox": (GPTNeoXConfig, {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    "gemma3": (
        Gemma3TextConfig,
        {**SIZES, "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
         "layer_types": GEMMA_LAYERS},
    ),
    "phi3": (Phi3Config, SIZES),
    "qwen3.5": (
        Qwen3_5TextConfig,
        {**SIZES, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "gpt2": (GPT2Config, {**GPT2_SIZES, **SPECIAL_TOKENS}),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="record the artifacts of tests/golden anew")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: needs a package index")
    config.addinivalue_line("markers", "figures: looks at the figures of a run")


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """Ctrl-C is heard here and in the processes that are started: a shell in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def assets() -> Path:
    """models/, text/ and tasks/; skips where the folder is absent."""
    if not (ASSETS / "models").is_dir():
        pytest.skip(f"no real models and texts at {ASSETS} (set LQER_TEST_ASSETS)")
    return ASSETS


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = ["<s>", "</s>", "<pad>", *string.ascii_letters, *string.digits, " ", ".", ","]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


@pytest.fixture(scope="session")
def random_model() -> Callable[..., PreTrainedModel]:
    """`random_model(architecture, **changes)`: a random float32 model as `load_model` hands it out."""

    def build(architecture: str, **changes: Any) -> PreTrainedModel:
        config_class, sizes = ARCHITECTURES[architecture]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**{**sizes, **changes}))
        prepare_model(model)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases start as ones and zeros, which nobody would miss.
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def windows_WT() -> Tensor:
    """Five windows of twelve token ids: batches of two leave a smaller one over."""
    return torch.randint(3, SIZES["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Stages:
    """A model, which nobody may change, and what the stages made of it."""

    model: PreTrainedModel
    calibration: Artifact
    checkpoint: Artifact

    @property
    def details(self) -> dict[str, Any]:
        return self.checkpoint.json("lqer.json")


@pytest.fixture(scope="session")
def plan() -> LinearPlan:
    """8-bit weights and rank-8 factors, activations and biases as they are."""
    mxint8 = MXInt(bits=8)
    return LinearPlan(
        method=LqerAct(), weight=mxint8, activation=None, bias=None, rank=8, factor=mxint8, factor_axis="reduction"
    )


@pytest.fixture(scope="session")
def run_stages(letter_tokenizer, windows_WT, tmp_path_factory) -> Callable[..., Stages]:
    """`run_stages(model, plan, attention=None, skip=(), other_plans={})`: calibrate and quantize, in its own store."""

    def run(
        model: PreTrainedModel,
        plan: LinearPlan,
        attention: Any = None,
        skip: Collection[str] = (),
        other_plans: Mapping[str, LinearPlan] = MappingProxyType({}),
    ) -> Stages:
        store = Store(tmp_path_factory.mktemp("store"))
        name, blocks = find_blocks(model)
        linears = [f"{name}.{i}.{linear}" for i, block in enumerate(blocks) for linear in block_linears(block)]
        plans = {one: None if one in skip else other_plans.get(one, plan) for one in linears}
        settings = QuantizeSettings(plans, attention, seed=0)
        opened = resident(model)

        def make_calibration(workspace: Workspace) -> None:
            calibrate(
                workspace,
                opened,
                CalibrationText(windows_WT, BATCH_SIZE, ERROR_TOKENS),
                requested_statistics(settings.plans),
            )

        def make_checkpoint(workspace: Workspace) -> None:
            quantize(workspace, opened, letter_tokenizer, stored_statistics(calibration), settings)

        calibration = store.obtain("calibrate", 0, make_calibration)
        return Stages(model, calibration, store.obtain("quantize", 0, make_checkpoint))

    return run


@pytest.fixture(scope="session")
def round_mxint() -> Callable[..., Tensor]:
    """`round_mxint(x, bits, axis=-1, block=16)`: MXINT in float64, block by block, from its definition."""

    def rounded(x: Tensor, bits: int, axis: int = -1, block: int = 16) -> Tensor:
        chunks = []
        for chunk in x.double().split(block, dim=axis):
            largest = chunk.abs().amax(axis, keepdim=True)
            step = 2.0 ** (largest.log2().ceil() - (bits - 1))
            codes = (chunk / step).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
            chunks.append(torch.where(largest > 0, codes * step, 0.0))
        return torch.cat(chunks, dim=axis)

    return rounded


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def stages(architecture, random_model, run_stages, plan) -> Stages:
    """Every architecture through the stages with `plan`."""
    return run_stages(random_model(architecture), plan)
