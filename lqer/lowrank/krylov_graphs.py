"""The growth of Krylov spaces on a GPU as CUDA graphs: launching a block takes longer than its products.

    with recorded_growth():
        factors = [reconstruct(error_OI, metric, rank, "krylov") for error_OI in errors]

The space of the first error of a shape is grown launch by launch. That of the second is recorded, a few blocks a graph,
and that of every further one is played back. The errors are copied to where the graphs read them, which takes a tenth
of a millisecond. Recordings end with the context, and with them the memory that they hold.

Shapes: I in_features, O out_features, L block width, D dimension of the space so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from lqer.lowrank.krylov_space import BLOCKS_AT_ONCE, grow, start_vectors
from lqer.lowrank.metric import Metric

# The most bytes of a recorded error with its metric (of larger ones, products take longer than launches), and the most
# kinds of errors that are recorded.
LARGEST_RECORDED, MOST_RECORDINGS = 1 << 28, 4


@dataclass(frozen=True)
class GrowingSpace:
    """rows: those of the projected matrix, block by block. All of it is valid until another space grows."""

    rows: Iterator[Tensor]
    basis_DO: Tensor
    images_DI: Tensor


_recordings: ContextVar[dict[object, _Recording | None] | None] = ContextVar("recordings", default=None)


@contextmanager
def recorded_growth() -> Iterator[None]:
    """Record the spaces that this thread grows within; an outer context's recordings go on."""
    if _recordings.get() is not None:
        yield
        return
    token = _recordings.set({})
    try:
        yield
    finally:
        _recordings.reset(token)


def growing_space(error_OI: Tensor, metric: Metric, width: int, largest: int, seed: int) -> GrowingSpace:
    """The space of an error, to be grown in blocks of `width` up to `largest` dimensions; `seed` fixes its start."""
    start_LO = start_vectors(width, error_OI.shape[0], seed, error_OI.device)
    recording = _recording(error_OI, metric, largest, start_LO, seed)
    return _space(error_OI, metric, largest, start_LO) if recording is None else recording.of(error_OI, metric)


def _space(error_OI: Tensor, metric: Metric, largest: int, start_LO: Tensor) -> GrowingSpace:
    out_features, in_features = error_OI.shape
    basis_DO = error_OI.new_empty(largest, out_features, dtype=torch.float64)
    images_DI = error_OI.new_empty(largest, in_features)
    return GrowingSpace(grow(error_OI, metric, start_LO, basis_DO, images_DI), basis_DO, images_DI)


def _recording(error_OI: Tensor, metric: Metric, largest: int, start_LO: Tensor, seed: int) -> _Recording | None:
    """The recording for errors like this one; None where none are recorded, and for the first of them."""
    recordings = _recordings.get()
    read = [tensor for tensor in (error_OI, metric.scale_I, metric.hessian_II) if tensor is not None]
    if recordings is None or not error_OI.is_cuda or sum(tensor.nbytes for tensor in read) > LARGEST_RECORDED:
        return None
    kind = (*((tensor.shape, tensor.dtype, tensor.device) for tensor in read), largest, start_LO.shape, seed)
    if kind in recordings and recordings[kind] is None:
        recordings[kind] = _Recording(error_OI, metric, largest, start_LO)
    if kind not in recordings and len(recordings) < MOST_RECORDINGS:
        recordings[kind] = None
    return recordings.get(kind)


class _Recording:
    """The graphs of errors of one shape under metrics of one kind, and the tensors that they read."""

    def __init__(self, error_OI: Tensor, metric: Metric, largest: int, start_LO: Tensor) -> None:
        self._error_OI, self._start_LO = torch.empty_like(error_OI), start_LO
        self._metric = Metric(_empty_like(metric.scale_I), _empty_like(metric.hessian_II))
        self._space = _space(self._error_OI, self._metric, largest, start_LO)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[tuple[torch.cuda.CUDAGraph, list[Tensor]]] = []
        self._count = -(-largest // (len(start_LO) * BLOCKS_AT_ONCE))
        # Once without recording: libraries load and allocate at their first use, which a recording does not allow.
        with _on_recording_stream(error_OI.device):
            for _ in _space(error_OI, metric, largest, start_LO).rows:
                pass

    def of(self, error_OI: Tensor, metric: Metric) -> GrowingSpace:
        """The space of this error. What was grown before is overwritten."""
        self._error_OI.copy_(error_OI)
        for own, given in ((self._metric.scale_I, metric.scale_I), (self._metric.hessian_II, metric.hessian_II)):
            if own is not None and given is not None:
                own.copy_(given)
        return GrowingSpace(self._played(), self._space.basis_DO, self._space.images_DI)

    def _played(self) -> Iterator[Tensor]:
        for number in range(self._count):
            if number == len(self._graphs):
                self._record()
            graph, rows = self._graphs[number]
            graph.replay()
            yield from rows

    def _record(self) -> None:
        """Record the next blocks, without running them.

        `torch.cuda.graph` would first wait for the GPU and release memory that the surrounding work asks for again.
        """
        graph = torch.cuda.CUDAGraph()
        with _on_recording_stream(self._error_OI.device):
            # Other threads may work on the GPU meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                rows = list(islice(self._space.rows, BLOCKS_AT_ONCE))
            finally:
                graph.capture_end()
        self._graphs.append((graph, rows))


@contextmanager
def _on_recording_stream(device: torch.device) -> Iterator[None]:
    """Within it, work goes to another stream: after the earlier work of the current one, before its later work."""
    current, stream = torch.cuda.current_stream(device), _recording_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _empty_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)
