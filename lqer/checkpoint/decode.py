"""Fast generation: a cache of fixed size, and every new token as one compiled graph, by transformers' own means."""

from __future__ import annotations

import warnings
from typing import Any

import torch._inductor
from transformers import CompileConfig, PreTrainedModel

from lqer.checkpoint.one_token import attend_by_kernel

# Inductor's kernels, like ours, start while the kernel before them ends (capability 9.0).
EARLY_STARTS = "triton.enable_pdl"
# Bytes that two kernels must both read to become one. They are small here, and a launch costs more than what they read:
# keys and values are written by one, which share the number of a token.
SHARED_BYTES = "score_fusion_memory_threshold"


def inductor_options(fuse: bool = True) -> dict[str, Any]:
    """Options of Inductor for a model with packed linears; none that this version of torch does not have.

    fuse: norms, gates and additions are fused into their launches (lqer/checkpoint/fuse.py).
    """
    from lqer.checkpoint.fuse import FUSE_INTO_LINEARS

    wanted = {EARLY_STARTS: True, SHARED_BYTES: 1} | ({"post_grad_custom_pre_pass": FUSE_INTO_LINEARS} if fuse else {})
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


def fuses_right(model: PreTrainedModel) -> bool:
    """Whether kernels that fuse agree with torch for each kind of packed linear of a model; warns where they do not."""
    from lqer.kernels import TritonLinear, compare_fused_once

    try:
        for module in model.modules():
            if isinstance(module, TritonLinear):
                compare_fused_once(module.packed)
    except ArithmeticError as error:
        warnings.warn(f"norms, gates and additions have launches of their own: {error}", stacklevel=3)
        return False
    return True


def compile_decode(model: PreTrainedModel, max_cache_len: int | None = None) -> PreTrainedModel:
    """Have `model.generate` keep keys and values in a static cache and, on a GPU, decode with compiled CUDA graphs.

    transformers compiles the forward call of one token once for each batch size and length of the cache, when
    `generate` first needs it, and runs prompts as they are. On a GPU, attention that would run as "sdpa" gets a kernel
    for one token (lqer/checkpoint/one_token.py), and norms, gates and additions go into the launches of packed linears
    where these take them. Tokens are those that the model generates without all that, but where two logits differ by
    less than the dtype's rounding. Cache and compilation are settings of `model.generation_config`, which arguments of
    `generate` override.

    max_cache_len: tokens that the cache holds at least, so that later calls with longer texts, up to that length,
    neither allocate nor compile again. By default the length of the text that is asked for.

    Returns the model, changed in place.
    """
    settings = model.generation_config
    settings.cache_implementation = "static"
    settings.max_cache_len = max_cache_len
    if model.device.type == "cuda":
        attend_by_kernel(model)
        options = torch._inductor.list_mode_options("reduce-overhead") | inductor_options(fuses_right(model))
        # Options exclude a mode, which transformers declares as a string.
        settings.compile_config = CompileConfig(mode=None, options=options, dynamic=False)  # type: ignore[arg-type]
    return model
