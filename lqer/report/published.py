"""Whether a run meets the figures that a paper reports of its experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqer.report.ranking import mean_accuracy
from lqer.results import Results


@dataclass(frozen=True)
class Figure:
    """A published figure and what the run measured in its place.

    quantity: "perplexity on <text>" or "mean accuracy". measured: None if the run has no value of it. cut: the key that
    kept the run from measuring all of the text or tasks, for which the figure stands; empty without one.
    """

    quantity: str
    value: float
    measured: float | None
    tolerance: float
    source: str
    lower_is_better: bool
    cut: str = ""

    @property
    def excess(self) -> float | None:
        """How much worse the run is than the figure, as a share of it; negative where it is better."""
        if self.measured is None:
            return None
        relative = self.measured / self.value - 1
        return relative if self.lower_is_better else -relative

    @property
    def is_met(self) -> bool | None:
        """Whether the run is as good as the figure, within its tolerance; None where it cannot be compared."""
        return None if self.cut or self.excess is None else self.excess <= self.tolerance

    def __str__(self) -> str:
        stated = f"{self.quantity} {self.value:g} ({self.source})"
        if self.excess is None or self.measured is None:
            return f"Published: {stated}. Not comparable: this run has no finite value of it."
        measured = f"this run has {self.measured:.4g}"
        if self.cut:
            return f"Published: {stated}; {measured}. Not comparable: `{self.cut}` leaves out a part of what it is of."
        side = "worse" if self.excess > 0 else "better"
        verdict = "Met" if self.is_met else "**Not met**"
        return (
            f"Published: {stated}; {measured}, {abs(self.excess):.1%} {side}. "
            f"{verdict}: a run may be {self.tolerance:.0%} worse."
        )


def figures_of(results: Results) -> Iterator[Figure]:
    """The published figures of the run's model; none where its configuration states none of it."""
    config = results["config"]
    published = config.get("published")
    if published is None:
        return
    model, evaluation = Path(results["model"]["name"]).name, config["evaluation"]
    common: dict[str, Any] = {"tolerance": published["tolerance"], "source": published["source"]}
    if (value := published["perplexity"].get(model)) is not None:
        text = published["text"]
        measured = next((row["quantized"] for row in results["perplexity"] if row["dataset"] == text), None)
        cut = _name_if_set(evaluation, "perplexity", "max_windows")
        yield Figure(f"perplexity on {text}", value, measured, **common, lower_is_better=True, cut=cut)
    if (value := published["accuracy"].get(model)) is not None:
        found = mean_accuracy(results["downstream"], "quantized")
        cut = _name_if_set(evaluation, "downstream", "limit")
        measured = None if found is None else found[0]
        yield Figure("mean accuracy", value, measured, **common, lower_is_better=False, cut=cut)


def _name_if_set(evaluation: Mapping[str, Any], section: str, key: str) -> str:
    """The full name of a key that is set, else nothing."""
    is_set = (evaluation.get(section) or {}).get(key) is not None
    return f"evaluation.{section}.{key}" if is_set else ""
