"""Finds out, without reading weights, whether a model can be run block by block with the same result.

A model of the same configuration is filled with made-up numbers and embeds three short windows. Then one block of each
kind is run by the walker and by the model's own forward pass: both must give the same hidden states. A matrix is a view
of one short vector (entry i, j is number i + j of it), so a model of any size takes no memory but that of one block.
Experts outside of transformers' registry are first compared with their own code, some rows of them.

Shapes: W windows, B windows of a batch, T tokens of a window, D hidden size, E experts, K experts of a token.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqer.errors import ModelError
from lqer.models.auto import auto_class, without_values
from lqer.models.backward import refuse_lost_gradients
from lqer.models.files import reported_as
from lqer.models.hidden import DEPENDS_ON_BATCH
from lqer.models.loaders import OpenedModel
from lqer.models.reading import fill_parameters
from lqer.models.source import ModelSource, load_model_config
from lqer.models.streaming import tie
from lqer.models.structure import block_linears, prepare_model
from lqer.models.walker import BlockRun, embed, run_one_block
from lqer.nn.experts import Experts, experts_of
from lqer.nn.stacked import split_experts, unregistered
from lqer.nn.unregistered import registered_class, takes_rows
from lqer.store.offload import Offload
from lqer.transforms.tracing import watched_inputs

CPU = torch.device("cpu")
WINDOWS, TOKENS, BATCH_SIZE = 3, 8, 2
# The standard deviation of made-up matrices; norms are around 1.
SCALE = 0.05
# Intermediate size of experts that are compared with their own code.
PROBED_WIDTH = 2
# The number of experts in a module that is called with the rows of all of them (`takes_rows`).
PROBED_EXPERTS = 2


@torch.no_grad()
def check_walk(source: ModelSource, whole_blocks: bool, gradients: bool = False) -> list[str]:
    """Raise ModelError, with the reason, for a model that cannot be run block by block.

    whole_blocks: whether blocks will be called with batches of any windows, as by transforms of whole blocks.
    gradients: whether the loss will be differentiated block by block. Returns the linears that no text reaches, such as
    those that would read an encoder's output, or of experts for images.
    """
    unreached: list[str] = []
    with reported_as(f"model: {source.name} cannot be run block by block"):
        model = _made_up(source)
        opened = OpenedModel.resident(model, CPU, Offload())
        batches = _made_up_windows(model).split(BATCH_SIZE)
        hidden = embed(opened, batches)
        # Where blocks may hand something to later ones, which one block alone does not show, all are run.
        hands_on = any(call.may_hand_on for calls in hidden.calls for call in calls)
        kinds = {index: others for index, *others in _by_kind(opened.blocks)}
        for index in range(len(opened.blocks)) if hands_on else kinds:
            run = BlockRun(index, f"{opened.name}.{index}", opened.blocks[index], hidden, CPU)
            given_BTD = hidden.load(0, CPU).clone()
            output_BTD, missed = _run_watched(run, len(batches))
            alike = (index, *kinds[index]) if index in kinds else ()
            unreached += [f"{opened.name}.{block}.{name}" for block in alike for name in missed]
            if hands_on:
                run.forward()
                if gradients:
                    refuse_lost_gradients(hidden)
            elif index + 1 < len(opened.blocks):
                own_BTD = run_one_block(opened, index, batches[0], hidden.returned_values)
                _refuse_difference(output_BTD, own_BTD, f"{run.name} of {type(model).__name__}")
            if whole_blocks:
                _refuse_needed(run, given_BTD, output_BTD)
        if hands_on:
            _refuse_difference(hidden.load(0, CPU), _last_output(opened, batches[0]), type(model).__name__)
    return unreached


def _run_watched(run: BlockRun, batches: int) -> tuple[Tensor, list[str]]:
    """The block's output for the first batch of windows, and its linears, by name, that none of all batches reached."""
    linears, experts = block_linears(run.block), experts_of(run.block)
    # Experts, in a list or split, may be for other tokens; a module of split ones is called with all tokens.
    lists = [name for name, part in run.block.named_modules() if isinstance(part, nn.ModuleList)]
    mixtures = {name: f"{name}." for name in (*lists, *experts)}
    waiting = {name for name in linears if not name.startswith(tuple(mixtures.values()))} | experts.keys()
    with watched_inputs(run.block, {name: partial(_reach, waiting, name) for name in waiting}):
        outputs = [run.output(batch) for batch in range(batches)]
    missed = tuple(mixtures[name] for name in waiting & mixtures.keys())
    return outputs[0], [name for name in linears if name in waiting or name.startswith(missed)]


