"""Plug-ins: Python files outside the package whose components a configuration can name like the built-in ones.

Importing a component registers it (lqer/components.py), so a plug-in only has to be imported before the configuration
is read. A file is imported like a script: its folder is searched for modules that it imports. Installed packages offer
plug-ins as entry points of the group "lqer.plugins", each the name of a module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from lqer.errors import PluginError

GROUP = "lqer.plugins"


def load_plugins(paths: Iterable[str | Path] = ()) -> None:
    """Import the plug-ins of installed packages, then these files. Raises PluginError."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise PluginError(f"plug-in {entry.name} ({entry.value}): {_one_line(error)}") from error
    for path in paths:
        load_plugin(path)


def load_plugin(path: str | Path) -> None:
    """Import a Python file, once. Raises PluginError, one line, if it does not exist or cannot be imported."""
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"--plugin {path}: no such Python file")
    loaded = sys.modules.get(file.stem)
    if loaded is not None:
        if _file_of(loaded) == file:
            return
        raise PluginError(f"--plugin {path}: a module called {file.stem!r} exists already; rename the file")
    if str(file.parent) not in sys.path:
        # Last, so that a file called like a library hides nothing.
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(file.stem)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise PluginError(f"--plugin {path}: {_one_line(error)}") from error
    if _file_of(module) != file:
        raise PluginError(f"--plugin {path}: a module called {file.stem!r} exists already; rename the file")


def _file_of(module: object) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _one_line(error: BaseException) -> str:
    """The error and, where it has one, the line of the plug-in that raised it."""
    trace, line = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "importlib" not in code.co_filename and Path(code.co_filename) != Path(__file__):
            line = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{line}" if message else f"{type(error).__name__}{line}"
