"""Gradients of a model's loss with respect to the outputs of its linears, one decoder block at a time, last to first.

    forward     the hidden states before every block are kept; only one block is in memory
    loss        Σ_t −log p(y_t | x_<t) with y_t drawn from the model's own distribution p: E[g gᵀ] is then the Hessian
                of the divergence from that distribution (the Fisher information)
    backward    block by block, last first: run it again on its inputs, and differentiate

So a model that is read from disk needs the memory of one block, its activations, and the hidden states of all blocks,
which the model's offload allocates.

Shapes: W windows, T tokens of a window, B windows of a batch, D hidden size, V vocabulary, N tokens of a window or
a call, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lqer.errors import ModelError
from lqer.models.hidden import HiddenStates
from lqer.models.loaders import OpenedModel
from lqer.models.walker import BlockRun, embed, logits_of_states, refuse_non_finite
from lqer.phases import in_phase
from lqer.transforms.tracing import hooked

# Gets the input x (B, N, I) of a call of a linear and the gradient (B, N, O) with respect to its output, by window;
# B = 1 for a call that gets a part of the tokens, as an expert does.
Visit = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class BackwardRun:
    """One decoder block, its inputs, and the gradients with respect to its outputs (W, T, D), float32."""

    run: BlockRun
    gradients_WTD: Tensor

    @property
    def index(self) -> int:
        return self.run.index

    @in_phase("backward")
    def backward(self, visits: Mapping[str, Visit]) -> None:
        """Differentiate every batch: gradients with respect to the inputs replace those with respect to the outputs.

        visits: by name of a linear of the block.
        """
        for batch, windows in enumerate(self.run.hidden.batches):
            inputs_BTD = self.run.hidden.load(batch, self.run.device).requires_grad_()
            sizes = (inputs_BTD.shape[0], inputs_BTD.shape[1])
            calls: list[tuple[str, Tensor, Tensor]] = []
            with torch.enable_grad(), _recorded(self.run.block, visits, calls):
                output_BTD = self.run.differentiable_output(batch, inputs_BTD)
            # A copy: gradients of the last sum are this very tensor, and its memory is overwritten below. In two steps:
            # in one, the CPU would round the values.
            kept_BTD = self.gradients_WTD[windows].to(output_BTD.device, copy=True, non_blocking=True)
            gradient_BTD = kept_BTD.to(output_BTD.dtype)
            wanted = [inputs_BTD, *(output for _, _, output in calls)]
            found = torch.autograd.grad(output_BTD, wanted, gradient_BTD, allow_unused=True)
            # Ordered on the device's stream, on which they are read too.
            self.gradients_WTD[windows].copy_(found[0].to(torch.float32), non_blocking=True)
            for (name, x, _), gradient in zip(calls, found[1:], strict=True):
                if gradient is not None:
                    visits[name](_by_window(x, sizes), _by_window(gradient, sizes))


def _by_window(tensor: Tensor, windows: tuple[int, int]) -> Tensor:
    """A tensor (..., I) or (..., O), all leading dims tokens, with its windows as the first dim (B, N, ...)."""
    tokens_NI = tensor.flatten(0, -2)
    return tokens_NI.unflatten(0, windows if len(tokens_NI) == math.prod(windows) else (1, -1))


def walk_backward(opened: OpenedModel, windows_WT: Tensor, batch_size: int, seed: int) -> Iterator[BackwardRun]:
    """The blocks, last to first; the caller runs each backward exactly once before it asks for the next one.

    windows_WT: int64 token ids. seed: of the tokens that are drawn. Raises ModelError for parameters that are not
    finite.
    """
    batches = windows_WT.split(batch_size)
    states = [embed(opened, batches)]
    indices = range(len(opened.blocks))
    for index, block in opened.loader.load_each(opened.blocks, indices, opened.device):
        refuse_non_finite(block.named_parameters(f"{opened.name}.{index}"))
        states.append(states[0].empty_like())
        _run(opened, index, block, states).forward(to=states[-1])
        refuse_lost_gradients(states[-1])
    pinned = states[0].states_WTD.is_pinned()
    gradients_WTD = opened.offload.empty(states[0].states_WTD.shape, torch.float32, pinned)
    for batch in range(len(batches)):
        gradient_BTD = _loss_gradient(opened, batches, states[-1], batch, seed)
        gradients_WTD[states[0].batches[batch]].copy_(gradient_BTD, non_blocking=True)
    for index, block in opened.loader.load_each(opened.blocks, indices[::-1], opened.device):
        yield BackwardRun(_run(opened, index, block, states), gradients_WTD)


def refuse_lost_gradients(states: HiddenStates) -> None:
    """Raise ModelError where blocks so far have left values for later ones that gradients would have to pass.

    What they have chosen, integers, is none.
    """
    if any(isinstance(one, Tensor) and one.is_floating_point() for one in tree_leaves(states.left)):
        raise ModelError(
            "model: its decoder blocks leave values for later ones, through which no gradients flow; "
            'quantize.budget_bits and calibration.token_weights = "gradient" need gradients'
        )


def _run(opened: OpenedModel, index: int, block: nn.Module, states: Sequence[HiddenStates]) -> BlockRun:
    return BlockRun(index, f"{opened.name}.{index}", block, states[index], opened.device)


def _loss_gradient(
    opened: OpenedModel, batches: Sequence[Tensor], states: HiddenStates, batch: int, seed: int
) -> Tensor:
    """∂L/∂h of the last block's outputs h on one batch, float32 (B, T, D)."""
    hidden_BTD = states.load(batch, opened.device).requires_grad_()
    generator = torch.Generator(opened.device).manual_seed(seed + batch)
    with torch.enable_grad():
        logits_BTV = logits_of_states(opened, batches[batch], hidden_BTD, states.returned_values)
        log_p_NV = logits_BTV.flatten(0, 1).to(torch.float32).log_softmax(-1)
        drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
        (gradient_BTD,) = torch.autograd.grad(-log_p_NV.gather(1, drawn_N1).sum(), hidden_BTD)
    return gradient_BTD.to(torch.float32)


@contextmanager
def _recorded(block: nn.Module, names: Iterable[str], calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """While active, append the name, input and output of every call of the named linears to `calls`.

    Not of those whose output no gradient reaches, as in an indexer, which chooses tokens.
    """

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                calls.append((name, args[0].detach(), output))

        return see

    with hooked(block.get_submodule(name).register_forward_hook(hook(name)) for name in names):
        yield
