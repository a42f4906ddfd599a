"""A process for each run of a sweep, forked from one that has imported everything.

The memory of a run is free when it ends, its peak is its own, and one that is killed takes no other with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

from lqer.config.plugins import load_plugins
from lqer.config.schema import Config
from lqer.run.console import log_on_console, quieten_libraries
from lqer.run.outcome import EXIT_FAILURE, EXIT_INTERRUPTED, explain_failure, one_line
from lqer.stages.processes import death, held_back_interrupts, processes

# How long a run that was interrupted may take to end by itself.
CLEANING_SECONDS = 3.0


class InAProcess:
    """Executes each configuration in a process of its own."""

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        self.plugins = tuple(plugins)
        # Forked from a server that has imported torch and never computed; not from this process.
        quieten_libraries()
        self.processes = processes(["lqer.run.preloaded"])

    def __call__(self, config: Config) -> str | None:
        ours, theirs = self.processes.Pipe(duplex=False)
        with held_back_interrupts():
            # pydantic would report an interrupt while it serializes as its own error.
            arguments = (config.model_dump_json(), self.plugins, theirs)
        process = self.processes.Process(target=_execute, args=arguments)  # type: ignore[attr-defined]
        try:
            with held_back_interrupts():
                process.start()
                theirs.close()
            process.join()
        except KeyboardInterrupt:
            # A terminal interrupts both processes, and the other one cleans up. A signal may have come to this one
            # alone: the store takes it that the other is ended. The server may have ended before it forked one.
            if process.pid is not None:
                process.join(CLEANING_SECONDS)
                process.terminate()
                process.join()
            raise
        if process.exitcode == 0:
            return None
        if process.exitcode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        try:
            return str(ours.recv())
        except EOFError:
            return f"the process {death(process.exitcode)}"


def _execute(config_json: str, plugins: Sequence[str], connection: Connection) -> None:
    """Do the run of this process: its log and bars on the terminal, its problem as a line through the connection."""
    from transformers.utils import logging as transformers_logging

    from lqer.run import pipeline

    transformers_logging.disable_progress_bar()
    try:
        with log_on_console():
            load_plugins(plugins)
            pipeline.run(Config.model_validate_json(config_json, strict=True))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        connection.send(one_line(explain_failure(error)))
        raise SystemExit(EXIT_FAILURE) from None
