from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lqer.formats import MX, Int, MXInt
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.rounding.rectified import dequantization_scale, inverse_rectified_sigmoid, rectified_sigmoid
from lqer.rounding.soft import Grid, harden
from lqer.transforms.clip import quantize_clipped

# 72 is no multiple of 16: the last group is ragged.
ROWS, COLUMNS = 10, 72
FORMATS = [
    Int(bits=2, block_size=16),
    Int(bits=4, block_size="row"),
    Int(bits=8, block_size=16, scale_dtype="float32"),
    Int(bits=3, block_size=16, symmetric=True),
    MXInt(bits=4, block_size=16),
    MXInt(bits=2, block_size=16, scale_rounding="floor"),
    MXInt(bits=3, block_size=16, levels="mid-rise"),
]


@pytest.fixture(scope="module")
def weight_OI():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[3, 16:32] = 0
    return weight


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def grid(request, weight_OI):
    return Grid.of(weight_OI, request.param.quantize(weight_OI))


def steps_of(start):
    """The step of every weight, from the definition of the formats."""
    if isinstance(start.format, Int):
        steps_ON = start.parts["scales"].double()
    else:
        steps_ON = 2.0 ** (start.parts["exponents"].double() - 127 - start.format.fraction_bits)
    width = COLUMNS if start.format.block_size == "row" else start.format.block_size
    return steps_ON.repeat_interleave(width, dim=1)[:, :COLUMNS]


def within_range(grid, weight_OI):
    steps_OI = weight_OI.double() / steps_of(grid.start)
    zeros = grid.start.parts.get("zeros")
    if zeros is not None:
        width = COLUMNS if grid.start.format.block_size == "row" else grid.start.format.block_size
        steps_OI = steps_OI + zeros.double().repeat_interleave(width, dim=1)[:, :COLUMNS]
    number_format = grid.start.format
    if isinstance(number_format, MXInt) and number_format.mid_rise:
        steps_OI = steps_OI - 0.5
    return (steps_OI >= number_format.min_code) & (steps_OI <= number_format.max_code)


def test_the_soft_weight_starts_at_the_weight_within_the_range(grid, weight_OI):
    v_OI = inverse_rectified_sigmoid(grid.fraction_OI)
    inside = within_range(grid, weight_OI)
    assert inside.float().mean() > 0.5
    soft_OI = grid.weight(v_OI, None)
    torch.testing.assert_close(soft_OI[inside], weight_OI[inside], rtol=1e-5, atol=1e-6)


def test_outside_the_range_it_is_the_nearest_end(weight_OI):
    number_format = Int(bits=3, block_size=16, scale_dtype="float32")
    half_ON = torch.full((ROWS, 5), 0.5)
    start = quantize_clipped(weight_OI, number_format, half_ON, half_ON)
    grid = Grid.of(weight_OI, start)
    outside = ~within_range(grid, weight_OI)
    assert outside.float().mean() > 0.05
    soft_OI = grid.weight(inverse_rectified_sigmoid(grid.fraction_OI), None)
    assert torch.equal(soft_OI[outside], start.dequantize()[outside])


def test_deciding_every_start_by_its_fraction_is_rounding_to_nearest(grid, weight_OI):
    rounded = grid.quantized(inverse_rectified_sigmoid(grid.fraction_OI), None)
    nearest = grid.start
    # A tie goes down here and to the even code there.
    ties = (grid.fraction_OI - 0.5).abs() < 1e-6
    assert torch.equal(rounded.parts["codes"][~ties], nearest.parts["codes"][~ties])
    assert all(rounded.parts[name] is nearest.parts[name] for name in nearest.parts if name != "codes")


def test_codes_are_the_lower_one_or_the_next(grid, weight_OI):
    v_OI = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    codes_OI = grid.quantized(v_OI, None).parts["codes"].double()
    rises = getattr(grid.start.format, "mid_rise", False)
    floor_OI = (weight_OI.double() / steps_of(grid.start) - 0.5 * rises).floor()
    zeros = grid.start.parts.get("zeros")
    if zeros is not None:
        width = COLUMNS if grid.start.format.block_size == "row" else grid.start.format.block_size
        floor_OI += zeros.double().repeat_interleave(width, dim=1)[:, :COLUMNS]
    inside = within_range(grid, weight_OI) & (floor_OI < grid.start.format.max_code)
    # The division in float32 may land on the other side of an integer than the one in float64.
    raised = (codes_OI - floor_OI)[inside & (grid.fraction_OI > 1e-4) & (grid.fraction_OI < 1 - 1e-4)]
    assert raised.unique().tolist() == [0, 1]


