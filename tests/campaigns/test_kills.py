"""A short form of the campaign of kills: a few kills of every configuration, by every kind of event.

And kills at the moments that only a mixture of experts has, which chance seldom meets.
"""

from __future__ import annotations

import kills
from server import ROOT
from workbench import Experiment, difference, run_whole

# In the order in which a run with widths comes to them; each begins after the one before. A block has four linears of
# attention, then experts: twelve linears, quantized in two batches or more. Losses are measured from the last block.
AMONG_EXPERTS = {"events": "calls", "pattern": ":_quantize_batch$", "at": 6}
MOMENTS = {
    "among the losses of a block's experts": {"events": "calls", "pattern": ":_add_losses$", "at": 10},
    "with the losses of a block": {"events": "files", "pattern": r"/widths-.*block-00000", "at": 1},
    "among the experts of the first block": AMONG_EXPERTS,
    "before a block has its name": {"events": "files", "pattern": r"replace /.*/quantize-.*block-00000", "at": 1},
    "with a block": {"events": "files", "pattern": r"/quantize-.*layers-00001", "at": 1},
    "among the experts of the next block": AMONG_EXPERTS,
}
FIRST, LAST = "block-00000.safetensors", "block-00001.safetensors"


def test_runs_killed_at_any_moment_end_with_the_bytes_of_an_undisturbed_one(server, workplace):
    tally = kills.campaign(server, workplace, count=6, seed=1)
    assert not tally.failures, "\n".join(tally.failures)


def test_a_mixture_with_widths_killed_among_its_experts_and_between_blocks_ends_with_the_same_bytes(server, workplace):
    whole = Experiment(workplace / "inputs", workplace / "undisturbed" / "mixture")
    run_whole(server, whole, "mixture")
    killed = Experiment(workplace / "inputs", workplace / "killed-at-moments" / "mixture")
    found = {}
    for moment, fault in MOMENTS.items():
        there = {"root": str(killed.output), "package": f"{ROOT}/lqer/"}
        done = server.run(*killed.arguments("mixture"), fault={**fault, **there})
        assert done.was_killed, f"{moment}: {done.stderr}"
        found[moment] = blocks_of(killed, "widths"), blocks_of(killed, "quantize")
    assert [[sorted(stage) for stage in stages] for stages in found.values()] == [
        [[], []], [[LAST], []], [[FIRST, LAST], []], [[FIRST, LAST], []], [[FIRST, LAST], [FIRST]],
        [[FIRST, LAST], [FIRST]],
    ]  # fmt: skip
    assert server.run(*killed.arguments("mixture")).objection(allowed=[0]) is None
    assert difference(killed, whole, "mixture") is None
    # Nor was a block measured or quantized anew that was stored before a kill.
    assert found["with the losses of a block"][0].items() <= blocks_of(killed, "widths").items()
    assert found["with a block"][1].items() <= blocks_of(killed, "quantize").items()


def blocks_of(experiment: Experiment, stage: str) -> dict[str, int]:
    """When the files of blocks in the artifact of a stage, finished or not, were written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in experiment.store.glob(f"{stage}-*/block-*")}
