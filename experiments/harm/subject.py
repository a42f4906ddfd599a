"""The model that harm is located in, whole and in memory, and how far a changed one is from it on other text.

Shapes: W windows, T tokens of a window, N = T - 1 positions of a window, B windows of a batch, O out_features, I
in_features, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from measures.texts import text_spec
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lqer.config.evaluation import DivergenceConfig
from lqer.data.datasets import calibration_windows, load_rows
from lqer.evaluation.divergence import divergences, original_distributions
from lqer.evaluation.perplexity import batch_nlls, concat_windows
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, load_tokenizer, pick_device, pick_dtype, resolve_model
from lqer.models.structure import block_linears
from lqer.stages.gather import CalibrationText
from lqer.stages.rotate import rotate_in_place
from lqer.store.offload import Offload

SEED, ERROR_TOKENS = 0, 1
# Of a window's positions, counted by the tokens that the model has seen: the first token alone, ten more, the others.
POSITIONS = {"1": slice(0, 1), "2 to 11": slice(1, 11), "others": slice(11, None)}
Parameters = Mapping[str, Tensor]  # by full name


@dataclass(frozen=True)
class Harm:
    """perplexity, and KL(original || model) in nats at every position of every window."""

    perplexity: float
    kl_WN: Tensor

    @property
    def kl(self) -> float:
        return self.kl_WN.mean().item()

    def by_position(self) -> list[float]:
        return [self.kl_WN[:, positions].mean().item() for positions in POSITIONS.values()]


class Ruler:
    """The windows of one text, and what the original model says of every token of them."""

    def __init__(self, original: PreTrainedModel, windows_WT: Tensor):
        self.windows = windows_WT.split(1)
        self.originals = list(original_distributions(original, self.windows, DivergenceConfig().top_k, progress=False))

    @torch.inference_mode()
    def harm(self, model: PreTrainedModel) -> Harm:
        kl, nlls = [], []
        for window_BT, original in zip(self.windows, self.originals, strict=True):
            logits_BTV = model(input_ids=window_BT.to(model.device), use_cache=False).logits
            kl.append(divergences(original, logits_BTV[0, :-1])[0].cpu())
            nlls.append(batch_nlls(logits_BTV, window_BT).cpu())
        return Harm(torch.cat(nlls).mean().exp().item(), torch.stack(kl))


@dataclass(frozen=True)
class Subject:
    """The model on its device, the text that statistics are of, and the texts that it is judged on, by their names.

    unseen_WT: windows behind the calibration text in its file.
    """

    opened: OpenedModel
    text: CalibrationText
    unseen_WT: Tensor
    rulers: Mapping[str, Ruler]

    def weights(self) -> dict[str, Tensor]:
        """Those of the linears of the decoder blocks, (O, I)."""
        return {
            f"{self.opened.name}.{i}.{name}.weight": linear.weight.detach()
            for i, block in enumerate(self.opened.blocks)
            for name, linear in block_linears(block).items()
        }

    def harms(self, parameters: Parameters) -> list[Harm]:
        """With some parameters replaced, on every text."""
        with replaced(self.opened.model, parameters):
            return [ruler.harm(self.opened.model) for ruler in self.rulers.values()]

    def harms_but_for_first_tokens(self, weights: Parameters) -> list[Harm]:
        """With some linears' weights replaced for all but the first token of every window."""
        own = self.weights()
        with exact_at_first(self.opened.model, {name: own[name] for name in weights}):
            return self.harms(weights)


@contextmanager
def replaced(module: nn.Module, parameters: Parameters) -> Iterator[None]:
    """While active, the module computes with these parameters, which have the dtypes of its own."""
    own = {name: module.get_parameter(name) for name in parameters}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = parameters[name]
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


@contextmanager
def exact_at_first(module: nn.Module, weights: Parameters) -> Iterator[None]:
    """While active, linears compute the first token of every sequence with these weights."""

    def hook(weight_OI: Tensor) -> Callable[..., None]:
        def correct(linear: nn.Linear, inputs: tuple[Tensor], output_BTO: Tensor) -> None:
            output_BTO[:, 0] = functional.linear(inputs[0][:, 0], weight_OI, linear.bias)

        return correct

    hooks = [
        module.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook(weight_OI))
        for name, weight_OI in weights.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True)
class Setting:
    """What a subject is opened with, as the command line names it."""

    model: str
    calibration: str
    texts: Sequence[str]
    num_samples: int
    seq_len: int
    max_windows: int | None
    batch_size: int
    rotated: bool = False
    unseen: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def open(self) -> Subject:
        """Raises LqerError for a model or text that cannot be read."""
        device, source = pick_device(self.device), resolve_model(self.model)
        dtype, tokenizer = pick_dtype(self.dtype, source, device), load_tokenizer(source)
        rows = load_rows(text_spec(self.calibration), "calibration")
        count, asked_by = self.num_samples + self.unseen, "--num-samples + --unseen"
        windows_WT = calibration_windows(tokenizer, rows, count, self.seq_len, asked_by)
        model = load_model(source, torch.float32 if self.rotated else dtype, device)
        if self.rotated:
            started = time.monotonic()
            rotate_in_place(model, device, SEED, online=False)
            nn.Module.to(model, dtype)
            print(f"rotated in {time.monotonic() - started:.1f} s", file=sys.stderr)
        rulers = {}
        for text in self.texts:
            name, _, path = text.rpartition("=")
            spec = text_spec(path)
            read = load_rows(spec, "evaluation")
            of_text_WT = concat_windows(tokenizer, read.rows, read.joiner, self.seq_len)[: self.max_windows]
            rulers[name or spec.label] = Ruler(model, of_text_WT)
        opened = OpenedModel.resident(model, device, Offload())
        calibration = CalibrationText(windows_WT[: self.num_samples], self.batch_size, ERROR_TOKENS)
        return Subject(opened, calibration, windows_WT[self.num_samples :], rulers)
