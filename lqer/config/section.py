"""What the sections of a configuration have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
# A place in a configuration: the keys, and indices of lists, that lead to it.
Loc = tuple[str | int, ...]


class Section(BaseModel):
    """One TOML table: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
