"""About how long jobs take beside each other, so that the longest ones start first.

Nothing is promised, and no result depends on it: only their order, and which linears are jobs of their own. Minutes are
those that were estimated for a model of 7B parameters on one H100, on which the schedule of docs/cluster.md rests too.
"""

from __future__ import annotations

from lqer.config.schema import QuantizeConfig

# Of the first that a configuration has.
MINUTES = {"adaptive": 115.0, "caldera": 85.0, "vector": 12.0, "ldlq": 25.0, "gptq": 3.5}
OTHERWISE = 1.5
EVALUATION = 10.0
CALIBRATION = 1.0
FINETUNING = 60.0
# Of the decoder blocks of that model.
WEIGHTS = 6.5e9
# A linear that takes longer is a job of its own. It reads its whole block, and is written twice: seconds, even of 405B
# parameters.
LONG_SECONDS = 30.0


def takes_long(weights: int, minutes: float) -> bool:
    """Whether a linear of so many weights does, by a method that takes so many minutes for a whole model."""
    return 60 * minutes * weights / WEIGHTS > LONG_SECONDS


def quantization_minutes(quantize: QuantizeConfig) -> float:
    """Of one checkpoint."""
    parts = {quantize.method.kind, quantize.chosen_rounding.kind, *(part.kind for part in quantize.transforms)}
    return next((minutes for kind, minutes in MINUTES.items() if kind in parts), OTHERWISE)
