"""About how long jobs take beside each other, so that the longest ones start first.

Only their order matters: nothing is promised, and no result depends on it. Minutes are those that were estimated for a
model of 7B parameters on one H100, on which the schedule of docs/cluster.md rests too.
"""

from __future__ import annotations

from lqer.config.schema import QuantizeConfig

# Of the first that a configuration has.
MINUTES = {"adaptive": 115.0, "caldera": 85.0, "vector": 12.0, "ldlq": 25.0, "gptq": 3.5}
OTHERWISE = 1.5
EVALUATION = 10.0
CALIBRATION = 1.0
FINETUNING = 60.0


def quantization_minutes(quantize: QuantizeConfig) -> float:
    """Of one checkpoint."""
    parts = {quantize.method.kind, quantize.chosen_rounding.kind, *(part.kind for part in quantize.transforms)}
    return next((minutes for kind, minutes in MINUTES.items() if kind in parts), OTHERWISE)
