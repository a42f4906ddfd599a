"""Attention of one new token over a cache of fixed size, of which a mask says what is filled.

    y = softmax(scale q Kᵀ + mask) V

One launch: a program has the query heads of a key head and a span of the cache; the last program of a key head combines
the spans. Keys and values of grouped attention are not repeated in memory, and a boolean mask is read as it is.

Shapes: B sequences, H query heads, G key heads, R query heads of a key head (padded to 16), S tokens of the cache,
D width of a head, T one token, X broadcast, P spans.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lqer.kernels import runtime
from lqer.kernels.decode import dot

WIDTHS = (64, 128, 256)
LARGEST_GROUP = 16  # query heads of a key head: rows of a tensor core operand
TOKENS_AT_ONCE = 64
WARPS, STAGES = 4, 3
MOST_SPANS = 16
COMPARED_TOKENS = 300
# Counters: key heads of all sequences, at most.
MOST_HEADS = 1 << 14
LOG2_E = tl.constexpr(1.4426950408889634)
ROWS = tl.constexpr(LARGEST_GROUP)


def fits(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel can run this call: one token, a boolean mask alike for all heads, usual widths of a head."""
    batch, heads, tokens, width = query_BHTD.shape
    groups = key_BGSD.shape[1]
    return (
        (query_BHTD.is_cuda or bool(runtime.INTERPRETED.value))
        and tokens == 1
        and width in WIDTHS
        and value_BGSD.shape == key_BGSD.shape
        and heads % groups == 0
        and heads // groups <= LARGEST_GROUP
        and batch * groups <= MOST_HEADS
        and query_BHTD.dtype in (torch.bfloat16, torch.float16)
        and query_BHTD.dtype == key_BGSD.dtype == value_BGSD.dtype
        and mask is not None
        and mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[1:3] == (1, 1)
        and mask.shape[3] >= key_BGSD.shape[2]
        and all(tensor.stride(3) == 1 for tensor in (query_BHTD, key_BGSD, value_BGSD, mask))
    )


@lru_cache
def counters(device: torch.device) -> Tensor:
    """int32, zero between calls. To be made before a CUDA graph is recorded, which keeps what it allocates."""
    return torch.zeros(MOST_HEADS, dtype=torch.int32, device=device)


