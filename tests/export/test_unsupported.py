"""What a target refuses by the description of a linear alone."""

from __future__ import annotations

import pytest

from lqer.export import Awq, Gptq
from lqer.export.base import Target
from lqer.export.source import LinearSpec
from lqer.formats import MXInt
from lqer.transforms.hadamard import hadamard
from lqer.transforms.quarot import OnlineRotation


def test_inputs_rotated_at_run_time_are_carried_by_dense_and_native_alone():
    """transformers reads over the entry of config.json that would describe them."""
    spec = LinearSpec("linear", MXInt(bits=4, block_size=32), 64, 64, online=OnlineRotation(hadamard))
    refused = {kind for kind, cls in Target.registry.items() if cls().unsupported(spec) is not None}
    assert refused == Target.registry.keys() - {"dense", "native"}


@pytest.mark.parametrize(
    ("target", "bits", "shape", "reason"),
    [
        (Gptq(), 3, (64, 48), "64 x 48 codes of 3 bits do not fill words of 32"),
        (Gptq(), 3, (48, 64), "48 x 64 codes of 3 bits do not fill words of 32"),
        (Gptq(), 5, (64, 64), "5 bits are not one of 2, 3, 4, 8"),
        (Awq(), 4, (60, 64), "60 outputs are not whole words of 8"),
    ],
)
def test_sizes_that_words_of_a_layout_do_not_hold(target, bits, shape, reason):
    assert target.unsupported(LinearSpec("linear", MXInt(bits=bits, block_size=16), *shape)) == reason
