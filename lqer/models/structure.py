"""Finds the parts of a model that are quantized: its decoder blocks and their linears.

No architecture is named here. Decoder blocks are the largest ModuleList whose members the model declares as not to be
split; the linears of a block are its nn.Linear modules, those of experts among them, but for routers and what
transformers keeps in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lqer.errors import ModelError
from lqer.models.wrappers import beside_the_language_model
from lqer.nn.experts import choices, experts_of
from lqer.nn.grouped import split_groups
from lqer.nn.stacked import split_experts
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation, attach

Found = TypeVar("Found")

# A key of config.json: linears by full name, with the number of heads their inputs are rotated across (null: the whole
# input is rotated).
ONLINE_ROTATIONS = "online_rotations"
# An attribute of modules: the names of their parameters and buffers that stay in float32, such as a router's.
KEPT_IN_FLOAT32 = "kept_in_float32"
# An attribute of linears that transformers' own quantizers leave as they are, too: those that it keeps in float32
# beside some dtype of half precision, such as the one that weights an indexer's heads.
KEPT_LINEAR = "kept_linear"
# A parameter's full name, its values, and the class of its module.
Weight = tuple[str, Tensor, str]
# A share of the matrix elements outside embedding and head; routers and the like are small.
MAX_UNQUANTIZED_FRACTION = 0.05
# Convolutions over neighbouring tokens (Mamba, gated delta rules, LFM2): kept, and few in every model that has them.
KEPT = nn.Conv1d


def prepare_model(model: PreTrainedModel) -> None:
    """Replace other linear modules by nn.Linear, split experts, have all linears called, attach online rotations.

    GPT-2's Conv1D is a linear whose weight is stored transposed; experts are stacked (lqer/nn/stacked.py), and the
    projections of groups in one matrix (lqer/nn/grouped.py). In a rotated model (lqer/stages/rotate.py) the inputs of
    the linears that its config.json names are rotated at run time.
    """
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            # Otherwise some models (Jamba, Falcon Mamba) multiply by the weight of a linear without calling it.
            config._is_quantized = True
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _as_linear(module))
    _mark_float32(model)
    _mark_kept(model)
    split_experts(model)
    split_groups(model)
    for name, heads in getattr(model.config, ONLINE_ROTATIONS, {}).items():
        attach(model.get_submodule(name), OnlineRotation(hadamard, heads))


def _as_linear(conv: Conv1D) -> nn.Linear:
    in_features, out_features = conv.weight.shape
    linear = nn.Linear(in_features, out_features, device=conv.weight.device, dtype=conv.weight.dtype)
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear


def _mark_float32(model: PreTrainedModel) -> None:
    """Name to each module those of its tensors that transformers keeps in float32 beside a model of half precision."""
    is_kept = _kept_in_float32(model, model.dtype)
    for name, module in model.named_modules():
        own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if kept := frozenset(key for key in own if is_kept(f"{name}.{key}")):
            setattr(module, KEPT_IN_FLOAT32, kept)


def _mark_kept(model: PreTrainedModel) -> None:
    # What is quantized must not depend on the dtype, and beside float16 transformers keeps the most.
    is_kept = _kept_in_float32(model, torch.float16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_kept(f"{name}.weight"):
            setattr(module, KEPT_LINEAR, True)


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers keeps a tensor in float32, by its name, in a model of that dtype."""
    plan = model._get_dtype_plan(dtype)
    pattern = re.compile("|".join(plan).replace("*", ".*"))
    return lambda name: bool(plan) and pattern.search(name) is not None


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: full name and ModuleList. Raises ModelError if the model has none or cannot be quantized."""
    name, blocks = largest_blocks(model)
    _refuse_unknown_weights(name, blocks, _linears_outside(model, name))
    return name, blocks


def largest_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The same, whatever else the model has. Raises ModelError if it has no list of blocks."""
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    beside = beside_the_language_model(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not f"{name}.".startswith(beside)
    ]
    declared = [(name, blocks) for name, blocks in lists if all(type(block).__name__ in unsplit for block in blocks)]
    candidates = declared or lists
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no ModuleList of decoder blocks")
    return max(candidates, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def within_block(by_linear: Mapping[str, Found], block: str) -> dict[str, Found]:
    """What belongs to the linears of one block, by their names within it."""
    prefix = f"{block}."
    return {name.removeprefix(prefix): found for name, found in by_linear.items() if name.startswith(prefix)}


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of one block by their name within it, in the order of registration; not routers, nor kept ones."""
    linears = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not hasattr(module, KEPT_LINEAR)
    }
    for name, experts in experts_of(block).items():
        beside = name.rpartition(".")[0]
        for router in _routers(block.get_submodule(beside), choices(experts)):
            linears.pop(f"{beside}.{router}".lstrip("."), None)
    return linears


def _routers(mixture: nn.Module, choices: int) -> Iterator[str]:
    """The linears beside experts that decide about tokens: one output per choice, or one for a shared expert."""
    for name, child in mixture.named_children():
        found = {part: module for part, module in child.named_modules(prefix=name) if isinstance(module, nn.Linear)}
        if len(found) == 1:
            yield from (part for part, linear in found.items() if linear.out_features in (1, choices))


def _linears_outside(model: nn.Module, list_name: str) -> Iterator[Weight]:
    """The weights of linears outside the blocks that process a text.

    Not the head, projections between the width of the embedding and the hidden size (OPT-350m), and what a wrapper has
    beside its language model.
    """
    if not isinstance(model, PreTrainedModel):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    widths = {getattr(embedding, "embedding_dim", None), getattr(model.config.get_text_config(), "hidden_size", None)}
    elsewhere = (f"{list_name}.", *beside_the_language_model(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head or f"{name}.".startswith(elsewhere):
            continue
        if len(widths) == 1 or {module.in_features, module.out_features} != widths:
            yield f"{name}.weight", module.weight, type(module).__name__


def _refuse_unknown_weights(list_name: str, blocks: nn.ModuleList, linears_outside: Iterable[Weight]) -> None:
    """Reject weights outside the blocks' linears: they stay in 16 bits, and the reported bits would be too low."""
    inside, outside = 0, 0
    largest: Weight = ("", nn.Parameter(), "")
    linears = {id(linear) for block in blocks for linear in block_linears(block).values()}
    for found in linears_outside:
        outside += found[1].numel()
        largest = max(largest, found, key=lambda candidate: candidate[1].numel())
    for name, module in blocks.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, KEPT) or parameter.squeeze().ndim < 2:
                continue
            if id(module) in linears:
                inside += parameter.numel()
                continue
            found = (f"{list_name}.{name}.{parameter_name}", parameter, type(module).__name__)
            outside += parameter.numel()
            largest = max(largest, found, key=lambda candidate: candidate[1].numel())
    if outside > MAX_UNQUANTIZED_FRACTION * (inside + outside):
        raise ModelError(
            f"{outside / (inside + outside):.0%} of the weights are not in nn.Linear modules of {list_name} and would "
            f"not be quantized (the limit is {MAX_UNQUANTIZED_FRACTION:.0%}), as {largest[0]} of {largest[2]}"
        )
