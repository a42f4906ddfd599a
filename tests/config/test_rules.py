"""A mistake in a configuration, or settings that do not go together, are answered with one line that names the rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from helpers import config_mistake as mistake

from lqer.config import read_config
from lqer.errors import ConfigError
from lqer.rounding import Ldlq
from lqer.statistics import Hessian, MeanSquare


@dataclass(frozen=True)
class InputDifference(MeanSquare):
    kind = "input-difference"
    needs_original: ClassVar[bool] = True


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("--quantize.low_rnak.rank=3", ["quantize.low_rnak: unknown key", "did you mean 'low_rank'?"]),
            (
                "--quantize.low_rank.rnak=3",
                ["quantize.low_rank.rnak: unknown key", "allowed: rank, format, format_b"],
            ),
            ("--quantize.low_rank.rank=abc", ["quantize.low_rank.rank: must be a valid integer", "found 'abc'"]),
            ("--quantize.low_rank.rank='3'", ["must be a valid integer", "found '3'"]),
            ("--quantize.low_rank.rank=-1", ["must be greater than or equal to 0", "found -1"]),
            ("--quantize.low_rank.rank=1.5", ["quantize.low_rank.rank: must be"]),
            ("--seed=true", ["seed: must be a valid integer", "found True"]),
            (
                "--quantize.weight=w44",
                ["quantize.weight: no such number format", "allowed: w4, x8", "did you mean 'w4'?"],
            ),
            ("--quantize.weight=none", ["quantize.weight: no such number format"]),
            ("--quantize.activation=x9", ["quantize.activation", "allowed: w4, x8, none"]),
            ("--quantize.method=lqer-atc", ["quantize.method: unknown method 'lqer-atc'", "did you mean 'lqer-act'?"]),
            ("--quantize.method=none", ["quantize.low_rank.rank: must be 0", "found 32"]),
            ("--formats.w4.bits=9", ["formats.w4: bits 9 is not in 2..8 (mxint)"]),
            ("--formats.w4.kind=mxin", ["formats.w4: unknown number format 'mxin'", "did you mean 'mxint'?"]),
            ("--formats.q={ bits = 4 }", ["formats.q: a number format needs a kind; allowed: "]),
            (
                "--formats.q={ kind = 'int', bits = 4, block_size = 'rows' }",
                ["formats.q.block_size: must be a valid integer or 'row' or 'tensor'; found 'rows'"],
            ),
            ("--formats.q={ kind = 'int', bits = 4, block_size = -1 }", ['block_size -1 is not "row", "tensor" or']),
            ("--formats.q={ kind = 'int', bits = 4, blocksize = 3 }", ["blocksize: unknown key", "'block_size'?"]),
            ("--formats.none={ kind = 'int', bits = 4 }", ["formats.none", "reserved"]),
            ("--evaluation.perplexity={ protocol = 'concta' }", ["protocol: not allowed", "did you mean 'concat'?"]),
            ("--evaluation.baselines=['rnt']", ["did you mean 'rtn'?"]),
            ("--evaluation.perplexity={ datasets = [{ path = 'c4', rowz = '3' }] }", ["rowz: unknown key", "'rows'?"]),
            (
                "--calibration.dataset={ path = 'a.jsonl', prompt = { template = '{a} {choice}', label = 'b' } }",
                ["calibration.dataset.prompt: label names the column that selects one of choices: set both or neither"],
            ),
            (
                "--calibration.dataset={ path = 'a.jsonl', prompt = { template = '{a}', lable = 'b' } }",
                ["calibration.dataset.prompt.lable: unknown key", "'label'?"],
            ),
            ("--calibration.dataset={ path = 'pydoc', prompt = '{a}' }", ["dataset.prompt: a prompt needs rows with"]),
            ("--calibration.datset=c4", ["calibration.datset: unknown key", "did you mean 'dataset'?"]),
            ("--calibration=3", ["calibration: must be a table", "found 3"]),
            ("--calibration.num_samples=0", ["must be greater than 0"]),
            ("--quantize.override=[{ mach = '*' }]", ["override.0.mach: unknown key", "did you mean 'match'?"]),
            ("--quantize.override=[{ match = '*', weight = 'w9' }]", ["quantize.override.0.weight", "found 'w9'"]),
            ("--quantize.override=[{ match = '*', low_rank = { rank = 'a' } }]", ["override.0.low_rank.rank"]),
            ("--quantize.rounding=nearst", ["quantize.rounding: unknown rounding 'nearst'", "did you mean 'nearest'?"]),
            ("--quantize.rounding={ kind = 'nearest', damp = 1 }", ["quantize.rounding.damp: unknown key"]),
            (
                "--quantize.rounding={ kind = 'ldlq', tune_iter = 1 }",
                ["quantize.rounding.tune_iter: unknown key", "did you mean 'tune_iters'?"],
            ),
            ("--finetune.parts=[]", ["finetune.parts: must name at least 1"]),
            ("--quantize.rounding=4", ["quantize.rounding: must be the kind of a rounding or a table", "found 4"]),
            ("--quantize.override=[{ match = '*', rounding = 'up' }]", ["override.0.rounding: unknown rounding 'up'"]),
            ("--quantize.transforms=['hadamrad']", ["transforms.0: unknown transform", "did you mean 'hadamard'?"]),
            (
                "--quantize.transforms=[{ kind = 'hadamard', sed = 1 }]",
                ["transforms.0.sed: unknown key"],
            ),
            ("--quantize.transforms=['hadamard', 'hadamard']", ['transforms: "hadamard" is named twice']),
            ("--quantize.transforms=hadamard", ["quantize.transforms: must be a valid array"]),
            (
                "--quantize.low_rank.format_b=x9",
                ["low_rank.format_b: no such number format", "allowed: w4, x8"],
            ),
            ("--quantize.method={ kind = 'lqer-act', down_date = 1 }", ["quantize.method.down_date: unknown key"]),
            (
                "--quantize.method={ kind = 'caldera', down_dat = 1 }",
                ["quantize.method.down_dat: unknown key", "did you mean 'down_date'?"],
            ),
            (
                "--quantize.method={ kind = 'caldera', down_date = 2 }",
                ["quantize.method: down_date 2.0 is not in 0..1 (caldera)"],
            ),
            (
                "--quantize.method={ kind = 'caldera', starts_with = 'rond' }",
                ["quantize.method.starts_with: not allowed", "did you mean 'round'?"],
            ),
            ("--quantize.low_rank.solver=krilov", ["low_rank.solver: not allowed", "did you mean 'krylov'?"]),
            ("--quantize.low_rank.iterations=0", ["low_rank.iterations: must be greater than 0"]),
            ("--quantize.low_rank.budget_bits=0", ["low_rank.budget_bits: must be greater than 0"]),
            ("--tag=a/b", ["tag: must be a plain folder name"]),
            ("--foo=1", ["foo: unknown key", "allowed: model"]),
            ("--evaluation.perplexity={ protocol = 'lm-eval', max_windows = 3 }", ["max_windows"]),
            ("--evaluation.perplexity.datasets=[]", ["evaluation.perplexity.datasets: must name at least 1"]),
        ],
    )
    def test_an_override_is_answered_with_one_line_that_names_it(self, base, override, parts):
        message = mistake(base, override)
        assert message.startswith(f"{override}: ") or "quantize.low_rank.rank: must be 0" in message
        for part in parts:
            assert part in message
        assert "?; found" not in message, "the value stands in the rule already"

    @pytest.mark.parametrize(
        ("method", "low_rank", "parts"),
        [
            ("qera-exact", "rank = 32, budget_bits = 5", ["low_rank.rank: must be 0 with budget_bits", "found 32"]),
            ("none", "rank = 0, budget_bits = 5", ["budget_bits: must be unset", '"none" has no low-rank factors']),
            ("none", "rank = 0, iterations = 2", ["iterations: must be unset", '"none" has no low-rank factors']),
            ("svdquant", "rank = 0, budget_bits = 5", ["budget_bits: not supported", '"svdquant", which rounds last']),
            ("loftq", "rank = 0, budget_bits = 5", ["budget_bits: not supported with 5 iterations"]),
            ("lqer-act", "rank = 0, budget_bits = 5, iterations = 2", ["budget_bits: not supported with 2 iterations"]),
        ],
    )
    def test_a_combination_that_makes_no_sense_is_refused_with_the_reason(self, base, method, low_rank, parts):
        message = mistake(base, f"--quantize.method={method}", f"--quantize.low_rank={{ {low_rank} }}")
        for part in parts:
            assert part in message

    def test_a_method_keeps_the_rounding_that_makes_it(self, base):
        assert 'quantize.rounding: method "gptq" always uses rounding "gptq"' in mistake(
            base, "--quantize.method=gptq", "--quantize.low_rank.rank=0", "--quantize.rounding=ldlq"
        )
        assert 'its weights are of kind "codebook", not "mxint"' in mistake(base, "--quantize.method=gptvq")

    def test_damping_beside_caldera_has_one_place(self, base):
        settings = ("--quantize.method=caldera", "--quantize.rounding={ kind = 'ldlq', damping = 0.5 }")
        assert "damping of the Hessian is set by quantize.method.damping" in mistake(base, *settings)

    def test_the_gpus_of_a_worker_are_whole_or_a_share_of_one(self, base):
        for gpus in (0.25, 1, 2):
            read_config(base, None, [f"--cluster.gpus_per_job={gpus}"])
        assert "gpus_per_job: must be greater than or equal to 0.0001" in mistake(base, "--cluster.gpus_per_job=0")
        message = mistake(base, "--cluster.gpus_per_job=1.5")
        assert "cluster.gpus_per_job: must be a whole number, or a fraction below 1; found 1.5" in message

    def test_workers_choose_no_gpu(self, base):
        message = mistake(base, "--cluster.address=local", "--device=cuda:1")
        assert "device: must name no GPU where cluster.address is 'local'; found 'cuda:1'" in message
        read_config(base, None, ["--cluster.address=off", "--device=cuda:1"])

    def test_a_budget_with_error_propagation_is_refused_with_the_reason(self, base):
        message = mistake(base, "--quantize.propagate_error=true", "--quantize.low_rank={ budget_bits = 5 }")
        assert (
            "low_rank.budget_bits: not supported with propagate_error = true: ranks are allocated from errors"
            in message
        )

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"finetune.parts": "['rht_signs']"}, ['finetune.parts: requires quantize.transforms = ["hadamard"]']),
            ({"finetune.parts": "[]"}, ["finetune.parts"]),
            (
                {"finetune.parts": "['scales']", "quantize.low_rank.format": "x8"},
                ["finetune.parts: requires a number format whose scales are floating-point numbers", "found 'scales'"],
            ),
            ({"finetune.parts": "['scals']"}, ["finetune.parts.0: not allowed", "did you mean 'scales'?"]),
            (
                {"finetune.parts": "['low_rank']", "quantize.low_rank.rank": "0"},
                ["there are no factors to train: quantize.low_rank.rank is 0"],
            ),
            (
                {"finetune": "{ parts = ['low_rank'], columns = 8 }"},
                ['finetune.columns: must be whole blocks of "x8"', "8 is not a multiple of block_size 16", "found 8"],
            ),
            (
                {
                    "finetune": "{ parts = ['low_rank'], columns = 8 }",
                    "quantize.low_rank": "{ rank = 32, format = 'none' }",
                    "quantize.override": "[{ match = '*q_proj', weight = 'w4' },"
                    " { match = '*down_proj', low_rank = { format = 'x8' } }]",
                },
                ['finetune.columns: must be whole blocks of "x8"', "(quantize.override.1)", "found 8"],
            ),
            (
                {
                    "finetune": "{ parts = ['low_rank'], columns = 8 }",
                    "quantize.low_rank": "{ rank = 0, budget_bits = 5, format = 'x8' }",
                },
                ['finetune.columns: must be whole blocks of "x8"', "found 8"],
            ),
            (
                {"finetune.parts": "['low_rank']", "evaluation.backend": "triton"},
                ['evaluation.backend must not be "triton"'],
            ),
        ],
    )
    def test_what_cannot_be_trained_is_refused_with_the_reason(self, base, settings, parts):
        message = mistake(base, *(f"--{key}={value}" for key, value in settings.items()))
        for part in parts:
            assert part in message

    @pytest.mark.parametrize("low_rank", ["{ rank = 8 }", "{ axis = 'outer', format_b = 'x8' }", "{ format = 'none' }"])
    def test_an_override_under_which_nothing_is_cut_along_the_rank_is_accepted(self, base, low_rank):
        settings = [
            "--finetune={ parts = ['low_rank'], columns = 8 }",
            "--quantize.low_rank={ rank = 32, format = 'none' }",
        ]
        override = f"--quantize.override=[{{ match = '*', low_rank = {low_rank} }}]"
        (found,) = read_config(base, None, [*settings, override]).quantize.override
        assert found.low_rank is not None

    def test_a_format_that_its_rounding_objects_to_is_refused(self, base, monkeypatch):
        unsupported_reason = lambda self, number_format: "must be mxfp4" if number_format.bits == 4 else None  # noqa: E731
        monkeypatch.setattr("lqer.rounding.Nearest.unsupported_reason", unsupported_reason)
        assert 'quantize.rounding: must be mxfp4 (weights are "w4")' in mistake(base)
        other = "--quantize.override=[{ match = '*', weight = 'w4' }]"
        assert 'quantize.override.0.weight: must be mxfp4 (weights are "w4")' in mistake(
            base, "--quantize.weight=x8", other
        )

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["transforms=['clip', 'awq']"],
                'quantize.transforms: "awq" must come before "clip", which fixes the scales of the current weights',
            ),
            (["transforms=['clip', 'lwc']"], '"clip" and "lwc" both fix the quantization scales: use one of them'),
            (["transforms=['awq', 'quarot']"], '"quarot" (model) must come before "awq" (block)'),
            (
                ["transforms=['awq', 'hadamard']"],
                '"awq" cannot be combined with "hadamard": it prepares weights that are not rotated',
            ),
            (
                ["transforms=['hadamard']", "rounding=adaptive"],
                'transforms.0: cannot be combined with rounding "adaptive", which does not support rotated linears',
            ),
            (
                ["transforms=['awq', 'clip']", "rounding=gptq"],
                'transforms.1: cannot be combined with rounding "gptq", which fits its own scales; use one of adap',
            ),
            (["transforms=['lwc']", "weight=w4"], "transforms.0: only weights of kind int can be clipped"),
            (
                ["transforms=['awq']", "propagate_error=false"],
                "propagate_error: must be true (or unset): awq calibrates on",
            ),
            (
                ["rounding=adaptive", "method=svdquant", "low_rank.rank=4"],
                "needs a method that rounds W itself",
            ),
            (
                ["rounding=adaptive", "method=qera-exact", "low_rank={ rank = 0, budget_bits = 6.0 }"],
                "budget_bits: not supported with propagate_error = true",
            ),
            (
                ["override=[{ match = '*', rounding = 'adaptive' }]"],
                "override.0.rounding: must be unset: one rounding rounds all linears of a block together",
            ),
            (["rounding=adaptive", "weight=fp4"], "rounding: adaptive rounding needs weights of kind int or mxint"),
            (["rounding={ kind = 'adaptive', steps = 0 }"], "steps 0 is not an integer of at least 1 (adaptive)"),
            (["rounding={ kind = 'adaptive', soft_fractions = [0.5, 0.5] }"], "do not fall strictly between 1 and 0"),
            (
                ["rounding={ kind = 'adaptive', learning_rate = '1' }"],
                "learning_rate: must be a valid number; found '1'",
            ),
            (["rounding=adaptive", "asymmetric=0.5"], 'asymmetric: must be 0 with "adaptive", which rounds weights'),
            (
                ["transforms=['clip']", "override=[{ match = '*', asymmetric = 0.5 }]"],
                'override.0.asymmetric: must be 0 with "clip", which rounds weights to outputs',
            ),
            (["asymmetric=1.5"], "asymmetric: must be"),
            (["order=sequential", "propagate_error=false"], 'in the order "sequential" linears see inputs from'),
            (["asymmetric=0.5", "propagate_error=false"], "asymmetric compares the quantized model's inputs with"),
            (["transforms=[{ kind = 'awq', ratios = true }]"], "ratios: must be a valid integer; found True"),
            (["transforms=[{ kind = 'clip', steps = 21 }]"], "steps 21 is not in 1..20 (clip)"),
        ],
    )
    def test_parts_of_a_block_that_do_not_go_together_are_refused(self, base, overrides, message):
        start = ["method=none", "low_rank.rank=0", "weight=i4"]
        formats = ["--formats.i4={ kind = 'int', bits = 4 }", "--formats.fp4={ kind = 'mx', element = 'mxfp4_e2m1' }"]
        arguments = [*formats, *(f"--quantize.{override}" for override in [*start, *overrides])]
        assert message in mistake(base, *arguments)

    def test_parts_of_a_block_go_with_each_other_and_ask_for_error_propagation(self, base):
        def quantize(*overrides):
            arguments = ["--formats.i4={ kind = 'int', bits = 4 }", "--quantize.weight=i4"]
            return read_config(base, None, [*arguments, *(f"--quantize.{override}" for override in overrides)]).quantize

        assert not quantize("method=none", "low_rank.rank=0").propagates_error
        for parts in (
            ["transforms=['quarot', 'awq', 'clip']", "rounding={ kind = 'adaptive', soft_fractions = [0.5, 0.1] }"],
            ["transforms=['awq', { kind = 'lwc', epochs = 5, both_targets = true }]"],
            ["transforms=['awq']", "rounding=gptq"],
            ["order=sequential"],
            ["rounding=adaptive", "method=qera-exact", "low_rank.rank=8"],
        ):
            assert quantize(*parts).propagates_error
        assert not quantize("transforms=['quarot']", "rounding=nearest").propagates_error

    def test_statistics_of_pairs_of_inputs_ask_for_error_propagation(self, base, monkeypatch):
        monkeypatch.setattr(Ldlq, "statistics", frozenset({Hessian(), InputDifference()}))
        ldlq = "--quantize.rounding=ldlq"
        assert read_config(base, None, [ldlq]).quantize.propagates_error
        message = mistake(base, ldlq, "--quantize.propagate_error=false")
        rule = "input-difference compares the quantized model's inputs with the original model's"
        assert f"quantize.propagate_error: must be true (or unset): {rule}; found False" in message

    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["widths=['w4', 'x8']"], ["quantize.widths: must be unset without quantize.budget_bits"]),
            (["tie_widths=true"], ["quantize.tie_widths: must be unset without quantize.budget_bits"]),
            (
                ["widths_text=unseen"],
                ["quantize.widths_text: must be unset without quantize.budget_bits", "found 'unseen'"],
            ),
            (
                ["low_rank.optional=true"],
                ["quantize.low_rank.optional: must be false without quantize.budget_bits, which decides between ranks"],
            ),
            (
                ["budget_bits=5", "widths=['w4', 'x8']", "method=loftq", "low_rank={ rank = 8, optional = true }"],
                ['quantize.low_rank.optional: must be false with method "loftq", whose A and B are not fitted'],
            ),
            (["budget_bits=5"], ["quantize.budget_bits: requires two or more formats to choose from"]),
            (["budget_bits=5", "widths=['w4', 'w4']"], ["quantize.budget_bits: requires two or more formats"]),
            (["budget_bits=5", "widths=['w4', 'x9']"], ["quantize.widths.1: no such number format", "allowed: w4, x8"]),
            (["budget_bits=5", "widths=['w4', 'none']"], ["quantize.widths.1: no such number format"]),
            (
                ["budget_bits=5", "widths=['w4', 'x8']", "low_rank={ budget_bits = 5 }"],
                ["low_rank.budget_bits: must be unset with quantize.budget_bits"],
            ),
        ],
    )
    def test_widths_without_a_budget_and_a_budget_without_widths_are_refused(self, base, overrides, parts):
        message = mistake(base, *(f"--quantize.{override}" for override in overrides))
        for part in parts:
            assert part in message

    def test_a_format_of_the_widths_that_its_rounding_objects_to_is_refused(self, base):
        message = mistake(
            base, "--quantize.method=none", "--quantize.low_rank.rank=0", "--quantize.rounding=gptq",
            "--formats.half={ kind = 'passthrough', dtype = 'float16' }", "--quantize.budget_bits=5",
            "--quantize.widths=['w4', 'half']",
        )  # fmt: skip
        assert 'half-precision weights have no rounding error to compensate (weights are "half")' in message

    def test_statistics_of_rounded_inputs_need_a_format_to_round_them_to(self, base):
        rounded = ["--calibration.round_inputs=true", "--quantize.activation=x8"]
        assert read_config(base, None, rounded).calibration.round_inputs
        one = ["--quantize.activation=none", '--quantize.override=[{ match = "*.down_proj", activation = "x8" }]']
        assert read_config(base, None, [rounded[0], *one]).calibration.round_inputs
        message = mistake(base, rounded[0], "--quantize.activation=none")
        assert 'calibration.round_inputs: must be false while quantize.activation is "none": no input' in message

    def test_statistics_that_are_unknown_in_the_new_basis_are_named(self, base):
        message = mistake(base, "--quantize.method=svdquant", "--quantize.transforms=['hadamard']")
        assert "max_abs of rotated inputs does not follow" in message
        assert '(method "svdquant", weights "w4")' in message

    def test_the_file_that_set_the_value_is_named(self, tmp_path, base):
        child = tmp_path / "child.toml"
        child.write_text('extends = "base.toml"\nseed = "x"\n')
        assert mistake(child).startswith(f"{child}: seed: ")
        base.write_text(base.read_text().replace("rank = 32", 'rank = "32"'))
        child.write_text('extends = "base.toml"\n')
        assert mistake(child).startswith(f"{base}: quantize.low_rank.rank: ")

    def test_a_missing_key_is_missing_from_the_file_not_from_what_was_set_beside_it(self, tmp_path):
        path = tmp_path / "empty.toml"
        path.write_text("")
        assert mistake(path) in (f"{path}: model: is missing", f"{path}: quantize: is missing")
        with pytest.raises(ConfigError, match=f"^{path}: "):
            read_config(path, "tag", ["--seed=1"])


@pytest.mark.parametrize(
    "key", ["quantize.activation", "quantize.attention", "quantize.bias", "quantize.low_rank.format"]
)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("codebook", "codebooks are learned from weights"), ("trellis", "its codes are searched for tiles of a weight")],
)
def test_a_codebook_and_a_trellis_are_formats_of_weights_alone(key, kind, reason):
    override = f"--formats.vq={{ kind = '{kind}', bits = 2 }}"
    with pytest.raises(ConfigError, match=rf"must not be a {kind}: {reason}; found 'vq'"):
        read_config(Path(__file__).parents[2] / "configs/demo.toml", None, [override, f"--{key}=vq"])
