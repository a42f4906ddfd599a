"""Refitted scales and coordinate descent: a rounded weight, improved under its Hessian in turns.

For a target W, values Q = (C - Z) s with codes C, zero points Z and a scale s per group, and the loss of every row
(w - q) H (w - q)ᵀ, whatever the groups of its columns:

    refit    the scales of a row together, codes fixed: the least loss, a system of groups x groups equations; kept
             where the stored scales are positive and lower the row's loss
    sweep    one code after the other, scales fixed:  c_j <- round(c_j + g_j / (H_jj s_j)),  g = (W - Q) H, clamped
             to the format's codes; g is kept up to date within a panel of columns, and made anew for the next

Neither raises a row's loss; rounding errors that would are undone. What is lowered is the error on the calibration
text, which is not the model's loss: many turns can fit the text (docs/methods/scalar.md).

Shapes: O out_features, I in_features, N groups of a row, g values of a group, P columns of a panel, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqer.formats import Int, NumberFormat, QuantizedTensor
from lqer.formats.blocks import block_width, from_blocks, to_blocks

PANEL = 128
SWEEPS = 2  # per turn
# Relative to a scale's own square in the least-squares matrix; groups may be nearly dependent.
RIDGE = 1e-9
# Elements of the least-squares matrices that are solved at once.
MOST_ELEMENTS = 1 << 26
# Zero blocks of MXINT have steps that cannot be divided by: their codes stay.
SMALLEST_STEP = torch.finfo(torch.float32).tiny


@torch.no_grad()
def descend(weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor, turns: int) -> QuantizedTensor:
    """`quantized` after that many turns of a refit and two sweeps.

    weight_OI: the target, float32. hessian_II: positive definite, float64, the one that losses are judged by.
    quantized: of evenly spaced values, groups along in_features.
    """
    hessian32_II = hessian_II.to(torch.float32)
    loss_O = row_losses(weight_OI, hessian_II, quantized)
    for _ in range(turns):
        moved = sweep(weight_OI, hessian32_II, refit(weight_OI, hessian32_II, quantized))
        moved_loss_O = row_losses(weight_OI, hessian_II, moved)
        better_O = moved_loss_O < loss_O
        quantized = _rows_of(moved, quantized, better_O)
        loss_O = torch.where(better_O, moved_loss_O, loss_O)
    return quantized


def row_losses(weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor) -> Tensor:
    """(w - q) H (w - q)ᵀ of every row, float64 (O,)."""
    error_OI = weight_OI.to(torch.float64) - quantized.dequantize()
    return ((error_OI @ hessian_II) * error_OI).sum(1)


def refit(weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor) -> QuantizedTensor:
    """The same codes under the scales that fit each row best; powers of two and a scale of the tensor stay."""
    number_format = quantized.format
    if not isinstance(number_format, Int) or number_format.block_size == "tensor":
        return quantized
    step_ON, zero_ON, _ = _spacing(quantized)
    width = block_width(weight_OI.shape[1], number_format.block_size)
    base_OI = from_blocks(_steps(quantized) - zero_ON.unsqueeze(-1), weight_OI.shape[1])
    right_ON = to_blocks((weight_OI @ hessian_II) * base_OI, number_format.block_size).sum(-1).to(torch.float64)
    rows = max(MOST_ELEMENTS // step_ON.shape[1] ** 2, 1)
    refitted_ON = torch.cat(
        [
            _solve(base_RI, hessian_II, width, right_RN, step_RN, number_format)
            for base_RI, right_RN, step_RN in zip(
                base_OI.split(rows), right_ON.split(rows), step_ON.split(rows), strict=True
            )
        ]
    )
    return replace(quantized, parts={**quantized.parts, "scales": refitted_ON})


def _solve(
    base_RI: Tensor, hessian_II: Tensor, width: int, right_RN: Tensor, step_RN: Tensor, number_format: Int
) -> Tensor:
    """Stored scales of some rows: of the normal equations where they are positive and better, else as they are."""
    columns = base_RI.shape[1]
    left_RNN = torch.stack(
        [
            to_blocks((base_RI[:, first : first + width] @ hessian_II[first : first + width]) * base_RI, width).sum(-1)
            for first in range(0, columns, width)
        ],
        dim=1,
    ).to(torch.float64)
    # A group of zeros has no say: its equation is s = s.
    diagonal_RN = left_RNN.diagonal(dim1=1, dim2=2)
    is_zero_RN = diagonal_RN <= 0
    damped_RNN = left_RNN + torch.diag_embed(torch.where(is_zero_RN, 1.0, RIDGE * diagonal_RN))
    factor_RNN, _ = torch.linalg.cholesky_ex(damped_RNN)
    wanted_RN = torch.where(is_zero_RN, step_RN.to(torch.float64), right_RN)
    fitted_RN = torch.cholesky_solve(wanted_RN.unsqueeze(-1), factor_RNN).squeeze(-1)
    stored_RN = number_format.storable_scales(fitted_RN.to(torch.float32).nan_to_num(0.0))
    losses = (_loss(left_RNN, right_RN, scales_RN.to(torch.float64)) for scales_RN in (stored_RN, step_RN))
    better_R = (fitted_RN > 0).all(1) & torch.lt(*losses)
    return torch.where(better_R.unsqueeze(-1), stored_RN, step_RN.to(stored_RN.dtype))


def _loss(left_RNN: Tensor, right_RN: Tensor, scales_RN: Tensor) -> Tensor:
    """The part of a row's loss that depends on its scales (R,)."""
    return ((left_RNN @ scales_RN.unsqueeze(-1)).squeeze(-1) * scales_RN - 2 * right_RN * scales_RN).sum(1)


