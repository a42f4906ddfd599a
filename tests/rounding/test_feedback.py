"""GPTQ and LDLQ: against each other, against their definitions, and against rounding to nearest."""

import pytest
import torch

from lqer.formats import E8P, Int, MXInt, NonFiniteError, NormalFloat, QuantizedTensor, Trellis
from lqer.rounding import Gptq, Ldlq
from lqer.rounding.gptq import gptq
from lqer.rounding.hessian import damp
from lqer.rounding.ldlq import block_lower, ldlq

SCALAR = [
    MXInt(3),
    MXInt(4, block_size=32),
    Int(2, block_size=64),
    Int(3, block_size=160, symmetric=True),
    Int(4, block_size="row"),
    NormalFloat(3, block_size=80),
    NormalFloat(4, block_size="tensor"),
]
VECTOR = [E8P(2), E8P(3), E8P(4), E8P(2, block_size=64)]
ROUNDINGS = [gptq, ldlq]
DIAGONAL = torch.linspace(0.5, 2, 320)


def describe(value) -> str | None:
    return "-".join(map(str, value.to_dict().values())) if hasattr(value, "to_dict") else None


each_scalar = pytest.mark.parametrize("number_format", SCALAR, ids=describe)
each_format = pytest.mark.parametrize("number_format", SCALAR + VECTOR, ids=describe)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def same(first: QuantizedTensor, second: QuantizedTensor) -> bool:
    return first.parts.keys() == second.parts.keys() and all(
        torch.equal(part, second.parts[name]) for name, part in first.parts.items()
    )


def same_but_for_near_ties(first_OI, second_OI) -> bool:
    """A different order of summation may flip a code, after which the rest of that row is another one."""
    return float((first_OI == second_OI).all(-1).float().mean()) >= 0.8


def feedback_by_definition(weight_OI, hessian_II, number_format) -> torch.Tensor:
    """Values of GPTQ with one scale per row: after each column the others go where the loss is least, in float64.

    With the errors e_P of rounded columns given, the free ones move to W_F + e_P H_PF H_FF⁻¹.
    """
    scales = number_format.fit(weight_OI.unsqueeze(1))
    values_OI = torch.zeros_like(weight_OI)
    for i in range(weight_OI.shape[1]):
        error_OP = (weight_OI - values_OI)[:, :i].double()
        free_II = hessian_II[i:, i:]
        shift_O = (error_OP @ hessian_II[:i, i:]) @ torch.linalg.inv(free_II)[:, 0]
        target_O = weight_OI[:, i] + shift_O.float()
        codes = number_format.encode(target_O[:, None, None], scales)
        values_OI[:, i] = number_format.decode(codes, scales).flatten()
    return values_OI


@each_scalar
def test_gptq_is_ldlq_with_blocks_of_one_from_the_other_end(number_format, make_layer):
    weight_OI, hessian_II = make_layer(40, 320)
    forward = gptq(weight_OI, damp(hessian_II), number_format)
    backward = ldlq(weight_OI.flip(1), damp(hessian_II.flip(0, 1)), number_format, block=1)
    assert same_but_for_near_ties(forward.dequantize(), backward.dequantize().flip(1))


def test_gptq_moves_free_columns_to_where_the_loss_is_least(make_layer):
    weight_OI, hessian_II = make_layer(16, 40)
    damped = damp(hessian_II)
    number_format = Int(3, block_size="row")
    expected_OI = feedback_by_definition(weight_OI, damped.hessian_II, number_format)
    assert same_but_for_near_ties(gptq(weight_OI, damped, number_format).dequantize(), expected_OI)


def test_a_vector_step_of_gptq_is_exact(make_layer):
    # Blocks of eight without feedback within the block: the definition, carried out column by column with the block's
    # codes given, must leave the same targets for the blocks to come.
    weight_OI, hessian_II = make_layer(16, 40)
    damped = damp(hessian_II)
    values_OI = gptq(weight_OI, damped, E8P(2)).dequantize()
    scales = E8P(2).fit(weight_OI.unsqueeze(1))
    for start in range(0, 40, 8):
        error_OP = (weight_OI - values_OI)[:, :start].double()
        shift_OF = (error_OP @ damped.hessian_II[:start, start:]) @ torch.linalg.inv(damped.hessian_II[start:, start:])
        target_O8 = weight_OI[:, start : start + 8] + shift_OF[:, :8].float()
        expected = E8P(2).decode(E8P(2).encode(target_O8.unsqueeze(1), scales), scales).squeeze(1)
        assert torch.equal(values_OI[:, start : start + 8], expected)


@pytest.mark.parametrize("block", [1, 8, 16, 24])
def test_the_block_decomposition_gives_the_hessian_back(block, make_layer):
    damped = damp(make_layer(4, 100)[1])
    lower_II = block_lower(damped.cholesky_II, block)
    blocks = [slice(k, min(k + block, 100)) for k in range(0, 100, block)]
    factor_II = torch.block_diag(*(damped.cholesky_II[now, now] for now in blocks))
    diagonal_II = factor_II @ factor_II.T
    torch.testing.assert_close(lower_II @ diagonal_II @ lower_II.T, damped.hessian_II, rtol=0.0, atol=1e-6)
    for now in blocks:
        torch.testing.assert_close(lower_II[now, now], torch.eye(now.stop - now.start).double(), rtol=0.0, atol=1e-12)
        assert not lower_II[now, now.stop :].any()


