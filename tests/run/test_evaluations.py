"""What a run evaluates is decided by its configuration."""

from __future__ import annotations

import pytest

from lqer.config.evaluation import EvaluationConfig
from lqer.run.evaluations import tokens_of_calls

WINDOWS = {"datasets": ["text.txt"], "seq_len": 512, "batch_size": 3}
TASKS = {"tasks": ["arc_easy"]}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"perplexity": WINDOWS}, (1536,)),
        ({"perplexity": WINDOWS, "divergence": True}, (1536,)),
        ({"perplexity": WINDOWS | {"protocol": "lm-eval"}}, ()),
        ({"perplexity": WINDOWS, "downstream": TASKS}, ()),
        ({"perplexity": WINDOWS, "decode_speed": True}, ()),
        ({"downstream": TASKS}, ()),
    ],
)
def test_calls_have_one_size_where_windows_alone_are_evaluated(settings, tokens):
    assert tokens_of_calls(EvaluationConfig(**settings)) == tokens
