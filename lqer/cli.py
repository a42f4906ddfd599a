"""The command lines `python experiments/pipeline.py` and `lqer`: arguments in, exit status out, errors as one line.

Heavy imports wait until the arguments are known to have the right form, so that `--help` is answered at once. argparse
takes an override with a space in its value (`--a.b=[1, 2]`) for a positional argument, so it does not read them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lqer import __version__
from lqer.errors import ConfigError
from lqer.run.chunks import Chunk, parse_chunk
from lqer.run.console import log_on_console, quieten_libraries
from lqer.run.imports import hash_model_beside, heavy_imports, open_gpu_beside
from lqer.run.outcome import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_USER_ERROR,
    leave,
    report_failure,
    tolerate_any_terminal,
)
from lqer.run.usage import HELP, OVERVIEW


def script() -> NoReturn:
    """The console script `lqer`."""
    leave(console())


def console() -> int:
    """The same, within a process that goes on. Returns the exit status."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if _asks_for_help([command]):
        print(OVERVIEW.strip())
        return EXIT_OK if sys.argv[1:] else EXIT_USER_ERROR
    if command == "--version":
        print(f"lqer {__version__}")
        return EXIT_OK
    if command == "lm-eval":
        return _answered(lambda: _lm_eval(arguments))
    if command in COMMANDS:
        return _perform(COMMANDS[command], arguments, HELP[command])
    from lqer.components import did_you_mean

    *names, last = (*COMMANDS, "lm-eval")
    meant = did_you_mean(command, (*names, last))
    return report_failure(ConfigError(f"{command}: expected {', '.join(names)} or {last}{meant}"))


def main(arguments: Sequence[str], usage: str) -> int:
    """Run the pipeline on command-line arguments. Returns the exit status."""
    return _perform(_run, arguments, usage)


def sweep(arguments: Sequence[str], usage: str) -> int:
    """Run a sweep on command-line arguments. Returns the exit status: 1 if some run failed."""
    return _perform(_sweep, arguments, usage)


def _perform(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str], usage: str) -> int:
    if arguments and not _asks_for_help(arguments):
        return _answered(lambda: command(arguments))
    print(usage.strip())
    return EXIT_OK if arguments else EXIT_USER_ERROR


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _answered(command: Callable[[], int | None]) -> int:
    """The exit status of a command, which may name one itself; its error is shown as one line."""
    tolerate_any_terminal()
    try:
        with log_on_console():
            return command() or EXIT_OK
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)


