"""The statistics of one input site, and what its linears derive from them.

q, k and v read the same inputs, and so do gate and up. What follows from the statistics alone (a rotated, damped or
factored Hessian) is then the same for all of them: it is made when the first asks for it and kept as long as the object
that it follows from, which whoever works on the site holds. The functions that derive it stay pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Source:
    """An object that keeps what was derived from it."""

    def __init__(self) -> None:
        self._derived: dict[tuple[Any, ...], Any] = {}

    def derived(self, make: Callable[..., T], *arguments: Any) -> T:
        """make(self, *arguments), made once for each function and arguments, which are hashable."""
        key = (make, *arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
        found: T = self._derived[key]
        return found


class SiteStatistics(Source, Mapping[str, Tensor]):
    """Statistics by kind, which must not be changed."""

    def __init__(self, statistics: Mapping[str, Tensor]):
        super().__init__()
        self._statistics = dict(statistics)

    def __getitem__(self, kind: str) -> Tensor:
        return self._statistics[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)


def derive(statistics: Mapping[str, Any], make: Callable[..., T], *arguments: Any) -> T:
    """make(statistics, *arguments): made once for `SiteStatistics`, anew for any other mapping."""
    if isinstance(statistics, SiteStatistics):
        return statistics.derived(make, *arguments)
    return make(statistics, *arguments)
