"""Trellis codes: the table, the packed stream, the error on normal values."""

from statistics import NormalDist

import pytest
import torch

from lqer.formats import Trellis, format_from_dict
from lqer.formats.trellis import BYTES_RMS, from_tiles, multiplier, ring_states, state_values, to_tiles

CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows(packed_bytes: bytes, bits: int, state_bits: int) -> list[int]:
    """The states of one tile by the documented rule, from its 8 k little-endian words."""
    words = [int.from_bytes(packed_bytes[i : i + 4], "little") for i in range(0, len(packed_bytes), 4)]
    states = []
    for i in range(256):
        q, shift = divmod(i * bits, 32)
        states.append((words[q] | words[(q + 1) % len(words)] << 32) >> shift & ((1 << state_bits) - 1))
    return states


class TestTable:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize("state_bits", [12, 13, 14, 15, 16])
    def test_neighbouring_states_lie_in_different_parts_of_the_distribution(self, bits, state_bits):
        value_S = state_values(state_bits, bits, "gaussian", CPU)
        choices = 1 << bits
        # Those that follow one state, then those that one state follows, by their order.
        for values in (value_S.view(choices, -1).T, value_S.view(-1, choices)):
            probability = torch.special.ndtr(values.sort(1)[0])
            assert float(probability.diff(dim=1).min()) > 0.1 / choices

    def test_the_values_are_those_of_a_normal_distribution(self):
        value_S = state_values(12, 2, "gaussian", CPU).double()
        assert float(value_S.mean()) == pytest.approx(0.0, abs=2e-3)
        assert float(value_S.square().mean()) == pytest.approx(1.0, abs=5e-3)
        assert float(value_S.pow(4).mean()) == pytest.approx(3.0, abs=0.1)

    def test_one_multiplication_finds_the_place_of_a_value(self):
        state = 1234
        u = ((0xB98C67C3 * state % 2**32) + 0.5) / 2**32 - 0.5
        expected = NormalDist().inv_cdf(u + 0.5)
        assert float(state_values(12, 2, "gaussian", CPU)[state]) == pytest.approx(expected, rel=2**-11)
        expected = 2.824 * u - 20.286 * u**3 + 437.888 * u**5 - 2941.542 * u**7 + 6754.387 * u**9
        assert float(state_values(12, 2, "polynomial", CPU)[state]) == pytest.approx(expected, rel=2**-11)

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize("state_bits", [12, 13, 14, 15, 16])
    def test_the_sums_of_bytes_are_those_of_a_product_and_nearly_normal(self, bits, state_bits):
        value_S = state_values(state_bits, bits, "bytes", CPU)
        product = multiplier(state_bits, bits, "bytes") * 1234 % 2**32
        signed = [byte - 256 if byte > 127 else byte for byte in product.to_bytes(4, "little")]
        assert float(value_S[1234]) == sum(signed) / 128
        assert torch.equal(value_S.to(torch.float16).float(), value_S)
        scaled_S = value_S.double() / BYTES_RMS
        assert float(scaled_S.mean()) == pytest.approx(0.0, abs=0.03)
        assert float(scaled_S.square().mean()) == pytest.approx(1.0, abs=0.03)
        # Of a sum of four uniform numbers; a normal one has 3.
        assert float(scaled_S.pow(4).mean()) == pytest.approx(2.7, abs=0.15)

    def test_the_polynomial_is_the_quantile_but_for_its_tails(self):
        gaussian_S, polynomial_S = (state_values(16, 2, table, CPU) for table in ("gaussian", "polynomial"))
        inner_S = gaussian_S.abs() < 2
        assert float((gaussian_S - polynomial_S)[inner_S].abs().max()) < 0.08
        assert float(polynomial_S.max()) == pytest.approx(2.77, abs=0.01)