@each_rounding
@each_format
@pytest.mark.parametrize("hessian", [torch.eye(320), torch.diag(DIAGONAL)], ids=["identity", "diagonal"])
def test_uncorrelated_inputs_mean_direct_rounding(rounding, number_format, hessian, make_layer):
    weight_OI = make_layer(12, 320)[0]
    assert same(rounding(weight_OI, damp(hessian), number_format), number_format.quantize(weight_OI))


@each_rounding
@each_format
def test_feedback_lowers_the_loss_for_correlated_inputs(rounding, number_format, make_layer, loss):
    for seed in range(3):
        weight_OI, hessian_II = make_layer(32, 320, seed)
        direct = loss(number_format.quantize(weight_OI), weight_OI, hessian_II)
        assert loss(rounding(weight_OI, damp(hessian_II), number_format), weight_OI, hessian_II) < 0.75 * direct


@each_rounding
@each_format
def test_a_result_packs_and_unpacks_like_any_other(rounding, number_format, make_layer):
    weight_OI, hessian_II = make_layer(12, 172)
    quantized = rounding(weight_OI, damp(hessian_II), number_format)
    direct = number_format.quantize(weight_OI)
    assert {name: part.shape for name, part in quantized.parts.items()} == {
        name: part.shape for name, part in direct.parts.items()
    }
    assert {name: part.dtype for name, part in quantized.parts.items()} == {
        name: part.dtype for name, part in direct.parts.items()
    }
    restored = number_format.unpack(quantized.pack(), weight_OI.shape, 1)
    assert torch.equal(restored.dequantize(), quantized.dequantize())
    assert quantized.dequantize().shape == weight_OI.shape


@each_rounding
@each_format
def test_static_groups_have_the_scales_of_direct_rounding(rounding, number_format, make_layer):
    weight_OI, hessian_II = make_layer(12, 320)
    quantized = rounding(weight_OI, damp(hessian_II), number_format, static_groups=True)
    direct = number_format.quantize(weight_OI)
    for name in direct.parts.keys() - {"codes"}:
        assert torch.equal(quantized.parts[name], direct.parts[name])
    assert not torch.equal(quantized.parts["codes"], direct.parts["codes"])


@each_rounding
def test_a_group_is_fitted_to_what_feedback_has_made_of_it(rounding, make_layer):
    weight_OI, hessian_II = make_layer(12, 320)
    number_format = Int(3, block_size=64)
    scales = rounding(weight_OI, damp(hessian_II), number_format).parts["scales"]
    direct = number_format.quantize(weight_OI).parts["scales"]
    first = 0 if rounding is gptq else -1
    assert torch.equal(scales[:, first], direct[:, first])
    assert (scales != direct).float().mean() > 0.5


@each_rounding
@pytest.mark.parametrize("number_format", [MXInt(3), Int(3, block_size=48), Int(3, block_size=160)], ids=describe)
def test_panels_change_nothing_but_the_order_of_summation(rounding, number_format, make_layer, monkeypatch):
    weight_OI, hessian_II = make_layer(24, 320)
    usual = rounding(weight_OI, damp(hessian_II), number_format).dequantize()
    monkeypatch.setattr("lqer.rounding.groups.PANEL", 10_000)
    assert same_but_for_near_ties(rounding(weight_OI, damp(hessian_II), number_format).dequantize(), usual)


@pytest.mark.parametrize("rounding", [Gptq(damping=0.1), Ldlq(damping=0.1)], ids=["gptq", "ldlq"])
def test_a_damped_hessian_gives_what_the_hessian_gives(rounding, make_layer):
    weight_OI, hessian_II = make_layer(12, 320)
    found = [rounding.round(weight_OI, {"hessian": one}, MXInt(4)) for one in (hessian_II, damp(hessian_II, 0.1))]
    assert same(*found)


