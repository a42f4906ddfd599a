"""Memory and disk of gradients that are taken block by block (lqer/models/backward.py)."""

from __future__ import annotations

from lqer.resources.machine import usable_ram
from lqer.resources.statistics import weighted_sites
from lqer.resources.walk import LARGER_DISK, LESS_IN_MEMORY, LIVE_ACTIVATIONS, tokens_of_batch, walk_needs
from lqer.resources.workload import Need, Workload
from lqer.stages.weigh_tokens import batches_of_a_pass

LOGIT_COPIES = 3  # logits: as computed, in float32, gradient; or those of both models, gradient


def backward_needs(work: Workload, windows: int) -> tuple[list[Need], list[Need], list[Need]]:
    """Host, device and disk of gradients of so many windows: the inputs of all blocks, the activations of one."""
    settings, summary = work.config.calibration, work.summary
    batch, fewer = tokens_of_batch(settings), "Reduce calibration.batch_size"
    host, device, disk = walk_needs(work, windows * (summary.blocks + 1), settings.seq_len, batch, fewer)
    host.append(Need("gradients of the windows", 4 * windows * settings.seq_len * summary.hidden_size, LESS_IN_MEMORY))
    device += [
        Need("activations for gradients", LIVE_ACTIVATIONS * batch * work.widest * 4, certain=False),
        Need("logits of a batch", 4 * LOGIT_COPIES * batch * summary.vocabulary, fewer),
    ]
    return host, device, disk


def token_weights_needs(work: Workload) -> tuple[list[Need], list[Need], list[Need]]:
    """Host, device and disk of weighting the tokens of the calibration text, a pass at a time."""
    settings, summary = work.config.calibration, work.summary
    at_once = batches_of_a_pass(
        summary.blocks, summary.hidden_size, tokens_of_batch(settings), work.computed, usable_ram()
    )
    host, device, disk = backward_needs(work, min(settings.num_samples, at_once * settings.batch_size))
    return host, device, [*disk, Need("weights of the tokens", bytes_of_token_weights(work), LARGER_DISK)]


def bytes_of_token_weights(work: Workload) -> int:
    """Of all tokens in all sites but those of experts, by the gradient; none where these are not asked for."""
    settings, summary = work.config.calibration, work.summary
    if settings.token_weights != "gradient":
        return 0
    return 4 * settings.num_samples * settings.seq_len * weighted_sites(summary) * summary.blocks