def _reach(waiting: set[str], name: str, _: Tensor) -> None:
    waiting.discard(name)


def _refuse_needed(run: BlockRun, given_BTD: Tensor, output_BTD: Tensor) -> None:
    """Raise ModelError for a block that is called with what suits the windows of a batch alone, and needs it."""
    call = run.hidden.call_of_one(run.index)
    if run.hidden.calls[run.index][0].returned:
        try:
            alone = run.block(given_BTD[:1], *call.args, **call.kwargs)
        except Exception as error:  # whatever a block does without what another one returns
            raise ModelError(DEPENDS_ON_BATCH) from error
        alone_BTD = alone[0] if isinstance(alone, tuple | list) else alone
        if not torch.allclose(alone_BTD, output_BTD[:1], rtol=1e-4, atol=1e-5):
            raise ModelError(DEPENDS_ON_BATCH)


def _refuse_difference(walked_BTD: Tensor, own_BTD: Tensor, what: str) -> None:
    if not torch.allclose(walked_BTD, own_BTD, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ModelError(f"model: {what} gives other hidden states when its blocks are run one by one")


def _last_output(opened: OpenedModel, ids_BT: Tensor) -> Tensor:
    """What the last block outputs in the model's own forward pass."""
    outputs: list[Any] = []
    with opened.blocks[-1].register_forward_hook(lambda block, args, output: outputs.append(output)):
        opened.model.base_model(input_ids=ids_BT, use_cache=False)
    return outputs[0][0] if isinstance(outputs[0], tuple | list) else outputs[0]


def _made_up(source: ModelSource) -> PreTrainedModel:
    config = load_model_config(source)
    with without_values():
        model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    by_class = {type(experts): (name, experts) for name, experts in unregistered(model)}
    for name, experts in by_class.values():
        _refuse_other_experts(name, experts, generator)
    prepare_model(model)
    # One of several tied weights gets values; two different ones would stay apart, with a warning of transformers.
    values = {
        name: _view(tuple(parameter.shape), generator)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and name not in model.all_tied_weights_keys
    }
    fill_parameters(model, values, CPU, torch.float32)
    tie(model)
    return model.eval()


def _made_up_windows(model: PreTrainedModel) -> Tensor:
    rows = len(cast(Tensor, model.get_input_embeddings().weight))
    return torch.randint(rows, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def _refuse_other_experts(name: str, experts: Experts, generator: torch.Generator) -> None:
    """Raise ModelError for stacked experts outside of the registry that compute something else once they are split."""
    own, registered = copy.deepcopy(experts), registered_class(experts)
    for parameter, axis, width in (("gate_up_proj", 1, 2 * PROBED_WIDTH), ("down_proj", 2, PROBED_WIDTH)):
        shape = list(getattr(own, parameter).shape)
        shape[3 - axis if registered.is_transposed else axis] = width
        if takes_rows(own):
            shape[0] = PROBED_EXPERTS
        setattr(own, parameter, nn.Parameter(_view(tuple(shape), generator), requires_grad=False))
    split = copy.deepcopy(own)
    split_experts(split)
    hidden_size = own.down_proj.shape[2 if registered.is_transposed else 1]
    if takes_rows(own):
        x_ETD = torch.randn(PROBED_EXPERTS, TOKENS, hidden_size, generator=generator)
        x_ETD[0, ::2], x_ETD[1, ::3] = 0, 0
        inputs: tuple[Tensor, ...] = (x_ETD.flatten(0, 1),)
    else:
        # With and without weights, where there are both.
        pairs_TK = torch.tensor([(0, split.choices - 1), (split.held - 1, 0)])
        inputs = (torch.randn(2, hidden_size, generator=generator), pairs_TK, torch.rand(2, 2, generator=generator))
    if not torch.allclose(split(*inputs), own(*inputs), rtol=1e-4, atol=1e-5):
        kind = type(experts).__name__
        raise ModelError(f"model: {name} is a {kind}, whose experts compute something else than act(gate) * up")


def _view(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    numbers = SCALE * torch.randn(sum(shape) + 1, generator=generator)
    if len(shape) == 1:
        return 1 + numbers[: shape[0]]
    return numbers.as_strided(shape, (1,) * len(shape))


def _by_kind(blocks: nn.ModuleList) -> list[list[int]]:
    """The indices of the blocks of each set of parameters, by their names and shapes."""
    kinds: dict[tuple[tuple[str, torch.Size], ...], list[int]] = {}
    for index, block in enumerate(blocks):
        kind = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        kinds.setdefault(kind, []).append(index)
    return list(kinds.values())
