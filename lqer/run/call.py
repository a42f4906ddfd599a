"""The experiment as a Python call.

>>> import lqer
>>> results = lqer.quantize(
...     model, "qera-exact",
...     quantize={"weight": "w3", "low_rank": {"rank": 8}},
...     calibration={"dataset": text, "num_samples": 4, "seq_len": 64},
...     evaluation={"perplexity": {"datasets": [text], "seq_len": 64, "max_windows": 8}},
...     output_dir=folder, device="cpu",
... )
>>> round(results["bits"]["average"], 2)
5.61
>>> row = results["perplexity"][0]
>>> sorted(kind for kind in ("original", "rtn", "quantized") if row[kind] is not None)
['original', 'quantized', 'rtn']
>>> quantized_model = lqer.load_quantized(f"{folder}/qera-exact/checkpoint", "cpu")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lqer.config import read_config
from lqer.config.plugins import load_plugins
from lqer.config.presets import PREFIX
from lqer.results import Results
from lqer.run import engine


def quantize(
    model: str | Path, preset: str, *, tag: str | None = None, plugins: Iterable[str | Path] = (), **overrides: Any
) -> Results:
    """Quantize and evaluate a model: the run of `lqer run preset:PRESET TAG`, artifacts reused. Returns results.json.

    model: a name on the hub or a folder. preset: of `lqer ls presets`, such as "lqer-act", or a TOML file. tag: names
    the folder under output_dir that holds the report and the checkpoint; the preset's name by default. plugins: Python
    files with components of your own. overrides: sections and keys of the configuration, as nested dictionaries.
    Raises LqerError.
    """
    files = [str(plugin) for plugin in plugins]
    load_plugins(files)
    name = preset if preset.endswith(".toml") or preset.startswith(PREFIX) else f"{PREFIX}{preset}"
    results = engine.run(read_config(name, tag, values={"model": str(model), **overrides}), files)
    assert results is not None, "only a chunk can finish before the others"
    return results