def test_what_is_evaluated_is_what_is_stored(grid):
    generator = torch.Generator().manual_seed(3)
    signs_OI = torch.randn(ROWS, COLUMNS, generator=generator).sign()
    u_ON = torch.randn(grid.spacing.step_G.shape, generator=generator) * 0.3 if grid.tunes_scales else None
    stored = grid.quantized(signs_OI, u_ON)
    assert torch.equal(grid.weight(signs_OI * torch.inf, u_ON), stored.dequantize())
    packed = stored.format.unpack(stored.pack(), stored.shape, stored.axis)
    assert torch.equal(packed.dequantize(), stored.dequantize())


def test_scales_are_stretched_by_twice_the_rectified_sigmoid_and_stay_where_that_is_one(weight_OI):
    start = Int(bits=3, block_size=16).quantize(weight_OI)
    grid = Grid.of(weight_OI, start)
    v_OI = inverse_rectified_sigmoid(grid.fraction_OI)
    untouched = grid.quantized(v_OI, torch.zeros_like(grid.spacing.step_G))
    assert torch.equal(untouched.parts["scales"], start.parts["scales"])
    stretched = grid.quantized(v_OI, torch.full_like(grid.spacing.step_G, 0.2))
    factor = float(dequantization_scale(torch.tensor(0.2)))
    assert factor == pytest.approx(2 * (1.2 / (1 + 2.718281828**-0.2) - 0.1))
    expected = (start.parts["scales"].float() * factor).half()
    assert torch.equal(stretched.parts["scales"], expected)
    assert torch.equal(stretched.parts["codes"], untouched.parts["codes"])