@each_rounding
def test_a_singular_hessian_is_rounded_under(rounding, make_layer, loss):
    weight_OI, _ = make_layer(32, 320)
    x_TI = torch.randn(20, 320, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hessian_II = x_TI.T @ x_TI
    quantized = rounding(weight_OI, damp(hessian_II), MXInt(4))
    assert loss(quantized, weight_OI, hessian_II) < 0.2 * loss(MXInt(4).quantize(weight_OI), weight_OI, hessian_II)


class TestGPTQ:
    @pytest.mark.parametrize("number_format", [MXInt(3), Int(4, block_size=64)], ids=describe)
    def test_activation_order_puts_codes_back_in_place(self, number_format, make_layer, loss):
        weight_OI, hessian_II = make_layer(32, 320)
        scale_I = torch.logspace(-1, 1, 320, dtype=torch.float64)[
            torch.randperm(320, generator=torch.Generator().manual_seed(0))
        ]
        hessian_II = scale_I[:, None] * hessian_II * scale_I
        ordered = gptq(weight_OI, damp(hessian_II), number_format, activation_order=True)
        in_place = gptq(weight_OI, damp(hessian_II), number_format, static_groups=True)
        assert loss(ordered, weight_OI, hessian_II) < loss(in_place, weight_OI, hessian_II)

    def test_activation_order_is_gptq_on_permuted_columns(self, make_layer):
        weight_OI, hessian_II = make_layer(12, 100)
        number_format = Int(3, block_size="row")
        order_I = damp(hessian_II).hessian_II.diagonal().argsort(descending=True, stable=True)
        permuted = gptq(weight_OI[:, order_I], damp(hessian_II[order_I][:, order_I]), number_format)
        ordered = gptq(weight_OI, damp(hessian_II), number_format, activation_order=True)
        assert torch.equal(ordered.dequantize()[:, order_I], permuted.dequantize())

    def test_inputs_that_were_never_seen_get_no_weight(self, make_layer):
        weight_OI, hessian_II = make_layer(12, 64)
        hessian_II[5] = hessian_II[:, 5] = 0
        values_OI = gptq(weight_OI, damp(hessian_II), Int(4, block_size="row")).dequantize()
        assert not values_OI[:, 5].any()
        assert values_OI[:, 6].any()

    def test_an_order_that_would_separate_the_columns_of_vectors_is_refused(self, make_layer):
        weight_OI, hessian_II = make_layer(8, 64)
        with pytest.raises(ValueError, match=r"activation_order would separate the columns of vectors of 8 \(e8p\)"):
            gptq(weight_OI, damp(hessian_II), E8P(2), activation_order=True)


class TestLDLQ:
    @pytest.mark.parametrize("number_format", [E8P(2), E8P(4), MXInt(3), Int(3, block_size=64)], ids=describe)
    def test_tuning_never_raises_the_loss(self, number_format, make_layer, loss):
        weight_OI, hessian_II = make_layer(32, 324)
        damped = damp(hessian_II)
        losses = [
            loss(ldlq(weight_OI, damped, number_format, tune_iters=sweeps), weight_OI, damped.hessian_II)
            for sweeps in range(4)
        ]
        assert losses == sorted(losses, reverse=True)
        assert losses[1] < 0.97 * losses[0]

    def test_tuning_changes_rows_that_share_codes_together_and_never_raises_the_loss(self, make_layer, loss):
        weight_OI, hessian_II = make_layer(32, 48)
        damped = damp(hessian_II)
        losses = [
            loss(ldlq(weight_OI, damped, Trellis(2), tune_iters=sweeps), weight_OI, damped.hessian_II)
            for sweeps in range(3)
        ]
        assert losses[0] > losses[1] >= losses[2]

    @pytest.mark.parametrize("number_format", [MXInt(3), Int(3, block_size=64)], ids=describe)
    def test_scalar_formats_can_be_swept_in_blocks(self, number_format, make_layer, loss):
        weight_OI, hessian_II = make_layer(32, 320)
        direct = loss(number_format.quantize(weight_OI), weight_OI, hessian_II)
        assert loss(ldlq(weight_OI, damp(hessian_II), number_format, block=8), weight_OI, hessian_II) < 0.75 * direct

    def test_a_block_that_does_not_fit_is_refused(self, make_layer):
        weight_OI, hessian_II = make_layer(8, 64)
        with pytest.raises(ValueError, match=r"block 4 is not a multiple of 8 \(e8p\)"):
            ldlq(weight_OI, damp(hessian_II), E8P(2), block=4)
        with pytest.raises(ValueError, match=r"block 24 does not divide groups of 16 columns \(mxint\)"):
            ldlq(weight_OI, damp(hessian_II), MXInt(4), block=24)


@each_rounding
def test_a_trellis_is_rounded_in_blocks_of_tiles(rounding, make_layer, loss):
    weight_OI, hessian_II = make_layer(32, 96)
    number_format = Trellis(2)
    direct, quantized = number_format.quantize(weight_OI), rounding(weight_OI, damp(hessian_II), number_format)
    assert loss(quantized, weight_OI, hessian_II) < 0.75 * loss(direct, weight_OI, hessian_II)
    assert same(rounding(weight_OI, damp(torch.eye(96)), number_format), direct)
    restored = number_format.unpack(quantized.pack(), weight_OI.shape, 1)
    assert torch.equal(restored.dequantize(), quantized.dequantize())


@each_rounding
def test_what_cannot_be_rounded_is_refused(rounding, make_layer):
    weight_OI, hessian_II = make_layer(8, 64)
    weight_OI[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN and 0 infinite"):
        rounding(weight_OI, damp(hessian_II), MXInt(4))


@each_rounding
def test_the_weight_and_the_hessian_are_left_alone(rounding, make_layer):
    weight_OI, hessian_II = make_layer(8, 64)
    before = weight_OI.clone(), hessian_II.clone()
    rounding(weight_OI, damp(hessian_II), E8P(2))
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian_II, before[1])
