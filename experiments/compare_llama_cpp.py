"""Perplexity of a GGUF file in llama.cpp, on the windows, tokens and positions that `lqer export --text` compares on.

    python experiments/compare_llama_cpp.py FILE.gguf CHECKPOINT --text FILE [--seq-len 256] [--windows 20]
        [--round-inputs]

llama.cpp gets the token ids of the checkpoint's tokenizer, without a BOS token; each window is a sequence of its own,
and the mean is taken over all its tokens but the first. (`llama-perplexity` scores the second half of each window
only.) Prints both perplexities, and the largest difference of a logit over 4 windows. With --round-inputs the
checkpoint's linears round their inputs to 8-bit integers in blocks of 32, as llama.cpp's kernels of quantized matrices
do.

cyllama is not a requirement of this project: `pip install cyllama==0.2.18` brings a llama.cpp that runs on a CPU.

Shapes: W windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from lqer.checkpoint.load import load_quantized
from lqer.evaluation.perplexity import concat_windows
from lqer.export.verify import WINDOW_TOKENS, WINDOWS_OF_LOGITS, WINDOWS_OF_PERPLEXITY
from lqer.formats import Int, NumberFormat
from lqer.nn.linear import QuantizedLinear

# Of llama.cpp's enum llama_flash_attn_type.
WITHOUT_FLASH_ATTENTION = 0
Q8_0 = Int(bits=8, block_size=32, symmetric=True, scale_dtype="float16")


def llama_cpp_logits(file: Path, windows_WT: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """The logits (T, V), float32, of every window. Attention is in float32; llama.cpp's defaults use float16."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        # What a context asks of its model and the library's own class does not tell.
        n_vocab = vocabulary

    llama_cpp.disable_logging()
    tokens = windows_WT.shape[1]
    parameters = llama_cpp.LlamaContextParams()
    parameters.type_k = parameters.type_v = int(gguf.GGMLQuantizationType.F32)
    parameters.flash_attn_type = WITHOUT_FLASH_ATTENTION
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    model = Model(path_model=str(file), params=llama_cpp.LlamaModelParams())
    context = llama_cpp.LlamaContext(model=model, params=parameters)
    for window_T in windows_WT:
        batch = llama_cpp.LlamaBatch(n_tokens=tokens, embd=0, n_seq_max=1)
        batch.set_batch(window_T.tolist(), 0, True)
        context.decode(batch)
        rows = [np.array(context.get_logits_ith(index), dtype=np.float32) for index in range(tokens)]
        context.kv_cache_clear()
        yield torch.from_numpy(np.stack(rows))


def token_losses(logits_TV: Tensor, window_T: Tensor) -> Tensor:
    """Nats for each token after the first, float64."""
    return cross_entropy(logits_TV[:-1], window_T[1:], reduction="none").double()


@torch.inference_mode()
def compare(file: Path, checkpoint: Path, windows_WT: Tensor, inputs: NumberFormat | None = None) -> dict[str, float]:
    """Perplexity of both, and how far logits lie apart. inputs: what the checkpoint's linears round theirs to."""
    model = load_quantized(checkpoint, torch.device("cpu"), torch.float32, "emulate")
    for module in model.modules():
        if inputs is not None and isinstance(module, QuantizedLinear):
            module.activation = inputs
    ours, theirs, difference = [], [], 0.0
    found = llama_cpp_logits(file, windows_WT, model.config.vocab_size)
    for index, (window_T, found_TV) in enumerate(zip(windows_WT, found, strict=True)):
        logits_TV = model(window_T[None]).logits[0]
        ours.append(token_losses(logits_TV, window_T))
        theirs.append(token_losses(found_TV, window_T))
        if index < WINDOWS_OF_LOGITS:
            difference = max(difference, float((logits_TV - found_TV).abs().max()))
    perplexity, of_file = (float(torch.cat(losses).mean().exp()) for losses in (ours, theirs))
    return {"checkpoint": perplexity, "llama.cpp": of_file, "logit difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=WINDOW_TOKENS)
    parser.add_argument("--windows", type=int, default=WINDOWS_OF_PERPLEXITY)
    parser.add_argument("--round-inputs", action="store_true")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    windows_WT = concat_windows(tokenizer, [text], "", arguments.seq_len)[: arguments.windows]
    found = compare(arguments.file, arguments.checkpoint, windows_WT, Q8_0 if arguments.round_inputs else None)
    of_file, ours = found["llama.cpp"], found["checkpoint"]
    print(f"{len(windows_WT)} windows of {arguments.seq_len} tokens of {arguments.text.name}")
    print(f"perplexity: llama.cpp {of_file:.6g}, checkpoint {ours:.6g} ({of_file / ours - 1:+.4%})")
    print(f"largest difference of a logit: {found['logit difference']:.3g}")


if __name__ == "__main__":
    main()
