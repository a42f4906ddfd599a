"""The parts of locate_harm.py against the stages that they stand for, and against their definitions.

Shapes: B windows of a batch, T tokens of a window, D hidden size, N tokens of a batch, I in_features.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harm.schemes import Scheme, quantize, schemes
from harm.signs import error_signs, error_sums, signs_of
from harm.subject import Ruler, Subject, replaced
from harm.super_weights import alone, early, super_weights
from harm.tokens import RULES, HessianOfTokens, token_shares
from helpers import quantize_in_memory, resident, settings_for

from lqer.checkpoint.load import load_quantized
from lqer.formats import Int
from lqer.stages.gather import CalibrationText
from lqer.statistics import Hessian
from lqer.store.offload import Offload

ROOT = Path(__file__).parents[2]
FORMAT = Int(bits=3, block_size=16)
AS_STAGES = ("GPTQ", "B", "C(0.25)", "W", "E", "S", "D(2)", "Hadamard", "rank 32 in 8 bits")


@pytest.fixture(scope="module")
def subject(random_model, windows_WT) -> Subject:
    model = random_model("llama")
    text, rulers = CalibrationText(windows_WT, 2, 24), {"text": Ruler(model, windows_WT)}
    return Subject(resident(model), text, windows_WT[:0], rulers)


@pytest.mark.parametrize("name", AS_STAGES)
def test_a_scheme_gives_the_weights_of_the_stage(subject, letter_tokenizer, tmp_path, name):
    scheme, model = schemes("least-squares")[name], subject.opened.model
    settings = settings_for(model, scheme.plan(FORMAT), transforms=scheme.transforms, order=scheme.order)
    text = replace(subject.text, token_weights=scheme.token_weights)
    quantize_in_memory(tmp_path, model, letter_tokenizer, text, settings)
    model = load_quantized(tmp_path, "cpu", torch.float32, verify=False)
    found = quantize(subject, scheme, FORMAT)
    (harm,) = subject.harms(found.parameters)
    # Float32 sums may tip a tie or two.
    assert harm.kl == pytest.approx(subject.rulers["text"].harm(model).kl, rel=0.01)


def test_bits_count_scales_and_factors(subject):
    plain = quantize(subject, Scheme(), FORMAT).average_bits
    # Of two groups: codes, half-precision scales, and a byte of two zero points.
    assert plain == 3 + (2 * 16 + 8) / 32
    assert quantize(subject, Scheme(finer=2), FORMAT).average_bits > plain + 1
    assert quantize(subject, Scheme(rank=2), FORMAT).average_bits > plain + 2 * 8 * (32 + 64) / (32 * 64)


def test_a_model_is_left_as_it_was(subject):
    before = copy.deepcopy(subject.opened.model.state_dict())
    parameters = quantize(subject, schemes("minmax")["E"], FORMAT).parameters
    (harm,) = subject.harms(parameters)
    assert harm.kl > 1e-4
    assert subject.harms({})[0].kl == pytest.approx(0, abs=1e-9)
    assert all(torch.equal(before[key], tensor) for key, tensor in subject.opened.model.state_dict().items())


def test_first_tokens_that_are_exact_leave_the_first_prediction_as_it_was(subject):
    parameters = quantize(subject, Scheme(), FORMAT).parameters
    (rounded,), (exact,) = subject.harms(parameters), subject.harms_but_for_first_tokens(parameters)
    assert exact.kl_WN[:, 0].abs().max() < 1e-5 < rounded.kl_WN[:, 0].min()
    assert exact.kl_WN[:, 1:].min() > 0


def test_two_more_bits_are_those_of_the_named_weights(subject):
    plain, wider = (quantize(subject, scheme, FORMAT) for scheme in (Scheme(), Scheme(wider=("*.v_proj.weight",))))
    values = sum(weight.numel() for name, weight in subject.weights().items() if "v_proj" in name)
    assert wider.bits - plain.bits >= 2 * values
    assert torch.equal(plain.parameters["model.layers.0.mlp.up_proj.weight"],
                       wider.parameters["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_weights_tokens_in_the_hessian(rule):
    x_BTI = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    x_BTI[1, 3] *= 100
    x_BTI[:, 0] *= 3
    weights_BT = RULES[rule](x_BTI.square().sum(-1))
    accumulator = HessianOfTokens(rule, 6).accumulator(8, x_BTI.device, Offload())
    accumulator.add(x_BTI.flatten(0, 1), None, torch.tensor([0]))
    expected_II = torch.einsum("bti,btj,bt->ij", x_BTI, x_BTI, weights_BT) / weights_BT.sum()
    assert torch.allclose(accumulator.result(), expected_II, rtol=1e-4)
    plain = Hessian().accumulator(8, x_BTI.device, Offload())
    plain.add(x_BTI.flatten(0, 1), None, torch.tensor([0]))
    assert not torch.allclose(accumulator.result(), plain.result(), rtol=0.01)


def test_shares_of_equal_tokens_are_their_number(subject):
    embedding = subject.opened.model.get_input_embeddings()
    with replaced(embedding, {"weight": embedding.weight[:1].expand_as(embedding.weight)}):
        shares = token_shares(subject)
    (first,) = [share for name, share in shares.items() if name.endswith("0.self_attn.q_proj")]
    assert first.first == pytest.approx(1 / subject.text.windows_WT.shape[1], rel=1e-3)
    assert first.massive == 0
    assert first.weighted_first is None
    assert len(shares) == 4 * len(subject.opened.blocks)


def test_an_error_that_undoes_what_came_before_has_a_cosine_of_minus_one():
    given, target, error = torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    blocks = [error_sums(given, target, target + error, target + error * rest) for rest in (0.5, 0.5)]
    rest, massive = (signs_of(of_tokens) for of_tokens in torch.stack(blocks).unbind(1))
    assert rest.cosine == pytest.approx(-1)
    assert massive.cosine != massive.cosine  # nan: no token is massive
    squares = error.square().sum(-1) / target.square().sum(-1)
    assert rest.end == pytest.approx(0.5 * squares.mean().sqrt().item(), rel=1e-4)


def test_a_block_that_is_not_rounded_makes_no_error_and_a_shorter_update_shrinks(subject):
    name = f"{subject.opened.name}.1."
    weights = {key: weight for key, weight in subject.weights().items() if key.startswith(name)}
    signs = error_signs(subject.opened, weights, subject.text.windows_WT, 2)[0]
    assert (signs.own, signs.end) == (0, 0)
    halved = {key: weight / 2 for key, weight in weights.items() if key.endswith(("o_proj.weight", "down_proj.weight"))}
    assert error_signs(subject.opened, halved, subject.text.windows_WT, 2)[0].shrink > 0.1


def test_a_planted_weight_is_found_and_taken_out_alone(random_model, windows_WT):
    model = random_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[5, 7] = 50.0
    subject = Subject(resident(model), CalibrationText(windows_WT, 2, 24), windows_WT[:0], {})
    linears = early(subject, "*.down_proj")
    assert linears == ["model.layers.0.mlp.down_proj"]
    (found,) = super_weights(subject, linears, 1)
    assert (found.row, found.column, found.weight) == (5, 7, 50.0)
    ((name, part),) = alone(subject, [found]).items()
    assert name == "model.layers.0.mlp.down_proj.weight"
    assert part.count_nonzero() == 1


def test_a_pattern_without_linears_is_refused_in_one_line(random_model, letter_tokenizer, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "model")
    letter_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("some words, and more of them. " * 20)
    command = [sys.executable, "experiments/locate_harm.py", tmp_path / "model", "--calibration", text, "--texts", text,
               "--parts", "supers", "--writer", "*.nothing", "--num-samples", "2", "--seq-len", "16"]  # fmt: skip
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: --writer must name a linear of the first third of the blocks; found '*.nothing'"
