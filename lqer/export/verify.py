"""The comparison that ends an export: the files, read back by the target's own library, against the checkpoint.

Both run in emulation on the same windows of tokens; the largest difference of a logit over 4 windows and the difference
of perplexity over 20 must stay within the bound of what the target says of itself. What a target cannot carry, the
rounding of inputs and of attention's operands, is switched off in the checkpoint for the comparison, and the perplexity
with it is measured besides.

Shapes: W windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lqer.checkpoint.load import load_quantized
from lqer.errors import DataError, DifferentExportError
from lqer.evaluation.logits import window_logits
from lqer.evaluation.perplexity import concat_perplexity, concat_windows
from lqer.export.base import Closeness, Target, Written
from lqer.export.source import Source
from lqer.models.files import LONGEST_REASON
from lqer.nn.linear import QuantizedLinear

WINDOWS_OF_LOGITS, WINDOWS_OF_PERPLEXITY = 4, 20
WINDOW_TOKENS, SAMPLED_TOKENS = 256, 128
BATCH = 2


@dataclass(frozen=True)
class Bound:
    """The largest difference of a logit, as a fraction of the largest logit, and of perplexity, as a fraction of it."""

    logits: float
    perplexity: float


BOUNDS: dict[Closeness, Bound] = {
    "exact": Bound(0.0, 0.0),
    "reordered": Bound(2e-5, 1e-5),
    "rounded": Bound(2e-2, 5e-3),
    "other inputs": Bound(1e-1, 1e-2),
}


class Text(NamedTuple):
    """What windows are taken from, and how the card calls it."""

    name: str
    content: str


def read_text(path: Path) -> Text:
    """A file's text. Raises DataError if it is none."""
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text: {path} cannot be read as UTF-8 text: {error}") from None


@dataclass(frozen=True)
class Check:
    """What was measured. Perplexities are those of the windows alone."""

    windows: int
    tokens_per_window: int
    text: str
    dtype: str
    largest_logit: float
    logit_difference: float
    perplexity: float  # of the checkpoint, without what the target cannot carry
    exported_perplexity: float
    whole_perplexity: float  # of the checkpoint as it is


@dataclass(frozen=True)
class Outcome:
    """What a target made of a checkpoint, and what was measured of it: None if nothing was, for the reason given."""

    written: Written
    check: Check | None
    unverified: str | None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Outcome:
        check = None if record["check"] is None else Check(**record["check"])
        return cls(Written(record["closeness"], tuple(record["notes"])), check, record["not_verified"])

    def record(self) -> dict[str, Any]:
        return {
            "closeness": self.written.closeness,
            "notes": list(self.written.notes),
            "check": None if self.check is None else asdict(self.check),
            "not_verified": self.unverified,
        }


def check_export(
    target: Target, written: Written, source: Source, folder: Path, text: Text | None, device: torch.device
) -> Check:
    """Compare the files in `folder` with the checkpoint.

    text: what the windows are of; None: the checkpoint itself writes them. Raises DifferentExportError if the files
    cannot be read back, or differ by more than the bound.
    """
    dtype = target.dtype_of_check(source)
    checkpoint = load_quantized(source.path, device, dtype, "emulate", verify=False)
    windows_WT, of_text = _windows(checkpoint, source, text)
    drops = target.drops_attention(source) or any(not target.keeps_activation(spec) for spec in source.specs.values())
    whole = _perplexity(checkpoint, windows_WT) if drops else math.nan
    if drops:
        _without_run_time_rounding(checkpoint, target, source)
    expected_WTV, expected = _logits(checkpoint, windows_WT), _perplexity(checkpoint, windows_WT)
    del checkpoint
    exported = _loaded(target, folder, dtype)
    nn.Module.to(exported, device)
    found_WTV, found = _logits(exported, windows_WT), _perplexity(exported, windows_WT)
    check = Check(
        windows=len(windows_WT),
        tokens_per_window=windows_WT.shape[1],
        text=of_text,
        dtype=str(dtype).removeprefix("torch."),
        largest_logit=float(expected_WTV.abs().max()),
        logit_difference=float((expected_WTV - found_WTV).abs().max()),
        perplexity=expected,
        exported_perplexity=found,
        whole_perplexity=whole if drops else expected,
    )
    _refuse_difference(check, written.closeness)
    return check


def _refuse_difference(check: Check, closeness: Closeness) -> None:
    bound = BOUNDS[closeness]
    # Written so that a NaN, of which any comparison is false, is refused.
    if not check.logit_difference <= bound.logits * check.largest_logit:
        raise DifferentExportError(
            f"the files do not compute what the checkpoint does: logits differ by up to {check.logit_difference:.3g}, "
            f"and the bound is {bound.logits * check.largest_logit:.3g} ({closeness})"
        )
    if not abs(check.exported_perplexity - check.perplexity) <= bound.perplexity * check.perplexity:
        raise DifferentExportError(
            f"the files do not compute what the checkpoint does: perplexity {check.exported_perplexity:.6g}, not "
            f"{check.perplexity:.6g} ({closeness})"
        )


def _loaded(target: Target, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            # These are warnings of one library to another.
            warnings.simplefilter("ignore", FutureWarning)
            return target.load(folder, dtype)
    except MemoryError:
        raise
    except Exception as error:  # each library has errors of its own, and any means that the files are of no use
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}"
        said = f"{target.kind} files cannot be read back (--no-check keeps them): {reason}"
        raise DifferentExportError(said) from error


def _without_run_time_rounding(model: PreTrainedModel, target: Target, source: Source) -> None:
    """Switch off, in place, the roundings that the target does not carry."""
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        # A rotated linear has the one that rounds inside it.
        linear = name.removesuffix(".inner")
        if isinstance(module, QuantizedLinear) and not target.keeps_activation(source.specs[linear]):
            module.activation = None
    if target.drops_attention(source):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def _windows(model: PreTrainedModel, source: Source, text: Text | None) -> tuple[Tensor, str]:
    """windows_WT, int64, and a description of their text."""
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW_TOKENS))
    if text is None:
        return _sampled(model, min(SAMPLED_TOKENS, longest)), "sampled from the checkpoint, seed 0"
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    windows_WT = concat_windows(tokenizer, [text.content], "", min(WINDOW_TOKENS, longest))
    return windows_WT[:WINDOWS_OF_PERPLEXITY], text.name


@torch.inference_mode()
def _sampled(model: Any, tokens: int) -> Tensor:
    """Windows (W, T) that the model writes by itself: in its own distribution, so that an error shows."""
    special = model.generation_config
    first = next((found for found in (special.bos_token_id, special.eos_token_id, 0) if isinstance(found, int)), 0)
    start_W1 = torch.full((WINDOWS_OF_PERPLEXITY, 1), first, device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        ids_WT = model.generate(
            start_W1,
            attention_mask=torch.ones_like(start_W1),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=tokens - 1,
            max_new_tokens=tokens - 1,
            pad_token_id=first,
        )
    return ids_WT.cpu()


@torch.inference_mode()
def _logits(model: PreTrainedModel, windows_WT: Tensor) -> Tensor:
    batches = windows_WT[:WINDOWS_OF_LOGITS].split(1)
    logits_of = window_logits(model, batches, "logits", progress=False)
    return torch.cat([logits_of(index).float().cpu() for index in range(len(batches))])


def _perplexity(model: PreTrainedModel, windows_WT: Tensor) -> float:
    return concat_perplexity(model, windows_WT, BATCH, progress=False).perplexity
