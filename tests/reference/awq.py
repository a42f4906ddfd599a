"""AWQ's search for one norm and the linear after it, written from the paper and its authors' definition of w.

arXiv 2306.00978, section 3.2, equations 4 and 5; asymmetric integers in groups, as the paper uses them. Shares nothing
with `lqer.transforms.awq`: float64, one channel and one group after another.

Shapes: N tokens, O out_features, I in_features.
"""

import torch
from torch import Tensor


def round_to_groups(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """Each group of a row on its own 2^b levels, zero among them."""
    rounded_OI = torch.empty_like(weight_OI)
    for start in range(0, weight_OI.shape[1], group):
        for row, values in enumerate(weight_OI[:, start : start + group]):
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            codes = (torch.round(values / step) + zero).clamp(0, 2**bits - 1)
            rounded_OI[row, start : start + group] = (codes - zero) * step
    return rounded_OI


def relative_magnitudes(weight_OI: Tensor, group: int) -> Tensor:
    """Per input channel the mean over the rows of |w| relative to the largest |w| of its group."""
    sums_I = torch.zeros(weight_OI.shape[1], dtype=torch.float64)
    for row in weight_OI.abs():
        for channel, value in enumerate(row):
            start = channel // group * group
            sums_I[channel] += value / row[start : start + group].max()
    return sums_I / len(weight_OI)


def search(
    x_NI: Tensor, weight_OI: Tensor, bits: int, group: int, grid: int = 20, duo_scaling: bool = False
) -> tuple[float, Tensor, list[float]]:
    """The best ratio, its scale (I,), and the squared error of the output under each ratio."""
    x_NI, weight_OI = x_NI.double(), weight_OI.double()
    mean_I, magnitude_I = x_NI.abs().mean(0), relative_magnitudes(weight_OI, group)
    scales, errors = [], []
    for step in range(grid):
        ratio = step / grid
        scale_I = mean_I**ratio
        if duo_scaling:
            scale_I = scale_I / (magnitude_I ** (1 - ratio) + 1e-4)
        scale_I = scale_I.clamp(min=1e-4)
        scale_I = scale_I / (scale_I.max() * scale_I.min()) ** 0.5
        output_NO = (x_NI / scale_I) @ round_to_groups(weight_OI * scale_I, bits, group).T
        scales.append(scale_I)
        errors.append(float(((output_NO - x_NI @ weight_OI.T) ** 2).sum()))
    best = min(range(grid), key=errors.__getitem__)
    return best / grid, scales[best], errors
