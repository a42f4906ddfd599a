"""Bits per weight, against arithmetic by hand and against the bytes that the checkpoint holds."""

from __future__ import annotations

import pytest

from lqer.checkpoint.bits import average_bits
from lqer.models.structure import find_blocks
from lqer.store.names import block_file


def row(out_features: int, in_features: int, weight: int, metadata: int, low_rank: int) -> dict[str, int]:
    return {
        "out_features": out_features,
        "in_features": in_features,
        "weight_bits": weight,
        "metadata_bits": metadata,
        "codebook_bits": metadata // 2,
        "zero_bits": metadata // 5,
        "sign_bits": metadata // 10,
        "low_rank_bits": low_rank,
    }


def test_totals_are_divided_by_the_number_of_original_weights():
    bits = average_bits([row(10, 10, 400, 50, 80), row(10, 30, 1200, 150, 0)])
    assert bits == {
        "average": 1880 / 400, "weight": 4.0, "low_rank": 0.2, "metadata": 0.5, "codebook": 0.25, "zeros": 0.1,
        "signs": 0.05,
    }  # fmt: skip


def test_a_published_scheme_costs_what_it_says():
    """4-bit MXINT in blocks of 16 with 8-bit factors of rank 32 on a 4096 x 4096 weight: 4.5 + 2 * 32 * 8.5 / 4096."""
    size, rank = 4096, 32
    exponents = size * size // 16
    bits = average_bits([row(size, size, 4 * size * size, 8 * exponents, int(2 * rank * size * 8.5))])
    assert bits["average"] == pytest.approx(4.6328125)


def test_nothing_quantized_costs_nothing():
    assert average_bits([])["average"] == 0


def test_the_stated_bits_are_the_bytes_in_the_files(stages):
    """Exactly: every quantized linear's tensors, apart from its bias, are what its bits were charged for."""
    stored_bytes, weights = 0, 0
    blocks = find_blocks(stages.model)[1]
    for i in range(len(blocks)):
        for key, tensor in stages.checkpoint.tensors(block_file(i)).items():
            linear = key.rsplit(".", 2)[0]
            if linear in stages.details["linears"] and key.rsplit(".", 2)[1] != "bias":
                stored_bytes += tensor.nbytes
    for linear in stages.details["linears"]:
        weights += stages.model.get_submodule(linear).weight.numel()
    assert 8 * stored_bytes == stages.details["bits"]["average"] * weights
