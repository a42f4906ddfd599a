"""One warm server for all short forms of a test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server
from workbench import warm_server


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("campaigns")


@pytest.fixture(scope="session")
def server(workplace: Path) -> Iterator[Server]:
    with warm_server(workplace, with_library=True) as started:
        yield started
