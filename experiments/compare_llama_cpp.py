"""Perplexity of a GGUF file in llama.cpp, on the windows, tokens and positions that `lqer export --text` compares on.

    python experiments/compare_llama_cpp.py FILE.gguf CHECKPOINT --text FILE [--seq-len 256] [--windows 20]
        [--perturb N]

llama.cpp gets the token ids of the checkpoint's tokenizer, without a BOS token; each window is a sequence of its own,
and the mean is taken over all its tokens but the first. (`llama-perplexity` scores the second half of each window
only.) Prints the perplexities and the largest difference of a logit over 4 windows, first as the checkpoint computes,
then like with like: with the inputs of every matrix rounded as llama.cpp's kernels on a CPU round them.

    weights in Q4_0, Q5_0, Q8_0, MXFP4    x in blocks of 32 (Q8_0): d = max|x| / 127, code = round(x / d), half to even,
                                          value = code * d with d rounded to float16 after the codes were made
    weights in F16, BF16                  x in that dtype
    weights in F32                        x as it is

A sum in another order changes a code here and there, and what follows it in all later blocks, so like with like differs
too. With --perturb, N more runs of the checkpoint, whose embeddings differ by a factor of 1 + 1e-6 z, z normal, show by
how much.

cyllama is not a requirement of this project: `pip install cyllama==0.2.18` brings a llama.cpp that runs on a CPU.

Shapes: W windows, T tokens of a window, V vocabulary, G blocks of g = 32 values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from lqer.checkpoint.load import load_quantized
from lqer.evaluation.perplexity import concat_windows
from lqer.export.verify import WINDOW_TOKENS, WINDOWS_OF_LOGITS, WINDOWS_OF_PERPLEXITY
from lqer.formats.blocks import from_blocks, to_blocks
from lqer.nn.linear import QuantizedLinear

# Of llama.cpp's enum llama_flash_attn_type.
WITHOUT_FLASH_ATTENTION = 0
Q8_BLOCK, LARGEST_Q8_CODE = 32, 127
PERTURBATION = 1e-6
Types = gguf.GGMLQuantizationType
Rounding = Callable[[Tensor], Tensor]


def q8_0(x: Tensor) -> Tensor:
    """The values (..., L), float32, that llama.cpp rounds the input (..., L) of a quantized matrix to."""
    x_Gg = to_blocks(x.to(torch.float32), Q8_BLOCK)
    largest_G1 = x_Gg.abs().amax(-1, keepdim=True)
    codes_Gg = (x_Gg * (LARGEST_Q8_CODE / largest_G1.where(largest_G1 > 0, 1.0))).round()
    steps_G1 = (largest_G1 / LARGEST_Q8_CODE).to(torch.float16).to(torch.float32)
    return from_blocks(codes_Gg * steps_G1, x.shape[-1])


def through(dtype: torch.dtype) -> Rounding:
    """Rounding to a dtype and back."""
    return lambda x: x.to(dtype).to(x.dtype)


# What inputs of a matrix of each type are rounded to.
INPUTS: dict[gguf.GGMLQuantizationType, Rounding] = {
    Types.F32: through(torch.float32), Types.F16: through(torch.float16), Types.BF16: through(torch.bfloat16),
    Types.Q4_0: q8_0, Types.Q5_0: q8_0, Types.Q8_0: q8_0, Types.MXFP4: q8_0,
}  # fmt: skip


def roundings(file: Path) -> tuple[Rounding, Rounding]:
    """Of the inputs of the linears in the blocks, which must be the same for all, and of the output head."""
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) == 2}
    of_linears = {INPUTS[kind] for name, kind in types.items() if name.startswith("blk.")}
    if len(of_linears) != 1:
        raise SystemExit(f"{file}: its matrices have types whose inputs llama.cpp rounds differently")
    return of_linears.pop(), INPUTS[types.get("output.weight", types["token_embd.weight"])]


def round_inputs(model: Any, of_linears: Rounding, of_head: Rounding) -> None:
    """Have a checkpoint's linears and its head round their inputs from now on."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(lambda _, arguments: (of_linears(arguments[0]),))
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, arguments: (of_head(arguments[0]),))


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
    # Its threads wait for each other busily: more of them than free cores take many times as long.
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
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
def compare(file: Path, checkpoint: Path, windows_WT: Tensor) -> dict[str, float]:
    """Perplexities of both, the checkpoint's also like with like, and how far logits lie apart either way."""
    exact, alike = (load_quantized(checkpoint, torch.device("cpu"), torch.float32, "emulate") for _ in range(2))
    round_inputs(alike, *roundings(file))
    losses: dict[str, list[Tensor]] = {"llama.cpp": [], "checkpoint": [], "like with like": []}
    difference = {"logit difference": 0.0, "like with like, logit difference": 0.0}
    found = llama_cpp_logits(file, windows_WT, exact.config.vocab_size)
    for index, (window_T, found_TV) in enumerate(zip(windows_WT, found, strict=True)):
        logits = {"llama.cpp": found_TV, "checkpoint": exact(window_T[None]).logits[0]}
        logits["like with like"] = alike(window_T[None]).logits[0]
        for name, logits_TV in logits.items():
            losses[name].append(token_losses(logits_TV, window_T))
        if index < WINDOWS_OF_LOGITS:
            for key, name in zip(difference, ("checkpoint", "like with like"), strict=True):
                difference[key] = max(difference[key], float((logits[name] - found_TV).abs().max()))
    return {name: float(torch.cat(values).mean().exp()) for name, values in losses.items()} | difference


