"""Stage "quantize": every linear of every decoder block through its method, one checkpoint file per block.

Beside the checkpoint it writes, per block, `layers-*.json` (one row per linear: bits, ranks, errors) and, for the
first, middle and last block, `spectra-*.safetensors` (singular values of the rounding error, plain and
activation-scaled).

Shapes: I in_features, O out_features, S sampled tokens, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqer.bits import average_bits
from lqer.blocks import HELD, BlockLoader
from lqer.calibration import SITES_FILE, block_file, site_statistics
from lqer.checkpoint import describe_linear, pack_linear, write_surroundings
from lqer.errors import ModelError
from lqer.formats import NonFiniteError, QuantizedTensor
from lqer.layers import output_error, weight_error
from lqer.lowrank.metric import Metric
from lqer.lowrank.scaling import activation_scale
from lqer.lowrank.solver import singular_values
from lqer.methods import METHODS, LinearPlan, QuantizedWeight
from lqer.models import block_linears
from lqer.store import Artifact, Workspace

# Raised whenever the same inputs would give other bytes than before.
QUANTIZE_VERSION = 2


def layers_file(index: int) -> str:
    return f"layers-{index:05d}.json"


def spectra_file(index: int) -> str:
    return f"spectra-{index:05d}.safetensors"


@dataclass(frozen=True)
class QuantizeSettings:
    """Plans by linear (None where skipped), and what is quantized beside the linears."""

    plans: Mapping[str, LinearPlan | None]
    attention: Mapping[str, Any] | None
    seed: int


def quantization_key(calibration: str, model_fingerprint: str, settings: QuantizeSettings, device: torch.device) -> Any:
    """What decides the outcome: the weights, the statistics, every linear's plan by value."""
    return {
        "version": QUANTIZE_VERSION,
        "model": model_fingerprint,
        "calibration": calibration,
        "plans": {name: plan and plan.to_dict() for name, plan in settings.plans.items()},
        "attention": settings.attention,
        "seed": settings.seed,
        "device": device.type,
    }


def quantize(
    workspace: Workspace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks_name: str,
    blocks: nn.ModuleList,
    calibration: Artifact,
    settings: QuantizeSettings,
    device: torch.device,
    loader: BlockLoader = HELD,
) -> None:
    """Write the files of every block that `workspace` does not hold yet, then what lies around the blocks.

    `model` holds the original weights in the checkpoint's own dtype; `loader` has its blocks, one at a time. Raises
    ModelError, naming the linear, where a weight is NaN or infinite or was never reached by the calibration text.
    """
    quantize_blocks(workspace, range(len(blocks)), blocks_name, blocks, calibration, settings, device, loader)
    rows = [row for index in range(len(blocks)) for row in workspace.json(layers_file(index))]
    details = {
        "blocks": {"name": blocks_name, "count": len(blocks)},
        "linears": {row["name"]: row["entry"] for row in rows},
        "attention": settings.attention,
        "bits": average_bits(rows),
    }
    loader.complete()
    write_surroundings(workspace, model, tokenizer, details)


