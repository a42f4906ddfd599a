"""The estimated memory and disk of a run, against what a tiny run holds and writes.

Shapes: W windows, T tokens of a window.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import all_sites, quantize
from memory_needs import SEQ_LEN, WINDOWS, experiment, need, outline_of, stages_of, workload
from safetensors import safe_open

from lqer.checkpoint.load import load_quantized
from lqer.checkpoint.pack import OUTSIDE_FILE
from lqer.evaluation.divergence import original_distributions
from lqer.models.loaders import OpenedModel
from lqer.models.source import resolve_model
from lqer.resources.statistics import input_sites
from lqer.resources.workload import Need, StageMemory, total
from lqer.stages import weigh_tokens
from lqer.stages.calibrate import calibrate
from lqer.stages.gather import CalibrationText, stored_statistics
from lqer.stages.quantize_linears import QuantizeSettings
from lqer.stages.rotate import rotate
from lqer.statistics import Hessian
from lqer.store.names import block_file
from lqer.store.offload import Offload
from lqer.store.store import Workspace
from lqer.training.parts import NORMS, trained_tensors

CPU = torch.device("cpu")


def offloadable(stage: StageMemory) -> list[Need]:
    return [entry for entry in stage.ram if entry.remedy and "max_memory" in entry.remedy]


def tensor_bytes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)


class RecordingSpill(Offload):
    """Notes the most that it held."""

    most = 0

    def empty(self, shape, dtype, pinned=False):
        tensor = super().empty(shape, dtype, pinned)
        self.most = max(self.most, self._resident)
        return tensor


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=96)


def test_the_sites_are_those_that_calibration_finds(architecture, stages, tmp_path):
    summary = outline_of(stages.model, tmp_path)
    first = f"{summary.blocks_name}.0."
    found = {site for site in all_sites(stages.calibration).values() if site.startswith(first)}
    assert sorted(input_sites(summary)) == sorted(stages.model.get_submodule(site).in_features for site in found)


def test_the_outlines_sizes_are_the_models(architecture, stages, tmp_path):
    summary, model = outline_of(stages.model, tmp_path), stages.model
    blocks = model.get_submodule(summary.blocks_name)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert summary.block_parameters == max(inside)
    assert summary.outside_parameters == sum(p.numel() for p in model.parameters()) - sum(inside)
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True)
    assert summary.vocabulary == output.logits.shape[-1]
    assert summary.hidden_size == output.hidden_states[1].shape[-1]


@pytest.mark.parametrize("method", ["qera-exact", "lqer-act"])
def test_bytes_are_what_a_run_holds_and_writes(model, method, windows_WT, letter_tokenizer, tmp_path):
    work = workload(model, tmp_path / "model", experiment(quantize={"method": method}))
    found = stages_of(work)
    offload = RecordingSpill()
    opened = OpenedModel.resident(model, CPU, offload)
    requested = {Hessian()} if method == "qera-exact" else set()
    calibration = Workspace(tmp_path / "calibrate")
    calibrate(calibration, opened, CalibrationText(windows_WT, 2, 24), requested)
    calibrate_stage = found["calibrate"]
    in_memory = sum(entry.bytes for entry in offloadable(calibrate_stage) if entry.what != "statistics of a block")
    assert in_memory == pytest.approx(offload.most, rel=0.05)
    statistics = sum(tensor_bytes(tmp_path / "calibrate" / block_file(i)) for i in range(3))
    assert need(calibrate_stage.disk, "statistics") == pytest.approx(statistics, rel=0.02)
    assert need(calibrate_stage.ram, "statistics of a block") == pytest.approx(statistics / 3, rel=0.02)

    checkpoint = Workspace(tmp_path / "quantize")
    quantize(
        checkpoint, opened, letter_tokenizer, stored_statistics(calibration), QuantizeSettings(work.plans, None, 0)
    )
    files = [*(tmp_path / "quantize").glob("block-*"), tmp_path / "quantize" / OUTSIDE_FILE]
    written = sum(map(tensor_bytes, files))
    # Norms are left out of the estimate: here they are a few percent, in a real model nothing.
    assert need(found["quantize"].disk, "quantized model") == pytest.approx(written, rel=0.05)


class TestGrowth:
    def stages(self, random_model, tmp_path, blocks: int, hidden: int = 64, **options) -> dict[str, StageMemory]:
        evaluation = {"blockwise": options.pop("blockwise", True)}
        config = experiment(evaluation=evaluation, **options.pop("sections", {}))
        model = random_model("llama", num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=2 * hidden)
        return stages_of(workload(model, tmp_path / f"{blocks}-{hidden}", config, **options))

    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_memory_does_not_grow_with_the_number_of_blocks(self, random_model, tmp_path, on_gpu):
        few, many = (self.stages(random_model, tmp_path, blocks, on_gpu=on_gpu) for blocks in (2, 8))
        for name in ("calibrate", "quantize", "evaluate"):
            assert few[name].ram == many[name].ram
            assert few[name].device == many[name].device
        assert total(many["calibrate"].disk) == 4 * total(few["calibrate"].disk)

    def test_memory_grows_with_the_block(self, random_model, tmp_path):
        small, large = (self.stages(random_model, tmp_path, 2, hidden) for hidden in (64, 128))
        # A packed block also has factors, which grow with the width alone.
        for name, what, times in [
            ("calibrate", "block", 3.5),
            ("evaluate", "block", 3.5),
            ("quantize", "packed block", 3),
        ]:
            assert need(large[name].ram, what) > times * need(small[name].ram, what)

    def test_a_model_evaluated_or_loaded_whole_counts_whole(self, random_model, tmp_path):
        few, many = (self.stages(random_model, tmp_path, blocks, blockwise=False) for blocks in (2, 8))
        assert need(many["evaluate"].ram, "whole model") > 3 * need(few["evaluate"].ram, "whole model")
        assert "whole model" not in [entry.what for entry in many["calibrate"].ram]
        gguf = self.stages(random_model, tmp_path, 8, streams=False)
        assert need(gguf["calibrate"].ram, "whole model") == need(many["evaluate"].ram, "whole model")

    def test_what_exceeds_the_budget_of_memory_is_on_disk(self, random_model, tmp_path):
        free = self.stages(random_model, tmp_path, 2)["calibrate"]
        excess = sum(entry.bytes - 1000 for entry in offloadable(free))
        sections = {"calibration": {"max_memory": 1000}}
        bound = self.stages(random_model, tmp_path, 2, sections=sections)["calibrate"]
        assert len(offloadable(free)) == 2
        assert total(free.ram) - total(bound.ram) == excess
        assert total(bound.disk) - total(free.disk) == excess

    def test_the_quantized_stream_walks_while_it_quantizes(self, random_model, tmp_path):
        sections = {"quantize": {"propagate_error": True}}
        found = self.stages(random_model, tmp_path, 4, sections=sections)
        apart = self.stages(random_model, tmp_path, 4)
        assert "calibrate" not in found
        assert total(found["quantize"].ram) > total(apart["quantize"].ram)

    def test_statistics_that_are_not_kept_are_gathered_while_quantizing(self, random_model, tmp_path):
        apart, found = (
            self.stages(random_model, tmp_path, 4, sections={"calibration": {"keep": keep}}) for keep in (True, False)
        )
        assert need(apart["calibrate"].disk, "statistics") > 0
        assert "calibrate" not in found
        assert total(found["quantize"].disk) == total(apart["quantize"].disk)
        assert need(found["quantize"].ram, "block") == need(apart["calibrate"].ram, "block")
        assert total(found["quantize"].ram) > total(apart["quantize"].ram)

    def test_on_a_gpu_the_host_holds_stored_blocks_and_the_device_the_rest(self, random_model, tmp_path):
        stage = self.stages(random_model, tmp_path, 4, on_gpu=True)["calibrate"]
        assert {"two blocks as read", "hidden states"} <= {entry.what for entry in stage.ram}
        assert {"block", "accumulators", "activations of a batch"} <= {entry.what for entry in stage.device}


def test_parts_that_learn_on_whole_blocks_say_what_they_hold(random_model, tmp_path):
    model = random_model("llama")
    weights = outline_of(model, tmp_path).block_parameters

    def quantize_stage(**quantize) -> StageMemory:
        quantize = {"method": "none", "low_rank": {"rank": 0}, "propagate_error": True, **quantize}
        config = experiment(quantize=quantize, formats={"w4": {"kind": "int", "bits": 4}})
        return stages_of(workload(model, tmp_path, config))["quantize"]

    plain = quantize_stage()
    assert not [n for n in plain.ram if n.what in ("block in float32", "hidden states of the original model")]
    adaptive = quantize_stage(rounding={"kind": "adaptive", "batch_size": 4, "micro_batch": 2})
    assert need(adaptive.ram, "block in float32") == 4 * weights
    assert need(adaptive.ram, "learned parameters") == 40 * weights
    assert need(adaptive.disk, "states of a block") == 2 * 9 * weights
    assert total(adaptive.disk, certain=True) == total(plain.disk, certain=True)
    states = WINDOWS * SEQ_LEN * model.config.hidden_size * 4
    assert need(adaptive.ram, "hidden states of the original model") == states
    twice = quantize_stage(rounding={"kind": "adaptive", "batch_size": 4})
    activations = "activations for gradients"
    assert need(twice.ram, activations) == 2 * need(adaptive.ram, activations)
    assert need(quantize_stage(transforms=["lwc"]).ram, "learned parameters") == 40 * weights
    scaled = quantize_stage(transforms=["awq"])
    assert "learned parameters" not in [n.what for n in scaled.ram]
    assert need(scaled.ram, "block in float32") == 4 * weights


def test_a_rotation_is_counted_and_what_is_quantized_then_is_in_float32(random_model, tmp_path):
    model = random_model("llama", tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    workspace = Workspace(tmp_path / "rotate")
    rotate(workspace, source, CPU, seed=0)
    found = stages_of(workload(model, tmp_path / "outline", experiment(quantize={"transforms": ["quarot"]}), stored=2))
    assert [*found] == ["rotate", "calibrate", "quantize", "evaluate"]
    written = sum(path.stat().st_size for path in workspace.path.glob("*.safetensors"))
    assert total(found["rotate"].disk) == pytest.approx(written, rel=0.05)
    assert total(found["rotate"].ram, certain=True) == 4 * sum(parameter.numel() for parameter in model.parameters())
    summary = outline_of(model, tmp_path / "outline")
    on_gpu = workload(
        model, tmp_path / "outline", experiment(quantize={"transforms": ["quarot"]}), stored=2, on_gpu=True
    )
    as_read = need(stages_of(on_gpu)["quantize"].ram, "two blocks as read to be rounded")
    assert as_read == 2 * 4 * summary.block_parameters


@pytest.mark.parametrize(
    ("parts", "weight"),
    [
        (["rht_signs"], "w4"),
        (["low_rank"], "w4"),
        (["rht_signs", "low_rank"], "w4"),
        (["scales"], "w3g16"),
        (["floats"], "w3g16"),
        (["floats", "low_rank"], "w3g16"),
    ],
)
def test_fine_tuning_is_counted(model, run_stages, tmp_path, parts, weight):
    """All but norms and biases."""
    settings = {"parts": parts, "columns": 5, "num_samples": 4, "validation_samples": 2, "seq_len": 12, "epochs": 3}
    quantize_settings = {"transforms": ["hadamard"], "low_rank": {"rank": 8, "format": "none"}, "weight": weight}
    formats = {"w3g16": {"kind": "int", "bits": 3, "block_size": 16}}
    config = experiment(quantize=quantize_settings, finetune=settings, formats=formats)
    work = workload(model, tmp_path, config)
    found = stages_of(work)["finetune"]
    stages = run_stages(model, next(iter(work.plans.values())))
    student = load_quantized(stages.checkpoint.path, CPU)
    files = [stages.checkpoint.tensors(block_file(index)) for index in range(work.summary.blocks)]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    trained = trained_tensors(student, stages.details["linears"], stored, config.finetune)
    values = sum(tensor.parameter.numel() for tensor in trained.values() if tensor.kind != NORMS)
    assert need(found.ram, "trained parameters") == 4 * 5 * values
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert need(found.ram, "original and quantized model") == 2 * 4 * parameters
    assert need(found.ram, "inputs of the blocks") == work.summary.blocks * 2 * 12 * model.config.hidden_size * 4


def test_the_originals_distributions_are_counted_on_disk(model, tmp_path):
    on = {"divergence": {"top_k": 5}, "baselines": ["original"]}
    found = stages_of(workload(model, tmp_path, experiment(evaluation=on)))["evaluate"]
    batches = torch.randint(model.config.vocab_size, (WINDOWS, SEQ_LEN)).split(2)
    written = sum(
        tensor.nbytes for batch in original_distributions(model, batches, 5, progress=False) for tensor in batch
    )
    # The last token of a window has no successor; the estimate counts all.
    assert need(found.disk, "distributions of the original") == written * SEQ_LEN // (SEQ_LEN - 1)
    assert not stages_of(workload(model, tmp_path))["evaluate"].disk


def test_stages_come_in_the_order_of_the_run(model, tmp_path):
    quantize_settings = {"transforms": ["quarot"], "low_rank": {"rank": 8, "format": "none"}}
    config = experiment(quantize=quantize_settings, finetune={"parts": ["low_rank"]})
    stages = [*stages_of(workload(model, tmp_path, config))]
    assert stages == ["rotate", "calibrate", "quantize", "finetune", "evaluate"]


def test_widths_count_the_inputs_of_all_blocks_and_the_errors_of_every_format(model, tmp_path):
    formats = {f"w{bits}": {"kind": "mxint", "bits": bits} for bits in (2, 3, 4)}
    quantize = {"method": "gptq", "widths": list(formats), "budget_bits": 6.0, "low_rank": {"rank": 0}}
    work = workload(model, tmp_path, experiment(formats=formats, quantize=quantize))
    found = stages_of(work)
    # Errors are propagated, and yet the losses are measured on statistics of the original.
    assert list(found) == ["calibrate", "widths", "quantize", "evaluate"]
    states = WINDOWS * SEQ_LEN * work.summary.hidden_size * 4
    assert need(found["widths"].ram, "hidden states") == (work.summary.blocks + 1) * states
    assert need(found["widths"].ram, "gradients of the windows") == states
    weights = sum(rows * columns for rows, columns in work.summary.linears.values()) // work.summary.blocks
    assert need(found["widths"].ram, "errors of a block") == 3 * 4 * weights


def test_weights_of_tokens_are_found_pass_by_pass_and_read_with_the_statistics(model, tmp_path, monkeypatch):
    config = experiment(calibration={"token_weights": "gradient"})
    work = workload(model, tmp_path, config)
    found, summary = stages_of(work), work.summary
    assert list(found) == ["token_weights", "calibrate", "quantize", "evaluate"]
    states = WINDOWS * SEQ_LEN * summary.hidden_size * 4
    assert need(found["token_weights"].ram, "hidden states") == (summary.blocks + 1) * states
    weights = 4 * WINDOWS * SEQ_LEN * 4 * summary.blocks
    assert need(found["token_weights"].disk, "weights of the tokens") == weights
    assert need(found["calibrate"].ram, "weights of the tokens") == weights
    monkeypatch.setattr(weigh_tokens, "PASS_BYTES", 0)
    monkeypatch.setattr("lqer.resources.backward.usable_ram", lambda: 0)
    of_a_batch = (summary.blocks + 1) * states * config.calibration.batch_size // WINDOWS
    assert need(stages_of(work)["token_weights"].ram, "hidden states") == of_a_batch
