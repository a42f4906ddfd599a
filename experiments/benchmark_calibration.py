"""What gathering statistics costs: a walk through the decoder blocks with calibration's hooks against one without.

    python experiments/benchmark_calibration.py [MODEL] [--windows 8] [--seq-len 512] [--repeats 5] [--request NAME ...]

MODEL is anything that a config's `model` may be (default: demo:smollm2-135m). Walks alternate in one process; the
medians and their ratio are printed. --request adds statistics that are gathered only for methods that need them.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch

from lqer.errors import LqerError
from lqer.models.loaders import OpenedModel
from lqer.models.source import load_model, pick_device, resolve_model
from lqer.models.walker import walk_blocks
from lqer.report.environment import device_name
from lqer.stages.gather import CalibrationText, observe_block
from lqer.statistics import Hessian, MaxAbs
from lqer.store.offload import Offload

# Tokens kept per site, as calibration.error_tokens does by default.
SAMPLED = 256
REQUESTED = {statistic.kind: statistic for statistic in (Hessian(), MaxAbs())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--request", nargs="*", default=[], choices=REQUESTED)
    arguments = parser.parse_args()
    device = pick_device("auto")
    try:
        model = load_model(resolve_model(arguments.model), torch.float32, torch.device("cpu"))
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(0)
    windows_WT = torch.randint(model.config.vocab_size, (arguments.windows, arguments.seq_len), generator=generator)

    def seconds(hooked: bool) -> float:
        opened = OpenedModel.resident(model, device, Offload())
        text = CalibrationText(windows_WT, arguments.batch_size, SAMPLED)
        statistics = [REQUESTED[kind] for kind in arguments.request]
        total = 0.0
        for run in walk_blocks(opened, windows_WT, arguments.batch_size):
            started = time.perf_counter()
            if hooked:
                observe_block(run, None, text, statistics, run.hidden.store)
            else:
                run.forward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            total += time.perf_counter() - started
        return total

    seconds(hooked=True)
    pairs = [(seconds(hooked=False), seconds(hooked=True)) for _ in range(arguments.repeats)]
    plain, hooked = (median(times) for times in zip(*pairs, strict=True))
    ratio = median(with_hooks / without for without, with_hooks in pairs)
    tokens = windows_WT.numel()
    print(f"{arguments.model}, {tokens} tokens, {device_name(device)}, torch {torch.__version__}")
    print(f"plain walk {plain:.3f} s, with hooks {hooked:.3f} s; median of paired ratios {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
