"""Finds the parts of a model that are quantized: its decoder blocks and their linears.

No architecture is named here. Decoder blocks are the largest ModuleList whose members the model declares as not to be
split; the linears of a block are its nn.Linear modules.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lqer.errors import ModelError
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation, attach

# A key of config.json: linears by full name, with the number of heads their inputs are rotated across (null: the whole
# input is rotated).
ONLINE_ROTATIONS = "online_rotations"


# Of the matrix elements in the decoder blocks; routers and the like are small.
MAX_UNQUANTIZED_FRACTION = 0.05


def prepare_model(model: PreTrainedModel) -> None:
    """Replace other linear modules by nn.Linear and attach online rotations, in place.

    GPT-2's Conv1D is a linear whose weight is stored transposed. In a rotated model (lqer/stages/rotate.py) the inputs
    of the linears that its config.json names are rotated at run time.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            linear = nn.Linear(in_features, out_features, device=module.weight.device, dtype=module.weight.dtype)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    for name, heads in getattr(model.config, ONLINE_ROTATIONS, {}).items():
        attach(model.get_submodule(name), OnlineRotation(hadamard, heads))


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: full name and ModuleList. Raises ModelError if the model has none or cannot be quantized."""
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    declared = [(name, blocks) for name, blocks in lists if all(type(block).__name__ in unsplit for block in blocks)]
    candidates = declared or lists
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no ModuleList of decoder blocks")
    name, blocks = max(candidates, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    _refuse_unknown_weights(name, blocks)
    return name, blocks


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of one block by their name within it, in the order of registration."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _refuse_unknown_weights(list_name: str, blocks: nn.ModuleList) -> None:
    """Reject weights outside nn.Linear: they would stay in 16 bits, and the reported bits would be too low."""
    inside, outside, largest = 0, 0, ("", nn.Parameter(), "")
    for name, module in blocks.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            if isinstance(module, nn.Linear):
                inside += parameter.numel()
                continue
            found = (f"{list_name}.{name}.{parameter_name}", parameter, type(module).__name__)
            if parameter.ndim >= 3:
                raise ModelError(
                    f"{found[0]} is a {parameter.ndim}-D parameter of {found[2]}, not an nn.Linear: "
                    "mixture-of-experts and convolution weights of this kind are not supported"
                )
            outside += parameter.numel()
            largest = max(largest, found, key=lambda candidate: candidate[1].numel())
    if outside > MAX_UNQUANTIZED_FRACTION * (inside + outside):
        raise ModelError(
            f"{outside / (inside + outside):.0%} of the decoder weights are not in nn.Linear modules and would not be "
            f"quantized (the limit is {MAX_UNQUANTIZED_FRACTION:.0%}); the largest is {largest[0]} of {largest[2]}"
        )
