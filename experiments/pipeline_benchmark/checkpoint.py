"""Random checkpoints of the shapes of real models, and texts for them: nothing is downloaded.

Weights are bfloat16, in several safetensors files. Texts are random words of the vocabulary, so that every row of the
embedding is used and inputs of the first block span their space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

BLOCKS_PER_FILE = 4
HEAD_SIZE = 64
WEIGHT_SIZE = 0.02
WORDS_PER_LINE = 16
SPECIAL = ("<s>", "<unk>")


@dataclass(frozen=True)
class Shape:
    """heads: of queries; by default as many as HEAD_SIZE gives. kv_heads: of keys and values; by default the same."""

    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int
    heads: int | None = None
    kv_heads: int | None = None

    def config(self) -> LlamaConfig:
        heads = self.heads or max(self.hidden // HEAD_SIZE, 1)
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            dtype=torch.bfloat16,
            architectures=["LlamaForCausalLM"],
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linears of one block, in the order of their calls."""
        config = self.config()
        narrow = self.hidden // config.num_attention_heads * (config.num_key_value_heads or 1)
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def weights(self) -> int:
        """Of the blocks' linears, the embedding and the head."""
        return (
            self.blocks * sum(out * into for out, into in self.linears().values()) + 2 * self.vocabulary * self.hidden
        )


# Blocks of 70B and 405B have the vocabulary of the small ones: what lies outside the blocks is not measured there.
SHAPES = {
    "tiny": Shape(64, 96, 2, 300),
    "small": Shape(512, 1408, 4, 1000),
    "llama-2-7b": Shape(4096, 11008, 32, 32000, heads=32),
    "llama-2-70b-block": Shape(8192, 28672, 1, 32000, heads=64, kv_heads=8),
    "llama-3.1-405b-block": Shape(16384, 53248, 1, 32000, heads=128, kv_heads=8),
}


def write_model(
    folder: Path, shape: Shape, tokenizer: PreTrainedTokenizerBase, device: torch.device | None = None
) -> int:
    """Write a random model and its tokenizer, a few blocks at a time. Returns the bytes of its weights.

    device: where the random numbers are made; on a GPU that is a hundred times as fast.
    """
    folder.mkdir(parents=True)
    shape.config().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator(device or torch.device("cpu")).manual_seed(0)
    parts = list(_parts(shape))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _random(size, generator) for name, size in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    return total


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of each file."""
    table = (shape.vocabulary, shape.hidden)
    yield {"model.embed_tokens.weight": table, "model.norm.weight": (shape.hidden,), "lm_head.weight": table}
    block: dict[str, tuple[int, ...]] = {
        **{f"{name}.weight": size for name, size in shape.linears().items()},
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    for first in range(0, shape.blocks, BLOCKS_PER_FILE):
        here = range(first, min(first + BLOCKS_PER_FILE, shape.blocks))
        yield {f"model.layers.{index}.{name}": size for index in here for name, size in block.items()}


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    values = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return values.normal_(0.0, WEIGHT_SIZE, generator=generator).cpu()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, from 1 on."""
    vocabulary = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One id per word; the words are w2, w3, ... by their ids, after the special tokens."""
    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[0], unk_token=SPECIAL[1]
    )


def write_text(path: Path, vocabulary: int, tokens: int, seed: int) -> None:
    """Write random words, one token each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), vocabulary, (tokens,), generator=generator).tolist()
    lines = (ids[start : start + WORDS_PER_LINE] for start in range(0, tokens, WORDS_PER_LINE))
    path.write_text("\n".join(" ".join(f"w{index}" for index in line) for line in lines) + "\n")