def quantize_blocks(
    workspace: Workspace,
    share: Sequence[int],
    blocks_name: str,
    blocks: nn.ModuleList,
    calibration: Artifact,
    settings: QuantizeSettings,
    device: torch.device,
    loader: BlockLoader = HELD,
) -> None:
    """The same for the blocks of a share alone, and for nothing around them."""
    sites = calibration.json(SITES_FILE)
    missing = [index for index in share if block_file(index) not in workspace]
    with tqdm(initial=len(share) - len(missing), total=len(share), desc="quantize", unit="block") as bar:
        for index, block in loader.visits(blocks, missing, torch.device("cpu")):
            statistics = calibration.tensors(block_file(index))
            with_spectra = index in {0, len(blocks) // 2, len(blocks) - 1}
            _quantize_block(workspace, index, f"{blocks_name}.{index}", block, sites, statistics, settings, device,
                            with_spectra)  # fmt: skip
            bar.update()


def _quantize_block(
    workspace: Workspace,
    index: int,
    prefix: str,
    block: nn.Module,
    sites: Mapping[str, str],
    statistics: Mapping[str, Tensor],
    settings: QuantizeSettings,
    device: torch.device,
    with_spectra: bool,
) -> None:
    """Write one block's files; a function, so that one block's tensors are gone before the next one's."""
    torch.manual_seed(settings.seed)
    statistics = {name: tensor.to(device) for name, tensor in statistics.items()}
    tensors = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    rows, spectra = [], {}
    for name, linear in block_linears(block).items():
        full_name = f"{prefix}.{name}"
        plan = settings.plans[full_name]
        if plan is None:
            continue
        site = site_statistics(statistics, sites, full_name)
        weight_OI = linear.weight.detach().to(device, torch.float32)
        weight, bias = _quantize_one(full_name, weight_OI, linear.bias, site, plan)
        del tensors[f"{full_name}.weight"]
        if bias is not None:
            del tensors[f"{full_name}.bias"]
        tensors |= pack_linear(full_name, weight, bias)
        entry = describe_linear(plan, weight, has_bias=linear.bias is not None)
        rounded_OI = _rounded_alone(weight_OI, weight, site, plan)
        rows.append(_layer_row(full_name, weight_OI, rounded_OI, weight, site) | {"entry": entry})
        if with_spectra:
            error_OI, scale_I = weight_OI - rounded_OI, activation_scale(site["mean_abs"])
            spectra[f"{full_name}.plain"] = singular_values(error_OI, Metric())
            spectra[f"{full_name}.scaled"] = singular_values(error_OI, Metric(scale_I=scale_I))
    if spectra:
        workspace.write_tensors(spectra_file(index), spectra)
    workspace.write_json(layers_file(index), rows)
    # Last: a block counts as done once its tensors are there.
    workspace.write_tensors(block_file(index), tensors)


def _quantize_one(
    name: str, weight_OI: Tensor, bias_O: Tensor | None, statistics: Mapping[str, Tensor], plan: LinearPlan
) -> tuple[QuantizedWeight, QuantizedTensor | None]:
    try:
        weight = METHODS[plan.method].quantize_linear(weight_OI, statistics, plan)
        bias = plan.bias.quantize(bias_O.detach()) if plan.bias is not None and bias_O is not None else None
    except NonFiniteError as error:
        raise ModelError(f"{name}: {error}") from None
    return weight, bias


def _rounded_alone(
    weight_OI: Tensor, weight: QuantizedWeight, statistics: Mapping[str, Tensor], plan: LinearPlan
) -> Tensor:
    """What rounding alone makes of the weight: the stored W_q, unless that is what is left beside a low-rank part."""
    if weight.low_rank is None or METHODS[plan.method].rounds_the_weight_itself(plan):
        return weight.rounded_weight()
    plain = plan.plain()
    return METHODS[plain.method].quantize_linear(weight_OI, statistics, plain).rounded_weight()


def _layer_row(
    name: str, weight_OI: Tensor, rounded_OI: Tensor, weight: QuantizedWeight, statistics: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One row of layers.csv; bits are totals here, of everything that is stored for the linear's weight."""
    effective_OI = weight.effective_weight()
    return {
        "name": name,
        "out_features": weight_OI.shape[0],
        "in_features": weight_OI.shape[1],
        "rank": weight.low_rank.rank if weight.low_rank else 0,
        "weight_bits": weight.weight_OI.code_bits,
        "metadata_bits": weight.metadata_bits,
        "low_rank_bits": weight.low_rank.bits if weight.low_rank else 0,
        "captured_share": weight.low_rank.captured_share if weight.low_rank else None,
        "solver_gap": weight.low_rank.gap if weight.low_rank else None,
        "weight_error_before": weight_error(weight_OI, rounded_OI),
        "weight_error": weight_error(weight_OI, effective_OI),
        "output_error_before": output_error(weight_OI, rounded_OI, statistics["sample"]),
        "output_error": output_error(weight_OI, effective_OI, statistics["sample"]),
    }