def sweep(weight_OI: Tensor, hessian_II: Tensor, quantized: QuantizedTensor, sweeps: int = SWEEPS) -> QuantizedTensor:
    """Choose the best code of every column in turn, first to last, with the others fixed; `sweeps` times."""
    step_ON, zero_ON, limits = _spacing(quantized)
    width = block_width(weight_OI.shape[1], quantized.format.block_size)
    codes_IO = from_blocks(_steps(quantized), weight_OI.shape[1]).T.contiguous()
    step_NO, zero_NO = step_ON.T.contiguous(), zero_ON.T.contiguous()
    sweep_panel = _panel_column_by_column
    if weight_OI.is_cuda:
        # A column would cost some ten launches.
        from lqer.rounding.sweep import descend_panel as sweep_panel
    group_I = torch.arange(len(codes_IO), device=codes_IO.device) // width
    for _ in range(sweeps):
        error_IO = weight_OI.T - (codes_IO - zero_NO[group_I]) * step_NO[group_I]
        for first in range(0, len(codes_IO), PANEL):
            now = slice(first, first + PANEL)
            gradient_PO = hessian_II[now] @ error_IO
            step_PO = step_NO[group_I[now]]
            sweep_panel(codes_IO[now], error_IO[now], gradient_PO, hessian_II[now, now], step_PO, limits)
    codes_OI = codes_IO.T.contiguous().to(quantized.parts["codes"].dtype)
    return replace(quantized, parts={**quantized.parts, "codes": codes_OI})


def _panel_column_by_column(
    codes_PO: Tensor,
    error_PO: Tensor,
    gradient_PO: Tensor,
    hessian_PP: Tensor,
    step_PO: Tensor,
    limits: tuple[int, int],
) -> None:
    """One sweep over a panel of columns, in place: codes, errors and their gradient g."""
    diagonal_P = hessian_PP.diagonal()
    divisor_PO = torch.where(step_PO < SMALLEST_STEP, torch.inf, step_PO * diagonal_P.unsqueeze(1))
    for p in range(len(codes_PO)):
        moved_O = torch.addcdiv(codes_PO[p], gradient_PO[p], divisor_PO[p]).round_().clamp_(*limits)
        change_O = (moved_O - codes_PO[p]) * step_PO[p]
        # The product is the fall of half the loss: neither a tie nor float32's error in g may move a code.
        change_O *= change_O * (gradient_PO[p] - 0.5 * diagonal_P[p] * change_O) > 0
        codes_PO[p] = torch.where(change_O == 0, codes_PO[p], moved_O)
        error_PO[p] -= change_O
        gradient_PO[p:].addr_(hessian_PP[p:, p], change_O, alpha=-1)


def _spacing(quantized: QuantizedTensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Step and zero point of every group, float32 (O, N), and the smallest and largest code."""
    spacing = quantized.format.spacing({name: part for name, part in quantized.parts.items() if name != "codes"})
    assert spacing is not None, "only evenly spaced values are descended"
    rows = quantized.shape[0]
    step_ON, zero_ON = (x.expand(rows, -1) for x in (spacing.step_G, spacing.zero_G))
    return step_ON, zero_ON, (spacing.min_code, spacing.max_code)


def _steps(quantized: QuantizedTensor) -> Tensor:
    """Codes in blocks, float32 (O, N, g), zeros in the padding of a ragged last one."""
    return to_blocks(quantized.parts["codes"].to(torch.float32), quantized.format.block_size)


def _rows_of(new: QuantizedTensor, old: QuantizedTensor, is_new_O: Tensor) -> QuantizedTensor:
    """The rows of one and the other; a scale of the whole tensor is the same in both."""
    parts = {
        name: part if len(part) != len(is_new_O) else torch.where(is_new_O.unsqueeze(-1), part, old.parts[name])
        for name, part in new.parts.items()
    }
    return replace(old, parts=parts)


def require_descent(descent: object, kind: str) -> None:
    """Raise ValueError unless the number of turns is an integer of at least 0."""
    if isinstance(descent, bool) or not isinstance(descent, int) or descent < 0:
        raise ValueError(f"descent {descent!r} is not an integer of at least 0 ({kind})")


def unsupported_descent(number_format: NumberFormat, turns: int) -> str | None:
    """Why weights of that format cannot be descended; None if they can."""
    if turns and type(number_format).spacing is NumberFormat.spacing:
        return f'descent needs evenly spaced values, of kind int or mxint, not "{number_format.kind}"'
    return None
