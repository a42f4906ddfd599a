"""The vectors of a panel of GPTVQ's sweep in one kernel (arXiv 2402.15319, algorithm 1).

For the vectors P of D columns of the panel, first to last, with i over the columns of P:

    code = argmin_k Σ_i h_i c_ki (c_ki - 2 w_i / s_i)          the distance without the term that has no centroid in it
    e_i = w_i - s_i c_code,i
    w_j = w_j - Σ_i F_ij e_i                                   F = U_PP⁻¹ U_P, for all j of the panel after P

In PyTorch a vector costs some ten launches of a few microseconds; here a program keeps its rows of the panel in
registers and walks the vectors. It imports triton: only for tensors on a GPU, or in Triton's interpreter.

Shapes: P columns of a panel, O rows, G groups of rows, K centroids, D elements of a vector, V vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program. Vectors come one after the other: many programs with few rows hide each other's latency.
ROWS = 8
# A warp holds the distances of 8 rows to 64 centroids in 16 registers a thread.
CENTROIDS_OF_A_WARP = 64


def sweep_panel(
    panel_PO: Tensor, scale_PO: Tensor, importance_P1: Tensor, feedback_PP: Tensor, centroids_GKD: Tensor
) -> tuple[Tensor, Tensor]:
    """uint8 codes [V, O] and errors [P, O] of a panel; the panel is left as it is.

    All float32. panel_PO, scale_PO: w and s, each column contiguous; O is a multiple of G. importance_P1: h.
    feedback_PP: the panel's block of F on the diagonal. K is a power of two, at most 256.
    """
    columns, rows = panel_PO.shape
    groups, centroids, dimension = centroids_GKD.shape
    centroids_GKD, importance_P1 = centroids_GKD.contiguous(), importance_P1.contiguous()
    codes_VO = torch.empty(columns // dimension, rows, dtype=torch.uint8, device=panel_PO.device)
    error_PO = torch.empty(columns, rows, dtype=torch.float32, device=panel_PO.device)
    vector_sweep_kernel[(triton.cdiv(rows, ROWS),)](
        panel_PO, scale_PO, importance_P1, feedback_PP, centroids_GKD, codes_VO, error_PO,
        columns, rows, rows // groups, panel_PO.stride(0), scale_PO.stride(0), *feedback_PP.stride(),
        DIMENSION=dimension, CENTROIDS=centroids, WIDTH=triton.next_power_of_2(columns), ROWS_C=ROWS,
        num_warps=max(1, centroids // CENTROIDS_OF_A_WARP),
    )  # fmt: skip
    return codes_VO, error_PO


@triton.jit
def vector_sweep_kernel(
    panel, scale, importance, feedback, centroid, codes, error,
    columns, rows, group_rows, panel_stride, scale_stride, feedback_row_stride, feedback_column_stride,
    DIMENSION: tl.constexpr, CENTROIDS: tl.constexpr, WIDTH: tl.constexpr, ROWS_C: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS_C + tl.arange(0, ROWS_C)
    p = tl.arange(0, WIDTH)
    k = tl.arange(0, CENTROIDS)
    inside = o < rows
    first_O = (o // group_rows) * CENTROIDS
    present = (p < columns)[:, None] & inside[None, :]
    w_PO = tl.load(panel + p[:, None] * panel_stride + o[None, :], mask=present, other=0.0)
    for v in range(columns // DIMENSION):
        score_KO = tl.zeros((CENTROIDS, ROWS_C), tl.float32)
        for d in tl.static_range(DIMENSION):
            i = v * DIMENSION + d
            w_O = tl.sum(tl.where((p == i)[:, None], w_PO, 0.0), axis=0)
            s_O = tl.load(scale + i * scale_stride + o, mask=inside, other=1.0)
            at_KO = (first_O[None, :] + k[:, None]) * DIMENSION + d
            c_KO = tl.load(centroid + at_KO, mask=inside[None, :], other=0.0)
            score_KO += tl.load(importance + i) * (c_KO * (c_KO - 2 * tl.math.div_rn(w_O, s_O)[None, :]))
        code_O = tl.argmin(score_KO, axis=0, tie_break_left=True)
        tl.store(codes + v * rows + o, code_O.to(tl.uint8), mask=inside)
        later = (p >= (v + 1) * DIMENSION) & (p < columns)
        for d in tl.static_range(DIMENSION):
            i = v * DIMENSION + d
            w_O = tl.sum(tl.where((p == i)[:, None], w_PO, 0.0), axis=0)
            s_O = tl.load(scale + i * scale_stride + o, mask=inside, other=1.0)
            c_O = tl.load(centroid + (first_O + code_O) * DIMENSION + d, mask=inside, other=0.0)
            error_O = w_O - s_O * c_O
            tl.store(error + i * rows + o, error_O, mask=inside)
            row_P = tl.load(feedback + i * feedback_row_stride + p * feedback_column_stride, mask=later, other=0.0)
            w_PO -= row_P[:, None] * error_O[None, :]
