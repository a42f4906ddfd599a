"""Shared fixtures: the folder of real models and texts, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Real models, texts and tasks that are too large for the repository.
ASSETS = Path(os.environ.get("LQER_TEST_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: needs a package index")


@pytest.fixture(scope="session")
def assets() -> Path:
    """models/, text/ and tasks/; skips where the folder is absent."""
    if not (ASSETS / "models").is_dir():
        pytest.skip(f"no real models and texts at {ASSETS} (set LQER_TEST_ASSETS)")
    return ASSETS
