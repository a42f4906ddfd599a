"""Exports as the last step of a run: what is refused before it, what it leaves, what a second run does again."""

from __future__ import annotations

import json

import pytest

from lqer.config import read_config
from lqer.errors import ConfigError, ExportError, LqerError, RunFolderError
from lqer.export import Dense
from lqer.export.run import RECORD_FILE
from lqer.run import pipeline, preflight

PLAIN = ("--quantize.method=none", "--quantize.low_rank.rank=0", "--quantize.activation=none",
         "--quantize.attention=none", "--evaluation.baselines=[]", "--formats.w4.block_size=32")  # fmt: skip
DENSE = '--export.targets=["dense"]'


@pytest.fixture
def run(experiment):
    return lambda *overrides: pipeline.run(read_config(experiment.config, "exported", [*PLAIN, *overrides]))


def test_the_folder_the_results_and_the_report_tell_what_was_exported(experiment, run):
    (row,) = run(DENSE)["exports"]
    folder = experiment.output / "exported"
    assert (row["target"], row["folder"], row["settings"]) == ("dense", "export/dense", {"dtype": "float32"})
    assert (row["closeness"], row["logit_difference"], row["not_verified"], row["refused"]) == ("exact", 0, None, None)
    assert row["weight_bytes"] == (folder / row["folder"] / "model.safetensors").stat().st_size
    assert "| `dense` | `export/dense` |" in (folder / "report.md").read_text()
    perplexity = json.loads((folder / "results.json").read_text())["perplexity"][0]["quantized"]
    assert f"{perplexity:.4f}" in (folder / "export/dense/README.md").read_text()


def test_a_second_run_keeps_the_files_and_writes_their_card_anew(experiment, run, monkeypatch):
    first = run(DENSE)
    weights = experiment.output / "exported/export/dense/model.safetensors"
    made, card = weights.stat().st_mtime_ns, (weights.parent / "README.md").read_text()
    monkeypatch.setattr(Dense, "write", lambda *_: pytest.fail("written again"))
    assert run(DENSE, "--evaluation.perplexity.seq_len=32")["exports"] == first["exports"]
    assert weights.stat().st_mtime_ns == made
    assert (weights.parent / "README.md").read_text() != card


