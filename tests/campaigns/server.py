"""Runs scripts in forks of one warm process: a run costs no imports, and what goes wrong in it goes wrong in it alone.

The server is a process of its own that reads jobs from its standard input, one JSON object a line, and answers each
with one. `Server` is its client.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import faults

from lqer.run import outcome

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "experiments" / "pipeline.py"
TIMEOUT = 300.0
# Seconds of a run with the hasty clock for each true one: states that are written once a minute are written at once.
HASTE = 20_000.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended. status: its exit status, negative for a signal; None where it was stopped for its time."""

    status: int | None
    stdout: str
    stderr: str
    events: int
    where: str

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def objection(self, allowed: Sequence[int] = (0, 1, 2)) -> str | None:
        """What is wrong with it as the answer of a command line; None if nothing is."""
        if self.status is None:
            return "no answer in time"
        if "Traceback (most recent call last)" in self.stderr:
            return "traceback: " + self.stderr.strip().splitlines()[-1]
        if self.status not in allowed:
            return f"exit {self.status}: {self.last_line}"
        errors = sum(line.startswith("error: ") for line in self.stderr.splitlines())
        if self.status in (1, 2) and (errors != 1 or not self.last_line.startswith("error: ")):
            return f"exit {self.status} without one line that says why: {self.last_line!r}"
        return None

    @property
    def last_line(self) -> str:
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else ""


class Server:
    """A warm process of the package in this checkout, for as long as the context lasts."""

    def __init__(self, warm_up: Sequence[str] = (), library: Path | None = None):
        environment = dict(os.environ)
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
        }  # fmt: skip
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self.has_library = library is not None
        self._process = subprocess.Popen(
            [sys.executable, __file__, *warm_up],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        *arguments: str,
        script: Path = PIPELINE,
        fault: Mapping[str, Any] | None = None,
        hasty: bool = False,
        timeout: float = TIMEOUT,
        memory: int | None = None,
    ) -> Outcome:
        """Run a script with arguments to its end, or until its fault or its time ends it.

        hasty: the monotonic clock runs HASTE times as fast. memory: bytes that the process may write to.
        """
        (outcome,) = self._ask([_job(script, arguments, timeout, fault=fault, hasty=hasty, memory=memory)])
        return outcome

    def run_together(self, commands: Sequence[Sequence[str]], timeout: float = TIMEOUT) -> list[Outcome]:
        """Run the pipeline in several processes at once, one for each list of arguments."""
        return self._ask([_job(PIPELINE, arguments, timeout) for arguments in commands])

    def _ask(self, jobs: list[dict[str, Any]]) -> list[Outcome]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return [Outcome(**answer) for answer in json.loads(self._process.stdout.readline())]


def _job(script: Path, arguments: Sequence[str], timeout: float, **options: Any) -> dict[str, Any]:
    none = {"fault": None, "hasty": False, "memory": None}
    return {"script": str(script), "arguments": list(arguments), "timeout": timeout, **none, **options}


def serve(warm_up: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # The end of a script is not that of the process that runs it.
    outcome.leave = sys.exit
    if warm_up:
        _run_here(PIPELINE, ["--validate", *warm_up])
        with contextlib.suppress(ImportError):
            import matplotlib.pyplot  # noqa: F401 (what reports draw with takes longer to import than to draw with)
    for line in sys.stdin:
        children = [Child.start(job) for job in json.loads(line)]
        answers.write(json.dumps([child.end() for child in children]) + "\n")
        answers.flush()


def _run_here(script: Path, arguments: Sequence[str]) -> None:
    sys.argv = [str(script), *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"the first run does not do: {arguments}") from None
        finally:
            sys.stdout = stdout


@dataclass
class Child:
    """A forked process at its job."""

    pid: int
    timeout: float
    stdout: IO[bytes]
    stderr: IO[bytes]
    report: int

    @classmethod
    def start(cls, job: dict[str, Any]) -> Child:
        stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed when it has ended)
        report_read, report_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become(job, stdout.fileno(), stderr.fileno(), report_write)
        os.close(report_write)
        return cls(pid, job["timeout"], stdout, stderr, report_read)

    def end(self) -> dict[str, Any]:
        """Wait for it. Returns the fields of its Outcome."""
        status = _wait(self.pid, self.timeout)
        with os.fdopen(self.report, encoding="utf-8") as report:
            told = report.readline()
        answer = {"status": status, **(json.loads(told) if told else {"events": 0, "where": ""})}
        for name in ("stdout", "stderr"):
            with getattr(self, name) as file:
                file.seek(0)
                answer[name] = file.read().decode("utf-8", "replace")
        return answer


def _wait(child: int, timeout: float) -> int | None:
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(descriptor)


def _become(job: dict[str, Any], stdout: int, stderr: int, report: int) -> None:
    """Never returns: the forked process runs the script and ends."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    _forget_consoles()
    status = 1
    tell = None
    try:
        if job["memory"]:
            resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
        if job["hasty"]:
            true_clock = time.monotonic
            time.monotonic = lambda: true_clock() * HASTE
        sys.argv = [job["script"], *job["arguments"]]
        if job["fault"]:
            tell = faults.arm(job["fault"], report)
        runpy.run_path(job["script"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.setprofile(None)
        if tell is not None:
            tell()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _forget_consoles() -> None:
    """The console handlers of the run that warmed this process up: each line would be heard twice."""
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "lqer":
            logging.getLogger(name).handlers.clear()


if __name__ == "__main__":
    serve(sys.argv[1:])