@torch.library.custom_op("lqer::decode_attention", mutates_args=())
def decode_attention(
    query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_BXTS: Tensor, scale: float
) -> Tensor:
    """y (B, T, H, D) for tensors that `fits` accepts; mask: (B or 1, 1, 1, S or more), true for what is attended to.

    A token that attends to nothing gets zeros.
    """
    batch, heads, _, width = query_BHTD.shape
    groups, length = key_BGSD.shape[1:3]
    y_BTHD = query_BHTD.new_empty(batch, 1, heads, width)
    spans = _spans(batch * groups, length, query_BHTD.device)
    span = -(-length // (spans * TOKENS_AT_ONCE)) * TOKENS_AT_ONCE
    partial = query_BHTD.new_empty((batch * groups, spans, LARGEST_GROUP, width), dtype=torch.float32)
    sums = query_BHTD.new_empty((batch * groups, spans, 2, LARGEST_GROUP), dtype=torch.float32)
    pdl = runtime.supports_pdl(query_BHTD)
    decode_attention_kernel[batch * groups, spans](
        query_BHTD, key_BGSD, value_BGSD, mask_BXTS, partial, sums, counters(query_BHTD.device), y_BTHD,
        length, groups, query_BHTD.stride(0), query_BHTD.stride(1), *key_BGSD.stride()[:3], *value_BGSD.stride()[:3],
        mask_BXTS.stride(0) if len(mask_BXTS) > 1 else 0, scale, span, REPEATS=heads // groups, D=width,
        BLOCK_S=TOKENS_AT_ONCE, spans=spans, pdl=pdl, num_warps=WARPS, num_stages=STAGES,
        **runtime.launch_options(pdl),
    )  # fmt: skip
    return y_BTHD


@decode_attention.register_fake
def _(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask_BXTS: Tensor, scale: float) -> Tensor:
    batch, heads, _, width = query_BHTD.shape
    return query_BHTD.new_empty(batch, 1, heads, width)


def relative_error(heads: int, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The error of the kernel against torch in float32, on random operands of several spans, relative to the norm.

    For calls that `fits` refuses it is 0.
    """
    generator = torch.Generator().manual_seed(0)

    def random(number: int, tokens: int) -> Tensor:
        return torch.randn(2, number, tokens, width, generator=generator).to(device, dtype)

    query_BHTD, key_BGSD, value_BGSD = (
        random(heads, 1),
        random(groups, COMPARED_TOKENS),
        random(groups, COMPARED_TOKENS),
    )
    mask_BXTS = (torch.rand(2, 1, 1, COMPARED_TOKENS, generator=generator) < 0.5).to(device)
    if not fits(query_BHTD, key_BGSD, value_BGSD, mask_BXTS):
        return 0.0
    key, value = (x.float().repeat_interleave(heads // groups, dim=1) for x in (key_BGSD, value_BGSD))
    scale = width**-0.5
    expected_BHTD = scaled_dot_product_attention(query_BHTD.float(), key, value, attn_mask=mask_BXTS, scale=scale)
    expected = expected_BHTD.transpose(1, 2)
    found = decode_attention(query_BHTD, key_BGSD, value_BGSD, mask_BXTS, scale)
    return float((found.float() - expected).norm() / expected.norm())


def _spans(heads: int, length: int, device: torch.device) -> int:
    """A power of two with which the programs fill the GPU about twice, if the cache is long enough."""
    wanted = 2 * runtime.multiprocessors(device) // heads
    most = min(MOST_SPANS, -(-length // TOKENS_AT_ONCE))
    return max(1, 1 << min(wanted, most).bit_length() - 1) if wanted and most else 1


@triton.jit
def load_mask(mask, first, end, BLOCK_S: tl.constexpr):
    """Whether each of BLOCK_S tokens is attended to [S]; false from `end` on."""
    tokens_S = first + tl.arange(0, BLOCK_S)
    return tl.load(mask + tokens_S, mask=tokens_S < end, other=0) != 0


@triton.jit
def prefetch_tokens(rows, row_stride, first, length, D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Fetch what a program reads first to the L2 cache, lines of 128 bytes; none of it is used yet."""
    tokens_S = tl.minimum(first + tl.arange(0, BLOCK_S), length - 1).to(tl.int64)
    places = rows + tokens_S[:, None] * row_stride + (tl.arange(0, D // 64) * 64)[None, :]
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def decode_attention_kernel(
    q,  # [B, H, 1, D]
    k,  # [B, G, S, D]
    v,  # [B, G, S, D]
    mask,  # bool [B or 1, 1, 1, S]
    partial,  # float32 [B G, P, 16, D]
    sums,  # float32 [B G, P, 2, 16]: the largest score, and the sum of exponentials relative to it
    finished,  # int32, a counter per key head, zero before and after
    y,  # [B, 1, H, D]
    length,
    groups,
    q_of_sequence,
    q_of_head,
    k_of_sequence,
    k_of_head,
    k_of_token,
    v_of_sequence,
    v_of_head,
    v_of_token,
    mask_of_sequence,
    scale,
    span,
    REPEATS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    spans: tl.constexpr,
    pdl: tl.constexpr,
):
    """The query heads of one key head over a span of the cache; the last program writes y."""
    key_head, this = tl.program_id(0), tl.program_id(1)
    b, g = (key_head // groups).to(tl.int64), key_head % groups
    rows_R, columns_D = tl.arange(0, ROWS), tl.arange(0, D)
    inside_R = rows_R < REPEATS
    heads_R = g * REPEATS + rows_R
    if pdl:
        # The kernel before it may still write the newest keys and values, but other kernels wrote the rest.
        prefetch_tokens(k + b * k_of_sequence + g * k_of_head, k_of_token, this * span, length, D, BLOCK_S)
        prefetch_tokens(v + b * v_of_sequence + g * v_of_head, v_of_token, this * span, length, D, BLOCK_S)
        gdc_wait()
        gdc_launch_dependents()
    place_RD = b * q_of_sequence + heads_R[:, None] * q_of_head + columns_D[None, :]
    q_RD = tl.load(q + place_RD, mask=inside_R[:, None], other=0.0)
    largest_R = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    acc_RD = tl.zeros((ROWS, D), tl.float32)
    mask += b * mask_of_sequence
    end = tl.minimum(this * span + span, length)
    mask_S = load_mask(mask, this * span, end, BLOCK_S)
    for first in range(this * span, end, BLOCK_S):
        tokens_S = first + tl.arange(0, BLOCK_S)
        inside_S = tokens_S < length
        row_S = tokens_S.to(tl.int64)[:, None]
        k_SD = tl.load(
            k + b * k_of_sequence + g * k_of_head + row_S * k_of_token + columns_D[None, :], mask=inside_S[:, None],
            other=0.0,
        )  # fmt: skip
        v_SD = tl.load(
            v + b * v_of_sequence + g * v_of_head + row_S * v_of_token + columns_D[None, :], mask=inside_S[:, None],
            other=0.0,
        )  # fmt: skip
        # Triton copies keys and values ahead, but not single bytes.
        attended_S = mask_S
        mask_S = load_mask(mask, first + BLOCK_S, end, BLOCK_S)
        scores_RS = dot(q_RD, tl.trans(k_SD), tl.zeros((ROWS, BLOCK_S), tl.float32)) * (scale * LOG2_E)
        scores_RS = tl.where(attended_S[None, :], scores_RS, float("-inf"))
        now_R = tl.maximum(largest_R, tl.max(scores_RS, axis=1))
        # Where nothing is attended to yet, exponents of -inf - 0 are zero, and not of -inf + inf.
        base_R = tl.where(now_R == float("-inf"), 0.0, now_R)
        weights_RS = tl.exp2(scores_RS - base_R[:, None])
        rescale_R = tl.exp2(largest_R - base_R)
        sum_R = sum_R * rescale_R + tl.sum(weights_RS, axis=1)
        acc_RD = dot(weights_RS.to(v_SD.dtype), v_SD, acc_RD * rescale_R[:, None])
        largest_R = now_R
    last = True
    if spans > 1:
        of_span = key_head * spans + this
        tl.store(sums + of_span * (2 * ROWS) + rows_R, largest_R)
        tl.store(sums + of_span * (2 * ROWS) + ROWS + rows_R, sum_R)
        partial_RD = partial + (of_span * ROWS + rows_R[:, None]) * D + columns_D[None, :]
        tl.store(partial_RD, acc_RD, mask=inside_R[:, None])
        # All threads must have stored their elements before the counter is incremented.
        tl.debug_barrier()
        last = tl.atomic_add(finished + key_head, 1, sem="acq_rel") == spans - 1
        if last:
            tl.store(finished + key_head, 0)
            spans_P = key_head * spans + tl.arange(0, spans)
            of_spans_PR = sums + spans_P[:, None] * (2 * ROWS) + rows_R[None, :]
            largest_PR = tl.load(of_spans_PR)
            now_R = tl.max(largest_PR, axis=0)
            base_R = tl.where(now_R == float("-inf"), 0.0, now_R)
            sum_R = tl.sum(tl.load(of_spans_PR + ROWS) * tl.exp2(largest_PR - base_R[None, :]), axis=0)
            acc_RD = tl.zeros((ROWS, D), tl.float32)
            for p in tl.static_range(spans):
                of_span = key_head * spans + p
                weight_R = tl.exp2(tl.load(sums + of_span * (2 * ROWS) + rows_R) - base_R)
                partial_RD = partial + (of_span * ROWS + rows_R[:, None]) * D + columns_D[None, :]
                part_RD = tl.load(partial_RD, mask=inside_R[:, None], other=0.0)
                acc_RD += part_RD * weight_R[:, None]
    if last:
        y_RD = acc_RD / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
        place_RD = (b * (groups * REPEATS) + heads_R[:, None]) * D + columns_D[None, :]
        tl.store(y + place_RD, y_RD.to(y.dtype.element_ty), mask=inside_R[:, None])
