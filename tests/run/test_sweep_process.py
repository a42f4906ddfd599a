"""The processes of a sweep's runs, before one of them has begun."""

from __future__ import annotations

import subprocess
import sys


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
