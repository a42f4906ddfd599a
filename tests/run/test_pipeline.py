"""A whole run: what it leaves behind, what it does not do twice, what it refuses before any work."""

from __future__ import annotations

import json
import pickle
import re
import sys
import typing
from pathlib import Path

import pandas as pd
import pytest
import tomli
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lqer
from lqer.checkpoint.bits import Bits
from lqer.config import Config, read_config
from lqer.data.datasets import DatasetSpec, load_rows
from lqer.errors import ConfigError, DataError, LqerError, ModelError, StoreError
from lqer.evaluation.perplexity import concat_perplexity, concat_windows
from lqer.results import PerplexityRow, Results
from lqer.run import evaluations


class TestWhatARunLeaves:
    @pytest.mark.figures
    def test_all_files_of_the_contract_are_there(self, experiment, run):
        results = run()
        folder = experiment.output / "tiny"
        assert json.loads((folder / "results.json").read_text()) == results
        for name in ("report.md", "report.html", "layers.csv", "config.toml", "run.log", "checkpoint/lqer.json"):
            assert (folder / name).stat().st_size > 0
        figures = {path.name for path in (folder / "figures").iterdir()}
        assert figures == {
            "perplexity.png", "output_error.png", "singular_values.png", "weight_singular_values.png",
        }  # fmt: skip

    @pytest.mark.figures
    def test_a_budget_leaves_its_ranks_in_the_table_the_report_and_a_figure(self, experiment, run):
        results = run(
            "--quantize.method=qera-exact", "--quantize.low_rank={ rank = 0, budget_bits = 6.5, format = 'x8' }"
        )
        folder = experiment.output / "tiny"
        assert {"calibrate", "spectra", "quantize"} <= set(experiment.stages())
        layers = pd.read_csv(folder / "layers.csv")
        assert layers["rank"].nunique() > 1
        assert (layers["rank"] % 16 == 0).all()
        assert 6.3 < results["bits"]["average"] <= 6.5
        assert results["allocation"]["objective"] <= results["allocation"]["uniform_objective"]
        assert (folder / "figures/ranks.png").stat().st_size > 0
        assert "Ranks were allocated within 6.5 bits" in (folder / "report.md").read_text()
        assert (layers["captured_energy"].between(0, 1) == (layers["rank"] > 0)).all()

    @pytest.mark.figures
    def test_an_alternation_in_another_basis_leaves_the_error_of_every_step(self, experiment, run):
        results = run(
            "--quantize.method=caldera", "--quantize.transforms=['hadamard']", "--quantize.rounding=ldlq",
            "--formats.q2={ kind = 'e8p', bits = 2 }", "--quantize.weight=q2",
            "--quantize.low_rank={ rank = 8, format = 'q2', iterations = 2, axis = 'outer' }",
        )  # fmt: skip
        folder = experiment.output / "tiny"
        rows = [row for path in sorted((folder / "checkpoint").glob("layers-*.json"))
                for row in json.loads(path.read_text())]  # fmt: skip
        assert all(len(row["step_errors"]) == 4 for row in rows)
        assert (folder / "figures/step_errors.png").stat().st_size > 0
        report = (folder / "report.md").read_text()
        assert "transforms `hadamard`" in report
        assert "figures/step_errors.png" in report
        assert (pd.read_csv(folder / "layers.csv")["damping_raises"] == 0).all()
        assert results["bits"]["metadata"] > 0

    def test_fine_tuning_is_a_stage_of_its_own(self, experiment, run):
        row = {"sentence": "It was the _ that went first, the others came later.", "a": "red one", "b": "blue one"}
        task = experiment.folder / "task.jsonl"
        task.write_text("".join(json.dumps(row | {"answer": i % 2}) + "\n" for i in range(30)))
        prompt = "{ template = '{sentence}', blank = '_', label = 'answer', choices = { 0 = '{a}', 1 = '{b}' } }"
        arguments = [
            "--quantize.method=none", "--quantize.low_rank.rank=0", "--quantize.transforms=['hadamard']",
            "--formats.q2={ kind = 'e8p', bits = 2 }", "--quantize.weight=q2", "--quantize.activation=none",
            "--quantize.attention=none",
            "--finetune={ parts = ['rht_signs'], num_samples = 8, validation_samples = 4, seq_len = 32, epochs = 2 }",
            f"--finetune.dataset={{ path = '{task}', prompt = {prompt} }}",
        ]  # fmt: skip
        for change, part in (
            ("--finetune.num_samples=80", "finetune.num_samples + validation_samples is 84"),
            ("--finetune.dataset.prompt.choices.1={c}", "task.jsonl, row 1: no column 'c'; it has sentence, a, b"),
        ):
            with pytest.raises(DataError, match=re.escape(part)):
                run(*arguments, change)
            assert experiment.stages() == []
        results = run(*arguments)
        losses = results["finetune"]["validation_loss"]
        assert len(losses) == 3
        assert losses[results["finetune"]["best_epoch"]] == min(losses)
        assert results["seconds"]["finetune"] > 0
        folder = experiment.output / "tiny"
        assert (folder / "checkpoint").resolve().name.startswith("finetune-")
        assert read_config(folder / "config.toml") == read_config(experiment.config, None, arguments)
        assert "Fine-tuned (rht_signs) for 2 epochs" in (folder / "report.md").read_text()
        assert run(*arguments)["perplexity"] == results["perplexity"]

    def test_a_budget_below_the_weights_is_refused_before_any_work(self, experiment, run):
        with pytest.raises(ConfigError, match=r"budget_bits: must be at least 4\.5"):
            run("--quantize.low_rank={ rank = 0, budget_bits = 4.2, format = 'x8' }")
        assert not (experiment.output / "store").exists()

    def test_every_key_of_the_contract_is_there_and_no_other(self, run):
        results = run()
        assert set(results) == set(typing.get_type_hints(Results))
        assert set(results["bits"]) == set(typing.get_type_hints(Bits))
        assert set(results["perplexity"][0]) == set(typing.get_type_hints(PerplexityRow))

    def test_the_resolved_configuration_is_itself_a_configuration(self, experiment, run):
        run("--quantize.low_rank.rank=4")
        saved = experiment.output / "tiny" / "config.toml"
        assert read_config(saved) == read_config(experiment.config, None, ["--quantize.low_rank.rank=4"])

    def test_layers_csv_has_a_row_for_each_linear(self, experiment, run):
        results = run()
        layers = pd.read_csv(experiment.output / "tiny" / "layers.csv")
        assert len(layers) == results["layers"]["count"] == 4 * 7
        assert (layers["output_error"] < layers["output_error_before"]).all()
        assert (layers["weight_error"] < layers["weight_error_before"]).all()

    def test_average_bits_weigh_the_layers_by_their_size(self, experiment, run):
        results = run()
        layers = pd.read_csv(experiment.output / "tiny" / "layers.csv")
        weights = layers["out_features"] * layers["in_features"]
        assert results["bits"]["average"] == pytest.approx((layers["bits"] * weights).sum() / weights.sum(), rel=1e-5)
        assert results["bits"]["weight"] == 4
        assert results["bits"]["metadata"] == 0.5
        assert results["baseline"]["bits"]["average"] == 4.5

    def test_perplexities_are_those_of_the_saved_models(self, experiment, run, tiny_model):
        results = run()
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        text = load_rows(DatasetSpec(path=str(experiment.folder / "evaluation.txt")), "evaluation")
        windows_WT = concat_windows(tokenizer, list(text.rows), "\n", 64)
        original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        quantized = lqer.load_quantized(experiment.output / "tiny" / "checkpoint", "cpu")
        row = results["perplexity"][0]
        assert row["tokens"] == windows_WT.numel() - len(windows_WT)
        assert row["original"] == pytest.approx(concat_perplexity(original, windows_WT, 4, False).perplexity, rel=1e-6)
        assert row["quantized"] == pytest.approx(
            concat_perplexity(quantized, windows_WT, 4, False).perplexity, rel=1e-6
        )
        assert len({row["original"], row["rtn"], row["quantized"]}) == 3


