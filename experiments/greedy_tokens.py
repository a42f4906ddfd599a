"""Print the ids of greedy tokens: where a checkpoint and its export run alike they print the same.

    python experiments/greedy_tokens.py FOLDER [PROMPT]

FOLDER holds a run or a checkpoint, which `lqer.load_quantized` loads, or else any model that transformers does. In the
second case nothing of lqer is imported, so that the script runs where only the export's own libraries are installed:

    diff <(python experiments/greedy_tokens.py checkpoints/TAG) <(FRESH/bin/python experiments/greedy_tokens.py OUT)

Both run in float32 on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "Once upon a time, there was"
TOKENS = 64


def load(folder: Path) -> Any:
    if not (folder / "lqer.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    import lqer

    return lqer.load_quantized(folder, "cpu", torch.float32)


def greedy_ids(folder: Path, prompt: str) -> list[int]:
    """The ids of `TOKENS` new tokens; none ends the text early."""
    ids_BT = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
    made_BT = load(folder).generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    return made_BT[0, ids_BT.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    arguments = parser.parse_args()
    run = arguments.folder / "checkpoint"
    print(*greedy_ids(run if (run / "lqer.json").exists() else arguments.folder, arguments.prompt), sep="\n")


if __name__ == "__main__":
    main()
