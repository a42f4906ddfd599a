"""Image-text pairs of a local .jsonl, as the windows of tokens and the images that a wrapper is calibrated on.

A line names an image, by a path from the file's folder, and a text: {"image": "cat.png", "text": "A cat."}. The model's
processor makes one sequence of both, by its chat template where it has one. Sequences are joined and cut into windows
of equal length. An image is never cut: where it does not fit into what is left of a window, its text stands alone.

Shapes: W windows, T tokens of a window, N tokens of a pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqer.data.datasets import DatasetSpec
from lqer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE, SUFFIX = "image", ".jsonl"
IDS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class PairWindows:
    """Token ids int64 (W, T), and by window what the model is given beside them: (1, T) by token, or by image."""

    windows_WT: Tensor
    beside: tuple[dict[str, Tensor], ...]


def holds_pairs(spec: DatasetSpec) -> bool:
    """Whether a dataset is a local .jsonl whose first line names an image."""
    path = Path(spec.path).expanduser()
    if path.suffix != SUFFIX or not path.is_file() or spec.prompt is not None:
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(next((line for line in file if line.strip()), "null"))
        except ValueError:
            return False  # said by what reads the texts
    return isinstance(first, dict) and isinstance(first.get(IMAGE), str)


def pair_windows(processor: Any, spec: DatasetSpec, num_samples: int, seq_len: int) -> PairWindows:
    """The first windows of the pairs of `spec`. processor: transformers' for the model.

    Raises DataError, naming the row, for an image that cannot be read or takes more tokens than a window has, and
    where there are too few pairs.
    """
    import torch

    windows: list[_Window] = []
    window = _Window(seq_len)
    for number, text, image in _pairs(spec):
        pair = _encoded(processor, text, image)
        ids_N = pair.pop(IDS)[0]
        with_image = int((ids_N == processor.image_token_id).nonzero().max()) + 1
        if with_image > seq_len:
            raise DataError(
                f"dataset {spec.label}, row {number}: its image takes {with_image} tokens, and calibration.seq_len is "
                f"{seq_len}"
            )
        if with_image > window.room:
            ids_N, pair = torch.tensor(processor.tokenizer(text)[IDS], dtype=torch.int64), {}
        window.add(ids_N, pair)
        if window.room == 0:
            windows.append(window)
            window = _Window(seq_len)
        if len(windows) == num_samples:
            break
    if len(windows) < num_samples:
        raise DataError(
            f"dataset {spec.label} yields {len(windows)} windows of {seq_len} tokens; calibration.num_samples is "
            f"{num_samples}"
        )
    by_token = {key for one in windows for key in one.by_token}
    return PairWindows(
        torch.stack([torch.cat(one.ids) for one in windows]), tuple(one.beside(by_token) for one in windows)
    )


@dataclass
class _Window:
    """One window as it fills. by_token: (start, values (N,)) of the stretches that have some."""

    room: int
    ids: list[Tensor] = field(default_factory=list)
    by_token: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    images: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, ids_N: Tensor, pair: dict[str, Tensor]) -> None:
        """Take as much of a pair as there is room for."""
        start = sum(len(ids) for ids in self.ids)
        for key, values in pair.items():
            if values.shape == (1, len(ids_N)):
                self.by_token.setdefault(key, []).append((start, values[0, : self.room]))
            else:
                self.images.setdefault(key, []).append(values)
        self.ids.append(ids_N[: self.room])
        self.room -= len(self.ids[-1])

    def beside(self, by_token: set[str]) -> dict[str, Tensor]:
        import torch

        found = {key: torch.cat(values) for key, values in self.images.items()}
        for key in sorted(by_token):
            found[key] = torch.zeros(1, sum(len(ids) for ids in self.ids), dtype=torch.int64)
            for start, values_N in self.by_token.get(key, ()):
                found[key][0, start : start + len(values_N)] = values_N
        return found


def _pairs(spec: DatasetSpec) -> Iterator[tuple[int, str, Any]]:
    """Number, text and image of every row."""
    from PIL import Image

    if spec.rows is not None:
        raise DataError(f"dataset {spec.path}: pairs are read from the first on; rows is {spec.rows!r}")
    path = Path(spec.path).expanduser()
    with path.open(encoding="utf-8") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                text, image = row[spec.text_column], Image.open(path.parent / row[IMAGE]).convert("RGB")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"dataset {spec.label}, row {number}: {type(error).__name__}: {error}") from None
            yield number, text, image


def _encoded(processor: Any, text: str, image: Any) -> dict[str, Tensor]:
    """What the model is given for one pair, token ids among it; no mask: windows have no padding."""
    if getattr(processor, "chat_template", None):
        content = [{"type": IMAGE}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    else:
        # Gemma's processors put the image where its beginning is marked.
        prompt = f"{getattr(processor, 'boi_token', None) or processor.image_token}\n{text}"
    found = processor(text=prompt, images=image, return_tensors="pt")
    return {key: values for key, values in found.items() if key != MASK}
