"""Errors of weights and statistics, with the name of the linear at fault, which a rounding does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from lqer.errors import ModelError
from lqer.formats import NonFiniteError
from lqer.rounding.hessian import HessianError

AT_FAULT = (NonFiniteError, HessianError)

Linear = TypeVar("Linear")
Result = TypeVar("Result")


@contextmanager
def named(full_name: str) -> Iterator[None]:
    """Raise ModelError, with the linear's name before the rule, for values of it that cannot be quantized."""
    try:
        yield
    except AT_FAULT as error:
        raise ModelError(f"{full_name}: {error}") from None


def one_named(
    work: Callable[[Sequence[Linear]], Result], batch: Sequence[Linear], name_of: Callable[[Linear], str]
) -> Result:
    """work(batch) of linears that are worked on at once. Raises ModelError with the name of the one at fault."""
    try:
        return work(batch)
    except AT_FAULT:
        # The error does not say which of them: it is the one that fails alone.
        for linear in batch:
            with named(name_of(linear)):
                work([linear])
        raise
