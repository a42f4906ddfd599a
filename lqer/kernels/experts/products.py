"""One launch for all experts that tokens are sent to: y = W_q x_q + b + Q(Q(x_q A) B), expert by expert.

Weights of all experts lie one after the other, and so do biases and factors. A program computes a tile of an expert's
outputs for a tile of its pairs (routing.py), with the products of integers/gemm.py: there x is one row a token, here
each pair reads a row through `order`, and writes a row of its own. K is split as there. The first programs of the grid
compute Q(x A); the others need it for the low-rank branch, which those of the first split add after their own products.

Gate and up are two matrices of an expert, "halves". Their partial sums meet in one counter: the program that finishes
last adds those of both, and writes Q(act(gate) * up), so that nothing lies between this launch and the next.

Shapes: P pairs, M pairs of a tile, I in_features, O out_features, R rank (padded), E experts, H halves.
"""

import triton
import triton.language as tl

from lqer.kernels.decode import rows_of_x
from lqer.kernels.experts.routing import load_tile
from lqer.kernels.integers.gemm import is_grouped, low_rank_product, product
from lqer.kernels.low_rank import PARTIALS_AT_ONCE, project_split, write_projection
from lqer.kernels.rounding import round_rows
from lqer.kernels.split_k import store_partial, sum_partials


