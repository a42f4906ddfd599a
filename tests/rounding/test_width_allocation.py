"""Widths under a budget: against every combination, and what allocation can never make worse."""

import itertools

import pytest
import torch

from lqer.rounding.width_allocation import Curve, allocate_widths, joined


def random_curves(linears: int, seed: int) -> dict[str, Curve]:
    """Losses that fall about fourfold with every bit, from sizes and sensitivities that differ widely."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for i in range(linears):
        size = int(torch.randint(10, 100, (), generator=generator))
        losses = 4.0 ** -torch.arange(3) * torch.randn((), generator=generator).mul(2).exp()
        losses = losses * torch.rand(3, generator=generator).add(0.75)
        curves[f"linear {i}"] = Curve(tuple(size * bits for bits in (2, 3, 4)), tuple(losses.tolist()))
    return curves


def totals(curves, chosen):
    return tuple(sum(getattr(curves[name], part)[i] for name, i in chosen.items()) for part in ("bits", "losses"))


@pytest.mark.parametrize("seed", range(6))
def test_no_combination_within_the_bits_used_has_less_loss_by_more_than_the_last_step(seed):
    curves = random_curves(6, seed)
    budget = int(3.1 * sum(curve.bits[0] // 2 for curve in curves.values()))
    found = allocate_widths(curves, budget)
    assert (found.bits, found.loss) == pytest.approx(totals(curves, found.chosen))
    assert found.bits <= budget
    best = min(
        loss
        for chosen in itertools.product(range(3), repeat=6)
        for bits, loss in [totals(curves, dict(zip(curves, chosen, strict=True)))]
        if bits <= budget
    )
    largest_step = max(curve.losses[0] - curve.losses[1] for curve in curves.values())
    assert best <= found.loss <= best + largest_step / 3


@pytest.mark.parametrize("seed", range(20))
def test_the_result_is_never_worse_than_the_best_uniform_width_and_leaves_no_step_untaken(seed):
    curves = random_curves(40, seed)
    size = sum(curve.bits[0] // 2 for curve in curves.values())
    for average in (2.0, 2.3, 3.0, 3.1, 3.9, 4.5):
        found = allocate_widths(curves, int(average * size))
        assert found.uniform == min(int(average), 4) - 2
        assert found.loss <= found.uniform_loss
        assert found.bits <= average * size
        left = int(average * size) - found.bits
        assert all(curve.step(found.chosen[name], left) is None for name, curve in curves.items())


def test_a_more_sensitive_linear_of_the_same_size_never_gets_fewer_bits():
    curves = {f"{i}": Curve((200, 300, 400), (4.0**i, 4.0 ** (i - 1), 4.0 ** (i - 2))) for i in range(8)}
    chosen = [allocate_widths(curves, 2500).chosen[name] for name in curves]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_a_format_that_costs_more_and_helps_nothing_is_not_taken():
    curves = {"one": Curve((2, 3, 4), (1.0, 1.0, 0.5))}
    assert allocate_widths(curves, 3).chosen == {"one": 0}
    assert allocate_widths(curves, 4).chosen == {"one": 2}


def test_linears_that_share_a_format_have_the_sum_of_their_curves():
    assert joined([Curve((2, 4), (1.0, 0.5)), Curve((20, 40), (3.0, 1.0))]) == Curve((22, 44), (4.0, 1.5))


def test_a_budget_below_the_cheapest_formats_is_refused():
    with pytest.raises(ValueError, match="the cheapest formats take 22 bits, more than the 21 of the budget"):
        allocate_widths({"a": Curve((2, 4), (1.0, 0.5)), "b": Curve((20, 40), (3.0, 1.0))}, 21)
