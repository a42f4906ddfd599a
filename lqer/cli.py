"""The command line of experiments/pipeline.py: arguments in, exit status out, errors as one line.

Heavy imports wait until the arguments are known to have the right form, so that `--help` is answered at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lqer.errors import ConfigError
from lqer.run.chunks import Chunk, parse_chunk
from lqer.run.outcome import EXIT_OK, EXIT_USER_ERROR, report_failure, tolerate_any_terminal


def main(arguments: Sequence[str], usage: str) -> int:
    """Run the pipeline on command-line arguments. Returns the exit status."""
    tolerate_any_terminal()
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(usage.strip())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    try:
        share, arguments = take_chunk(arguments)
        validate_only, path, tag, overrides = split_arguments(arguments)
        return _run(path, tag, overrides, validate_only, share)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)


def take_chunk(arguments: Sequence[str]) -> tuple[Chunk | None, list[str]]:
    """The share of `--chunk i/n` or `--chunk=i/n`, and the other arguments. Raises ConfigError for another form."""
    rest = list(arguments)
    found = [place for place, argument in enumerate(rest) if argument.partition("=")[0] == "--chunk"]
    if not found:
        return None, rest
    if len(found) > 1:
        raise ConfigError("--chunk: given twice")
    _, equals, text = rest.pop(found[0]).partition("=")
    if not equals:
        text = rest.pop(found[0]) if found[0] < len(rest) else ""
    return parse_chunk(text), rest


def split_arguments(arguments: Sequence[str]) -> tuple[bool, str, str | None, list[str]]:
    """(validate only, config path, tag or None, overrides). Raises ConfigError for arguments of another form."""
    overrides = [argument for argument in arguments if argument.startswith("--") and argument != "--validate"]
    words = [argument for argument in arguments if not argument.startswith("-")]
    strays = [argument for argument in arguments if argument.startswith("-") and not argument.startswith("--")]
    if strays:
        raise ConfigError(f"{strays[0]}: an override has the form --section.key=value")
    if not 1 <= len(words) <= 2:
        raise ConfigError(f"one config file and at most one tag are expected; found {' '.join(words) or 'nothing'}")
    return "--validate" in arguments, words[0], words[1] if len(words) == 2 else None, overrides


def _run(path: str, tag: str | None, overrides: list[str], validate_only: bool, share: Chunk | None) -> int:
    _quieten_libraries()
    from lqer.config import read_config

    config = read_config(path, tag, overrides)
    from transformers.utils import logging as transformers_logging

    from lqer.run import pipeline, preflight

    # A bar for every loaded model would stand between those of the stages.
    transformers_logging.disable_progress_bar()
    if validate_only:
        if share is not None:
            pipeline.refuse_chunks(config, share)
        preflight.describe(config, print)
        return EXIT_OK
    results = pipeline.run_chunk(config, share)
    if results is None:
        return EXIT_OK
    from lqer.report.write import REPORT_FILE, summary_table

    print(f"\n{results['model']['description']}\n\n{summary_table(results)}\n")
    print(f"report: {os.path.join(config.output_dir, config.tag, REPORT_FILE)}")  # noqa: PTH118 (shown as typed)
    return EXIT_OK


def _quieten_libraries() -> None:
    """Our own lines on the console, libraries only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # On our own logger: libraries bring handlers of theirs, and would be heard twice.
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("lqer")
    ours.addHandler(console)
    ours.setLevel(logging.INFO)
