"""Stage "token_weights": what every token counts in the statistics of a site's inputs, by the gradient of the loss.

To second order, an error E of a linear's weight adds ½ Σ_t Σ_o g_to² (E x_t)_o² to the loss, g_t = ∂L/∂y_t being the
gradient with respect to the linear's output, where errors of outputs and tokens are independent of each other. With the
mean of g² over a group of outputs, all rows of the group have one H (GuidedQuant, arXiv 2505.07004):

    H = Σ_t w_t x_t x_tᵀ / Σ_t w_t        w_t = mean_o g_to²

Here all outputs of the linears that share an input (q, k and v; gate and up) are one group, as they share statistics.
L is that of lqer/models/backward.py, whose tokens y are drawn from the model; the paper takes those of the text. An
orthogonal map of a linear's outputs keeps Σ_o g_o², so a rotated model's tokens have the weights of the original's.

Windows go forward and backward in passes of bounded memory. For each batch of windows a safetensors file holds
`<site>` (B, T) float32, w of its tokens, each site named after its first linear; `sites.json` says which site each
linear belongs to. Linears that no gradient reaches are in neither. Nor are those of experts, which see some of the
tokens: for them all count the same.

Shapes: W windows, T tokens of a window, B windows of a batch, N tokens of a window or call, I in_features, O
out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lqer.errors import ModelError
from lqer.models.backward import BackwardRun, walk_backward
from lqer.models.loaders import OpenedModel
from lqer.models.source import ModelSource
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears
from lqer.nn.experts import expert_of_linear
from lqer.stages.base import Stage, no_effect
from lqer.stages.rotate import Rotate, source_of
from lqer.store.names import token_weights_file
from lqer.store.offload import Offload
from lqer.store.store import Artifact, Store, Workspace
from lqer.transforms.tracing import trace

SITES = "sites.json"
# Bytes of the hidden states of a pass, or that part of the RAM where it is more: each pass reads the model twice.
PASS_BYTES, SHARE_OF_RAM = 8_000_000_000, 4


@dataclass(frozen=True)
class WeighTokens(Stage):
    """The weight of every token of the calibration text in every site. at_once: how many batches make a pass."""

    name: ClassVar[str] = "token_weights"
    version: ClassVar[int] = 1

    model: ModelSource | Rotate
    windows_WT: Tensor
    batch_size: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    offload: Offload = field(metadata=no_effect("it decides where numbers are stored, not their values"))
    at_once: int = field(metadata=no_effect("batches are independent of each other, whichever are in a pass"))

    def build(self, workspace: Workspace, store: Store) -> None:
        opened = open_model(source_of(self.model, store), self.dtype, self.device, self.offload)
        weigh_tokens(workspace, opened, self.windows_WT, self.batch_size, self.seed, self.at_once)

    def weights(self, store: Store) -> dict[str, Tensor]:
        """What every token counts, float32 (W, T) of mean 1, by full name of a linear; one tensor for those of a site.

        Built if the store does not have it.
        """
        artifact = self.artifact(store)
        of_site = {site: relative(weights_WT) for site, weights_WT in self._of_sites(artifact).items()}
        return {linear: of_site[site] for linear, site in artifact.json(SITES).items()}

    def summary(self, artifact: Artifact) -> str:
        """How few tokens decide: of the sites with the most uneven and the most even weights, for the log."""
        found = {site: effective_tokens(weights_WT) for site, weights_WT in self._of_sites(artifact).items()}
        if not found:
            return "no gradient reaches a linear"
        fewest = min(found, key=found.__getitem__)
        return (
            f"weights worth {found[fewest]:.0f} ({fewest}) to {max(found.values()):.0f} equally weighted tokens of "
            f"{self.windows_WT.numel()}"
        )

    def _of_sites(self, artifact: Artifact) -> dict[str, Tensor]:
        """What every token counts, float32 (W, T), by site."""
        batches = range(-(-len(self.windows_WT) // self.batch_size))
        of_batches = [artifact.tensors(token_weights_file(batch)) for batch in batches]
        return {site: torch.cat([one[site] for one in of_batches]) for site in of_batches[0]}


def batches_of_a_pass(blocks: int, hidden_size: int, batch_tokens: int, value_bytes: int, ram: int) -> int:
    """How many batches have hidden states, before all blocks and after the last, that fit the memory of a pass; at
    least 1.

    batch_tokens: tokens of a batch. value_bytes: of a value of a hidden state. ram: of this machine, in bytes.
    """
    batch_bytes = (blocks + 1) * hidden_size * batch_tokens * value_bytes
    return max(1, max(PASS_BYTES, ram // SHARE_OF_RAM) // batch_bytes)


def mean_squares(squares: Sequence[Tensor], outputs: int) -> Tensor:
    """w_t of a site: the mean of g_to² over the outputs of its linears, given Σ_o g_to² of each of them.

    outputs: how many these linears have together.
    """
    return torch.stack(list(squares)).sum(0) / outputs


def relative(weights_WT: Tensor) -> Tensor:
    """The weights divided by their mean; 1 for all tokens where no gradient reaches any."""
    mean = weights_WT.double().mean()
    return (weights_WT / mean).to(torch.float32) if mean > 0 else torch.ones_like(weights_WT)


def effective_tokens(weights_WT: Tensor) -> float:
    """Kish's effective sample size (Σ w)² / Σ w²: how many tokens of equal weight vary a weighted mean as much.

    0 where no gradient reaches any.
    """
    weights_WT = weights_WT.double()
    squares = weights_WT.square().sum().item()
    return weights_WT.sum().item() ** 2 / squares if squares > 0 else 0.0


def weigh_tokens(
    workspace: Workspace, opened: OpenedModel, windows_WT: Tensor, batch_size: int, seed: int, at_once: int
) -> None:
    """Write the weights of every batch that `workspace` does not hold yet, `at_once` batches in a pass.

    windows_WT: int64 token ids. Raises ModelError, naming the linear, for gradients that are not finite, and for a
    linear that does not see every token once.
    """
    batches = windows_WT.split(batch_size)
    passes = [range(len(batches))[first : first + at_once] for first in range(0, len(batches), at_once)]
    missing = [ours for ours in passes if not all(token_weights_file(batch) in workspace for batch in ours)]
    blocks = len(opened.blocks)
    there = (len(passes) - len(missing)) * blocks
    # By the block, backward: a pass alone may take most of an hour.
    with tqdm(initial=there, total=len(passes) * blocks, desc="token weights", unit="block") as bar:
        for ours in missing:
            sites: dict[str, str] = {}
            of_batches: list[dict[str, Tensor]] = [{} for _ in ours]
            # Tokens are drawn by the seed and the place of a batch, here as in one pass over all.
            taken_WT = torch.cat(batches[ours.start : ours.stop])
            for run in walk_backward(opened, taken_WT, batch_size, seed + ours.start):
                for names, weights in _site_weights(run):
                    sites |= dict.fromkeys(names, names[0])
                    for of_batch, weights_BT in zip(of_batches, weights, strict=True):
                        of_batch[names[0]] = weights_BT
                bar.update()
            if SITES not in workspace:
                workspace.write_json(SITES, dict(sorted(sites.items())))
            for batch, of_batch in zip(ours, of_batches, strict=True):
                if token_weights_file(batch) not in workspace:
                    workspace.write_tensors(token_weights_file(batch), of_batch)


def _site_weights(run: BackwardRun) -> Iterator[tuple[list[str], list[Tensor]]]:
    """The full names of the linears of each site of a block, and w (B, T) of each batch, on the CPU."""
    prefix = run.run.name
    linears = {name: found for name, found in block_linears(run.run.block).items() if expert_of_linear(name) is None}
    squares: dict[str, list[Tensor]] = {name: [] for name in linears}
    traced = trace(run.run.block, lambda: run.run.output(0)).sites()
    run.backward({name: partial(_add_squares, found) for name, found in squares.items()})
    shapes = [run.gradients_WTD[windows].shape[:2] for windows in run.run.hidden.batches]
    seen = {name for site in traced for name in site}
    for site in [*traced, *((name,) for name in linears if name not in seen)]:
        names = [name for name in site if squares.get(name)]
        for name in names:
            _require_usable(f"{prefix}.{name}", squares[name], shapes)
        if names:
            outputs = sum(linears[name].out_features for name in names)
            of_batches = zip(*(squares[name] for name in names), strict=True)
            yield [f"{prefix}.{name}" for name in names], [mean_squares(one, outputs).cpu() for one in of_batches]


def _add_squares(squares: list[Tensor], x_BNI: Tensor, g_BNO: Tensor) -> None:
    squares.append(g_BNO.to(torch.float32).square().sum(-1))


def _require_usable(linear: str, squares: Sequence[Tensor], shapes: Sequence[torch.Size]) -> None:
    """Raise ModelError unless a linear has a finite gradient for every token of every batch."""
    if [one.shape for one in squares] != list(shapes):
        raise ModelError(
            f'calibration.token_weights: {linear} does not see every token once; use token_weights = "none"'
        )
    if not all(torch.stack([torch.isfinite(one).all() for one in squares]).tolist()):
        raise ModelError(
            f"calibration.token_weights: the gradients of {linear} hold NaN or infinities, although the weights are "
            "finite: they overflow; use another dtype"
        )
