"""Attention of one token over a cache agrees with the formula in float64.

Shapes: B sequences, H query heads, G key heads, S tokens of the cache, D width of a head, T one token.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import DEVICE, DTYPES, ON_GPU, relative_error

from lqer.kernels import decode_attention as module
from lqer.kernels.decode_attention import counters, decode_attention, fits

LENGTHS = (1, 40, 200, 1000) if ON_GPU else (1, 40, 200)


def operands(batch: int, heads: int, groups: int, length: int, width: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(length + heads)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    # A view, as the part of q of a joint output is.
    query_BHTD = random(batch, 1, 2 * heads, width)[:, :, :heads].transpose(1, 2)
    mask = torch.rand(batch, 1, 1, length + 8, generator=generator).to(DEVICE) < 0.7
    mask[..., 0] = True
    return query_BHTD, random(batch, groups, length, width), random(batch, groups, length, width), mask


def exact(query_BHTD, key_BGSD, value_BGSD, mask, scale):
    repeats = query_BHTD.shape[1] // key_BGSD.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key_BGSD, value_BGSD))
    scores = query_BHTD.double() @ key.transpose(-1, -2) * scale
    scores = scores.masked_fill(~mask[..., : key.shape[2]], -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("batch", "heads", "groups", "width"), [(1, 4, 4, 64), (2, 8, 2, 128), (3, 6, 1, 64)])
def test_it_gives_the_formula(batch, heads, groups, width, length, dtype, monkeypatch):
    monkeypatch.setattr("lqer.kernels.runtime.multiprocessors", lambda device: 132)
    given = operands(batch, heads, groups, length, width, dtype)
    assert fits(*given)
    for _ in range(2):
        y_BTHD = decode_attention(*given, 0.1)
        assert relative_error(y_BTHD, exact(*given, 0.1)) < 5e-3
    assert not counters(given[0].device).any()


def test_a_mask_of_one_sequence_holds_for_all_and_a_token_that_attends_to_nothing_gets_zeros():
    query, key, value, mask = operands(2, 4, 2, 70, 64, DTYPES[0])
    y_BTHD = decode_attention(query, key, value, mask[:1], 0.2)
    assert relative_error(y_BTHD, exact(query, key, value, mask[:1], 0.2)) < 5e-3
    mask[1] = False
    assert not decode_attention(query, key, value, mask, 0.2)[1].any()


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr("lqer.kernels.runtime.multiprocessors", lambda device: 132)
    assert 0 < module.relative_error(4, 2, 64, DTYPES[0], DEVICE) < 5e-3
    assert module.relative_error(4, 2, 48, DTYPES[0], DEVICE) == 0, "not run by the kernel"
    monkeypatch.setattr(module, "decode_attention", lambda query, *_: torch.zeros_like(query).transpose(1, 2))
    assert module.relative_error(4, 2, 64, DTYPES[0], DEVICE) == 1


def test_only_calls_that_the_kernel_supports_fit():
    query, key, value, mask = operands(2, 4, 2, 70, 64, DTYPES[0])
    assert fits(query, key, value, mask)
    for changed in (
        (query.expand(2, 4, 3, 64), key, value, mask), (query[..., :32], key[..., :32], value[..., :32], mask),
        (query, key, value, None), (query, key, value, mask.float()), (query, key, value, mask.expand(2, 4, 1, 78)),
        (query.float(), key.float(), value.float(), mask), (query, key, value, mask[..., :60]),
        (query, key.transpose(2, 3).contiguous().transpose(2, 3), value, mask),
    ):  # fmt: skip
        assert not fits(*changed)
