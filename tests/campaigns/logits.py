"""Loads a quantized checkpoint as its users do and prints a hash of its logits.

    python tests/campaigns/logits.py FOLDER

Exit status 2 and one line if the package refuses the folder.
"""

from __future__ import annotations

import hashlib
import sys

import torch

import lqer
from lqer.errors import LqerError

if __name__ == "__main__":
    try:
        model = lqer.load_quantized(sys.argv[1], device="cpu")
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.arange(1, 33).view(2, 16)).logits
    print(hashlib.sha256(logits_BTV.numpy().tobytes()).hexdigest())
