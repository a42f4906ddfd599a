"""A moment of a job that lasts until a test has seen it, however fast the job is and however busy the machine."""

from __future__ import annotations

import time
from pathlib import Path

PLUGIN = """
import time
from pathlib import Path

from lqer.store.workspace import Workspace

FOLDER, STAGES = Path({folder!r}), {stages!r}
write = Workspace.write


def write_and_wait(workspace, name, *rest):
    write(workspace, name, *rest)
    stage = workspace.path.name.partition("-")[0]
    if stage not in STAGES:
        return
    workspace.flush()
    try:
        (FOLDER / f"{{stage}} is held").touch(exist_ok=False)
    except FileExistsError:
        return
    end = time.monotonic() + 300
    while not (FOLDER / f"{{stage}} goes on").exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{{stage}} was held, and nobody let it go on")
        time.sleep(0.02)


Workspace.write = write_and_wait
"""


def holding(folder: Path, *stages: str) -> str:
    """A plug-in: of all processes, the first that has stored a file of a stage waits then, once for each stage."""
    path = folder / "holds_stages.py"
    path.write_text(PLUGIN.format(folder=str(folder), stages=stages))
    return str(path)


def is_held(folder: Path, stage: str) -> bool:
    return (folder / f"{stage} is held").exists()


def wait_until_held(folder: Path, *stages: str) -> None:
    while not all(is_held(folder, stage) for stage in stages):
        time.sleep(0.02)


def let_go(folder: Path, *stages: str) -> None:
    """Who waits goes on, unless it was killed."""
    for stage in stages:
        (folder / f"{stage} goes on").touch()