# P and the number of tiles change from call to call: do not compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["P", "bound"])
def experts_kernel(
    x,  # [P / fan, I], rounded if activations are
    order,  # as in routing.py
    tiles,
    words,  # these four as in layout/codes.py or layout/groups.py, [E, H, ..]
    high,
    scales,
    zeros,
    bias,  # [E, H, O], or None
    a_codes,  # Aᵀ [E, H, RP, IP] int8 or plain, or None
    a_exponents,  # [E, H, RP, IP / a_block] uint8, or None
    b_codes,  # [E, H, RP, O] int8 or plain, or None
    b_exponents,  # [E, H, RP / b_block, O] uint8, or None
    partial,  # [parts, O, P] float32, or None for one part
    finished,  # int32, a counter per output tile, zero before
    projection_partial,  # [projection_splits, H, P, RP] float32, or None
    projection,  # Q(x A) [H, P, RP], or None
    counters,  # int32 [tiles, H, 1 + blocks of ranks], zero before, or None
    y,  # [P, O] with a gate, else [P, H, O]
    bound,
    P,
    N,
    K,
    x_stride,  # between rows of x and y
    y_stride,
    words_stride,  # between halves, elements; zero points lie as scales do
    high_stride,
    scales_stride,
    fan: tl.constexpr,
    halves: tl.constexpr,
    gate: tl.constexpr,  # "silu", "gelu", "gelu_tanh"; "": halves are written apart
    rank: tl.constexpr,
    layout: tl.constexpr,  # RowLayout or GroupLayout
    rounding: tl.constexpr,  # ActivationRounding of x
    y_rounding: tl.constexpr,  # of y, with a gate
    not_rounding: tl.constexpr,  # that of what is rounded already
    a_block: tl.constexpr,
    b_block: tl.constexpr,
    padded_columns: tl.constexpr,
    projection_splits: tl.constexpr,
    SPLIT_K: tl.constexpr,
    tiles_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
):
    """By program number: first the splits of Q(x A), then those of W x, the first of which also add the branch."""
    pid = tl.program_id(0)
    if rank > 0:
        producers = bound * (halves * (rank // BLOCK_R) * projection_splits)
        if pid < producers:
            _project(
                pid, x, order, tiles, a_codes, a_exponents, projection_partial, projection, counters, P, K,
                x_stride, fan, halves, rank, padded_columns, projection_splits, SPLIT_K, BLOCK_M, BLOCK_R, rounding,
                not_rounding, a_block,
            )  # fmt: skip
            return
        pid -= producers
    pid_n, pid_s = pid % tiles_n, pid // tiles_n % splits
    half, tile = pid // (tiles_n * splits) % halves, pid // (tiles_n * splits * halves)
    expert, first, end = load_tile(tiles, tile, P)
    if first >= end:
        return
    matrix = (expert * halves + half).to(tl.int64)
    rows_O, rows_M = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_M)
    if high is not None:
        high += matrix * high_stride
    if zeros is not None:
        zeros += matrix * scales_stride
    acc_OM = product(
        x, words + matrix * words_stride, high, scales + matrix * scales_stride, zeros, pid_n * BLOCK_N, first,
        pid_s, end, N, K, x_stride, order, fan, layout, False, BLOCK_N, BLOCK_M, splits, stages, False,
    )  # fmt: skip
    if rank > 0:
        if pid_s == 0:
            _await(counters + (tile * halves + half) * (1 + rank // BLOCK_R), rank // BLOCK_R)
            if b_exponents is not None:
                b_exponents += matrix * (rank // b_block) * N
            acc_OM += low_rank_product(
                projection + half.to(tl.int64) * P * rank, b_codes + matrix * rank * N, b_exponents, 0, rows_O, rows_M,
                end, N, x.dtype.element_ty, rank, rank, b_block, BLOCK_N, BLOCK_M, BLOCK_R, rounding,
                is_grouped(layout),
            )  # fmt: skip
    if bias is not None:
        bias += matrix * N
    inside_OM = (rows_O < N)[:, None] & (rows_M < end)[None, :]
    offset_OM = rows_O.to(tl.int64)[:, None] * P + rows_M[None, :]
    size = P.to(tl.int64) * N
    at_once: tl.constexpr = max(1, 64 // BLOCK_M)
    pair_M = rows_of_x(rows_M, end, order, 1).to(tl.int64)
    place_OM = y + pair_M[None, :] * y_stride + rows_O[:, None]
    if gate == "":
        place_OM += half * N
        last = True
        if splits > 1:
            counter = finished + (tile * halves + half) * tiles_n + pid_n
            own = partial + half.to(tl.int64) * splits * size
            last = store_partial(acc_OM, own, offset_OM, inside_OM, size, counter, pid_s, splits)
            if last:
                acc_OM = sum_partials(acc_OM, own, offset_OM, inside_OM, size, counter, splits, at_once)
        if last:
            y_OM = _add_bias(acc_OM, bias, rows_O, N)
            tl.store(place_OM, y_OM.to(y.dtype.element_ty), mask=inside_OM)
    else:
        counter = finished + tile * tiles_n + pid_n
        if store_partial(acc_OM, partial, offset_OM, inside_OM, size, counter, half * splits + pid_s, halves * splits):
            gate_OM = sum_partials(acc_OM, partial, offset_OM, inside_OM, size, counter, splits, at_once)
            up_OM = sum_partials(acc_OM, partial + splits * size, offset_OM, inside_OM, size, counter, splits, at_once)
            if bias is not None:
                bias -= half * N
                gate_OM, up_OM = _add_bias(gate_OM, bias, rows_O, N), _add_bias(up_OM, bias + N, rows_O, N)
            dtype: tl.constexpr = y.dtype.element_ty
            # The model's dtype holds every one of these where they are computed apart.
            hidden_OM = activate(gate_OM.to(dtype).to(tl.float32), gate).to(dtype).to(tl.float32)
            hidden_OM = (hidden_OM * up_OM.to(dtype).to(tl.float32)).to(dtype)
            if y_rounding.bits > 0:
                hidden_OM = round_rows(hidden_OM.to(tl.float32), y_rounding).to(dtype)
            tl.store(place_OM, hidden_OM, mask=inside_OM)


@triton.jit
def activate(x, kind: tl.constexpr):
    """The activation of this name, float32."""
    if kind == "silu":
        return x * tl.sigmoid(x)
    elif kind == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(kind == "gelu_tanh")
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _add_bias(acc_OM, bias, rows_O, N):
    if bias is None:
        return acc_OM
    else:
        return acc_OM + tl.load(bias + rows_O, mask=rows_O < N, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _project(
    producer,  # number of this program
    x,
    order,
    tiles,
    a_codes,
    a_exponents,
    partial,
    projection,
    counters,
    P,
    K,
    x_stride,
    fan: tl.constexpr,
    halves: tl.constexpr,
    rank: tl.constexpr,
    padded_columns: tl.constexpr,
    splits: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    rounding: tl.constexpr,
    not_rounding: tl.constexpr,
    a_block: tl.constexpr,
):
    """One split of x A for a tile of pairs, a half and a block of ranks; the last one also writes Q(x A)."""
    rank_blocks: tl.constexpr = rank // BLOCK_R
    # As in `produce_projection`.
    BLOCK_K: tl.constexpr = max(64, min(SPLIT_K, 2048 // max(BLOCK_M, BLOCK_R)))
    split, pid_r = producer % splits, producer // splits % rank_blocks
    half, tile = producer // (splits * rank_blocks) % halves, producer // (splits * rank_blocks * halves)
    expert, first, end = load_tile(tiles, tile, P)
    if first < end:
        matrix = (expert * halves + half).to(tl.int64)
        if a_exponents is not None:
            a_exponents += matrix * rank * (padded_columns // a_block)
        rows_M, ranks_R = first + tl.arange(0, BLOCK_M), pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        acc_MR = project_split(
            x, a_codes + matrix * rank * padded_columns, a_exponents, None, False, split, rows_M,
            rows_of_x(rows_M, end, order, fan), ranks_R, end, K, x_stride,
            rank, padded_columns, SPLIT_K, BLOCK_K, not_rounding, a_block, 1,
        )  # fmt: skip
        ready = counters + (tile * halves + half) * (1 + rank_blocks)
        inside_M1, offset_MR = (rows_M < end)[:, None], rows_M[:, None] * rank + ranks_R[None, :]
        own, size = half.to(tl.int64) * P * rank, halves * P.to(tl.int64) * rank
        if store_partial(acc_MR, partial + own, offset_MR, inside_M1, size, ready + 1 + pid_r, split, splits):
            xa_MR = sum_partials(
                acc_MR, partial + own, offset_MR, inside_M1, size, ready + 1 + pid_r, splits, PARTIALS_AT_ONCE
            )
            write_projection(xa_MR, projection + own, rows_M, ranks_R, end, rank, rounding)
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _await(ready, rank_blocks: tl.constexpr):
    """Wait for Q(x A) of a tile and half. Its counter is not used again."""
    while tl.atomic_add(ready, 0, sem="acquire") < rank_blocks:
        pass
