"""A bar is hidden by its caller or by the environment."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("shown", "environment", "visible"),
    [(True, {}, True), (False, {}, False), (True, {"TQDM_DISABLE": "1"}, False), (False, {"TQDM_DISABLE": "1"}, False)],
)
def test_a_bar_is_shown_unless_its_caller_or_the_user_hides_it(shown, environment, visible, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # tqdm reads the environment when it is imported.
    script = f"from lqer.evaluation.progress import progress_bar; list(progress_bar({shown})(range(3), desc='windows'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ("windows" in done.stderr) is visible
