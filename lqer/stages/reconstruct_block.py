"""The block step of transforms and adaptive rounding: one decoder block of the quantized stream, resumable and shown.

Beside the checkpoint it writes, per block, `tuning-*.json` (losses, AWQ's ratios), which the report draws. While a
block is worked on, what its transforms have made and the state after an epoch or a round lie in `state-*.safetensors`;
a killed run goes on from there with the same bytes. It is removed once the block's own file is there.

Shapes: S sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import logging
import re
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from lqer.errors import ModelError
from lqer.formats import NonFiniteError
from lqer.methods.block import TunedBlock, tune_block
from lqer.methods.block_state import BlockState
from lqer.nn.attention import attention_as
from lqer.rounding import Adaptive
from lqer.rounding.adaptive import DivergedError
from lqer.stages.quantize import QuantizeSettings
from lqer.stages.quantize_sequential import BlockChange, BlockStep, BlockTask
from lqer.store.names import tuning_file
from lqer.store.store import Workspace
from lqer.transforms.block_function import BlockFunction
from lqer.transforms.block_problem import BlockProblem

log = logging.getLogger(__name__)

# A state is a few times as large as the block: it is kept where losing it would cost more than writing it.
SECONDS_BETWEEN_STATES = 60.0
# Bytes a weight that rounding a block takes on a GPU, with room for what passes through it.
BYTES_PER_WEIGHT = 60
STATE_FILE = re.compile(r"state-(\d{5})-(\d{2})-(\d{4})\.safetensors")


def block_step(workspace: Workspace, settings: QuantizeSettings, batch_size: int) -> BlockStep | None:
    """What is done to a whole block before its linears go through their methods; None where nothing is.

    batch_size: windows that pass the block at once where nothing is learnt.
    """
    if not settings.transforms and _rounding(settings) is None:
        return None
    return Tuner(workspace, settings, batch_size)


def remove_states(workspace: Workspace, keep: int | None = None) -> None:
    """Remove the states of all blocks but one: theirs are done."""
    for name, index, *_ in _states(workspace):
        if index != keep:
            workspace.remove(name)


class Tuner:
    """The step: `tune_block` between a workspace and a progress bar."""

    def __init__(self, workspace: Workspace, settings: QuantizeSettings, batch_size: int):
        self._workspace, self._settings, self._batch_size = workspace, settings, batch_size
        self._rounding = _rounding(settings)

    def __call__(self, task: BlockTask) -> BlockChange:
        """Raises ModelError, naming the block, for a weight that is not finite and where learning diverges."""
        remove_states(self._workspace, keep=task.index)
        if not any(task.plans.values()):
            return BlockChange()
        problem = _problem(task, self._batch_size, self._settings.seed)
        reached = self._last_state(task, problem)
        saved = time.monotonic()

        def keep(state: BlockState) -> None:
            nonlocal reached, saved
            reached = state
            if time.monotonic() - saved >= SECONDS_BETWEEN_STATES:
                self._save(task.index, state)
                saved = time.monotonic()

        with _Bar(task.name) as bar, attention_as(problem.call.block, task.attention):
            try:
                tuned = tune_block(problem, self._settings.transforms, self._rounding, reached, keep, bar.show)
            except DivergedError as error:
                if reached is not None:
                    self._save(task.index, reached)
                raise ModelError(
                    f"{task.name}: {error}; the state before is kept in {self._workspace.path}; a lower "
                    "quantize.rounding.learning_rate or scale_learning_rate begins a run of its own"
                ) from None
            except (ArithmeticError, NonFiniteError) as error:
                raise ModelError(f"{task.name}: {error}") from None
        self._workspace.write_json(tuning_file(task.index), tuned.notes)
        _log(task, tuned)
        return BlockChange(problem.as_kept(tuned.parameters), tuned.rounded)

    def _last_state(self, task: BlockTask, problem: BlockProblem) -> BlockState | None:
        found = max(_states(self._workspace), key=lambda found: found[1:], default=None)
        if found is None:
            return None
        state = BlockState.from_tensors(self._workspace.tensors(found[0]), problem)
        log.info(
            "%s: going on after %d of its %d transforms, and %d steps of what comes next",
            task.name, state.finished, len(self._settings.transforms), state.steps,
        )  # fmt: skip
        return state

    def _save(self, index: int, state: BlockState) -> None:
        """Write a state under a name of its own, so that a kill leaves either it or the one before it whole."""
        name = f"state-{index:05d}-{state.finished:02d}-{state.steps:04d}.safetensors"
        if name in self._workspace:
            return
        older = [other for other, *_ in _states(self._workspace)]
        self._workspace.write_tensors(name, state.tensors())
        for other in older:
            self._workspace.remove(other)


def _rounding(settings: QuantizeSettings) -> Adaptive | None:
    """The rounding of whole blocks that the plans ask for; the configuration admits one."""
    found = (plan.rounding for plan in settings.plans.values() if plan is not None)
    return next((rounding for rounding in found if isinstance(rounding, Adaptive)), None)


def _states(workspace: Workspace) -> list[tuple[str, int, int, int]]:
    """The states of the workspace: file, block, finished transforms, epochs or rounds of what comes after them."""
    matches = [(name, STATE_FILE.fullmatch(name)) for name in workspace.names()]
    return [(name, int(match[1]), int(match[2]), int(match[3])) for name, match in matches if match is not None]


def _problem(task: BlockTask, batch_size: int, seed: int) -> BlockProblem:
    """The block in float32, its weights as the checkpoint has them; products in bfloat16 where the run is in halves."""
    plans = {name: plan for name, plan in task.plans.items() if plan is not None}
    run_dtype = next(task.block.parameters()).dtype
    block = copy.deepcopy(task.block).float()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(task.stored[name])
    activations = {name: plan.activation for name, plan in plans.items() if plan.activation is not None}
    args, kwargs = tree_map(_as_float, (task.function.args, task.function.kwargs))
    size = sum(parameter.numel() for parameter in block.parameters())
    return BlockProblem(
        call=BlockFunction(block, args, kwargs, activations),
        inputs_STD=_near(task.inputs_WTD, task.device, size),
        targets_STD=_near(task.targets_WTD, task.device, size),
        formats={name: plan.weight for name, plan in plans.items()},
        batch_size=batch_size,
        autocast=None if run_dtype == torch.float32 else torch.bfloat16,
        seed=seed,
        kept_dtypes={name: tensor.dtype for name, tensor in task.stored.items()},
    )


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _near(states_STD: Tensor, device: torch.device, weights: int) -> Tensor:
    """The states on the GPU where they leave it room for the work, since random batches are read; else as they are."""
    if device.type != "cuda":
        return states_STD
    free, _ = torch.cuda.mem_get_info(device)
    return states_STD.to(device) if 2 * states_STD.nbytes + BYTES_PER_WEIGHT * weights < free else states_STD


def _log(task: BlockTask, tuned: TunedBlock) -> None:
    loss = tuned.notes.get("loss", {})
    if "start" in loss:
        log.info("%s: loss %.5g, rounded to nearest %.5g", task.name, loss["end"], loss["start"])
    elif loss:
        log.info("%s: loss %.5g", task.name, loss["end"])


class _Bar:
    """A progress bar of one block: what is being done, how long it will take yet, and the loss."""

    def __init__(self, name: str):
        self._name, self._what = name, ""
        self._bar = tqdm(desc=name, unit="round", leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def show(self, what: str, done: int, total: int, loss: float | None) -> None:
        if self._what != what:
            self._what = what
            self._bar.set_description(f"{self._name} {what}", refresh=False)
            self._bar.reset(total)
        self._bar.set_postfix({} if loss is None else {"loss": f"{loss:.4g}"}, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
