"""Memory and disk of hidden states on their way through the blocks, of reading these, and of their statistics."""

from __future__ import annotations

from lqer.config.schema import CalibrationConfig, FinetuneConfig
from lqer.models.hidden import stay_on_gpu
from lqer.models.reading import READ_AT_ONCE_BYTES, READ_WHOLE_BYTES
from lqer.resources.statistics import accumulator_bytes, block_bytes, in_passes
from lqer.resources.workload import Need, Workload

LIVE_ACTIVATIONS = 5  # activations of a batch that are live at once, next to the widest linear's input

LARGER_DISK = "Put output_dir on a larger disk"
SAFETENSORS = "Convert the model to safetensors, which are read block by block"
LESS_IN_MEMORY = "Reduce calibration.max_memory"


def walk_needs(
    work: Workload,
    windows: int,
    seq_len: int,
    batch_tokens: int,
    remedy: str,
    accumulated: int = 0,
    blocks: int = 1,
    near: bool = False,
) -> tuple[list[Need], list[Need], list[Need]]:
    """Host, device and disk of windows on their way through the blocks, `blocks` of which are in memory at once.

    accumulated: bytes of the accumulators of a block's statistics. near: whether hidden states may stay on a GPU.
    """
    summary, limit = work.summary, work.config.calibration.max_bytes
    states = states_bytes(work, windows, seq_len)
    stay = near and states_stay_on_gpu(work, states)
    # Only RAM is offloaded.
    offloadable = {
        "hidden states": 0 if stay else states,
        "accumulators": 0 if work.on_gpu else accumulated,
    }
    size = sum(offloadable.values())
    held = size if limit is None else min(size, limit)
    what = max(offloadable, key=lambda name: offloadable[name])
    host = [Need(what, held, LESS_IN_MEMORY)]
    disk = [Need(f"offloaded {what}", size - held, LARGER_DISK)]
    device = activation_needs(work, batch_tokens, remedy)
    if work.streams:
        device.append(Need("weights outside the blocks", work.computed * summary.outside_parameters))
        device.append(Need("block", blocks * work.computed * summary.block_parameters))
        host += as_read(work)
    else:  # it stays in RAM, and a GPU holds one block at a time
        host.append(Need("whole model", work.computed * summary.parameters, SAFETENSORS))
        on_gpu = work.computed * (blocks * summary.block_parameters + summary.outside_parameters)
        device.append(Need("block and weights outside the blocks", on_gpu if work.on_gpu else 0))
    if work.on_gpu:
        device.append(Need("accumulators", accumulated, 'Set device = "cpu"'))
        device.append(Need("hidden states", states if stay else 0))
    return host, device, disk


def states_bytes(work: Workload, windows: int, seq_len: int) -> int:
    return windows * seq_len * work.summary.hidden_size * work.computed


def states_stay_on_gpu(work: Workload, size: int) -> bool:
    return work.on_gpu and stay_on_gpu(size, work.near_bytes)


def as_read(work: Workload, purpose: str = "") -> list[Need]:
    """What a GPU's run reads ahead: a block beside the one in use, of large blocks a part at a time."""
    size = work.read_block or work.stored_block
    if size > READ_WHOLE_BYTES:
        return [Need(f"part of a block as read{purpose}", READ_AT_ONCE_BYTES * work.on_gpu)]
    return [Need(f"two blocks as read{purpose}", 2 * size * work.on_gpu)]


def add_statistics(work: Workload, host: list[Need], device: list[Need], disk: list[Need]) -> None:
    """Add the statistics of a block: on a GPU there, unless they are gathered in several passes."""
    size, limit = statistics_bytes(work), work.config.calibration.max_bytes
    if work.on_gpu and not observed_in_passes(work):
        device.append(Need("statistics of a block", size))
        return
    held = size if limit is None else min(size, limit)
    host.append(Need("statistics of a block", held, LESS_IN_MEMORY))
    disk.append(Need("offloaded statistics of a block", size - held, LARGER_DISK))


def activation_needs(work: Workload, batch_tokens: int, remedy: str) -> list[Need]:
    """Activations of a block on `batch_tokens` tokens: the widest ones, and those beside them."""
    size = batch_tokens * work.widest * work.computed
    others = Need("other activations of a batch", LIVE_ACTIVATIONS * size, remedy, certain=False)
    return [Need("activations of a batch", size, remedy), others]


def tokens_of_batch(settings: CalibrationConfig | FinetuneConfig) -> int:
    """Tokens of a batch: no more than there are."""
    return min(settings.batch_size, settings.num_samples) * settings.seq_len


def accumulated_bytes(work: Workload) -> int:
    """Bytes of the accumulators of one block that are in memory together."""
    return accumulator_bytes(work.summary, work.plans, work.on_gpu)


def observed_in_passes(work: Workload) -> bool:
    """Whether a block is observed in several passes over the text."""
    return in_passes(work.summary, work.plans, work.on_gpu)


def statistics_bytes(work: Workload) -> int:
    """Bytes of the statistics of one block."""
    return block_bytes(work.config, work.summary, work.plans, work.computed)