def test_files_that_could_not_be_compared_are_written_again_where_they_can_be(experiment, run, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(Dense, "readers", ("no_such_reader",))
        (row,) = run(DENSE)["exports"]
        assert row["not_verified"].startswith("no_such_reader")
        assert run(DENSE)["exports"] == [row]
    assert run(DENSE)["exports"][0]["logit_difference"] == 0


def test_another_checkpoint_replaces_the_files_but_not_those_that_somebody_changed(experiment, run):
    run(DENSE)
    folder = experiment.output / "exported/export/dense"
    before = json.loads((folder / RECORD_FILE).read_text())
    run(DENSE, "--formats.w4.bits=3")
    assert json.loads((folder / RECORD_FILE).read_text())["checkpoint"] != before["checkpoint"]
    (folder / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="was changed since it was exported"):
        run(DENSE)
    assert (folder / "config.json").read_text() == "{}"


def test_a_run_without_exports_says_so(run):
    assert run()["exports"] == []


def test_a_target_that_refuses_a_value_leaves_its_reason_in_the_report(experiment, run, monkeypatch):
    def refuse(*_, **settings):
        raise ExportError("model.layers.0.mlp.up_proj: a zero point is 0")

    monkeypatch.setattr("lqer.export.gptq.gptq_tensors", refuse)
    with pytest.raises(
        ExportError, match=r"complete but for its exports: model\.layers\.0\.mlp\.up_proj: a zero point"
    ):
        run('--export.targets=["gptq", "dense"]')
    folder = experiment.output / "exported"
    gptq, dense = json.loads((folder / "results.json").read_text())["exports"]
    assert gptq["folder"] is None
    assert "a zero point is 0" in gptq["refused"]
    assert dense["logit_difference"] == 0
    assert "refused: model.layers.0.mlp.up_proj" in (folder / "report.md").read_text()
    assert [path.name for path in (folder / "export").iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (['--export.targets=["desne"]'], r"export\.targets\.0: unknown export target 'desne'.*did you mean 'dense'"),
        (['--export.targets=[{ dtype = "float16" }]'], r"export\.targets\.0: unknown export target ''"),
        (['--export.targets=[{ kind = "dense", dtyp = "x" }]'], "unknown key 'dtyp'"),
        (['--export.targets=["gguf"]', *PLAIN], 'in export.targets { kind = "gguf", template = "FILE.gguf" }'),
        (['--export.targets=["compressed-tensors"]'], r"q_proj: it has low-rank factors \(rank 8\); targets that can"),
        (['--export.targets=["peft"]', *PLAIN], "neither it nor any other linear has low-rank factors"),
        (['--export.targets=["awq"]', *PLAIN, "--formats.w4.bits=3"], "its codes have 3 bits"),
        (
            ['--export.targets=["gptq"]', *PLAIN, '--quantize.transforms=["quarot"]'],
            r"down_proj: its inputs are rotated at run time; targets that can: dense",
        ),
        (
            ['--export.targets=["compressed-tensors"]', *PLAIN, '--quantize.transforms=["hadamard"]'],
            "rounded in a rotated basis",
        ),
        (
            ['--export.targets=["awq"]', *PLAIN, '--quantize.widths=["w2", "w3"]', "--quantize.budget_bits=3.2"],
            "its codes have 2 bits",
        ),
    ],
)
def test_what_plans_tell_is_refused_before_the_run(experiment, overrides, match):
    config = read_config(experiment.config, "refused", overrides)
    for check in (pipeline.run, lambda config: preflight.describe(config, lambda line: None)):
        with pytest.raises(LqerError, match=match):
            check(config)
    assert not (experiment.output / "refused").exists()


def test_a_width_that_only_some_targets_take_is_left_to_the_allocation(experiment):
    choice = ['--quantize.widths=["w2", "w4"]', "--quantize.budget_bits=3.2", '--export.targets=["awq"]']
    config = read_config(experiment.config, "widths", [*PLAIN, *choice])
    assert [target.kind for target in preflight.check_run(config, lambda line: None).exports] == ["awq"]


@pytest.mark.parametrize(
    ("value", "rule"), [("dense", "must be a valid array"), ("[3]", "must be .*string"), ("[]", "must name at least 1")]
)
def test_targets_are_a_list_of_kinds_or_tables(experiment, value, rule):
    with pytest.raises(ConfigError, match=rf"export\.targets.*{rule}"):
        read_config(experiment.config, None, [f"--export.targets={value}"])


def test_a_kind_can_be_named_once(experiment):
    with pytest.raises(ConfigError, match='export: targets must name each kind once; found "dense" twice'):
        read_config(experiment.config, None, ['--export.targets=["dense", { kind = "dense", dtype = "float16" }]'])


def test_a_folder_that_no_export_made_is_refused_before_the_run(experiment, run):
    folder = experiment.output / "exported/export/dense"
    folder.mkdir(parents=True)
    (experiment.output / "exported/.lqer-run").touch()
    (folder / "mine").touch()
    with pytest.raises(RunFolderError, match="was not made by an export"):
        run(DENSE)
    assert not (experiment.output / "store").exists()


def test_validate_says_what_will_not_be_verified_and_what_exports_need(experiment, monkeypatch):
    monkeypatch.setattr(Dense, "readers", ("no_such_reader",))
    lines: list[str] = []
    preflight.describe(read_config(experiment.config, "exported", [DENSE]), lines.append)
    assert "warning: export dense will not be verified: no_such_reader is not installed" in lines
    assert any(line.startswith("export ") for line in "\n".join(lines).splitlines())
