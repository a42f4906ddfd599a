"""The workspace of another process of this machine, which works on the same artifact and alone writes its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lqer.store.workspace import Workspace


class Onlooker(Workspace):
    """Has the files that were there when it was made, less those removed since; what is written to it is dropped.

    The other process has checked the files.
    """

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        pass

    def write_json(self, name: str, value: Any) -> None:
        pass

    def write(self, name: str, write: Callable[[Path], object], size: int = 0) -> None:
        pass

    def remove(self, name: str) -> None:
        del self._files[name]

    def _compare(self, name: str) -> None:
        pass
