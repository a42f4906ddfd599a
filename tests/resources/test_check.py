"""A run that cannot fit is refused in one line that names the key that helps; estimates refuse nothing."""

from __future__ import annotations

import pytest

from lqer.resources.check import DoesNotFitError, refuse_what_cannot_fit, shown, table
from lqer.resources.machine import Machine
from lqer.resources.workload import Need, StageMemory

GB = 10**9


def machine(**changes) -> Machine:
    facts = {"ram": 8 * GB, "device": None, "disk": 10 * GB, "resident": GB}
    return Machine(**{**facts, **changes})


def stage(name: str = "evaluate", **needs) -> StageMemory:
    return StageMemory(name, **{"ram": (), "device": (), "disk": (), **needs})


WHOLE = Need("whole model", 9 * GB, "Set evaluation.blockwise = true")
STATES = Need("hidden states", 2 * GB, "Reduce calibration.max_memory")


def test_a_need_for_more_than_is_available_is_refused_with_the_key_of_the_largest_part():
    with pytest.raises(DoesNotFitError) as error:
        refuse_what_cannot_fit([stage(ram=(STATES, WHOLE))], machine())
    assert str(error.value) == (
        "evaluate needs at least 12 GB of RAM but only 8.0 GB is available (whole model: 9.0 GB). "
        "Set evaluation.blockwise = true."
    )


def test_gpu_memory_is_apart_from_ram():
    on_gpu = stage(device=(WHOLE,))
    refuse_what_cannot_fit([on_gpu], machine(device=10 * GB, ram=2 * GB))
    with pytest.raises(DoesNotFitError, match=r"needs at least 9\.0 GB of GPU memory but only 6\.0 GB is available"):
        refuse_what_cannot_fit([on_gpu], machine(device=6 * GB))
    with pytest.raises(DoesNotFitError, match=r"of GPU memory \(cluster\.gpus_per_job 0\.25\) but only 6\.0 GB"):
        refuse_what_cannot_fit([on_gpu], machine(device=6 * GB, card_share=0.25))


def test_the_key_is_that_of_the_largest_need_that_has_one():
    with pytest.raises(DoesNotFitError, match=r"\(block: 9\.0 GB\)\. Reduce calibration\.max_memory\.$"):
        refuse_what_cannot_fit([stage(ram=(Need("block", 9 * GB), STATES))], machine())
    with pytest.raises(DoesNotFitError, match=r"\(block: 9\.0 GB\)$"):
        refuse_what_cannot_fit([stage(ram=(Need("block", 9 * GB),))], machine())


def test_memory_that_the_process_holds_already_counts():
    fits = stage(ram=(Need("block", 7 * GB),))
    refuse_what_cannot_fit([fits], machine())
    with pytest.raises(DoesNotFitError):
        refuse_what_cannot_fit([fits], machine(resident=2 * GB))


def test_an_estimate_refuses_nothing():
    refuse_what_cannot_fit([stage(ram=(Need("activations of a batch", 90 * GB, certain=False),))], machine())


class TestDisk:
    OUTPUT = Need("quantized model", 6 * GB, "Put output_dir on a larger disk")

    def test_later_stages_get_the_rest(self):
        stages = [stage("calibrate", disk=(self.OUTPUT,)), stage("quantize", disk=(self.OUTPUT,))]
        with pytest.raises(DoesNotFitError) as error:
            refuse_what_cannot_fit(stages, machine())
        assert str(error.value) == (
            "quantize writes about 6.0 GB under output_dir but only 4.0 GB is free. Put output_dir on a larger disk."
        )
        refuse_what_cannot_fit(stages, machine(disk=12 * GB))

    def test_what_is_stored_already_is_not_written_again(self):
        stages = [stage("calibrate", disk=(self.OUTPUT,)), stage("quantize", disk=(self.OUTPUT,))]
        refuse_what_cannot_fit(stages, machine(), {"calibrate": 3 * GB})
        refuse_what_cannot_fit(stages, machine(disk=6 * GB), {"calibrate": 8 * GB})


def test_the_table_names_stages_and_what_is_available():
    text = table([stage("calibrate", ram=(STATES,), disk=(STATES,)), stage(device=(WHOLE,))], machine(device=80 * GB))
    lines = [line.split("  ") for line in text.splitlines()[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["stage", "RAM", "GPU memory", "disk"],
        ["calibrate", "3.0 GB", "0 B", "2.0 GB"],
        ["evaluate", "1.0 GB", "9.0 GB", "0 B"],
        ["available", "8.0 GB", "80 GB", "10 GB"],
    ]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_960_000, "10 MB"), (999_900_000, "1.0 GB")]
)
def test_sizes_are_shown_with_two_or_three_digits(size, text):
    assert shown(size) == text
