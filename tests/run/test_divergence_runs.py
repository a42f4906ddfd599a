"""Divergence from the original in a whole run: where its numbers are, what is stored once, what resumes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from killing import KilledError, dying_workspace
from transformers import AutoModelForCausalLM

import lqer
from lqer.config import read_config
from lqer.errors import ConfigError, ModelError
from lqer.evaluation.perplexity import concat_windows
from lqer.models.source import load_tokenizer, resolve_model
from lqer.report.collect import collect
from lqer.run import evaluations, pipeline
from lqer.stages import divergence as stages
from lqer.stages import evaluate
from lqer.store import store

ON = "--evaluation.divergence=true"


@pytest.fixture
def run(experiment):
    def run_with(*overrides: str, tag: str | None = None):
        return pipeline.run(read_config(experiment.config, tag, [ON, *overrides]))

    return run_with


def direct(experiment, tiny_model) -> tuple[float, float]:
    """Mean KL and top-1 agreement of the checkpoint, from all logits."""
    text = (experiment.folder / "evaluation.txt").read_text()
    tokens = concat_windows(load_tokenizer(resolve_model(str(tiny_model))), [text], "\n", 64)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    quantized = lqer.load_quantized(str(experiment.output / "tiny/checkpoint"))
    with torch.no_grad():
        log_p, log_q = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (original, quantized))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return kl.item(), (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()


def test_the_numbers_stand_in_results_report_table_and_collection(experiment, tiny_model, run):
    results = run("--evaluation.divergence.top_k=257")
    (row,) = results["perplexity"]
    info = row["divergence"]
    kl, agreement = direct(experiment, tiny_model)
    assert (info["top_k"], info["covered"]) == (257, 1)
    assert info["quantized"]["kl_mean"] == pytest.approx(kl, rel=1e-3)
    assert info["quantized"]["top1_agreement"] == pytest.approx(agreement, abs=2e-3)
    assert 0 < info["quantized"]["kl_mean"] < info["rtn"]["kl_mean"]
    folder = experiment.output / "tiny"
    assert json.loads((folder / "results.json").read_text())["perplexity"] == [row]
    report = (folder / "report.md").read_text()
    protocol = f"evaluation.txt (concat, seq_len 64, {row['tokens']} tokens, top 257)"
    shown = f"| – | {info['rtn']['kl_mean']:.4f} | {info['quantized']['kl_mean']:.4f} |"
    assert f"| KL from the original, mean, {protocol} {shown}" in report
    assert f"| top-1 agreement with the original, {protocol} | – |" in report
    assert "a lower bound" in report
    (collected,) = collect(experiment.output).to_dict("records")
    assert (collected["kl_mean"], collected["top_k"]) == (info["quantized"]["kl_mean"], 257)
    assert collected["rtn_kl_mean"] == info["rtn"]["kl_mean"]


def test_perplexity_is_measured_in_the_same_pass_with_the_same_bits(experiment, run, monkeypatch):
    alone = run("--evaluation.divergence=false", f"--output_dir={experiment.folder / 'alone'}")["perplexity"][0]
    monkeypatch.setattr(evaluate, "window_nlls", lambda *arguments: pytest.fail("the windows were run again"))
    together = run()["perplexity"][0]
    assert together.pop("divergence")
    assert alone.pop("divergence") is None
    assert together == alone


def test_without_it_nothing_is_measured_and_collections_have_empty_columns(experiment, run):
    assert run("--evaluation.divergence=false")["perplexity"][0]["divergence"] is None
    assert not list(experiment.output.glob("store/distribution-*"))
    assert collect(experiment.output)["kl_mean"].isna().all()


def test_the_original_is_measured_once_for_all_schemes(experiment, run, monkeypatch):
    run()
    (stored,) = experiment.output.glob("store/distribution-*")
    monkeypatch.setattr(evaluations, "load_whole", lambda *arguments: pytest.fail("the original was loaded"))
    other = run("--quantize.low_rank.rank=4", tag="other")
    assert list(experiment.output.glob("store/distribution-*")) == [stored]
    assert other["perplexity"][0]["divergence"]["quantized"]["kl_mean"] > 0


def test_perplexities_keep_their_names_in_the_store(experiment, run):
    run("--evaluation.divergence=false")
    names = {path.name for path in experiment.output.glob("store/perplexity-*")}
    run(tag="with")
    assert {path.name for path in experiment.output.glob("store/perplexity-*")} == names


@pytest.mark.parametrize("blockwise", ["false", "true"])
def test_a_killed_run_resumes_at_the_next_batch(experiment, run, monkeypatch, blockwise, tmp_path):
    how = f"--evaluation.blockwise={blockwise}"
    whole = run(how, f"--output_dir={tmp_path / 'whole'}")
    monkeypatch.setattr(store, "Workspace", dying_workspace(at_write="distribution-00002.safetensors"))
    with pytest.raises(KilledError):
        run(how)
    monkeypatch.undo()
    asked = []

    def counting(model, batches, top_k, progress=True):
        asked.extend(batches)
        return measure(model, batches, top_k, progress)

    measure = stages.original_distributions
    monkeypatch.setattr(stages, "original_distributions", counting)
    assert run(how)["perplexity"] == whole["perplexity"]
    (stored,) = experiment.output.glob("store/distribution-*")
    assert len(asked) == len(list(stored.glob("distribution-*"))) - 2


def test_block_by_block_the_numbers_are_the_same(run):
    whole = run()["perplexity"][0]["divergence"]
    blockwise = run("--evaluation.blockwise=true", tag="blockwise")["perplexity"][0]["divergence"]
    assert blockwise["quantized"] == pytest.approx(whole["quantized"], rel=1e-5)


def test_a_divergence_that_is_not_finite_is_null_with_a_warning(experiment, run, monkeypatch):
    measure = stages.divergence

    def broken(*arguments):
        return replace(measure(*arguments), kl_mean=float("nan"), kl_p99=float("inf"))

    monkeypatch.setattr(stages, "divergence", broken)
    results = run("--evaluation.baselines=['original']")
    assert results["perplexity"][0]["divergence"]["quantized"]["kl_mean"] is None
    assert results["perplexity"][0]["divergence"]["quantized"]["kl_p99"] is None
    assert results["warnings"] == [
        "the divergence of the quantized model from the original on evaluation.txt is not finite"
    ]
    text = (experiment.output / "tiny/results.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_an_original_whose_logits_are_not_finite_is_refused(run, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.constant_(model.model.norm.weight, 1e38)
    model.save_pretrained(tmp_path / "broken")
    for file in tiny_model.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"the original model's logits on evaluation.txt .* are not finite"):
        run(f"--model={tmp_path / 'broken'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--evaluation.baselines=['rtn']"], 'requires "original" in evaluation.baselines'),
        (["--evaluation.perplexity.protocol=lm-eval"], 'must be unset with protocol "lm-eval"'),
        (["--evaluation.divergence.top_k=0"], "evaluation.divergence.top_k: must be greater than 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(experiment, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_config(experiment.config, None, [ON, *overrides])


def test_it_requires_perplexity(tmp_path):
    config = tmp_path / "bare.toml"
    config.write_text('extends = "preset:rtn"\nmodel = "a/b"\nevaluation = { divergence = true }\n')
    assert read_config(config).evaluation.divergence is not None
    config.write_text(
        'extends = "preset:formats/int"\nmodel = "a/b"\nquantize = { weight = "w4" }\n[evaluation]\ndivergence = {}\n'
    )
    with pytest.raises(ConfigError, match=r"evaluation\.divergence: requires evaluation\.perplexity"):
        read_config(config)
