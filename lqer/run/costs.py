"""About how long jobs take beside each other, so that the longest ones start first.

Nothing is promised, and no result depends on it: only their order, and which linears are jobs of their own. Minutes are
those of a model of 7B parameters on one H200, for single blocks of which some were measured
(docs/results/time-and-memory.md, docs/methods/tesseraq.md); those of `ldlq` and of evaluations are guesses.
"""

from __future__ import annotations

from lqer.config.quantize import QuantizeConfig

# Minutes of quantization, by the first of these parts that a configuration has; OTHERWISE without any.
MINUTES = {"adaptive": 64.0, "caldera": 5.0, "ldlq": 5.0, "vector": 3.0, "gptq": 2.0}
OTHERWISE = 1.5
EVALUATION = 10.0
CALIBRATION = 1.0
FINETUNING = 60.0
# Weights in the decoder blocks of that model.
WEIGHTS = 6.5e9
# A linear that takes longer is a job of its own. It reads its whole block, and is written twice: seconds, even of 405B
# parameters.
LONG_SECONDS = 30.0


def takes_long(weights: int, minutes: float) -> bool:
    """Whether a linear with that many weights takes long. minutes: what its method takes for a whole model."""
    return 60 * minutes * weights / WEIGHTS > LONG_SECONDS


def quantization_minutes(quantize: QuantizeConfig) -> float:
    """About how many minutes a checkpoint of WEIGHTS weights takes."""
    parts = {quantize.method.kind, quantize.chosen_rounding.kind, *(part.kind for part in quantize.transforms)}
    return next((minutes for kind, minutes in MINUTES.items() if kind in parts), OTHERWISE)