def test_gradients_are_those_of_the_definition(grid, weight_OI):
    """Against autograd on the formula, written down once more."""
    generator = torch.Generator().manual_seed(4)
    v_OI = torch.randn(ROWS, COLUMNS, generator=generator).mul_(3).requires_grad_()
    u_ON = torch.zeros_like(grid.spacing.step_G).requires_grad_() if grid.tunes_scales else None
    upstream_OI = torch.randn(ROWS, COLUMNS, generator=generator)
    soft_OI = grid.weight(v_OI, u_ON)
    soft_OI.backward(upstream_OI)

    width = COLUMNS if grid.start.format.block_size == "row" else 16
    zeros_ON = grid.start.parts.get("zeros", torch.zeros_like(grid.spacing.step_G))
    if getattr(grid.start.format, "mid_rise", False):
        zeros_ON = zeros_ON - 0.5
    zeros_OI = zeros_ON.double().repeat_interleave(width, dim=1)[:, :COLUMNS]
    v = v_OI.detach().double().requires_grad_()
    u = torch.zeros_like(grid.spacing.step_G, dtype=torch.float64).requires_grad_()
    steps_OI = steps_of(grid.start) * (2.4 * torch.sigmoid(u) - 0.2).repeat_interleave(width, dim=1)[:, :COLUMNS]
    codes_OI = grid.lower_OI + (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
    expected_OI = (codes_OI.clamp(grid.start.format.min_code, grid.start.format.max_code) - zeros_OI) * steps_OI
    expected_OI.backward(upstream_OI.double())
    torch.testing.assert_close(soft_OI, expected_OI.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v_OI.grad, v.grad.float(), rtol=1e-3, atol=1e-6)
    if u_ON is not None:
        torch.testing.assert_close(u_ON.grad, u.grad.float(), rtol=1e-3, atol=1e-4)


def test_a_decided_rounding_has_no_gradient(weight_OI):
    grid = Grid.of(weight_OI, Int(bits=3, block_size=16).quantize(weight_OI))
    v_OI = torch.full_like(weight_OI, torch.inf)
    v_OI[::2] = -torch.inf
    v_OI.requires_grad_()
    grid.weight(v_OI, None).sum().backward()
    assert torch.equal(v_OI.grad, torch.zeros_like(weight_OI))


@pytest.mark.parametrize("fraction", [0.8, 0.34, 0.005])
def test_at_most_so_many_stay_soft_and_the_surest_are_decided(fraction):
    v = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    hardened = harden(v, int(fraction * 2000))
    hard = hardened.isinf()
    assert hard.sum() == 2000 - int(fraction * 2000)
    score = (rectified_sigmoid(v) - 0.5).abs()
    assert score[hard].min() >= score[~hard].max()
    assert torch.equal(hardened[hard] > 0, v[hard] > 0)
    assert torch.equal(hardened[~hard], v[~hard])


def test_ties_are_decided_together_and_decisions_are_kept():
    v = torch.tensor([1.0, 1.0, 1.0, 0.125, -torch.inf, 1.0])
    # Three may stay soft, but the four that tie for the third place are decided together.
    assert harden(v, 3).tolist() == [torch.inf, torch.inf, torch.inf, 0.125, -torch.inf, torch.inf]


def test_padding_of_a_ragged_group_is_not_counted():
    weight_OI = torch.randn(1, 17, generator=torch.Generator().manual_seed(0))
    grid = Grid.of(weight_OI, Int(bits=2, block_size=16).quantize(weight_OI))
    assert grid.fraction_OI.shape == (1, 17)
    assert harden(inverse_rectified_sigmoid(grid.fraction_OI), 8).isinf().sum() >= 9


def test_codes_that_are_not_evenly_spaced_are_refused(weight_OI):
    with pytest.raises(ValueError, match="adaptive rounding needs weights of kind int or mxint"):
        Grid.of(weight_OI, MX(element="mxfp4_e2m1").quantize(weight_OI))


def test_a_start_of_another_shape_is_refused(weight_OI):
    with pytest.raises(ValueError, match=r"the start has shape \(10, 72\) and groups along axis 0"):
        Grid.of(weight_OI, Int(bits=4, block_size=16).quantize(weight_OI, axis=0))


def test_power_of_two_scales_cannot_be_stretched(weight_OI):
    grid = Grid.of(weight_OI, MXInt(bits=4).quantize(weight_OI))
    assert not grid.tunes_scales
    with pytest.raises(ValueError, match="the scales of mxint are powers of two"):
        grid.weight(torch.zeros_like(weight_OI), torch.zeros_like(grid.spacing.step_G))


def test_a_weight_beyond_the_codes_is_decided_from_the_start(weight_OI):
    number_format = Int(bits=3, block_size=16, scale_dtype="float32")
    half_ON = torch.full((ROWS, 5), 0.5)
    grid = Grid.of(weight_OI, quantize_clipped(weight_OI, number_format, half_ON, half_ON))
    outside = ~within_range(grid, weight_OI)
    v_OI = grid.start_v_OI
    assert v_OI[outside].isinf().all()
    assert torch.equal(v_OI.isinf(), ~grid.is_open_OI)
    assert torch.equal(grid.weight(v_OI, None), grid.weight(inverse_rectified_sigmoid(grid.fraction_OI), None))
    # Both decisions are the same code there, and two codes elsewhere.
    up_OI, down_OI = (grid.quantized(torch.full_like(v_OI, sign), None).parts["codes"].int() for sign in (1.0, -1.0))
    assert torch.equal((up_OI - down_OI).bool(), grid.is_open_OI)


def test_the_codes_of_a_start_can_be_kept_as_the_nearest(grid, weight_OI):
    """Codes of other weights: the grid starts at them once all is decided, and as near to the weight as it can."""
    start = grid.start
    other_OI = weight_OI + 0.4 * torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(5)) * weight_OI
    codes_OI = from_blocks(start.format.encode(to_blocks(other_OI, start.format.block_size), start.parts), COLUMNS)
    start = replace(start, parts=start.parts | {"codes": codes_OI})
    kept = Grid.of(weight_OI, start, keep_codes=True)
    v_OI = kept.start_v_OI
    assert torch.equal(kept.quantized(v_OI, None).parts["codes"], codes_OI)
    soft_OI, steps_OI = kept.weight(v_OI, None).double(), steps_of(start)
    nonzero = weight_OI != 0
    assert ((soft_OI - start.dequantize()).abs() <= 0.5 * steps_OI)[nonzero].all()
    moved_OI = (soft_OI - weight_OI).abs()
    assert (moved_OI <= (start.dequantize() - weight_OI).abs() + 1e-6)[nonzero].all()
    same = codes_OI == grid.quantized(grid.start_v_OI, None).parts["codes"]
    inside = same & within_range(grid, weight_OI) & nonzero
    assert (moved_OI <= 0.0101 * steps_OI + 1e-6)[inside].all()