class TestPackedStream:
    @pytest.mark.parametrize(("bits", "state_bits"), [(1, 12), (2, 12), (2, 16), (3, 12), (3, 13), (4, 12), (4, 14)])
    def test_every_value_is_a_window_of_the_ring(self, bits, state_bits):
        """Any bytes are a valid code."""
        packed = torch.randint(0, 256, (2, 3 * 32 * bits), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
        scales = torch.tensor([[0.5]])
        quantized = Trellis(bits, state_bits).unpack({"codes": packed, "scales": scales}, (32, 48), 1)
        table_S = state_values(state_bits, bits, "gaussian", CPU)
        values_OI = quantized.dequantize()
        for row in range(2):
            for column in range(3):
                tile = bytes(packed[row, 32 * bits * column : 32 * bits * (column + 1)].tolist())
                expected = 0.5 * table_S[windows(tile, bits, state_bits)].view(16, 16)
                found = values_OI[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert torch.equal(found, expected)

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_packing_loses_nothing_and_takes_bits_per_weight(self, bits):
        number_format = Trellis(bits)
        quantized = number_format.quantize(normal(32, 48))
        packed = quantized.pack()
        assert packed["codes"].shape == (2, 48 * 2 * bits)
        assert quantized.code_bits == bits * 32 * 48
        assert quantized.metadata_bits == 32
        assert number_format.bits_per_value(48) == bits
        unpacked = number_format.unpack(packed, (32, 48), 1)
        assert torch.equal(unpacked.dequantize(), quantized.dequantize())

    def test_tiles_are_rows_of_rows(self):
        x_RC = torch.arange(32 * 48.0).view(32, 48)
        tiles_NP = to_tiles(x_RC)
        assert torch.equal(tiles_NP[4], x_RC[16:32, 16:32].flatten())
        assert torch.equal(from_tiles(tiles_NP, 2), x_RC)

    def test_a_state_continues_around_the_ring(self):
        codes_NP = torch.zeros(1, 256, dtype=torch.uint8)
        codes_NP[0, 0] = 3
        states_P = ring_states(codes_NP, 2, 12)[0]
        assert states_P.nonzero().flatten().tolist() == [0, 251, 252, 253, 254, 255]
        assert int(states_P[251]) == 3 << 10


class TestError:
    @pytest.mark.parametrize(
        ("bits", "state_bits", "table", "rows", "most"),
        [
            (1, 12, "gaussian", 32, 0.280), (2, 12, "gaussian", 64, 0.0705), (2, 16, "gaussian", 16, 0.070),
            (3, 12, "gaussian", 64, 0.0182), (4, 12, "gaussian", 64, 0.00475), (2, 12, "polynomial", 64, 0.071),
            (4, 12, "polynomial", 64, 0.0053), (2, 12, "bytes", 64, 0.0735), (3, 12, "bytes", 64, 0.0194),
            (4, 12, "bytes", 64, 0.0052), (2, 14, "bytes", 32, 0.0715), (4, 14, "bytes", 32, 0.0049),
        ],
    )  # fmt: skip
    def test_the_error_of_normal_values_is_near_the_bound(self, bits, state_bits, table, rows, most):
        x_OI = normal(rows, 256)
        values_OI = Trellis(bits, state_bits, table).quantize(x_OI).dequantize()
        error = (values_OI - x_OI).square().mean() / x_OI.square().mean()
        assert 4.0**-bits < float(error) < most

    def test_scaling_a_tensor_scales_its_values(self):
        x_OI = normal(16, 32)
        one, other = Trellis(2).quantize(x_OI), Trellis(2).quantize(x_OI * 0.25)
        assert torch.equal(one.parts["codes"], other.parts["codes"])
        assert torch.equal(one.dequantize() * 0.25, other.dequantize())

    def test_a_matrix_of_zeros_decodes_to_zeros(self):
        assert not Trellis(2).quantize(torch.zeros(16, 16)).dequantize().any()

    def test_blocks_along_rows_are_those_of_the_transpose(self):
        x_OI = normal(16, 32)
        along = Trellis(3).quantize(x_OI.T, axis=0)
        assert torch.equal(along.dequantize(), Trellis(3).quantize(x_OI).dequantize().T)


class TestBadInput:
    @pytest.mark.parametrize("shape", [(16, 40), (8, 32)])
    def test_a_matrix_of_parts_of_tiles_is_refused(self, shape):
        with pytest.raises(ValueError, match=rf"16 x 16 weights, and the matrix is {shape[0]} x {shape[1]} \(trellis"):
            Trellis(2).quantize(torch.ones(shape))

    def test_what_is_no_matrix_is_refused(self):
        with pytest.raises(ValueError, match=r"a tensor of shape \(16,\) is not a matrix \(trellis\)"):
            Trellis(2).quantize(torch.ones(16))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bits": 5}, r"bits 5 is not in 1..4 \(trellis\)"),
            ({"bits": 2, "state_bits": 17}, r"state_bits 17 is not in 12..16 \(trellis\)"),
            (
                {"bits": 2, "table": "normal"},
                r"table 'normal' is not one of 'gaussian', 'polynomial', 'bytes' \(trellis\)",
            ),
            ({"bits": 2, "block_size": 16}, r"block_size 16 is not one of 'tensor' \(trellis\)"),
        ],
    )
    def test_settings_are_checked(self, settings, message):
        with pytest.raises(ValueError, match=message):
            format_from_dict({"kind": "trellis", **settings})
