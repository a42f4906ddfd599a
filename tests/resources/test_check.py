"""A run that cannot fit is refused in one line with the key that would help; what is only guessed refuses nothing."""

from __future__ import annotations

import pytest

from lqer.resources import Piece, Stage
from lqer.resources.check import DoesNotFitError, refuse_what_cannot_fit, seconds, shown, shown_time, table
from lqer.resources.machine import Machine, Rates

GB = 10**9


def machine(**changes) -> Machine:
    facts = {"ram": 8 * GB, "device": None, "disk": 10 * GB, "resident": GB, "gpus": 0, "rates": Rates(1e12, 1e10, 1e5)}
    return Machine(**{**facts, **changes})


def stage(name: str = "evaluate", **pieces) -> Stage:
    parts = {"ram": (), "device": (), "disk": (), "flops": 3e12, "moved": 2e10, "calls": 0.0, **pieces}
    return Stage(name, **parts)


WHOLE = Piece("the whole model", 9 * GB, "evaluation.blockwise = true")
STATES = Piece("hidden states", 2 * GB, "a smaller calibration.max_memory")


def test_more_memory_than_there_is_is_refused_with_the_key_of_the_largest_piece():
    with pytest.raises(DoesNotFitError) as error:
        refuse_what_cannot_fit([stage(ram=(STATES, WHOLE))], machine())
    assert str(error.value) == (
        "evaluate needs at least 12 GB of RAM, there are 8.0 GB; the most for the whole model, 9.0 GB: "
        "use evaluation.blockwise = true"
    )


def test_gpu_memory_is_apart_from_ram():
    on_gpu = stage(device=(WHOLE,))
    refuse_what_cannot_fit([on_gpu], machine(device=10 * GB, ram=2 * GB))
    with pytest.raises(DoesNotFitError, match=r"needs at least 9\.0 GB of GPU memory, there are 6\.0 GB"):
        refuse_what_cannot_fit([on_gpu], machine(device=6 * GB))


def test_the_key_is_that_of_a_piece_that_has_one():
    with pytest.raises(DoesNotFitError, match=r"for a block, 9\.0 GB: use a smaller calibration\.max_memory$"):
        refuse_what_cannot_fit([stage(ram=(Piece("a block", 9 * GB), STATES))], machine())
    with pytest.raises(DoesNotFitError, match=r"for a block, 9\.0 GB$"):
        refuse_what_cannot_fit([stage(ram=(Piece("a block", 9 * GB),))], machine())


def test_what_the_process_holds_already_counts():
    fits = stage(ram=(Piece("a block", 7 * GB),))
    refuse_what_cannot_fit([fits], machine())
    with pytest.raises(DoesNotFitError):
        refuse_what_cannot_fit([fits], machine(resident=2 * GB))


def test_a_guess_refuses_nothing():
    refuse_what_cannot_fit([stage(ram=(Piece("activations of a batch", 90 * GB, sure=False),))], machine())


class TestDisk:
    OUTPUT = Piece("the quantized model", 6 * GB, "output_dir on a larger disk")

    def test_stages_share_it(self):
        stages = [stage("calibrate", disk=(self.OUTPUT,)), stage("quantize", disk=(self.OUTPUT,))]
        with pytest.raises(DoesNotFitError) as error:
            refuse_what_cannot_fit(stages, machine())
        assert str(error.value) == (
            "quantize writes about 6.0 GB under output_dir, whose disk has 4.0 GB left: use output_dir on a larger disk"
        )
        refuse_what_cannot_fit(stages, machine(disk=12 * GB))

    def test_what_is_stored_already_is_not_written_again(self):
        stages = [stage("calibrate", disk=(self.OUTPUT,)), stage("quantize", disk=(self.OUTPUT,))]
        refuse_what_cannot_fit(stages, machine(), {"calibrate": 3 * GB})
        refuse_what_cannot_fit(stages, machine(disk=6 * GB), {"calibrate": 8 * GB})


def test_a_time_is_that_of_products_of_moving_bytes_and_of_calls():
    assert seconds(stage(), machine()) == pytest.approx(3 + 2)
    assert seconds(stage(calls=4e5), machine()) == pytest.approx(3 + 2 + 4)


def test_the_table_names_stages_and_what_there_is():
    text = table([stage("calibrate", ram=(STATES,), disk=(STATES,)), stage(device=(WHOLE,))], machine(device=80 * GB))
    lines = [line.split("  ") for line in text.splitlines()[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["stage", "RAM", "GPU memory", "disk", "time"],
        ["calibrate", "3.0 GB", "0 B", "2.0 GB", "~5.0 s"],
        ["evaluate", "1.0 GB", "9.0 GB", "0 B", "~5.0 s"],
        ["there is", "8.0 GB", "80 GB", "10 GB"],
    ]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_960_000, "10 MB"), (999_900_000, "1.0 GB")]
)
def test_sizes_are_shown_with_two_or_three_digits(size, text):
    assert shown(size) == text


@pytest.mark.parametrize(
    ("rough", "text"), [(0.2, "~1 s"), (3.21, "~3.2 s"), (89, "~89 s"), (120, "~2.0 min"), (6000, "~1.7 h")]
)
def test_times_are_shown_in_the_unit_that_suits(rough, text):
    assert shown_time(rough) == text
