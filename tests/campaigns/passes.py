"""Every causal architecture of the installed transformers, tiny and random: statistics of passes that end early.

    python tests/campaigns/passes.py [--kinds jamba mixtral ...]

A pass over the text whose outputs nobody gets ends at the input of the last linear that it observes. For all linears of
each of the first two blocks, for the first, the last and half of them, its statistics must be those of a whole pass, to
the last bit. Exit status 1 if any differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tiny import CannotBeBuiltError, build, causal_kinds

from lqer.errors import ModelError
from lqer.models.source import resolve_model
from lqer.models.streaming import open_model
from lqer.models.structure import block_linears
from lqer.models.walker import BlockRun, walk_blocks
from lqer.stages.gather import CalibrationText, observe_block
from lqer.statistics import Hessian

CPU = torch.device("cpu")
STATISTICS = frozenset({Hessian()})
BATCH, BLOCKS = 2, 2
# The last batch is smaller.
WINDOWS_WT = torch.randint(1, 200, (5, 24), generator=torch.Generator().manual_seed(0))


def passes_of(kind: str, folder: Path) -> Counter[str]:
    """How many passes there were, how many ended early, and how many gave other statistics than a whole one.

    Raises CannotBeBuiltError, and ModelError for an architecture that is refused.
    """
    build(folder, kind)
    opened, found = open_model(resolve_model(str(folder)), torch.float32, CPU), Counter[str]()
    for run in walk_blocks(opened, WINDOWS_WT, BATCH, min(BLOCKS, len(opened.blocks))):
        names = list(block_linears(run.block))
        for some in (names, names[:1], names[-1:], names[: len(names) // 2]):
            found += _compared(run, some)
        run.forward()
    return found


def _compared(run: BlockRun, linears: list[str]) -> Counter[str]:
    text, ends = CalibrationText(WINDOWS_WT, BATCH, 16), []
    hook = run.block.register_forward_hook(lambda *_: ends.append(1))
    whole = observe_block(run, None, text, STATISTICS, lambda batch, output_BTD: None, linears=linears)
    of_whole = len(ends)
    ended = observe_block(run, None, text, STATISTICS, linears=linears)
    hook.remove()
    same = whole.sites == ended.sites and whole.tensors.keys() == ended.tensors.keys()
    same = same and all(torch.equal(x, ended.tensors[name]) for name, x in whole.tensors.items())
    return Counter(passes=1, early=int(len(ends) - of_whole < of_whole), different=int(not same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=causal_kinds())
    found, kinds = Counter[str](), 0
    for kind in parser.parse_args().kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                of_kind = passes_of(kind, Path(folder) / "model")
            except (CannotBeBuiltError, ModelError) as reason:
                print(f"{kind}: {reason}", flush=True)
                continue
        found, kinds = found + of_kind, kinds + 1
        if of_kind["different"]:
            print(f"{kind}: {of_kind['different']} of {of_kind['passes']} passes DIFFER", flush=True)
    print(f"{kinds} architectures, {found['passes']} passes, {found['early']} ended early, {found['different']} differ")
    return 1 if found["different"] or not found["early"] else 0


if __name__ == "__main__":
    sys.exit(main())
