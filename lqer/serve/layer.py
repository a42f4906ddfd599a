"""One rank's share of a layer that may join several linears, from their tensors as they arrive to the module.

Shapes: O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqer.checkpoint.backend import choose_backend
from lqer.checkpoint.linear import LinearTensors
from lqer.errors import ModelError
from lqer.serve.modules import Reduce, inputs_module, outputs_module
from lqer.serve.shards import input_shard, output_shard
from lqer.serve.stored import StoredLinear


class LayerShard:
    """What rank `rank` of `ranks` holds of a layer.

    linears: those that the layer joins, in their order. inputs: how many this rank sees. outputs: how many it computes
    of each linear. If they are fewer than a linear has, ranks hold them in turn; if there are more ranks than shares,
    neighbours hold the same (heads of keys and values). reduce: the sum of a tensor over all ranks.

    Raises ModelError where the sizes fit no way of splitting; `add` raises it for formats that do not.
    """

    def __init__(
        self,
        linears: Sequence[StoredLinear],
        inputs: int,
        outputs: Sequence[int],
        rank: int,
        ranks: int,
        dtype: torch.dtype,
        reduce: Reduce,
    ):
        self.linears, self.inputs, self.rank, self.ranks = linears, inputs, rank, ranks
        self.dtype, self.reduce = dtype, reduce
        # A linear that is stored as one although it is several, such as a fused projection.
        self.outputs = [sum(outputs)] if len(linears) == 1 and ranks == 1 else list(outputs)
        self.dtypes = {part: dtype for linear in linears for part, dtype in linear.dtypes.items()}
        self._held: list[LinearTensors | None] = [None] * len(linears)
        if len(self.outputs) != len(linears):
            raise ModelError(f"{linears[0].name} is one matrix for {len(outputs)} linears, so it cannot be split")
        for linear, count in zip(linears, self.outputs, strict=True):
            whole = (linear.out_features, linear.in_features)
            fits = linear.out_features % count == 0 and linear.in_features % inputs == 0
            if not fits or (self.splits_inputs and count != linear.out_features):
                raise ModelError(f"{linear.name}: a rank cannot hold {count} x {inputs} out of {whole[0]} x {whole[1]}")

    @property
    def splits_inputs(self) -> bool:
        """Whether ranks see different inputs, and their outputs are to be added."""
        return self.inputs != self.linears[0].in_features

    def add(self, place: int, part: str, tensor: Tensor, device: torch.device) -> None:
        """A tensor of the linear in this place, by its name within the linear. What is complete goes to the device."""
        linear = self.linears[place]
        if not linear.add(part, tensor):
            return
        whole, count = linear.take(device), self.outputs[place]
        try:
            if self.splits_inputs:
                self._held[place] = input_shard(whole, self.rank * self.inputs, self.inputs)
            else:
                neighbours = max(1, self.ranks * count // linear.out_features)
                self._held[place] = output_shard(whole, self.rank // neighbours * count, count)
        except ValueError as error:
            raise ModelError(f"{linear.name} cannot be split over {self.ranks} ranks: {error}") from None

    def finish(self) -> tuple[nn.Module, Tensor | None]:
        """The module of this rank, without bias, and the bias (O,) if the checkpoint holds it in a number format."""
        held = []
        for linear, shard in zip(self.linears, self._held, strict=True):
            held.append(linear.take(torch.device("cpu")) if shard is None else shard)  # raises: something is missing
        self._held = []
        device = held[0].weight.parts["codes"].device
        backend = choose_backend("auto", device, self.dtype, {linear.name: linear.entry for linear in self.linears})
        try:
            if self.splits_inputs:
                module = inputs_module(held[0], backend, self.dtype, self.rank, self.reduce)
            else:
                module = outputs_module(held, backend, self.dtype)
        except ModelError as error:
            raise ModelError(f"{self.linears[0].name}: {error}") from None
        biases = [shard.bias_O for shard in held if shard.bias_O is not None]
        return module.eval(), torch.cat(biases) if biases else None
