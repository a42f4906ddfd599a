"""Native exports of tiny models whose sizes two and four ranks can share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lqer.export import Native, export
from lqer.formats import MXInt, NumberFormat
from lqer.methods import LinearPlan, RoundingOnly

# Heads of 32 values: keys and values have two, so that of four ranks two hold the same.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def native(random_model, run_stages, tmp_path_factory) -> Callable[..., Path]:
    """`native(weight, biases=False, skip=(), **changes of the plan)`: the folder of a Llama's export, made once."""
    made: dict[str, Path] = {}

    def folder(weight: NumberFormat, biases: bool = False, skip: tuple = (), **changes: object) -> Path:
        key = repr((weight, biases, skip, changes))
        if key not in made:
            settings = {
                "method": RoundingOnly(), "weight": weight, "activation": None, "bias": None, "rank": 0,
                "factor": MXInt(bits=8), "factor_axis": "reduction", **changes,
            }  # fmt: skip
            model = random_model("llama", **SIZES, attention_bias=biases)
            checkpoint = run_stages(model, LinearPlan(**settings), skip=skip).checkpoint.path
            made[key] = tmp_path_factory.mktemp("native") / "out"
            export(checkpoint, Native(), made[key], check=False)
        return made[key]

    return folder
