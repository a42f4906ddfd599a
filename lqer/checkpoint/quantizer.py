"""What transformers calls to load and save the native form of a checkpoint (native.py describes the folder).

The linears of the skeleton become holders of packed tensors, which transformers fills as it fills any other. Then they
become the modules of `load_quantized`: kernels on packed weights where those can run, else emulation. The packed
tensors stay beside the model, in host memory, and are what save_pretrained writes.

transformers imports this file while it is itself imported, so nothing here may import its models before they are used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lqer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "lqer"


def guard(linears: Iterable[str]) -> dict[str, Tensor]:
    """The tensor without which transformers would load random weights where lqer is not imported (native.py).

    Of the first name in the order of letters: config.json is sorted when a model is saved.
    """
    return {f"{min(linears)}.weight": torch.empty(0, dtype=torch.uint8)}


class LqerConfig(QuantizationConfigMixin):
    """quantization_config of config.json: what `native_config` makes.

    backend: as in `load_quantized`; it is not saved. To choose another than "auto", change the configuration first:
    config = AutoConfig.from_pretrained(folder); config.quantization_config["backend"] = "emulate".
    """

    def __init__(
        self,
        format_version: int,
        blocks: Mapping[str, Any],
        attention: Mapping[str, Any] | None,
        schemes: Sequence[Mapping[str, Any]],
        linears: Mapping[str, int],
        backend: str = "auto",
        quant_method: str = QUANT_METHOD,
    ):
        self.quant_method: Any = quant_method
        self.format_version, self.blocks, self.attention = format_version, blocks, attention
        self.schemes, self.linears, self.backend = schemes, linears, backend

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **options: Any) -> Any:
        from lqer.checkpoint.pack import FORMAT_VERSION

        if "schemes" not in config_dict:
            raise ModelError(
                "this is a checkpoint for lqer.load_quantized; from_pretrained loads what "
                '"lqer export CHECKPOINT native OUT" makes of it'
            )
        if (version := config_dict.get("format_version")) != FORMAT_VERSION:
            raise ModelError(f"config.json: format_version {version} is not supported, only {FORMAT_VERSION}")
        return super().from_dict(config_dict, return_unused_kwargs, **options)

    @property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """What each quantized linear is, by name, as in lqer.json."""
        return {name: self.schemes[place] for name, place in self.linears.items()}

    def to_dict(self) -> dict[str, Any]:
        return {key: copy.deepcopy(value) for key, value in self.__dict__.items() if key != "backend"}


class StoredLinear(nn.Module):
    """The packed tensors of a linear as buffers, whose names in a state_dict are those in the files.

    tensors: by their names within the linear, such as "weight.codes" or "bias".
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            role, _, part = name.rpartition(".")
            if role and role not in self._modules:
                self.add_module(role, nn.Module())
            self.get_submodule(role).register_buffer(part, tensor)


