"""What goes wrong inside one process: it is killed at the n-th event, or the disk refuses the n-th write.

Three kinds of event, all counted from 1 and none of them a matter of time:

    files   calls that change the file system below a folder, as Python's os and io make them
    calls   function calls inside the package
    writes  the C library's own calls (open, write, fsync, rename, mkdir ...) below the folder, those of native code
            too; needs `faults.c` loaded before anything else (LD_PRELOAD)

A fault is a JSON-able dict: {"events": "files", "root": "/folder", "at": 12} kills; with "errno" it is an error, and
with "lasting" every later call fails as well. Without "at" events are only counted. With "pattern" only those files and
calls count whose description the regular expression is found in. A process tells what came of it in one line of JSON:
{"events": how many, "where": the last one's description}.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "symlink")


class Recorder:
    """Counts events and kills the process at the chosen one, having said where that was."""

    def __init__(self, report: int, at: int | None, pattern: str):
        self._report, self._at, self.events, self.where = report, at, 0, ""
        self._pattern = re.compile(pattern)

    def meet(self, where: str) -> None:
        if self._pattern.search(where) is None:
            return
        self.events, self.where = self.events + 1, where
        if self.events == self._at:
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        os.write(self._report, json.dumps({"events": self.events, "where": self.where}).encode() + b"\n")


def arm(fault: dict[str, Any], report: int) -> Callable[[], None]:
    """Have the fault happen in this process. Returns what tells of it at the process's end."""
    if fault["events"] == "writes":
        return _arm_library(fault, report)
    recorder = Recorder(report, fault.get("at"), fault.get("pattern", ""))
    if fault["events"] == "files":
        _watch_files(recorder, fault["root"])
    else:
        _watch_calls(recorder, fault["package"])
    return recorder.tell


def _watch_files(recorder: Recorder, root: str) -> None:
    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = _path(arguments[0])
            if path.startswith(root):
                recorder.meet(f"{name} {path}")
            return original(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, watched(name, getattr(os, name)))
    opened = io.open

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+") and (path := _path(file)).startswith(root):
            recorder.meet(f"open {path}")
        return opened(file, mode, *arguments, **options)

    io.open = builtins.open = open_file  # type: ignore[assignment]


def _path(file: Any) -> str:
    if not isinstance(file, int):
        return os.path.abspath(os.fsdecode(file))  # noqa: PTH100 (a path may be that of a dangling link)
    try:
        return os.readlink(f"/proc/self/fd/{file}")  # noqa: PTH115 (pathlib is what is watched)
    except OSError:
        return ""


def _watch_calls(recorder: Recorder, package: str) -> None:
    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and (name := frame.f_code.co_filename).startswith(package):
            recorder.meet(f"{name.removeprefix(package)}:{frame.f_code.co_name}")

    sys.setprofile(profile)


def _arm_library(fault: dict[str, Any], report: int) -> Callable[[], None]:
    library = ctypes.CDLL(None)
    library.fault_arm(
        os.fsencode(fault["root"]), ctypes.c_long(fault.get("at", 0)), fault.get("errno", 0), fault.get("lasting", 0)
    )

    def tell() -> None:
        where = ctypes.create_string_buffer(4096)
        events = library.fault_disarm(where)
        os.write(report, json.dumps({"events": events, "where": where.value.decode()}).encode() + b"\n")

    return tell


def compile_library(folder: Path) -> Path | None:
    """`faults.c` as a shared library in the folder; None where there is no C compiler, or not this kind of system."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, check=False)
    return library if done.returncode == 0 else None
