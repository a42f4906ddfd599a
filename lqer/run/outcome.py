"""How a run ends: one that fails is reported by one line on stderr, and an exit status.

2     the input is at fault: configuration, model, text, store; the line states the rule and the value
1     the machine refused (disk full, no permission), or the program is at fault: the traceback is in a file that
the line names
130   interrupted
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from lqer.errors import LqerError, RunFailedError

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
INTERRUPTED = "\nInterrupted.\n"


@contextmanager
def interrupted_at_once(said: str = INTERRUPTED) -> Iterator[None]:
    """Let Ctrl-C end the program on the spot, while libraries are imported and nothing is written.

    Some of them swallow a KeyboardInterrupt (numpy, in the middle of torch), and fail later for another reason.
    """

    def end(*_: object) -> None:
        print(said, end="", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    # Who starts a program in the background may have told it to ignore Ctrl-C.
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def report_failure(error: BaseException) -> int:
    """Print the line for an exception that ended the program. Returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. Rerun the same command to resume.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader of the output, such as `head`, has seen enough. Nothing more can be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    print(f"error: {one_line(explain_failure(error))}", file=sys.stderr)
    return EXIT_USER_ERROR if isinstance(error, LqerError) else EXIT_FAILURE


def explain_failure(error: BaseException) -> str:
    """The message of the line."""
    if isinstance(error, LqerError | RunFailedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        # For a rename or a link, the second name is the one that was to be made.
        return f"{error.filename2 or error.filename or 'the operating system'}: {error.strerror}"
    return f"{headline(error)} (traceback in {write_traceback(error)})"


def headline(error: BaseException) -> str:
    """Type and first line of an unexpected exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def write_traceback(error: BaseException) -> Path:
    """Save the traceback where no run folder is open yet. Returns the path of the file."""
    with tempfile.NamedTemporaryFile("w", prefix="lqer-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return Path(file.name)


def one_line(text: str) -> str:
    """The text with line breaks and other control characters escaped: a message is one line whatever it quotes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def tolerate_any_terminal() -> None:
    """Escape characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def leave(status: int) -> NoReturn:
    """End the process without taking its objects apart, which takes seconds where torch and transformers are loaded.

    What libraries have registered for the end is done: logs are closed, trackers told, worker processes ended.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Nobody may be reading any more.
        with suppress(OSError):
            stream.flush()
    os._exit(status)
