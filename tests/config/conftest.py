"""A configuration that every mistake is made in."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """
model = "some/model"
[formats]
w4 = { kind = "mxint", bits = 4, block_size = 32 }
x8 = { kind = "mxint", bits = 8 }
[quantize]
weight = "w4"
low_rank = { rank = 32, format = "x8" }
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text(BASE)
    return path
