"""Which architectures of the installed transformers are supported, and what each leaves in its original precision.

    python tests/campaigns/support.py                         everything; prints the table
    python tests/campaigns/support.py --write docs/models.md  also replaces the table between the markers there
    python tests/campaigns/support.py --kinds jamba gemma3    some, by model_type
    python tests/campaigns/support.py --found FILE.jsonl      resumes: what FILE has is not measured again

Every architecture, tiny and random, in a process of its own: it is quantized whole by a run (lqer-act, rank 4),
loaded, and generates with and without a cache; its logits and its tokens are those of plain transformers with the
dequantized weights. What fails is named with its reason. The share of weights that stay as they are is that of the
architecture in the size its configuration has by default, embeddings, head, towers and their projections aside.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import CannotBeBuiltError, build, causal_kinds, wrapper_kinds
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from workbench import ROOT, write_texts

import lqer
from lqer.errors import LqerError, ModelError
from lqer.export.dense import Dense
from lqer.export.run import export
from lqer.models.auto import auto_class
from lqer.models.structure import block_linears, largest_blocks, prepare_model
from lqer.models.wrappers import beside_the_language_model

LONGEST_S, LONGEST_SHARE_S = 300, 120
NEW_TOKENS = 4
# Of logits, relative to the largest: dequantized weights are multiplied in another order than W_q and A·B.
TOLERANCE = 1e-4
QUANTIZED, REFUSED, UNBUILT, FAILED = "quantized", "refused", "cannot be built small", "FAILED"
TABLE = re.compile(r"(<!-- architectures -->\n).*?(<!-- end of architectures -->)", re.DOTALL)
LONGEST_REASON = 160


def try_one(kind: str, wrapper: bool, folder: Path) -> tuple[str, str]:
    """The outcome for one architecture, and the reason where it is not QUANTIZED."""
    try:
        build(folder / "model", kind, wrapper=wrapper)
    except CannotBeBuiltError as reason:
        return UNBUILT, str(reason)
    try:
        return _quantized_truly(folder)
    except LqerError as error:
        return REFUSED, str(error)
    except Exception as error:  # whatever it is, it belongs in the table
        return FAILED, f"{type(error).__name__}: {error}"


def _quantized_truly(folder: Path) -> tuple[str, str]:
    write_texts(folder)
    results = lqer.quantize(
        folder / "model",
        f"{ROOT}/configs/formats/mxint.toml",
        tag="run",
        quantize={"method": "lqer-act", "weight": "w4", "low_rank": {"rank": 4, "format": "x8"}},
        calibration={
            "dataset": str(folder / "calibration.txt"), "num_samples": 2, "seq_len": 32, "error_tokens": 32,
        },
        output_dir=str(folder), device="cpu",
    )  # fmt: skip
    checkpoint = folder / "run" / "checkpoint"
    model = lqer.load_quantized(checkpoint, device="cpu")
    ids_BT = torch.arange(1, 33).view(2, 16)
    export(checkpoint, Dense(), folder / "dense", check=False)
    auto = auto_class(AutoConfig.from_pretrained(folder / "dense"))
    plain = auto.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        logits_BTV, plain_BTV = (one(input_ids=ids_BT, use_cache=False).logits for one in (model, plain))
    difference = float((logits_BTV - plain_BTV).abs().max() / plain_BTV.abs().max())
    if not difference < TOLERANCE:
        return FAILED, f"logits differ from those of the dequantized weights by {difference:.1e} of the largest"
    for cached in (False, True):
        if not torch.equal(_generated(model, ids_BT, cached), _generated(plain, ids_BT, cached)):
            return FAILED, f"generates other tokens than the dequantized weights, use_cache={cached}"
    return QUANTIZED, str(results["layers"]["count"])


def _generated(model: PreTrainedModel, ids_BT: Tensor, cached: bool) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": cached, "eos_token_id": None}
    return model.generate(ids_BT, **options)


def share_left(kind: str, wrapper: bool) -> float:
    """The share of weights of the language model, embeddings and head aside, that are not in the blocks' linears."""
    auto = AutoModelForMultimodalLM if wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(AutoConfig.for_model(kind))
    prepare_model(model)
    beside = beside_the_language_model(model)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    aside = filter(None, (*tables, model.get_output_embeddings()))
    own = {id(parameter) for part in aside for parameter in part.parameters()}
    counted = {
        id(parameter): parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(beside) and id(parameter) not in own
    }
    _, blocks = largest_blocks(model)
    linears = {id(one.weight): one.weight.numel() for block in blocks for one in block_linears(block).values()}
    return 1 - sum(linears.values()) / max(sum(counted.values()), 1)


