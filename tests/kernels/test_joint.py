"""Linears packed side by side give what each gives by itself.

Shapes: M tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

import pytest
import torch
from kernel_layers import build_layer, random_input, random_lattice, random_trellis, relative_error, rotated_layers

from lqer.formats import Codebook, Int, MXInt, QuantizedTensor, Trellis
from lqer.kernels import PackedLinear, packed_linear
from lqer.kernels.joint import can_join, join, part_of
from lqer.kernels.reference import reference_linear
from lqer.kernels.spec import decode_spec, encode_spec

COLUMNS = 512
# Of q, k and v of grouped attention: not all multiples of a tile.
ROWS = (256, 64, 80)
TOKENS = (1, 3, 20, 300)


def integer_layers(number_format, activation=None, ranks=(16, 32, 0), biased=(0,)) -> list[PackedLinear]:
    return [
        build_layer(number_format, rows, COLUMNS, rank, activation, bias=place in biased).packed
        for place, (rows, rank) in enumerate(zip(ROWS, ranks, strict=True))
    ]


def lattice(rows: int) -> QuantizedTensor:
    return random_lattice(rows, COLUMNS)


def refuse_difference(joint: PackedLinear, single: list[PackedLinear], tokens: int, error: float) -> None:
    x_MI = random_input(tokens, COLUMNS)
    y_MO = packed_linear(x_MI, joint)
    for segment, linear in zip(joint.spec.segments, single, strict=True):
        expected = reference_linear(x_MI, linear)
        assert relative_error(y_MO[:, segment.rows_of_all], expected.double()) < error


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("number_format", "activation"),
    [
        pytest.param(MXInt(4), MXInt(8), id="w4a8"),
        pytest.param(MXInt(4), None, id="w4"),
        pytest.param(MXInt(3), None, id="w3"),
        pytest.param(Int(4, 128), None, id="groups4"),
        pytest.param(Int(3, 64, symmetric=True), MXInt(8), id="groups3a8"),
    ],
)
def test_integer_linears_side_by_side_give_what_each_gives_alone(number_format, activation, tokens):
    single = integer_layers(number_format, activation, ranks=(16, 32, 64), biased=(0, 2))
    refuse_difference(join(single), single, tokens, 5e-3)


@pytest.mark.parametrize("tokens", [1, 4, 20, 70])
@pytest.mark.parametrize(("rank", "rows_of_all"), [(0, ROWS), (32, ROWS), (32, (256, 128, 128))])
@pytest.mark.parametrize("kind", ["e8p", "bytes", "gaussian"])
def test_rotated_linears_side_by_side_share_the_rotation_of_their_input(kind, rank, rows_of_all, tokens):
    # Blocks of the rotation of outputs are of 16 or of 128, by the lengths.
    make = lattice if kind == "e8p" else lambda rows: random_trellis(Trellis(2, table=kind), rows, COLUMNS)
    single = rotated_layers([make(rows) for rows in rows_of_all], rank)
    assert can_join(single)
    refuse_difference(join(single), single, tokens, 1e-2)


def test_the_reference_of_linears_side_by_side_is_that_of_each():
    for single in (
        integer_layers(MXInt(4), MXInt(8), ranks=(16, 16, 32)),
        rotated_layers([*map(lattice, ROWS)], 16),
    ):
        joint, x_MI = join(single), random_input(5, COLUMNS)
        y_MO = reference_linear(x_MI, joint)
        for segment, linear in zip(joint.spec.segments, single, strict=True):
            torch.testing.assert_close(y_MO[:, segment.rows_of_all], reference_linear(x_MI, linear))


def test_only_linears_of_one_kind_and_one_input_rotation_are_packed_side_by_side():
    four, other = integer_layers(Int(4, 128), ranks=(0, 0, 0)), integer_layers(Int(3, 128), ranks=(0, 0, 0))
    assert can_join(four)
    assert not can_join([four[0], other[1]])
    assert not can_join([four[0], integer_layers(Int(4, 128), MXInt(8), ranks=(0, 0, 0))[1]])
    assert not can_join(rotated_layers([*map(lattice, ROWS)], 0, same_input=False))
    codebook = Codebook(bits=2, dimension=1)
    assert not can_join([build_layer(codebook, 64, COLUMNS).packed] * 2)


@pytest.mark.parametrize(
    "single",
    [
        integer_layers(MXInt(4), MXInt(8), ranks=(16, 32, 16), biased=(0, 1, 2)),
        integer_layers(MXInt(3), ranks=(0, 0, 0), biased=()),
        integer_layers(Int(4, 32), ranks=(0, 0, 0), biased=()),
        rotated_layers([*map(lattice, ROWS)], 16),
    ],
)
def test_parts_of_the_joint_tensors_are_those_of_each(single):
    joint = join(single)
    for index, linear in enumerate(single):
        parts = part_of(joint, index, linear.spec)
        for name, tensor in linear.tensors().items():
            if name != "workspace":
                assert torch.equal(parts[name], tensor), name
        assert parts["words"].untyped_storage().data_ptr() == joint.weight.words.untyped_storage().data_ptr()


def test_segments_are_in_the_string_of_a_spec():
    spec = join(integer_layers(Int(4, 128), ranks=(16, 16, 16))).spec
    assert len(spec.segments) == len(ROWS)
    assert decode_spec(encode_spec(spec)) == spec
