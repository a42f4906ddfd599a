"""The folder of a run, <output_dir>/<tag>: the resolved configuration, the log, and a link to the checkpoint."""

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
    """Create the folder, write the configuration, and remove the results of an earlier run."""
    folder = Path(config.output_dir) / config.tag
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    return folder


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Copy the log to a file in the folder, with the traceback of an exception that ends the run."""
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("lqer").setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        # To the file only: the command line prints its own line.
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (error,), sys.exc_info()))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def link_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Link the artifact, replacing the link of an earlier run with this tag."""
    link = folder / CHECKPOINT_LINK
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(Path("..") / checkpoint.relative_to(folder.parent))
