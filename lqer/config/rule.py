"""What a rule is that ties several keys of a configuration together, and how one is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lqer.config.schema import Config
from lqer.config.section import Loc


class KeyedError(ValueError):
    """A rule is broken at one key; the reader turns it into the usual line."""

    def __init__(self, loc: Loc, rule: str, found: object = None, allowed: tuple[str, ...] | None = None):
        super().__init__(rule)
        self.loc, self.rule, self.found, self.allowed = loc, rule, found, allowed


Rule = Callable[[Config], Iterator[KeyedError]]
