"""The plans of a model's linears, whether they are known or follow from a budget of bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from lqer.methods import Plans
from lqer.store.store import Store

# (out_features, in_features) by linear.
Shapes = Mapping[str, tuple[int, int]]


class Allocated(Protocol):
    """What an allocation found: plans with every rank and every weight format known."""

    @property
    def plans(self) -> Plans: ...


class BudgetedPlans(ABC):
    """Plans of which a part follows from a budget of bits, once a stage has measured what to choose by."""

    @abstractmethod
    def allocate(self, store: Store) -> Allocated:
        """The plans with all of their parts."""


AnyPlans = Plans | BudgetedPlans


def resolve_plans(plans: AnyPlans, store: Store) -> Plans:
    """The plans with every rank and every weight format known."""
    return plans.allocate(store).plans if isinstance(plans, BudgetedPlans) else plans
