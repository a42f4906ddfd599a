"""Published quantizers, each run by its own library at its defaults, on the windows of tokens that it is given.

Every quantizer changes the model that it gets; afterwards the weights of its linears hold what its library dequantizes
them to, so that plain PyTorch evaluates them. All quantize the linears of the decoder blocks to asymmetric integers in
groups along a row, and leave embedding and head alone.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.errors import ConfigError

HEAD = "lm_head"
AUTO_ROUND_ITERATIONS = 200
# Samples that AutoRound runs through the model at a time, and draws for a step: its own default.
AUTO_ROUND_BATCH = 8


@dataclass(frozen=True)
class PeerTask:
    """What a peer quantizes. Model on the CPU in the dtype of the run; windows_WT int64."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows_WT: Tensor
    bits: int
    group_size: int
    iterations: int
    device: torch.device

    def average_bits(self, scale_bits: int, zero_bits: int) -> float:
        """Bits per weight of dense codes, and of a scale and a zero point per group."""
        return self.bits + (scale_bits + zero_bits) / self.group_size


Quantizer = Callable[[PeerTask], float]


@dataclass(frozen=True)
class Peer:
    """packages: the versions that were tried, as pip takes them. quantize: returns the average bits as stored."""

    module: str
    packages: tuple[str, ...]
    quantize: Quantizer

    def require(self, name: str) -> dict[str, str]:
        """The versions of the peer's packages. Raises ConfigError if it cannot be imported."""
        install = f"pip install {' '.join(self.packages)}"
        try:
            importlib.import_module(self.module)
            return {package: metadata.version(package) for package in map(distribution, self.packages)}
        except ImportError as error:
            raise ConfigError(f"peer {name} cannot be imported ({error}): {install}, in an environment apart") from None


def distribution(requirement: str) -> str:
    return requirement.partition("==")[0]


def auto_round(task: PeerTask) -> float:
    """AutoRound: signed gradient descent on the rounding and the range of every weight, block by block.

    In bfloat16, whatever the model's dtype. Tokens of its samples are all attended to and count in its loss, but for
    the last of each.
    """
    from auto_round import AutoRound

    # A mask of ones spares AutoRound from guessing which tokens are padding.
    batches = [
        {"input_ids": windows_BT, "attention_mask": torch.ones_like(windows_BT)}
        for windows_BT in task.windows_WT.split(AUTO_ROUND_BATCH)
    ]
    n_windows, seq_len = task.windows_WT.shape
    rounder = AutoRound(
        task.model,
        task.tokenizer,
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        iters=task.iterations,
        dataset=batches,
        nsamples=n_windows,
        seqlen=seq_len,
        batch_size=AUTO_ROUND_BATCH,
        device_map=str(task.device),
    )
    rounder.quantize()
    # Its checkpoints hold float16 scales and zero points in as many bits as a code.
    return task.average_bits(16, task.bits)


def gptq(task: PeerTask) -> float:
    """GPTQ of llm-compressor: activation order, damping 0.01, min-max ranges, errors of earlier blocks seen."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(task, [GPTQModifier(config_groups=_groups(task), ignore=[HEAD])])


def awq(task: PeerTask) -> float:
    """AWQ of llm-compressor: scales of channels from a grid of 20, then rounding to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return _oneshot(task, [AWQModifier(), QuantizationModifier(config_groups=_groups(task), ignore=[HEAD])])


def _groups(task: PeerTask) -> dict[str, dict]:
    weights = {"num_bits": task.bits, "type": "int", "symmetric": False, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": {**weights, "group_size": task.group_size}}}


def _oneshot(task: PeerTask, recipe: list) -> float:
    from compressed_tensors.quantization import forward_quantize
    from llmcompressor import oneshot

    n_windows, seq_len = task.windows_WT.shape
    samples: Any = [{"input_ids": tokens_T} for tokens_T in task.windows_WT]
    oneshot(
        model=task.model,
        tokenizer=task.tokenizer,
        dataset=DataLoader(samples),
        num_calibration_samples=n_windows,
        max_seq_length=seq_len,
        recipe=recipe,
    )
    scale_bits = 0
    linear: Any
    for linear in task.model.modules():
        if scheme := getattr(linear, "quantization_scheme", None):
            weight_OI = forward_quantize(linear, linear.weight, "weight", scheme.weights)
            linear.weight = nn.Parameter(weight_OI, requires_grad=False)
            scale_bits = 8 * linear.weight_scale.element_size()
    # Zero points are packed like codes.
    return task.average_bits(scale_bits, task.bits)


def hqq(task: PeerTask) -> float:
    """HQQ: zero points by half-quadratic splitting under a sparse norm of the weights' error; reads no text."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size)
    meta_bits = 0
    for name, linear in task.model.named_modules():
        if isinstance(linear, nn.Linear) and name != HEAD:
            quantized = HQQLinear(linear.to(task.device), config, del_orig=False, device=str(task.device))
            weight_OI = quantized.dequantize().to(linear.weight)
            meta_bits = sum(8 * quantized.meta[part].element_size() for part in ("scale", "zero"))
            linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    return task.average_bits(meta_bits, 0)


LLM_COMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0")
PEERS = {
    "auto-round": Peer("auto_round", ("auto-round==0.16.1",), auto_round),
    "gptq": Peer("llmcompressor", LLM_COMPRESSOR, gptq),
    "awq": Peer("llmcompressor", LLM_COMPRESSOR, awq),
    "hqq": Peer("hqq.core.quantize", ("hqq==0.2.8.post1",), hqq),
}