class LqerQuantizer(HfQuantizer):
    """Loads and saves; it quantizes nothing."""

    requires_calibration = True
    quantization_config: LqerConfig

    def __init__(self, quantization_config: LqerConfig, **options: Any):
        super().__init__(quantization_config, **options)
        # As stored, by full name, on the CPU; with the guard.
        self._packed: dict[str, Tensor] = {}

    def validate_environment(self, *arguments: Any, device_map: Any = None, **options: Any) -> None:
        homes = {str(home) for home in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in homes or ("cpu" in homes and len(homes) > 1):
            raise ModelError("device_map: quantized linears cannot be offloaded to the CPU or the disk beside a GPU")

    def is_serializable(self) -> bool:
        return True

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> list[Any]:
        """No conversions: files have the names of the skeleton, and transformers would stack the codes of experts."""
        return []

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        """Put a holder of tensors without values in the place of every quantized linear."""
        from lqer.models.structure import prepare_model
        from lqer.nn.experts import experts_of
        from lqer.transforms.quarot import carry_over

        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise ModelError("a quantized checkpoint is loaded from safetensors files")
        if getattr(model.config, "distributed_config", None) is not None:
            raise ModelError('tensor parallelism is not supported: use device_map="auto", or vLLM on an export')
        prepare_model(model)
        for experts in experts_of(model).values():
            # transformers would initialize the stacked weights, which are there no more.
            experts._is_hf_initialized = True
        entries = self.quantization_config.entries
        stored = _by_linear(_described(checkpoint_files), entries)
        for name, entry in entries.items():
            of_linear = stored.get(name, {})
            missing = [role for role in entry if role != "activation" and not _has_role(of_linear, role)]
            if missing:
                raise ModelError(f"{Path(checkpoint_files[0]).parent} has no tensor of {name}.{missing[0]}")
            # The guard, and nothing else, is called as the weight of a linear that is not quantized.
            of_linear.pop("weight", None)
            holder = StoredLinear(of_linear)
            carry_over(model.get_submodule(name), holder)
            model.set_submodule(name, holder)
        guards = {re.escape(name) for name in self._guard()}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        """Put the module that runs in the place of every holder."""
        from lqer.checkpoint.backend import choose_backend
        from lqer.checkpoint.experts import group_experts
        from lqer.checkpoint.linear import build_linear
        from lqer.checkpoint.siblings import join_siblings
        from lqer.models.dispatch import launch_on
        from lqer.nn.attention import quantize_attention, quantized_attention
        from lqer.transforms.quarot import carry_over

        entries, dtype = self.quantization_config.entries, model.dtype
        home = next(model.get_submodule(next(iter(entries))).buffers()).device
        backend = choose_backend(self.quantization_config.backend, home, dtype, entries)
        for name, entry in entries.items():
            holder = model.get_submodule(name)
            tensors = {f"{name}.{key}": tensor for key, tensor in holder.state_dict().items()}
            device = next(holder.buffers()).device
            linear = build_linear(tensors, name, entry, device, dtype, backend).eval()
            carry_over(holder, linear)
            model.set_submodule(name, linear)
            # Copies: what was read may be mapped from files that the model is saved over.
            self._packed |= {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        self._packed |= self._guard()
        if backend == "triton":
            group_experts(model)
        blocks = model.get_submodule(self.quantization_config.blocks["name"])
        spans = len({buffer.device for buffer in model.buffers()}) > 1
        if backend == "triton" and spans:
            for block in blocks.children():
                launch_on(block, next(block.parameters()).device)
        if self.quantization_config.attention is not None:
            quantize_attention(model, quantized_attention(self.quantization_config.attention))
        if not spans:  # or else transformers has yet to move hidden states from one GPU to the next
            join_siblings(model, blocks)

    def _guard(self) -> dict[str, Tensor]:
        return guard(self.quantization_config.entries)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: the packed tensors as they were read, and all else as the model holds it."""
        others = _by_linear(model.state_dict(), self.quantization_config.entries).get(None, {})
        return others | self._packed, {}


def _described(files: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these files by name, without values."""
    from transformers.modeling_utils import str_to_torch_dtype

    from lqer.models.files import read_header

    headers = [read_header(Path(file)) for file in files]
    return {
        name: torch.empty(shape, dtype=str_to_torch_dtype[header.dtypes[name]], device="meta")
        for header in headers
        for name, shape in header.shapes.items()
    }


def _by_linear(tensors: Mapping[str, Tensor], linears: Collection[str]) -> dict[str | None, dict[str, Tensor]]:
    """Tensors of each of these linears by their names within it, and under None all others."""
    found: dict[str | None, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        around = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        linear = next((name for name in around if name in linears), None)
        within = key if linear is None else key.removeprefix(f"{linear}.")
        found.setdefault(linear, {})[within] = tensor
    return found


def _has_role(tensors: Mapping[str, Tensor], role: str) -> bool:
    return any(name.startswith(f"{role}.") for name in tensors)
