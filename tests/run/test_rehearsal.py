"""Kernels of an evaluation are compiled on one block, while the others are quantized."""

from __future__ import annotations

import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_layers import DTYPE, ON_GPU

import lqer
from lqer.formats import MXInt
from lqer.kernels.siblings import Siblings
from lqer.methods import LinearPlan, LqerAct
from lqer.models.loaders import OpenedModel
from lqer.models.source import ModelSource
from lqer.run.rehearsal import TURN, Rehearsal, short_turns
from lqer.store.names import block_file, layers_file

PLAN = LinearPlan(LqerAct(), MXInt(4), None, MXInt(8), 8, MXInt(8), "reduction")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def rehearsal(random_model, run_stages, windows_WT, tmp_path) -> tuple[Rehearsal, Path]:
    """Of a model of two blocks whose checkpoint is there; its folder is still empty."""
    model = random_model("llama")
    checkpoint = run_stages(model, PLAN).checkpoint.path
    model.save_pretrained(tmp_path / "model")
    source = ModelSource("model", str(tmp_path / "model"), None, "", "")
    (tmp_path / "partial").mkdir()
    return Rehearsal(source, tmp_path / "partial", None, DEVICE, DTYPE, windows_WT[:1, :6]), checkpoint


def write_block(rehearsal: Rehearsal, checkpoint: Path, index: int) -> None:
    for name in (layers_file(index), block_file(index)):
        shutil.copyfile(checkpoint / name, rehearsal.checkpoint / name)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_runs_as_the_evaluation_will_run_it(rehearsal, monkeypatch, index):
    run, checkpoint = rehearsal
    write_block(run, checkpoint, index)
    monkeypatch.setattr("lqer.checkpoint.backend.resolve_backend", lambda wanted, *_: wanted)
    evaluated = lqer.load_quantized(checkpoint, DEVICE, DTYPE, "triton")
    del evaluated.model.layers[1 - index]
    expected = evaluated(run.ids_BT.to(DEVICE), use_cache=False).logits
    joined: list[int] = []
    before = Siblings.__init__
    monkeypatch.setattr(
        Siblings, "__init__", lambda self, linears: (joined.append(len(linears)), before(self, linears))[1]
    )
    torch.testing.assert_close(run.run(run.opened(), index), expected)
    assert joined == [3, 2]


@pytest.mark.parametrize("index", [0, 1])
def test_a_thread_waits_for_a_block_and_is_done_before_the_evaluation(rehearsal, monkeypatch, index):
    run, checkpoint = rehearsal
    ran: list[threading.Thread] = []
    blocks: list[int] = []
    monkeypatch.setattr(
        Rehearsal, "run", lambda self, _, found: (blocks.append(found), ran.append(threading.current_thread()))
    )
    with run.beside():
        assert not ran
        write_block(run, checkpoint, index)
        while not ran:
            pass
    assert blocks == [index]
    assert ran != [threading.main_thread()]
    assert not ran[0].is_alive()


def test_the_thread_leaves_torchs_default_dtype_alone_which_all_threads_share(rehearsal, monkeypatch):
    run, checkpoint = rehearsal
    setters: list[threading.Thread] = []
    before, ran = torch.set_default_dtype, Rehearsal.run
    done = threading.Event()
    monkeypatch.setattr(
        torch, "set_default_dtype", lambda dtype: (setters.append(threading.current_thread()), before(dtype))
    )
    monkeypatch.setattr(Rehearsal, "run", lambda *given: (ran(*given), done.set()))
    with run.beside():
        write_block(run, checkpoint, 0)
        assert done.wait(120)
    assert set(setters) == {threading.main_thread()}


def test_a_model_that_cannot_be_read_block_by_block_is_not_rehearsed(rehearsal, monkeypatch):
    run, checkpoint = rehearsal
    monkeypatch.setattr(Rehearsal, "run", lambda *_: pytest.fail("loads the whole model beside the work"))
    write_block(run, checkpoint, 0)
    with replace(run, source=replace(run.source, load_args={"gguf_file": "model.gguf"})).beside():
        assert "rehearsal" not in [thread.name for thread in threading.enumerate()]


def test_turns_are_short_while_it_runs_and_no_longer(rehearsal, monkeypatch):
    run, checkpoint = rehearsal
    turns: list[float] = []

    def fail(self: Rehearsal, opened: OpenedModel, index: int) -> None:
        turns.append(sys.getswitchinterval())
        raise RuntimeError

    monkeypatch.setattr(Rehearsal, "run", fail)
    before = sys.getswitchinterval()
    write_block(run, checkpoint, 0)
    with run.beside():
        assert before > 10 * TURN
    assert turns == [pytest.approx(TURN)]
    assert sys.getswitchinterval() == before
    sys.setswitchinterval(TURN / 2)
    try:
        with short_turns():
            # Python counts whole microseconds, rounded down.
            assert sys.getswitchinterval() == pytest.approx(TURN / 2, abs=2e-6)
    finally:
        sys.setswitchinterval(before)


def test_nothing_waits_for_a_block_that_never_comes_and_what_fails_is_left_to_the_evaluation(rehearsal):
    run, _ = rehearsal
    with run.beside():
        pass
    (run.checkpoint / block_file(0)).write_bytes(b"broken")
    with run.beside():
        pass
    with pytest.raises(KeyError), run.beside():
        raise KeyError
    for thread in [thread for thread in threading.enumerate() if thread.name == "rehearsal"]:
        thread.join(timeout=60)
        assert not thread.is_alive()