class TestWhatIsNotDoneTwice:
    def test_a_second_run_makes_no_artifact_and_gives_the_same_results(self, run, monkeypatch):
        first = run()
        monkeypatch.setattr(evaluations, "load_whole", lambda *args: pytest.fail("a model was loaded"))
        monkeypatch.setattr(evaluations, "load_verified", lambda *args: pytest.fail("a checkpoint was loaded"))
        second = run()
        for key in ("bits", "perplexity", "calibration", "layers", "baseline", "model"):
            assert second[key] == first[key]

    def test_another_rank_reuses_calibration_original_and_plain(self, experiment, run):
        run()
        before = experiment.stages()
        run("--quantize.low_rank.rank=4", tag="other")
        assert sorted([*before, "quantize", "perplexity"]) == experiment.stages()

    def test_names_of_formats_do_not_matter_to_the_store(self, experiment, run):
        run()
        before = experiment.stages()
        run("--formats.w={ kind = 'mxint', bits = 4 }", "--quantize.weight=w", tag="other")
        assert experiment.stages() == before

    def test_methods_share_the_statistics_that_cost_nothing(self, experiment, run):
        run()
        run("--quantize.method=qera-approx", tag="approx")
        assert experiment.stages().count("calibrate") == 1
        run("--quantize.method=qera-exact", tag="exact")
        run("--quantize.method=eora", tag="eora")
        assert experiment.stages().count("calibrate") == 2

    def test_another_budget_reuses_the_spectra(self, experiment, run):
        for bits in (6.5, 7.0):
            run(f"--quantize.low_rank={{ rank = 0, budget_bits = {bits}, format = 'x8' }}", tag=f"b{bits:g}")
        assert experiment.stages().count("spectra") == 1

    def test_other_calibration_text_calibrates_again(self, experiment, run):
        run()
        run("--calibration.num_samples=4", tag="other")
        assert experiment.stages().count("calibrate") == 2

    def test_two_output_folders_hold_the_same_checkpoint_bytes(self, experiment, run):
        run()
        run(f"--output_dir={experiment.folder / 'again'}")
        first, second = (folder / "tiny/checkpoint" for folder in (experiment.output, experiment.folder / "again"))
        names = {path.name for path in first.iterdir()}
        assert names == {path.name for path in second.iterdir()}
        for name in names - {"manifest.json"}:
            assert (first / name).read_bytes() == (second / name).read_bytes()