def in_own_process(seconds: int, work: Callable[[], Any]) -> Any:
    """What `work` returns, computed in a fork of this process; None where it ends without, or takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)  # whatever happened: or else the copy would go on with the work of this process
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found) if found else None


def measure(kind: str, wrapper: bool) -> tuple[str, str, float | None]:
    """Outcome, reason or number of linears, and share left, of one architecture."""

    def share() -> float | None:
        try:
            return share_left(kind, wrapper)
        except (ModelError, ImportError, ValueError, TypeError, AttributeError, RuntimeError, KeyError):
            return None  # its default size cannot be built

    folder = Path(tempfile.mkdtemp(prefix="support-"))
    try:
        outcome = in_own_process(LONGEST_S, lambda: try_one(kind, wrapper, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status, reason = outcome or (FAILED, f"no answer within {LONGEST_S} s")
    reason = reason.replace(f"{folder}/model", kind)
    return status, reason, None if status == UNBUILT else in_own_process(LONGEST_SHARE_S, share)


Rows = dict[tuple[str, bool], tuple[str, str, "float | None"]]


def read_rows(file: Path | None) -> Rows:
    """What an earlier call found with this version of transformers, but for what failed, which is tried again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
    found = [json.loads(line) for line in lines]
    return {
        (one["kind"], one["wrapper"]): (one["outcome"], one["reason"], one["left"])
        for one in found
        if one["transformers"] == transformers.__version__ and one["outcome"] != FAILED
    }


def append_row(file: Path, key: tuple[str, bool], row: tuple[str, str, float | None]) -> None:
    names = ("transformers", "kind", "wrapper", "outcome", "reason", "left")
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(dict(zip(names, (transformers.__version__, *key, *row), strict=True))) + "\n")


def table(rows: Rows) -> str:
    """Markdown: counts, then the refused with their reasons, those that cannot be built small, and the quantized."""
    text = ["| | quantized | refused | cannot be built small | all |", "|---|---|---|---|---|"]
    for wrapper, name in ((False, "causal language models"), (True, "with other inputs")):
        found = [row[0] for key, row in rows.items() if key[1] == wrapper]
        counts = [
            sum(outcome in wanted for outcome in found) for wanted in ((QUANTIZED,), (REFUSED, FAILED), (UNBUILT,))
        ]
        text.append(f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} | {len(found)} |")
    text += ["", "| refused | weights left | why |", "|---|---|---|"]
    text += [f"| {_name(key)} | {_percent(row[2])} | {_line(row[1])} |" for key, row in _those(rows, REFUSED, FAILED)]
    text += ["", "| quantized | weights left |", "|---|---|"]
    shares: dict[str, list[str]] = {}
    for key, row in _those(rows, QUANTIZED):
        shares.setdefault(_percent(row[2]), []).append(_name(key))
    text += [f"| {', '.join(names)} | {share} |" for share, names in sorted(shares.items(), key=_by_share)]
    text += ["", "| cannot be built small | why |", "|---|---|"]
    text += [f"| {_name(key)} | {_line(row[1])} |" for key, row in _those(rows, UNBUILT)]
    return "\n".join(text) + "\n"


def _those(rows: Rows, *outcomes: str) -> list[tuple[tuple[str, bool], tuple[str, str, float | None]]]:
    return sorted((key, row) for key, row in rows.items() if row[0] in outcomes)


def _name(key: tuple[str, bool]) -> str:
    return f"`{key[0]}`" + (" with its towers" if key[1] else "")


def _percent(share: float | None) -> str:
    return "not known" if share is None else "below 1%" if share < 0.01 else f"{share:.0%}"


def _by_share(item: tuple[str, list[str]]) -> float:
    return float(number.group()) if (number := re.search(r"\d+", item[0])) else 101


def _line(reason: str) -> str:
    line = reason.strip().splitlines()[0].replace("|", "/") if reason.strip() else "no message"
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the markers of the table")
    parser.add_argument("--kinds", nargs="*", help="only these, by model_type")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--found", type=Path, help="a file of one line per architecture, read and continued")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    keys = [(kind, False) for kind in causal_kinds()] + [(kind, True) for kind in wrapper_kinds()]
    wanted = [key for key in keys if given.kinds is None or key[0] in given.kinds]
    rows = {key: row for key, row in read_rows(given.found).items() if key in wanted}
    with ProcessPoolExecutor(given.jobs) as pool:
        pending = {pool.submit(measure, *key): key for key in wanted if key not in rows}
        for done in as_completed(pending):
            rows[key := pending[done]] = done.result()
            print(_name(key), *rows[key], sep="\t", file=sys.stderr, flush=True)
            if given.found is not None:
                append_row(given.found, key, rows[key])
    text = table(rows)
    print(text)
    if given.write is not None:
        page = given.write.read_text(encoding="utf-8")
        given.write.write_text(TABLE.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")
    sys.exit(1 if any(row[0] == FAILED for row in rows.values()) else 0)


if __name__ == "__main__":
    main()
