"""Print the contract of results.json as markdown: docs/results/contract.md.

python -m lqer.report.contract > docs/results/contract.md
"""

from __future__ import annotations

import inspect

from lqer import results
from lqer.checkpoint import bits

INTRODUCTION = """# results.json

Every run writes `<output_dir>/<tag>/results.json`. These classes define its keys; `python -m lqer.report.contract`
makes this page from them. `schema_version` is raised when a key changes its meaning.
"""
CLASSES = (
    results.Results,
    results.Versions,
    results.ModelInfo,
    bits.Bits,
    results.AllocationInfo,
    results.WidthsInfo,
    results.Baseline,
    results.ExpertsInfo,
    results.FinetuneInfo,
    results.CalibrationInfo,
    results.PerplexityRow,
    results.DivergenceInfo,
    results.Divergence,
    results.DownstreamRow,
    results.ExportRow,
    results.Decode,
    results.Layers,
    results.Seconds,
)


def render() -> str:
    """The page: the source of every TypedDict of the contract."""
    source = "\n\n\n".join(inspect.getsource(cls).rstrip() for cls in CLASSES)
    return f"{INTRODUCTION}\n```python\n{source}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
