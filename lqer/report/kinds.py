"""The place of a linear in the model: its decoder block and its kind there, with one colour per kind."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

# The colours of curves that are drawn by kind in one figure: Okabe and Ito's palette, then darker shades.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#7A7A7A", "#5B3FA0", "#8C5A2B", "#B00020")


def places(names: Sequence[str]) -> pd.DataFrame:
    """Columns `block` (a number) and `kind` (q, k, v, o, gate, up, down) of linears, in the order of their names."""
    found = pd.Series(list(names), dtype=str).str.extract(r"\.(?P<block>\d+)\.(?P<kind>.+)$")
    shown = short_kinds(list(dict.fromkeys(found["kind"])))
    return pd.DataFrame({"block": found["block"].astype(int), "kind": found["kind"].map(shown)})


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """What linears of a block are called in figures: self_attn.q_proj is q; two of one name keep their paths."""
    short = {kind: kind.rsplit(".", 1)[-1].removesuffix("_proj") for kind in kinds}
    names = list(short.values())
    return {kind: name if names.count(name) == 1 else kind for kind, name in short.items()}


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for every kind, in the order in which they occur."""
    return {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(dict.fromkeys(kinds))}
