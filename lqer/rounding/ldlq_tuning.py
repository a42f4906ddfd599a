"""Coordinate descent on the codes of LDLQ (ldlq.py), under its scales: block by block, or on a GPU panel by panel.

For every block k of columns, last to first, with the errors E = Z - Ẑ of now:

    X_k = Ẑ_k + (E H)_:k H_kk⁻¹                what the block would be if nothing rounded it
    C   = round(X_k) - Ẑ_k
    Ẑ_k = Ẑ_k + C                              for the rows whose loss tr(E H Eᵀ) falls: C H_kk (C - 2 (X_k - Ẑ_k))ᵀ < 0

Rows of a trellis code stay or change 16 at a time. On a GPU a panel of lattice codes is one launch: with the rows
F_k = H_kk⁻¹ H_k: that a sweep shares with all others, X = Ẑ + E Fᵀ of all its blocks is one product, and the kernel
carries what changes from block to block (lattice_tuning.py).

Shapes: O out_features, I in_features, P columns of a panel, D columns of a block, K blocks, V codes of a block's row,
M vectors of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lqer.formats import E8P
from lqer.rounding.groups import Groups

# Codes (O, V) of blocks by their first column.
Codes = dict[int, Tensor]


def tuned(
    weight_IO: Tensor, error_IO: Tensor, codes: Codes, hessian_II: Tensor, groups: Groups, block: int, sweeps: int
) -> Codes:
    """The codes after that many sweeps, which never raise the loss of a row; errors are updated in place.

    codes: of one or several blocks each, by their first column. hessian_II: damped, float32.
    """
    codes = _by_block(codes, block, len(weight_IO))
    if has_kernel(groups, block, weight_IO.is_cuda):
        shares_II = block_shares(hessian_II, block)
        for _ in range(sweeps):
            sweep_panels(weight_IO, error_IO, codes, hessian_II, shares_II, groups)
    else:
        for _ in range(sweeps):
            sweep_blocks(weight_IO, error_IO, codes, hessian_II, groups, block)
    return codes


def has_kernel(groups: Groups, block: int, on_gpu: bool) -> bool:
    return on_gpu and block == E8P.vector_size and isinstance(groups.number_format, E8P)


def _by_block(codes: Codes, block: int, in_features: int) -> Codes:
    """Codes by first column of a block, of those by first column of one or several blocks."""
    starts = sorted(codes)
    return {
        start + i * block: codes_OV
        for start, stop in zip(starts, [*starts[1:], in_features], strict=True)
        for i, codes_OV in enumerate(codes[start].chunk(-(-(stop - start) // block), dim=1))
    }


def sweep_blocks(
    weight_IO: Tensor, error_IO: Tensor, codes: Codes, hessian_II: Tensor, groups: Groups, block: int
) -> None:
    """One sweep, block by block, in place."""
    rows = groups.number_format.vector_rows
    for k in sorted(codes, reverse=True):
        now = slice(k, min(k + block, len(weight_IO)))
        hessian_DD = hessian_II[now, now]
        gradient_DO = hessian_II[now] @ error_IO
        values_DO = weight_IO[now] - error_IO[now]
        new_codes_OV, new_values_OD = groups.round(k, (values_DO + torch.linalg.solve(hessian_DD, gradient_DO)).T)
        change_DO = new_values_OD.T - values_DO
        loss_change_O = (change_DO * (hessian_DD @ change_DO - 2 * gradient_DO)).sum(0)
        # Rows that share codes change together.
        better_M = loss_change_O.unflatten(0, (-1, rows)).sum(1) < 0
        error_IO[now] -= change_DO * better_M.repeat_interleave(rows)
        codes[k] = torch.where(better_M[:, None], new_codes_OV, codes[k])


def block_shares(hessian_II: Tensor, block: int) -> Tensor:
    """F (I, I): the rows of every block k of H times H_kk⁻¹; the last block may be smaller."""
    whole = len(hessian_II) // block * block
    rows_KDI = hessian_II[:whole].unflatten(0, (-1, block))
    square_KDKD = rows_KDI[:, :, :whole].unflatten(2, (-1, block))
    diagonal_KDD = square_KDKD.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    shares = [torch.linalg.solve(diagonal_KDD, rows_KDI).flatten(0, 1)]
    if whole < len(hessian_II):
        shares.append(torch.linalg.solve(hessian_II[whole:, whole:], hessian_II[whole:]))
    return torch.cat(shares)


def sweep_panels(
    weight_IO: Tensor, error_IO: Tensor, codes: Codes, hessian_II: Tensor, shares_II: Tensor, groups: Groups
) -> None:
    """One sweep over blocks of lattice codes, a launch for every panel, in place."""
    from lqer.rounding.lattice_tuning import tune_lattice_panel

    assert isinstance(groups.number_format, E8P)
    in_features, out_features = weight_IO.shape
    for start in reversed(range(0, in_features, groups.panel)):
        now = slice(start, min(start + groups.panel, in_features))
        starts = range(start, now.stop, E8P.vector_size)
        values_PO = weight_IO[now] - error_IO[now]
        target_PO = torch.addmm(values_PO, shares_II[now], error_IO)
        scale_KO = torch.stack([groups.scales(k)["scales"].float().flatten().expand(out_features) for k in starts])
        codes_KO = torch.cat([codes[k] for k in starts], dim=1).T.contiguous()
        change_PO = tune_lattice_panel(
            target_PO, values_PO, shares_II[now, now], hessian_II[now, now], scale_KO, codes_KO,
            groups.number_format.bits,
        )  # fmt: skip
        error_IO[now] -= change_PO
        codes |= dict(zip(starts, codes_KO.T.split(1, dim=1), strict=True))