@torch.inference_mode()
def perturbed(file: Path, checkpoint: Path, windows_WT: Tensor, runs: int) -> tuple[list[float], float]:
    """Perplexities of runs like with like that differ in their embeddings; how far the first and the last lie apart."""
    model: Any = load_quantized(checkpoint, torch.device("cpu"), torch.float32, "emulate")
    round_inputs(model, *roundings(file))
    generator = torch.Generator().manual_seed(0)

    def perturb(module: Any, arguments: Any, y: Tensor) -> Tensor:
        return y * (1 + PERTURBATION * torch.randn(y.shape, generator=generator))

    model.get_input_embeddings().register_forward_hook(perturb)
    losses: list[list[Tensor]] = [[] for _ in range(runs)]
    difference = 0.0
    for window_T in windows_WT:
        logits = [model(window_T[None]).logits[0] for _ in range(runs)]
        for of_run, logits_TV in zip(losses, logits, strict=True):
            of_run.append(token_losses(logits_TV, window_T))
        difference = max(difference, float((logits[0] - logits[-1]).abs().max()))
    return [float(torch.cat(of_run).mean().exp()) for of_run in losses], difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=WINDOW_TOKENS)
    parser.add_argument("--windows", type=int, default=WINDOWS_OF_PERPLEXITY)
    parser.add_argument("--perturb", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    windows_WT = concat_windows(tokenizer, [text], "", arguments.seq_len)[: arguments.windows]
    found = compare(arguments.file, arguments.checkpoint, windows_WT)
    print(f"{len(windows_WT)} windows of {arguments.seq_len} tokens of {arguments.text.name}")
    print(f"llama.cpp: perplexity {found['llama.cpp']:.6g}")
    for name, key in (("checkpoint", "logit difference"), ("like with like", "like with like, logit difference")):
        change = found["llama.cpp"] / found[name] - 1
        print(f"{name}: perplexity {found[name]:.6g}, llama.cpp's {change:+.4%}; logits within {found[key]:.3g}")
    if arguments.perturb:
        found_again, apart = perturbed(arguments.file, arguments.checkpoint, windows_WT, arguments.perturb)
        print(f"perturbed: perplexity {', '.join(f'{one:.6g}' for one in found_again)}; logits within {apart:.3g}")


if __name__ == "__main__":
    main()