class TestOtherSettings:
    def test_plain_rounding_has_no_low_rank_bits(self, run):
        results = run("--quantize.method=none", "--quantize.low_rank.rank=0")
        assert results["bits"]["low_rank"] == 0
        assert results["perplexity"][0]["quantized"] == results["perplexity"][0]["rtn"]

    @pytest.mark.parametrize(
        "override",
        [
            "--quantize.method=lqer-svd",
            "--quantize.method=gptq",
            "--quantize.activation=none",
            "--quantize.attention_axis=lqer",
            "--quantize.low_rank.axis=lqer",
            "--quantize.low_rank.rank=7",
            "--quantize.low_rank.rank=1000",
            "--quantize.low_rank.format=none",
            "--formats.w4={ kind = 'int', bits = 4, block_size = 48 }",
            "--formats.w4={ kind = 'mx', element = 'mxfp4_e2m1' }",
            "--quantize.skip=['*.down_proj', 'model.layers.2.*']",
            "--evaluation.perplexity.protocol=row-batches",
            "--evaluation.perplexity.protocol=lm-eval",
            "--evaluation.baselines=[]",
            "--calibration.batch_size=3",
        ],
    )
    def test_a_run_ends_well_with(self, run, override):
        results = run(override)
        assert results["perplexity"][0]["quantized"] > 1
        assert results["layers"]["count"] > 0

    def test_the_bits_of_codebooks_are_told_apart(self, experiment, run):
        codebook = "bits = 2, dimension = 2, group_size = 512, block_size = 32, scale_block_size = 32"
        results = run(
            "--quantize.method=gptvq", "--quantize.weight=v", f"--formats.v={{ kind = 'codebook', {codebook} }}"
        )
        layers = pd.read_csv(experiment.output / "tiny" / "layers.csv")
        parts = layers[["code_bits", "codebook_bits", "scale_bits", "zero_bits", "sign_bits", "low_rank_bits"]].sum(
            axis=1
        )
        assert layers["bits"].to_numpy() == pytest.approx(parts.to_numpy(), rel=1e-4)
        square = layers[layers["name"].str.endswith("q_proj")].iloc[0]
        assert square["code_bits"] == 2
        # 16 centroids of 2 int8 and a bfloat16 scale per 512 weights; 4 bits per 32 weights, two halves per 32 columns.
        assert square["codebook_bits"] == (16 * 2 * 8 + 16) / 512
        assert square["scale_bits"] == pytest.approx(4 / 32 + 2 * 2 * 16 / 64**2)
        bits = results["bits"]
        report = (experiment.output / "tiny" / "report.md").read_text()
        assert f"{bits['weight']:.4f} indices + {bits['codebook']:.4f} codebooks + " in report

    def test_an_override_changes_the_linears_it_matches_alone(self, experiment, run):
        run("--quantize.override=[{ match = '*.down_proj', weight = 'w8', low_rank = { rank = 0 } }]",
            "--formats.w8={ kind = 'mxint', bits = 8 }")  # fmt: skip
        layers = pd.read_csv(experiment.output / "tiny" / "layers.csv").set_index("name")
        down = layers.index.str.endswith("down_proj")
        assert set(layers.loc[down, "rank"]) == {0}
        assert set(layers.loc[down, "bits"]) == {8.5}
        assert set(layers.loc[~down, "rank"]) == {8}

    def test_downstream_tasks_are_scored_for_every_candidate(self, experiment, run):
        tasks = experiment.folder / "tasks" / "arc_easy"
        tasks.mkdir(parents=True)
        choices = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
        rows = [{"id": str(i), "question": f"Colour {i}?", "choices": choices, "answerKey": "B"} for i in range(4)]
        (tasks / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = run(
            "--evaluation.downstream.tasks=['arc_easy_local']",
            f"--evaluation.downstream.include_path={Path(__file__).parents[2] / 'experiments/tasks'}",
            f"--evaluation.downstream.data_dir={tasks.parent}",
        )
        row = next(row for row in results["downstream"] if row["metric"] == "acc")
        assert row["samples"] == 4
        assert all(0 <= row[kind] <= 1 for kind in ("original", "rtn", "quantized"))

    def test_a_scheme_without_factors_is_quantized_once_although_it_is_its_own_baseline(self, experiment, run):
        results = run("--quantize.method=gptq", "--quantize.weight=w4", "--quantize.low_rank.rank=0")
        assert experiment.stages().count("quantize") == 1
        assert results["perplexity"][0]["rtn"] == results["perplexity"][0]["quantized"]

    def test_the_quantized_stream_needs_no_calibration_of_its_own(self, experiment, run):
        results = run("--quantize.propagate_error=true")
        assert experiment.stages().count("quantize") == 2
        assert "calibrate" not in experiment.stages()
        assert results["seconds"]["calibrate"] == 0
        assert results["calibration"]["tokens"] == 8 * 64
        again = run("--quantize.propagate_error=false", tag="original")
        assert again["bits"] == results["bits"]
        assert again["perplexity"][0]["quantized"] != results["perplexity"][0]["quantized"]
        assert again["perplexity"][0]["original"] == results["perplexity"][0]["original"]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("override", "error", "part"),
        [
            ("--model=/nowhere/model", ModelError, "no such file or folder: /nowhere/model"),
            (f"--model={__file__}", ModelError, "is neither a folder nor a .safetensors or .gguf file"),
            ("--model=demo:smollm3", ModelError, "demo:smollm2-135m"),
            ("--device=cuda:99", LqerError, "device"),
            ("--calibration.dataset=wikitext-2", DataError, "did you mean 'wikitext2'?"),
            ("--calibration.num_samples=100000", DataError, "calibration.num_samples is 100000"),
            ("--quantize.skip=['*.dwn_proj']", ConfigError, "did you mean 'down_proj'?"),
            ("--quantize.override=[{ match = '*.nothing' }]", ConfigError, "quantize.override.0.match"),
            ("--quantize.skip=['model.layers.*']", ConfigError, "all linears are skipped"),
            ("--evaluation.downstream={ tasks = ['arc_easyy'] }", ConfigError, "arc_easy"),
        ],
    )
    def test_a_mistake_is_one_line_before_any_artifact_is_made(self, experiment, run, override, error, part):
        with pytest.raises(error) as caught:
            run(override)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(experiment.output.glob("store/quantize-*"))

    def test_a_damaged_checkpoint_is_refused_by_name(self, experiment, run):
        run()
        shard = experiment.output / "tiny" / "checkpoint" / "block-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(StoreError, match=r"block-00001\.safetensors is damaged"):
            run("--evaluation.perplexity.seq_len=32")

    def test_nothing_is_ever_unpickled(self, run, monkeypatch):
        def refuse(*args, **kwargs):
            pytest.fail("something was unpickled")

        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        monkeypatch.setattr(torch, "load", refuse)
        assert run()["perplexity"]

    def test_trackers_are_not_imported_unless_asked_for(self, run, monkeypatch, tmp_path):
        for name in ("wandb", "trackio"):
            (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        run()
        with pytest.raises(RuntimeError, match="imported"):
            run("--tracking.backend=trackio")

    def test_a_tracker_gets_the_numbers_when_asked_for(self, run, monkeypatch):
        logged = {}

        class Run:
            def log(self, numbers):
                logged.update(numbers)

            def finish(self):
                logged["finished"] = True

        fake = type(pickle)("trackio")
        fake.init = lambda **settings: logged.update(settings) or Run()
        monkeypatch.setitem(sys.modules, "trackio", fake)
        results = run("--tracking.backend=trackio")
        assert logged["finished"]
        assert logged["project"] == "lqer"
        assert logged["bits/average"] == results["bits"]["average"]
        assert results["perplexity"][0]["quantized"] in logged.values()


def test_the_saved_configuration_holds_no_null(experiment, run):
    run()
    saved = tomli.loads((experiment.output / "tiny" / "config.toml").read_text())
    assert "tracking" not in saved
    assert Config.model_validate_json(json.dumps(saved), strict=True).tag == "tiny"
