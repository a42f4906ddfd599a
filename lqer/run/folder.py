"""The folder of a run, <output_dir>/<tag>: the resolved configuration, its log, and a link to its checkpoint."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from lqer.config import Config
from lqer.report.write import RESULTS_FILE
from lqer.store.files import write_text

CONFIG_FILE = "config.toml"
LOG_FILE = "run.log"
CHECKPOINT_LINK = "checkpoint"

log = logging.getLogger(__name__)


def begin_run(config: Config) -> Path:
    """The folder with the configuration in it, and without the results of an earlier run."""
    folder = Path(config.output_dir) / config.tag
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    return folder


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Everything that is logged goes to the folder's file as well, and the exception that ends the run."""
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("lqer").setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        # To the file alone, with its traceback: the console gets its one line from the command line's own handler.
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info()))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def link_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Point the folder's link at the artifact, replacing what an earlier run with this tag left."""
    link = folder / CHECKPOINT_LINK
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(Path("..") / checkpoint.relative_to(folder.parent))
