"""What a wrapper, such as ...ForConditionalGeneration, has beside its language model: towers for images or sound.

They and the projections of their outputs are kept as they are. No architecture is named here: the language model is
what transformers calls the decoder, and a tower is a model that does not read text.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# What a model that processes text calls its input, and the kind of that input.
TEXT_INPUT, TEXT = "input_ids", "text"


def beside_the_language_model(model: nn.Module) -> tuple[str, ...]:
    """What the names begin with of all modules beside the language model; () where the model is nothing else."""
    if not isinstance(model, PreTrainedModel):
        return ()
    return tuple(f"{name}." for name in _parts_beside(model))


def _parts_beside(model: PreTrainedModel) -> Iterator[str]:
    base, language = model.base_model, model.get_decoder()
    with_language = {id(module) for module in model.modules() if any(part is language for part in module.modules())}
    inside_language = {id(part) for part in language.modules()}
    inside_base = {id(part) for part in base.modules()} if id(base) in with_language else set()
    for name, module in model.named_modules():
        # Whisper's decoder is the language model, whatever its main input is said to be.
        if id(module) in with_language:
            continue
        is_tower = isinstance(module, PreTrainedModel) and not _reads_text(module)
        if is_tower or (id(module) in inside_base and id(module) not in inside_language):
            yield name


def _reads_text(model: PreTrainedModel) -> bool:
    inputs = model.input_modalities
    return model.main_input_name == TEXT_INPUT and TEXT in ((inputs,) if isinstance(inputs, str) else inputs)