def take_option(name: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of every `name VALUE` or `name=VALUE`, and the other arguments. Raises ConfigError without a value."""
    values, rest, waiting = [], [], iter(arguments)
    for argument in waiting:
        found, equals, value = argument.partition("=")
        if found != name:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{name}: expected a value")
        values.append(value)
    return values, rest


def take_chunk(arguments: Sequence[str]) -> tuple[Chunk | None, list[str]]:
    """The chunk of `--chunk i/n`, and the other arguments. Raises ConfigError for another form."""
    values, rest = take_option("--chunk", arguments)
    if len(values) > 1:
        raise ConfigError("--chunk: given twice")
    return (parse_chunk(values[0]) if values else None), rest


def split_arguments(arguments: Sequence[str]) -> tuple[bool, str, str | None, list[str]]:
    """(validate only, config path, tag or None, overrides). Raises ConfigError for arguments of another form."""
    overrides = [argument for argument in arguments if argument.startswith("--") and argument != "--validate"]
    words = [argument for argument in arguments if not argument.startswith("-")]
    strays = [argument for argument in arguments if argument.startswith("-") and not argument.startswith("--")]
    if strays:
        raise ConfigError(f"{strays[0]}: an override has the form --section.key=value")
    if not 1 <= len(words) <= 2:
        raise ConfigError(f"expected one config file and at most one tag; found {' '.join(words) or 'nothing'}")
    return "--validate" in arguments, words[0], words[1] if len(words) == 2 else None, overrides


def _run(arguments: Sequence[str]) -> None:
    chunk, arguments = take_chunk(arguments)
    plugins, arguments = take_option("--plugin", arguments)
    validate_only, path, tag, overrides = split_arguments(arguments)
    quieten_libraries()
    with heavy_imports():
        from lqer.config import read_config
        from lqer.config.plugins import load_plugins

        load_plugins(plugins)
        config = read_config(path, tag, overrides)
        hash_model_beside(config)
        # With several processes, each one opens its own.
        if not validate_only and config.cluster is None:
            open_gpu_beside(config.device)
        from transformers.utils import logging as transformers_logging

        from lqer.run import engine, pipeline, preflight

    # A progress bar for every loaded model would clutter those of the stages.
    transformers_logging.disable_progress_bar()
    if validate_only:
        if chunk is not None:
            pipeline.refuse_chunks(config, chunk)
        preflight.describe(config, print)
        return
    results = engine.run(config, plugins, chunk)
    if results is None:
        return
    from lqer.report.page.write import PAGE_FILE
    from lqer.report.published import figures_of
    from lqer.report.write import REPORT_FILE, summary_table

    print(f"\n{results['model']['description']}\n\n{summary_table(results)}\n")
    for figure in figures_of(results):
        print(f"{figure}\n")
    for name, file in (("report", REPORT_FILE), ("page", PAGE_FILE)):
        print(f"{name}: {os.path.join(config.output_dir, config.tag, file)}")  # noqa: PTH118 (shown as typed)


def _validate(arguments: Sequence[str]) -> None:
    _run(["--validate", *arguments])


def _sweep(arguments: Sequence[str]) -> int:
    # A sweep that is told to end passes it on to the run in progress, which is another process.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run_sweep(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_sweep(arguments: Sequence[str]) -> int:
    plugins, arguments = take_option("--plugin", arguments)
    names, arguments = take_option("--only", arguments)
    parts, arguments = take_option("--part", arguments)
    if len(parts) > 1 or (parts and names):
        raise ConfigError("--part: give it once, and without --only")
    overrides = [argument for argument in arguments if argument.startswith("--")]
    words = [argument for argument in arguments if not argument.startswith("-")]
    if len(words) != 3 or len(words) + len(overrides) != len(arguments):
        raise ConfigError(f"expected a sweep file, a config file and a tag; found {' '.join(words) or 'nothing'}")
    path, config, tag = words
    quieten_libraries()
    with heavy_imports():
        from lqer.config.plugins import load_plugins
        from lqer.config.sweep import plan_sweep

        load_plugins(plugins)
        plan = plan_sweep(path, config, tag, overrides)
        from lqer.report.sweep import record_of, write_record
        from lqer.run import engine
        from lqer.run.conclude import conclude

    record = record_of(plan, config, tag, [*overrides, *(f"--plugin={plugin}" for plugin in plugins)])
    # `recommend` reads what is finished of a sweep that is interrupted, or still runs.
    write_record(record, plan.output_dir)
    outcome = engine.sweep(plan.part(parts[0]) if parts else plan.only(names), tag, plugins)
    conclude(record, plan.output_dir, outcome, print)
    return EXIT_FAILURE if outcome.failed else EXIT_OK


def _recommend(arguments: Sequence[str]) -> None:
    options: dict[str, str | None] = {}
    for name in ("--bits", "--size", "--activations", "--atlas"):
        values, arguments = take_option(name, arguments)
        if len(values) > 1:
            raise ConfigError(f"{name}: given twice")
        options[name] = values[0] if values else None
    runs, arguments = "--run" in arguments, [argument for argument in arguments if argument != "--run"]
    _, path, tag, overrides = split_arguments(arguments)
    if tag is not None:
        raise ConfigError(f"recommend: expected one config file; found {path} {tag}")
    quieten_libraries()
    with heavy_imports():
        from lqer.report.recommend import lines, parse_budget, recommend
        from lqer.run import engine
        from lqer.run.recommend import atlas_of

    budget = parse_budget(options["--bits"], options["--size"], options["--activations"])
    record, ranking = atlas_of(path, overrides, options["--atlas"], engine.sweep if runs else None)
    for line in lines(recommend(ranking, budget), ranking, record, budget):
        print(line)


def _list(arguments: Sequence[str]) -> None:
    plugins, words = take_option("--plugin", arguments)
    quieten_libraries()
    from lqer.config.plugins import load_plugins
    from lqer.run.listing import list_items

    load_plugins(plugins)
    for line in list_items(words):
        print(line)


def _export(arguments: Sequence[str]) -> None:
    plugins, rest = take_option("--plugin", arguments)
    texts, rest = take_option("--text", rest)
    devices, rest = take_option("--device", rest)
    words = [argument for argument in rest if not argument.startswith("-")]
    if len(words) != 3 or len(texts) > 1 or len(devices) > 1:
        raise ConfigError(f"export: expected CHECKPOINT TARGET OUT; found {' '.join(rest) or 'nothing'}")
    settings = dict(_setting(argument) for argument in rest if argument.startswith("-") and argument != "--no-check")
    quieten_libraries()
    with heavy_imports():
        from transformers.utils import logging as transformers_logging

        from lqer.config.plugins import load_plugins
        from lqer.export import export, make_target
        from lqer.models.source import pick_device

        load_plugins(plugins)

    transformers_logging.disable_progress_bar()
    target = make_target(words[1], settings)
    text = Path(texts[0]) if texts else None
    device = pick_device(devices[0] if devices else "auto")
    export(Path(words[0]), target, Path(words[2]), text, "--no-check" not in rest, device)
    print(words[2])


def _lm_eval(arguments: Sequence[str]) -> None:
    """The command line of lm-eval, which looks for no models but its own, in a process where "lqer" is one of them."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


def _setting(argument: str) -> tuple[str, str]:
    key, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise ConfigError(f"export: {argument}: a setting of a target has the form --key=value")
    return key, value


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "run": _run,
    "validate": _validate,
    "sweep": _sweep,
    "recommend": _recommend,
    "export": _export,
    "ls": _list,
}
