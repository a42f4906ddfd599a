"""The benchmark of whole runs: its checkpoints are models, its phases cover a run, its floors are bytes and FLOP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import benchmark_pipeline as benchmark
import pytest
import tomli
import torch
from pipeline_benchmark import child
from pipeline_benchmark.checkpoint import SHAPES, WEIGHT_SIZE, Shape, word_tokenizer, write_model, write_text
from pipeline_benchmark.floors import Work, floors
from pipeline_benchmark.rates import Rates
from pipeline_benchmark.report import Measured, table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lqer.config import read_config
from lqer.formats import format_from_dict
from lqer.methods import caldera
from lqer.phases import Recorder, recorded
from lqer.rounding import gptq

ROOT = Path(__file__).parents[2]
RATES = Rates(read=2e9, reread=4e9, write=1e9, hash=5e9, copy=1e12, to_device=1e10, product=1e14, product32=1e13,
              product64=1e12, imports=3.0)  # fmt: skip
WORK = Work(
    shape=SHAPES["llama-2-7b"], model_bytes=13_000_000_000, calibration_tokens=65536, evaluation_tokens=40940,
    sampled=256, propagates=False, hessian=False, feedback=False, rank=32, stored=4_000_000_000,
    checkpoint=3_800_000_000, models=2,
)  # fmt: skip


def test_the_checkpoint_is_a_model_in_several_files(tmp_path):
    stored = write_model(tmp_path / "model", Shape(64, 96, 9, 300, heads=4, kv_heads=2), word_tokenizer(300))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert stored == sum(parameter.nbytes for parameter in model.parameters())
    assert model.lm_head.weight.detach().float().std() == pytest.approx(WEIGHT_SIZE, rel=0.1)


def test_a_text_is_one_token_a_word_over_the_whole_vocabulary(tmp_path):
    word_tokenizer(300).save_pretrained(tmp_path)
    write_text(tmp_path / "text.txt", 300, 5000, seed=0)
    ids = AutoTokenizer.from_pretrained(tmp_path)((tmp_path / "text.txt").read_text(), verbose=False)["input_ids"]
    assert len(ids) == 5000
    assert {*ids} == {*range(2, 300)}


def test_floors_are_bytes_and_operations_over_rates():
    found = floors(WORK, RATES)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found["forward"].seconds == pytest.approx(2 * weights * 65536 / 1e14)
    assert found["fingerprint"].seconds == pytest.approx(13 / 2)
    assert found["write"].seconds == pytest.approx(4.0)
    assert found["hash"].seconds == pytest.approx(0.8)
    assert "factor" not in found
    exact = floors(replace(WORK, hessian=True, feedback=True, propagates=True), RATES)
    # Of two passes the one for statistics ends before down.
    assert exact["forward"].seconds == pytest.approx(2 * (2 * weights - 32 * 4096 * 11008) * 65536 / 1e14)
    squares = 32 * (3 * 4096**2 + 11008**2)
    assert exact["statistics"].seconds == pytest.approx(2 * squares * 65536 / 1e14)
    assert exact["factor"].seconds == pytest.approx(2 / 3 * 32 * (3 * 4096**3 + 11008**3) / 1e12)
    # Gradients are those of activations, not of weights.
    assert "backward" not in found
    measured = floors(replace(WORK, gradient_tokens=16384), RATES)
    assert measured["backward"].seconds == pytest.approx(4 * weights * 16384 / 1e14)
    assert measured["forward"].seconds == pytest.approx(2 * weights * (65536 + 16384) / 1e14)


def test_the_loss_is_differentiated_for_widths_and_for_token_weights():
    def tokens(preset: str, weights: str) -> int:
        settings = ["--model=stories15M", f"--calibration.token_weights={weights}"]
        return benchmark.gradient_tokens(read_config(f"preset:{preset}", None, settings))

    assert tokens("gptq", "none") == 0
    assert tokens("gptq", "gradient") == 128 * 2048
    assert tokens("best-3", "none") == 8 * 2048
    assert tokens("best-3", "gradient") == (128 + 8) * 2048


def test_the_rows_of_the_table_add_up_to_the_wall_clock():
    measured = Measured({"imports": 4.0, "read": 2.0, "unheard-of": 1.0}, {"read": 5.0}, 9.0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(measured, floors(WORK, RATES))]
    seconds = {row[0]: row[1] for row in rows[2:]}
    assert seconds == {
        "imports": "4.00",
        "read": "2.00",
        "unheard-of": "1.00",
        "in no phase": "2.00",
        "wall clock": "9.00",
    }
    assert next(row for row in rows if row[0] == "read")[2] == "5.00"
    assert len({len(row) for row in rows}) == 1


def test_phases_of_a_whole_model_are_scaled_as_their_floors():
    small = WORK.of_blocks(4)
    assert small.of_blocks(32).model_bytes == pytest.approx(WORK.model_bytes)
    measured = Measured({"imports": 5.0, "forward": 2.0, "texts": 1.0}, {}, wall=9.0)
    lines = table(measured, floors(small, RATES), floors(WORK, RATES), 32)
    rows = {cells[0]: cells[-1] for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])}
    assert [rows[name] for name in ("imports", "forward", "texts", "in no phase")] == ["5.0", "16.0", "1.0", "1.0"]
    assert rows["wall clock"] == "23.0"


def test_every_wrapped_function_exists_and_is_counted_where_others_have_imported_it(monkeypatch):
    before = caldera.down_date
    try:
        child._wrap_mathematics()
        assert caldera.down_date is not before
        with recorded(recorder := Recorder()):
            gptq.Gptq().round(
                torch.randn(4, 8),
                {"hessian": torch.eye(8)},
                format_from_dict({"kind": "int", "bits": 4, "block_size": 8}),
            )
        assert recorder.main["factor"] > 0
    finally:
        for functions in child.FUNCTIONS.values():
            for module, function in functions:
                wrapped = getattr(sys.modules[module], function)
                child._replace_everywhere(wrapped, wrapped.__wrapped__)
    assert caldera.down_date is before


def test_a_setting_of_another_form_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.parse(["--shape", "tiny", "--calibration"])
    assert refused.value.code == 2
    assert "--calibration: neither an option nor of the form --section.key=value" in capsys.readouterr().err
    options, settings = benchmark.parse(["--blocks", "3", "--calibration.num_samples=2"])
    assert (options.blocks, settings) == (3, ["--calibration.num_samples=2"])


def measured(folder: Path, *options: str) -> str:
    """What the benchmark prints of tiny runs on the CPU, whose files it must have removed."""
    command = [sys.executable, "experiments/benchmark_pipeline.py", "--shape", "tiny", "--device", "cpu", "--windows",
               "2", "--folder", str(folder), *options, "--calibration.num_samples=4", "--calibration.seq_len=32",
               "--evaluation.perplexity.seq_len=32"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


def seconds_of(printed: str) -> dict[str, float]:
    """Seconds of the main thread, by the rows of one table."""
    rows = re.findall(r"^\| ([a-z, ]+?) \| ([\d.]+) \|", printed, re.MULTILINE)
    return {name: float(seconds) for name, seconds in rows}


def test_a_whole_run_is_measured(tmp_path):
    printed = measured(tmp_path, "--presets", "gptq")
    seconds = seconds_of(printed)
    expected = {"imports", "checks", "fingerprint", "read", "forward", "statistics", "factor", "round", "pack", "write",
                "hash", "verify", "load", "evaluate", "errors and spectra", "report"}  # fmt: skip
    assert expected <= seconds.keys()
    assert 0.1 < float(re.search(r"^peak memory ([\d.]+) GB$", printed, re.MULTILINE)[1]) < 8
    assert sum(seconds.values()) == pytest.approx(2 * seconds["wall clock"], rel=0.02)
    stages = dict(re.findall(r"(\w+) ([\d.]+) s\b", printed[printed.index("calibrate ") :]))
    assert 0 < float(stages["quantize"]) <= float(stages["total"]) <= seconds["wall clock"]
    # Of two blocks, whose files are written within the stage.
    assert 0 < float(stages["block"]) <= float(stages["quantize"]) + 0.1


def test_a_run_that_is_not_recorded_has_its_wall_clock_alone(tmp_path):
    seconds = seconds_of(measured(tmp_path, "--presets", "rtn", "--process", "unrecorded"))
    assert seconds.keys() == {"in no phase", "wall clock"}
    assert seconds["wall clock"] > 0.5


def test_later_runs_of_one_process_import_nothing_more(tmp_path):
    _, first, second = measured(tmp_path, "--presets", "rtn", "gptq", "--process", "this").split("| phase |")
    assert seconds_of(first)["imports"] > 3 * seconds_of(second)["imports"]
    assert "factor" in seconds_of(second)


def test_a_checkpoint_that_is_kept_is_used_again_with_the_rates(tmp_path):
    model = tmp_path / "kept"
    write_model(model, SHAPES["tiny"], word_tokenizer(SHAPES["tiny"].vocabulary))
    rates = replace(RATES, imports=123.0)
    assert benchmark.weight_files(model)
    (tmp_path / "kept.rates.json").write_text(json.dumps(asdict(rates)))
    cpu = torch.device("cpu")
    assert benchmark.measured_rates(tmp_path, model, 1, cpu, torch.float32) == rates
    options, overrides = benchmark.parse(["--model", str(model), "--shape", "tiny"])
    path = benchmark.write_experiment(tmp_path, options.model, "gptq", options, overrides, SHAPES["tiny"])
    assert tomli.loads(Path(path).read_text())["model"] == str(model)
