"""The plans of a model's linears, whether they are known or follow from a budget of bits."""

from __future__ import annotations

from lqer.stages.allocate_ranks import BudgetedPlans, Plans
from lqer.stages.allocate_widths import WidthPlans
from lqer.store.store import Store

AnyPlans = Plans | BudgetedPlans | WidthPlans


def resolve_plans(plans: AnyPlans, store: Store) -> Plans:
    """The plans with every rank and every weight format known."""
    return plans.allocate(store).plans if isinstance(plans, BudgetedPlans | WidthPlans) else plans
