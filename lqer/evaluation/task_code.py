"""Whose code the tasks of lm-evaluation-harness run.

A task's YAML may name Python functions (`!function`) of files next to it. Those of the library's own tasks run, and the
loader of local tasks; any other only if the configuration trusts the folder. A metric that the library does not know
itself it would load by `evaluate`, as code of a folder or of a hub: that needs the same trust. Templates are rendered
in a sandbox.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from lqer.errors import ConfigError

LOCAL_LOADER = "lqer.evaluation.harness.load_jsonl"
LIBRARY = "lm_eval.tasks."


@contextlib.contextmanager
def trusted_code_alone(trust_code: bool) -> Iterator[None]:
    """While tasks are loaded: raise ConfigError for a function or metric neither the library's nor trusted."""
    from lm_eval.api import task
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import _yaml_loader

    sandbox_templates()
    # The library has one place where it turns a name into a function, one for metrics, and no setting for either.
    import_function, get_metric = _yaml_loader._import_func_in_yml, task.get_metric

    def checked(name: str, folder: Path) -> Any:
        if not trust_code and not _is_trusted(name, folder):
            raise ConfigError(
                f"evaluation.downstream.include_path: a task in {folder} runs Python code ({name}): read it, and set "
                "evaluation.downstream.trust_code = true to allow it"
            )
        return import_function(name, folder)

    def checked_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
        if not trust_code and (hf_evaluate_metric or name not in metric_registry):
            raise ConfigError(
                f"evaluation.downstream.tasks: the metric {name!r} of a task is not lm-eval's own: it would be loaded "
                "as code; set evaluation.downstream.trust_code = true to allow it"
            )
        return get_metric(name, hf_evaluate_metric)

    _yaml_loader._import_func_in_yml, task.get_metric = checked, checked_metric
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, task.get_metric = import_function, get_metric


def _is_trusted(name: str, folder: Path) -> bool:
    from lm_eval import tasks

    if Path(tasks.__file__).resolve().parent in (folder.resolve(), *folder.resolve().parents):
        # A name may still lead out of the library's folder.
        return ".." not in name and not name.startswith("/")
    # Files next to the YAML come first: one could take the name of a module.
    module = name.rpartition(".")[0].replace(".", "/")
    return (name == LOCAL_LOADER or name.startswith(LIBRARY)) and not (folder / f"{module}.py").exists()


def sandbox_templates() -> None:
    """Render the library's templates with Jinja's sandbox, which refuses what reaches beyond the template's values."""
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(
        loader=utils.env.loader,
        undefined=utils.env.undefined,
        keep_trailing_newline=utils.env.keep_trailing_newline,
    )
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox
