"""Registering costs nothing until a library is there, and works whichever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lqer.checkpoint.registration import AfterImport

ASK_TRANSFORMERS = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["lqer"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["lqer"].__name__)
"""


def printed(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_lqer_imports_nothing_that_takes_long():
    code = "import lqer, sys; print({'torch', 'transformers', 'numpy', 'lm_eval', 'triton'} & set(sys.modules))"
    assert printed(code) == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import lqer",
        "import transformers\nimport lqer",
        "from transformers import AutoModelForCausalLM\nimport lqer",
        "import lqer, importlib, sys\nimportlib.reload(lqer)",
        "from transformers.quantizers import auto\nimport lqer, importlib\nimportlib.reload(lqer)",
    ],
    ids=["lqer first", "transformers first", "a model class first", "lqer twice", "lqer twice, last"],
)
def test_transformers_knows_the_method(imports):
    assert printed(imports + ASK_TRANSFORMERS) == "LqerQuantizer LqerConfig"


@pytest.mark.parametrize("imports", ["import lqer\nimport lm_eval.models", "import lm_eval.models\nimport lqer"])
def test_lm_eval_knows_the_model(imports):
    ask = "\nfrom lm_eval.api.registry import get_model\nprint(get_model('lqer').__name__)"
    assert printed(imports + ask) == "LqerLM"


def test_a_listener_is_called_once_after_the_module_ran(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    finder = AfterImport({"awaited_module": lambda: seen.append(sys.modules["awaited_module"].value)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import awaited_module

    del sys.modules["awaited_module"]
    import awaited_module  # noqa: F811

    assert seen == [1]
    assert awaited_module.value == 1


def test_a_module_that_is_not_there_stays_missing(monkeypatch):
    finder = AfterImport({"no_such_module_anywhere": lambda: None})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        import no_such_module_anywhere  # noqa: F401
