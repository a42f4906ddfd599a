"""What a run leaves in its store, to compare it with what another one leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lqer.store.records import MANIFEST


def stored(output_dir: Path) -> dict[str, Any]:
    """Every file of every artifact, of manifests all but the times."""
    artifacts = [path for path in (output_dir / "store").iterdir() if path.is_dir()]
    return {
        f"{artifact.name}/{path.name}": _untimed(path) if path.name == MANIFEST else path.read_bytes()
        for artifact in artifacts
        for path in artifact.iterdir()
    }


def _untimed(manifest: Path) -> Any:
    return json.loads(manifest.read_bytes()) | {"seconds": 0}
