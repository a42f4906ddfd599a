"""Reconstruction of one decoder block by transforms and adaptive rounding, resumable within the block.

With the checkpoint it writes, per block, `tuning-*.json` (losses, AWQ's ratios) for the report. While a block is being
reconstructed, its latest result is saved in `state-*.safetensors`; a killed run resumes from it and ends with the same
bytes. State files are removed once the block is finished.

Shapes: S sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from lqer.errors import ModelError
from lqer.formats import NonFiniteError
from lqer.methods import Plans
from lqer.methods.block import reconstruct_block
from lqer.models.walker import BlockRun
from lqer.nn.attention import attention_as
from lqer.phases import in_phase
from lqer.rounding import Adaptive
from lqer.rounding.adaptive import DivergedError
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.store.names import tuning_file
from lqer.store.store import Workspace
from lqer.transforms import BlockTransform
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem
from lqer.transforms.block_result import BlockResult

log = logging.getLogger(__name__)

# A state is a few times as large as the block: it is saved where losing it would cost more than writing it.
SECONDS_BETWEEN_STATES = 60.0
# Peak GPU memory of adaptive rounding per weight of the block, in bytes, including the activations of one micro-batch.
BYTES_PER_WEIGHT = 60
STATE_FILE = re.compile(r"state-(\d{5})-(\d{2})-(\d{4})\.safetensors")


@dataclass(frozen=True)
class BlockReconstruction:
    """Reconstructs blocks one after another, with intermediate states in `workspace`.

    batch_size: sequences per forward pass where nothing is learned. attention: the name of the original model's
    attention in transformers' registry, which the block runs with: rounded operands carry no gradient.
    """

    workspace: Workspace
    transforms: tuple[BlockTransform, ...]
    rounding: Adaptive | None
    batch_size: int
    seed: int
    attention: str

    @in_phase("round")
    def run(
        self,
        run: BlockRun,
        targets_STD: Tensor,
        plans: Plans,
        stored: Mapping[str, Tensor],
    ) -> BlockResult:
        """The reconstructed block, its parameters in the dtypes of the checkpoint; unchanged if no linear has a plan.

        run: the block with the quantized model's hidden states. targets_STD: outputs of the original block on the
        original model's hidden states. plans: by linear within the block. stored: the block's parameters as the
        checkpoint has them, on any device. Hidden states and targets must not be modified.

        Raises ModelError, naming the block, if a weight is not finite or training diverges.
        """
        saver = StateSaver(self.workspace, run.index)
        if not any(plans.values()):
            return BlockResult()
        problem = block_problem(run, targets_STD, plans, stored, self.batch_size, self.seed)
        with attention_as(problem.call.block, self.attention):
            result = self._resume(run.name, problem, saver)
        # Several GPUs may differ in the last bit.
        result = BlockResult.from_tensors(problem.gang.of_first(result.tensors()), problem)
        self.workspace.write_json(tuning_file(run.index), result.notes)
        _log(run.name, result)
        return replace(result, parameters=problem.in_stored_dtypes(result.parameters))

    def _resume(self, name: str, problem: BlockProblem, saver: StateSaver) -> BlockResult:
        """Reconstruct the block from its last saved state, or from the start if there is none."""
        result = saver.load(problem)
        if result is not None:
            log.info(
                "%s: resuming (transforms done: %d/%d, epochs or rounds of the next part done: %d)",
                name, result.finished, len(self.transforms), result.steps,
            )  # fmt: skip
        with _ProgressBar(name) as bar:
            try:
                result = reconstruct_block(problem, self.transforms, self.rounding, result, saver, bar.show)
            except DivergedError as error:
                saver.save_last()
                raise ModelError(
                    f"{name}: {error}; the state before that is saved in {self.workspace.path}; try a lower "
                    "quantize.rounding.learning_rate or scale_learning_rate"
                ) from None
            except (ArithmeticError, NonFiniteError) as error:
                raise ModelError(f"{name}: {error}") from None
        return result


def block_problem(
    run: BlockRun,
    targets_STD: Tensor,
    plans: Plans,
    stored: Mapping[str, Tensor],
    batch_size: int,
    seed: int,
) -> BlockProblem:
    """The block in float32, with matrix products in bfloat16 where the run is in half precision.

    Arguments as of `BlockReconstruction.run`.
    """
    planned = {name: plan for name, plan in plans.items() if plan is not None}
    run_dtype = next(run.block.parameters()).dtype
    block = copy.deepcopy(run.block).float()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(stored[name])
    activations = {name: plan.activation for name, plan in planned.items() if plan.activation is not None}
    call = run.hidden.call_of_one(run.index)
    args, kwargs = tree_map(_as_float, (call.args, call.kwargs))
    gang = run.hidden.gang
    size = sum(parameter.numel() for parameter in block.parameters())
    return BlockProblem(
        call=BlockFunction(block, args, kwargs, activations, call.per_window),
        inputs_STD=_on_device_if_it_fits(gang.joined(run.hidden.synchronized(run.device)), run.device, size),
        targets_STD=_on_device_if_it_fits(gang.joined(targets_STD), run.device, size),
        formats={name: plan.weight for name, plan in planned.items()},
        batch_size=batch_size,
        autocast=None if run_dtype == torch.float32 else torch.bfloat16,
        seed=seed,
        stored_dtypes={name: tensor.dtype for name, tensor in stored.items()},
        gang=gang,
    )


def block_reconstruction(
    workspace: Workspace, settings: QuantizeSettings, batch_size: int, attention: str
) -> BlockReconstruction | None:
    """The reconstruction that the settings ask for, by block transforms or an adaptive rounding; else None."""
    roundings = (plan.rounding for plan in settings.plans.values() if plan is not None)
    # The configuration admits one rounding of whole blocks.
    rounding = cast(Adaptive | None, next((rounding for rounding in roundings if rounding.together), None))
    if not settings.transforms and rounding is None:
        return None
    return BlockReconstruction(workspace, settings.transforms, rounding, batch_size, settings.seed, attention)


class StateSaver:
    """Saves intermediate results of one block to a workspace, but not more often than they are worth."""

    def __init__(self, workspace: Workspace, index: int):
        """Removes the states of other blocks, which are finished."""
        self._workspace, self._index = workspace, index
        self._last: BlockResult | None = None
        self._saved = time.monotonic()
        remove_states(workspace, except_block=index)

    def __call__(self, result: BlockResult) -> None:
        self._last = result
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_STATES:
            self.save_last()
            self._saved = time.monotonic()

    def load(self, problem: BlockProblem) -> BlockResult | None:
        """The latest state that an earlier run saved, if there is one."""
        found = max(_states(self._workspace), key=lambda state: state[1:], default=None)
        if found is not None:
            self._last = BlockResult.from_tensors(self._workspace.tensors(found[0]), problem)
        return self._last

    def save_last(self) -> None:
        """Write the last state under a name of its own, so that a kill leaves either it or the one before intact."""
        if self._last is None:
            return
        name = f"state-{self._index:05d}-{self._last.finished:02d}-{self._last.steps:04d}.safetensors"
        if name in self._workspace:
            return
        older = [other for other, *_ in _states(self._workspace)]
        self._workspace.write_tensors(name, self._last.tensors())
        # The tensors are those that training goes on with.
        self._workspace.flush()
        for other in older:
            self._workspace.remove(other)


def remove_states(workspace: Workspace, except_block: int | None = None) -> None:
    """Remove the saved states of all blocks, or of all but one."""
    for name, index, *_ in _states(workspace):
        if index != except_block:
            workspace.remove(name)


def _states(workspace: Workspace) -> list[tuple[str, int, int, int]]:
    """The saved states: file, block, finished transforms, finished epochs or rounds of the next part."""
    matches = [(name, STATE_FILE.fullmatch(name)) for name in workspace.names()]
    return [(name, int(match[1]), int(match[2]), int(match[3])) for name, match in matches if match is not None]


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _on_device_if_it_fits(states_STD: Tensor, device: torch.device, weights: int) -> Tensor:
    """The states on the GPU if enough of its memory is left for the reconstruction: random batches are read often."""
    if device.type != "cuda":
        return states_STD
    free, _ = torch.cuda.mem_get_info(device)
    return states_STD.to(device) if 2 * states_STD.nbytes + BYTES_PER_WEIGHT * weights < free else states_STD


def _log(name: str, result: BlockResult) -> None:
    loss = result.notes.get("loss", {})
    if "start" in loss:
        log.info("%s: output loss %.5g (round-to-nearest: %.5g)", name, loss["end"], loss["start"])
    elif loss:
        log.info("%s: output loss %.5g", name, loss["end"])


class _ProgressBar:
    """A progress bar of one block: the running part, its remaining time, and the loss; at the end a line in the log
    with the seconds that each part took.
    """

    def __init__(self, name: str):
        self._name, self._part = name, ""
        self._started: dict[str, float] = {}
        self._bar = tqdm(desc=name, unit="round", leave=False)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        ends = [*self._started.values(), time.monotonic()][1:]
        spans = zip(self._started.items(), ends, strict=True)
        if self._started:
            log.info("%s: %s", self._name, ", ".join(f"{part} {end - start:.1f} s" for (part, start), end in spans))

    def show(self, part: str, step: int, steps: int, loss: float | None) -> None:
        if self._part != part:
            self._part = part
            self._started[part] = time.monotonic()
            self._bar.set_description(f"{self._name} {part}", refresh=False)
            self._bar.reset(steps)
        self._bar.set_postfix({} if loss is None else {"loss": f"{loss:.4g}"}, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()
