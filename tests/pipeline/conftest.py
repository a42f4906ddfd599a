"""A tiny random model, its tokenizer and two texts on disk: a whole experiment that runs in seconds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one id per byte, and an end-of-text token for lm-eval to start from."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def save_tiny_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@dataclass(frozen=True)
class Experiment:
    """A folder with a model, two texts and a config that uses them."""

    folder: Path
    config: Path

    @property
    def output(self) -> Path:
        return self.folder / "checkpoints"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "experiments/pipeline.py"), str(self.config), *arguments]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path) -> Experiment:
    text = "\n".join(topics[name] for name in sorted(topics))
    (tmp_path / "calibration.txt").write_text(text[:20_000])
    (tmp_path / "evaluation.txt").write_text(text[20_000:26_000])
    config = tmp_path / "tiny.toml"
    config.write_text(f"""
extends = "{ROOT / "configs/formats/mxint.toml"}"
model = "{tiny_model}"
output_dir = "{tmp_path / "checkpoints"}"
device = "cpu"

[calibration]
dataset = "{tmp_path / "calibration.txt"}"
num_samples = 8
seq_len = 64
batch_size = 2
error_tokens = 64

[quantize]
weight = "w4"
activation = "x8"
attention = "x8"
low_rank = {{ rank = 8, format = "x8" }}

[evaluation]
baselines = ["original", "plain"]

[evaluation.perplexity]
datasets = ["{tmp_path / "evaluation.txt"}"]
seq_len = 64
batch_size = 4
""")
    return Experiment(tmp_path, config)
