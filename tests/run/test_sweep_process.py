"""The processes of a sweep's runs, before one of them has begun."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lqer.run.sweep_process import InAProcess

pytestmark = pytest.mark.usefixtures("heard_interrupts")


def test_an_interrupt_while_the_first_run_is_started_leaves_that_line_to_the_sweep():
    """The server of its processes is in the middle of its imports then, and says nothing."""
    code = (
        "import signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'lqer.run.pipeline':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "import lqer.run.preloaded\n"
    )
    server = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (server.returncode, server.stderr) == (130, "")


def test_an_interrupt_that_ends_the_server_before_it_forks_is_told_as_an_interrupt():
    class NeverForked(multiprocessing.get_context("spawn").Process):
        def start(self) -> None:
            signal.raise_signal(signal.SIGINT)
            raise EOFError  # the server's end of the pipe is closed

    execute = InAProcess()
    execute.processes = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=NeverForked)
    with pytest.raises(KeyboardInterrupt):
        execute(SimpleNamespace(model_dump_json=lambda: "{}"))
