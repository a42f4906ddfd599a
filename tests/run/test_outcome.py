"""Whatever ends a run, the user sees one line and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lqer.cli import main
from lqer.errors import ConfigError
from lqer.run.outcome import interrupted_at_once, one_line, report_failure
from lqer.store import workspace


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_mistake_in_the_input_has_status_2_and_its_own_words(capsys):
    assert report_failure(ConfigError("quantize.rank: must be at least 0; found -1")) == 2
    assert told(capsys) == "error: quantize.rank: must be at least 0; found -1"


def test_a_link_or_rename_that_failed_is_named_by_what_was_to_be_made(capsys):
    refused = OSError(errno.EIO, os.strerror(errno.EIO), "../store/quantize-1", None, "/runs/demo/checkpoint")
    assert report_failure(refused) == 1
    assert told(capsys) == f"error: /runs/demo/checkpoint: {os.strerror(errno.EIO)}"


def test_a_refusal_of_the_machine_has_status_1_path_and_reason(capsys):
    assert report_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/block-00000.safetensors")) == 1
    assert told(capsys) == "error: /data/block-00000.safetensors: No space left on device"


def test_anything_else_has_status_1_and_names_the_file_with_its_traceback(capsys):
    with pytest.raises(ValueError, match="shapes differ") as raised:
        raise ValueError("shapes differ\nand more")
    assert report_failure(raised.value) == 1
    line = told(capsys)
    assert line.startswith("error: ValueError: shapes differ (traceback in ")
    log = Path(line.rpartition(" in ")[2].rstrip(")"))
    assert "shapes differ\nand more" in log.read_text()
    log.unlink()


def test_an_interruption_says_how_to_resume(capsys):
    assert report_failure(KeyboardInterrupt()) == 130
    assert told(capsys) == "Interrupted. Rerun the same command to resume."


def test_ctrl_c_ends_an_import_that_would_swallow_it():
    code = (
        "import os, signal; from lqer.run.outcome import interrupted_at_once\n"
        "with interrupted_at_once():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: pass\n"
    )
    # Who runs the tests may have told them to ignore Ctrl-C, which a process passes on.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **heard)
    assert (done.returncode, done.stderr.strip()) == (130, "Interrupted.")


def test_after_imports_ctrl_c_is_an_exception_again():
    heard = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupted_at_once():
            heard.append(signal.getsignal(signal.SIGINT))
        heard.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard[0] is not signal.default_int_handler
    assert heard[1] is signal.default_int_handler


def test_a_message_that_quotes_a_line_break_is_one_line():
    assert one_line("tag 'a\nb\x00c': – é") == "tag 'a\\nb\\x00c': – é"


def test_a_full_disk_ends_a_run_with_one_line_and_a_rerun_resumes(experiment, monkeypatch, capsys):
    original, threads = workspace.save_file, []

    def save_until_full(*arguments, **options):
        threads.append(threading.current_thread())
        if len(threads) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments, **options)

    monkeypatch.setattr(workspace, "save_file", save_until_full)
    assert main([str(experiment.config)], "") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {experiment.output}")
    assert line.endswith("/block-00002.safetensors: No space left on device")
    # The files of blocks are written beside the work.
    assert threading.main_thread() not in threads
    assert len(threads) == 3
    monkeypatch.undo()
    assert main([str(experiment.config)], "") == 0


def test_a_fault_of_the_program_names_the_log_of_the_run(experiment, monkeypatch, capsys):
    def fail(*arguments):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lqer.run.pipeline.write_tables", fail)
    assert main([str(experiment.config)], "") == 1
    log = experiment.output / "tiny" / "run.log"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: ZeroDivisionError: division by zero (traceback in {log})"
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_sees_it_escaped(experiment, encoding):
    done = subprocess.run(
        experiment.command("--validate"),
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "valid"


def test_a_reader_that_stops_reading_is_no_error():
    script = "from lqer.run.outcome import report_failure; import sys; sys.exit(report_failure(BrokenPipeError()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_process_that_leaves_has_its_status_and_does_what_libraries_asked_for():
    code = "import atexit; from lqer.run.outcome import leave; atexit.register(print, 'told'); print('done'); leave(3)"
    # Into a pipe, output is kept back until it is flushed.
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (left.returncode, left.stdout, left.stderr) == (3, "done\ntold\n", "")
