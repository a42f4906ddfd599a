"""Hostile configurations and command lines by name, and which answer is right where only one is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from server import ROOT

# (configuration, folder) -> command line
Document = Callable[[dict[str, Any], Path], list[str]]
DEVICES = ["mps", "xpu", "meta", "mkldnn", "cuda", "cuda:99", "cpu:1", "vulkan", "hpu", "privateuseone", "cpu", "CPU"]
SEEDS = [2**64, 2**63, -1, -(10**20), 2**64 - 1]
OUTPUTS = ["/proc/x", "/dev/null", "/dev/null/x", "a\x00b", "/sys", "/etc/passwd", "~", "", "x" * 300, "/proc/self/mem"]
TAGS = ["a\nb", "a\x00b", "..", "", "é", "x" * 300, " ", "store", "-x", "a/b", "\u202e"]


def set_at(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


def write(values: dict[str, Any], here: Path) -> list[str]:
    (here / "case.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    return [str(here / "case.toml")]


def _text(text: str) -> Document:
    """The configuration with a line before it."""

    def make(base: dict[str, Any], here: Path) -> list[str]:
        (here / "case.toml").write_text(text + "\n" + tomli_w.dumps(base), encoding="utf-8")
        return [str(here / "case.toml")]

    return make


def _with(**values: Any) -> Document:
    """The configuration with other values at dotted keys, written with "__" for the dot."""

    def make(base: dict[str, Any], here: Path) -> list[str]:
        changed = json.loads(json.dumps(base))
        for key, value in values.items():
            set_at(changed, key.split("__"), value)
        return write(changed, here)

    return make


def _link_circle(base: dict[str, Any], here: Path) -> list[str]:
    (here / "a.toml").symlink_to(here / "b.toml")
    (here / "b.toml").symlink_to(here / "a.toml")
    return [str(here / "a.toml")]


def _chain(base: dict[str, Any], here: Path) -> list[str]:
    for link in range(1100):
        (here / f"{link}.toml").write_text(f'extends = "{link + 1}.toml"\n', encoding="utf-8")
    (here / "1100.toml").write_text(tomli_w.dumps(base), encoding="utf-8")
    return [str(here / "0.toml")]


def _diamonds(base: dict[str, Any], here: Path) -> list[str]:
    for level in range(25):
        parents = f'["{level + 1}.toml", "{level + 1}.toml"]'
        (here / f"{level}.toml").write_text(f"extends = {parents}\n", encoding="utf-8")
    (here / "25.toml").write_text(tomli_w.dumps(base), encoding="utf-8")
    return [str(here / "0.toml")]


def _pipe(base: dict[str, Any], here: Path) -> list[str]:
    os.mkfifo(here / "case.toml")
    return [str(here / "case.toml")]


def _unreadable(base: dict[str, Any], here: Path) -> list[str]:
    arguments = write(base, here)
    (here / "case.toml").chmod(0)
    return arguments


def _is_a_folder(base: dict[str, Any], here: Path) -> list[str]:
    (here / "case.toml").mkdir()
    return [str(here / "case.toml")]


def _file_as_output(base: dict[str, Any], here: Path) -> list[str]:
    (here / "output").write_text("mine", encoding="utf-8")
    return _with(output_dir=str(here / "output"))(base, here)


DOCUMENTS: dict[str, Document] = {
    "arrays nested 500 deep": _text(f"x = {'[' * 500}{']' * 500}"),
    "arrays nested 100000 deep": _text(f"x = {'[' * 100_000}{']' * 100_000}"),
    "tables nested 500 deep": _text(f"x = {'{a=' * 500}1{'}' * 500}"),
    "a key of 1200 parts": _text(f"{'.'.join(['a'] * 1200)} = 1"),
    "a table of 1200 parts": _text(f"[{'.'.join(['a'] * 1200)}]\nb = 1\n[c]"),
    "an integer of 5000 digits": _text(f"seed = {'9' * 5000}"),
    "a float of 5000 digits": _text(f"x = 0.{'9' * 5000}e9999"),
    "NUL in extends": _text('extends = "a\\u0000b.toml"'),
    "300 letters in extends": _text(f'extends = "{"x" * 300}.toml"'),
    "5000 letters in extends": _text(f'extends = "{"x" * 5000}.toml"'),
    "extends of itself": _text('extends = "case.toml"'),
    "extends a folder": _text('extends = "."'),
    "extends a table": _text("extends = { a = 1 }"),
    "extends /proc/self/mem": _text('extends = "/proc/self/mem"'),
    "extends /dev/zero": _text('extends = "/dev/zero"'),
    "extends the terminal": _text('extends = "/dev/tty"'),
    "a circle of links": _link_circle,
    "a chain of 1100 files": _chain,
    "diamonds of 25 levels": _diamonds,
    "a pipe": _pipe,
    "a file that may not be read": _unreadable,
    "a folder": _is_a_folder,
    "a key with a line break": _text('"wie\\nght" = 1'),
    "a key with an escape sequence": _text('"\\u001b[31mred" = 1'),
    "a date": _text("seed = 2026-01-01"),
    "a byte-order mark": _text("\ufeff"),
    **{f"a kind that is {json.dumps(kind)}": _with(quantize__rounding={"kind": kind}) for kind in ([], {}, 1, "")},
    **{f"a transform's kind {json.dumps(kind)}": _with(quantize__transforms=[{"kind": kind}]) for kind in ([], {}, 1)},
    **{f"a format's kind {json.dumps(kind)}": _with(formats__w4={"kind": kind}) for kind in ([], {}, 1, "")},
    **{f"a budget of {bits}": _with(quantize__low_rank={"budget_bits": bits}, quantize__method="qera-exact")
       for bits in (float("inf"), float("nan"), 1e308, 1e-320)},
    **{f"device {name}": _with(device=name) for name in DEVICES},
    **{f"seed {seed}": _with(seed=seed) for seed in SEEDS if abs(seed) < 2**63},
    **{f"output {name[:20]!r}": _with(output_dir=name) for name in OUTPUTS},
    **{f"tag {name[:20]!r}": _with(tag=name) for name in TAGS},
    "a file as output": _file_as_output,
    "a learning rate of infinity": _with(finetune__learning_rate=float("inf"), finetune__parts=["low_rank"]),
    "1e9 error tokens": _with(calibration__error_tokens=10**9),
    "batches of 1e9": _with(calibration__batch_size=10**9, evaluation__perplexity__batch_size=10**9),
    "the whole experiment": _with(),
    "a text that is not there": _with(evaluation__perplexity__datasets=["/nowhere.txt"]),
    "a misspelt text": _with(evaluation__perplexity__datasets=["wikitext3"]),
    "a misspelt fine-tuning text": _with(finetune__dataset="wikitext3", finetune__parts=["low_rank"]),
    "no task of this name": _with(evaluation__downstream={"tasks": ["no-such-task"]}),
    "windows of one token": _with(evaluation__perplexity__seq_len=1),
    "windows beyond the positions": _with(calibration__seq_len=2**20),
    "max_memory of nothing": _with(calibration__max_memory="0"),
    "a model that is a pipe": _with(model="/dev/stdin"),
    "a model with NUL": _with(model="a\x00b"),
    "a model with a line break": _with(model="/a\nb"),
}  # fmt: skip


# Of these one answer alone is right: the others may be valid or not, as the rules have it.
MUST_BE_VALID = {"device cpu", "1e9 error tokens", "batches of 1e9", "the whole experiment", "tag 'é'"}
MAY_BE_VALID = {
    "a byte-order mark", "windows beyond the positions", "extends the terminal", "tag ' '", "tag '-x'", "tag '\\u202e'",
    "output '~'", "output ''", "device cpu:1", "device CPU", "device cuda", "seed -1", "--seed=-1", "a date",
    "--seed=18446744073709551615", "--seed=9223372036854775808", "max_memory of nothing",
    # Whoever is root may read it.
    "a file that may not be read",
    # Each file counts once.
    "diamonds of 25 levels",
    "a budget of 1e+308", "a budget of inf", "a key with an escape sequence",
}  # fmt: skip


def _command(*more: str) -> Document:
    return lambda base, here: [*write(base, here), *more]


COMMANDS: dict[str, Document] = {
    **{f"--seed={seed}": _command(f"--seed={seed}") for seed in SEEDS},
    "5000 digits": _command(f"--seed={'9' * 5000}"),
    "1200 parts": _command(f"--{'.'.join(['a'] * 1200)}=1"),
    "500 deep": _command(f"--x={'[' * 500}{']' * 500}"),
    "an override with a line break": _command("--quantize.weight=a\nb"),
    "a key with a line break": _command("--quantize.wei\nght=w4"),
    "a tag with a line break": _command("a\nb"),
    "a tag that is a path": _command("../x"),
    "a tag of 5000 letters": _command("x" * 5000),
    "not Unicode": _command("--quantize.weight=\udcff"),
    "not Unicode as a tag": _command("\udcff"),
    "an override of a value's inside": _command("--seed.x=1"),
    "an empty override": _command("--=1"),
    "only dashes": _command("--"),
    "chunk 0/0": _command("--chunk", "0/0"),
    "chunk 2/1": _command("--chunk=2/1"),
    "chunk of 5000 digits": _command(f"--chunk={'9' * 5000}/{'9' * 5000}"),
    "chunk twice": _command("--chunk=1/2", "--chunk=1/2"),
    "a file that is not there": lambda base, here: [str(here / "nowhere.toml")],
    "a path of 5000 letters": lambda base, here: ["x" * 5000],
    "the shipped demo": lambda base, here: [str(ROOT / "configs/demo.toml"), "--seed=x"],
}
