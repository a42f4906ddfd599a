"""The lattice codebooks from their definition, the search against brute force, published values, packing.

Vectors in e8p_vectors.json are values of the published codebooks; the residual's are rounded to six decimals there.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lqer.formats import E8P
from lqer.formats.e8 import LARGEST_COORDINATE, absolute_rows, decode_e8p, e8_one_bit_points, e8p_points
from lqer.formats.e8_search import CHUNK, nearest_e8_one_bit, nearest_e8p

CPU = torch.device("cpu")
VECTORS = json.loads((Path(__file__).parent / "e8p_vectors.json").read_text())


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(*shape, step, seed=0) -> torch.Tensor:
    """Multiples of a power of two, for which distances are exact and ties abound."""
    steps = int(4 / step)
    return torch.randint(-steps, steps + 1, shape, generator=torch.Generator().manual_seed(seed)) * step


def scores(x_V8, points_P8):
    """Half of |x|² - |x - p|²: largest where the distance is smallest, and exact on a grid."""
    return torch.addmm(-points_P8.square().sum(-1) / 2, x_V8, points_P8.T)


def brute_force(x_V8, points_P8):
    """The first of the nearest points, by all distances."""
    return torch.cat([scores(x_8, points_P8).argmax(-1) for x_8 in x_V8.split(100)])


class TestCodebook:
    def test_rows_are_the_short_half_integer_vectors_and_29_longer_ones(self):
        rows = torch.tensor(absolute_rows()) + 0.5
        assert len(set(absolute_rows())) == 256
        squares = Counter(rows.square().sum(-1).tolist())
        assert squares == {2.0: 1, 4.0: 8, 6.0: 28, 8.0: 64, 10.0: 126, 12.0: 29}
        every = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
        assert (every.square().sum(-1) <= 10).sum() == 227

    def test_the_points_are_shifted_half_integer_vectors_of_even_sum(self):
        points_P8 = e8p_points(CPU)
        assert len(torch.unique(points_P8, dim=0)) == 65536
        shift_P = torch.where(torch.arange(65536) < 32768, 0.25, -0.25)
        vectors_P8 = points_P8 - shift_P[:, None]
        assert torch.equal(vectors_P8.abs() % 1, torch.full_like(vectors_P8, 0.5))
        assert not (vectors_P8.sum(-1) % 2).any()
        rows = {tuple(row) for row in (vectors_P8.abs() - 0.5).int().tolist()}
        assert rows == set(absolute_rows())
        assert points_P8.square().mean() == 1.1962890625
        assert points_P8.abs().max() == LARGEST_COORDINATE

    def test_a_code_is_shift_row_and_signs(self):
        # Row 1 is (1/2, .., 1/2, 3/2): its sum is odd, so an odd number of signs is negative.
        assert decode_e8p(torch.tensor([1 << 7])).tolist() == [[0.75] * 7 + [-1.25]]
        assert decode_e8p(torch.tensor([1 << 15 | 1 << 7 | 1 << 6])).tolist() == [[-0.75] + [0.25] * 6 + [1.25]]

    def test_the_one_bit_points_are_short_lattice_vectors(self):
        points_P8 = e8_one_bit_points(CPU)
        assert len(torch.unique(points_P8, dim=0)) == 256
        assert Counter(points_P8.square().sum(-1).tolist()) == {0.0: 1, 2.0: 240, 4.0: 15}
        halves = (points_P8 % 1 == 0.5).all(-1)
        assert ((points_P8 % 1 == 0).all(-1) | halves).all()
        assert not (points_P8.sum(-1) % 2).any()
        assert int(halves.sum()) == 128


class TestSearch:
    @pytest.mark.parametrize(
        "x_V8",
        [
            normal(10000, 8),
            3 * normal(2000, 8),
            0.1 * normal(2000, 8),
            grid(4000, 8, step=0.25),
            grid(2000, 8, step=0.125),
        ],
        ids=["normal", "outside", "near zero", "grid of 1/4", "grid of 1/8"],
    )
    def test_e8p_finds_what_brute_force_finds_and_of_ties_the_lowest_code(self, x_V8):
        assert torch.equal(nearest_e8p(x_V8), brute_force(x_V8, e8p_points(CPU)))

    def test_the_grid_has_ties(self):
        x_V8 = grid(200, 8, step=0.25)
        scores_VP = scores(x_V8, e8p_points(CPU))
        assert ((scores_VP == scores_VP.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() > 0.2

    @pytest.mark.parametrize("x_V8", [normal(3000, 8), grid(3000, 8, step=0.25)], ids=["normal", "grid of 1/4"])
    def test_one_bit_finds_what_brute_force_finds(self, x_V8):
        assert torch.equal(nearest_e8_one_bit(x_V8), brute_force(x_V8, e8_one_bit_points(CPU)))

    def test_every_point_is_its_own_nearest(self):
        assert torch.equal(nearest_e8p(e8p_points(CPU)), torch.arange(65536))
        assert torch.equal(nearest_e8_one_bit(e8_one_bit_points(CPU)), torch.arange(256))

    def test_chunks_change_nothing(self):
        x_V8 = normal(CHUNK + 3, 8)
        assert torch.equal(nearest_e8p(x_V8)[-3:], nearest_e8p(x_V8[-3:]))
        assert torch.equal(nearest_e8p(x_V8.T.contiguous().T), nearest_e8p(x_V8))


class TestPublishedValues:
    @pytest.mark.parametrize("vector", VECTORS)
    def test_e8p_is_bit_exact(self, vector):
        scales = {"scales": torch.ones(1)}
        codes = E8P(2).encode(torch.tensor([vector["x"]]), scales)
        assert E8P(2).decode(codes, scales).tolist() == [vector["e8p"]]

    @pytest.mark.parametrize(("bits", "name"), [(3, "rvq3"), (4, "rvq4")])
    @pytest.mark.parametrize("vector", VECTORS)
    def test_residual_codes_are_exact_to_the_decimals_given(self, bits, name, vector):
        scales = {"scales": torch.ones(1)}
        codes = E8P(bits).encode(torch.tensor([vector["x"]]), scales)
        torch.testing.assert_close(E8P(bits).decode(codes, scales), torch.tensor([vector[name]]), rtol=0.0, atol=6e-7)

    @pytest.mark.parametrize(
        ("bits", "opt_scale", "published"),
        [
            (2, 0.9, 0.0990),
            (2, 1.0, 0.0918),
            (2, None, 0.0913),
            (3, None, 0.0295),
            (3, 1.03, 0.0299),
            (4, 0.98, 0.0089),
            (4, None, 0.0096),
        ],
    )
    def test_the_error_of_normal_values_is_the_published_one(self, bits, opt_scale, published):
        x = normal(20000, 8, seed=1)
        error = (E8P(bits, opt_scale=opt_scale).fake_quantize(x) - x).square().mean() / x.square().mean()
        assert float(error) == pytest.approx(published, rel=0.02)


class TestFormat:
    def test_two_bits_are_sixteen_per_eight_weights_low_byte_first(self):
        quantized = E8P(2).quantize(normal(3, 24))
        codes = quantized.parts["codes"]
        packed = quantized.pack()["codes"]
        assert packed.shape == (3, 6)
        assert quantized.code_bits == 2 * 3 * 24
        assert quantized.metadata_bits == 32
        assert torch.equal(packed[:, 0::2].long() | packed[:, 1::2].long() << 8, codes)
        assert int(codes.max()) < 65536

    @pytest.mark.parametrize("bits", [3, 4])
    def test_the_first_points_lie_packed_before_the_residuals(self, bits):
        x = normal(3, 24)
        packed = E8P(bits, opt_scale=1.0).quantize(x).pack()["codes"]
        assert packed.shape == (3, 3 * bits)
        assert torch.equal(packed[:, :6], E8P(2, opt_scale=1.0).quantize(x).pack()["codes"])

    def test_the_scale_is_the_root_mean_square_over_opt_scale(self):
        x = normal(16, 40)
        rms = x.double().square().mean().sqrt()
        assert float(E8P(2).quantize(x).parts["scales"]) == pytest.approx(float(rms / 1.03), rel=1e-6)
        assert float(E8P(3).quantize(x).parts["scales"]) == pytest.approx(float(rms / 0.98), rel=1e-6)
        rows = E8P(2, block_size="row", opt_scale=1.0).quantize(x).parts["scales"]
        torch.testing.assert_close(rows, x.square().mean(-1, keepdim=True).sqrt())

    def test_scaling_a_tensor_scales_its_values(self):
        x = normal(16, 40)
        assert torch.equal(E8P(4).quantize(1024 * x).parts["codes"], E8P(4).quantize(x).parts["codes"])

    def test_a_tensor_of_zeros_and_a_row_of_zeros_decode_to_zeros(self):
        assert not E8P(2).fake_quantize(torch.zeros(2, 8)).any()
        x = normal(3, 40)
        x[1] = 0
        values = E8P(2, block_size="row").fake_quantize(x)
        assert not values[1].any()
        assert values[0].all()
        assert E8P(2).fake_quantize(x).all()  # the codebook has no zero

    def test_a_ragged_last_vector_is_encoded_as_if_padded_with_zeros(self):
        x = normal(5, 12)
        quantized = E8P(2).quantize(x)
        scales = {"scales": quantized.parts["scales"]}
        padded = E8P(2).encode(torch.nn.functional.pad(x, (0, 4)).unsqueeze(1), scales)
        assert torch.equal(quantized.parts["codes"], padded.squeeze(1))
        assert quantized.dequantize().shape == (5, 12)

    def test_bytes_that_are_too_few_or_no_bytes_are_refused(self):
        with pytest.raises(ValueError, match="3 codes of 16 bits take 6 bytes a row, found 5"):
            E8P(2).unpack({"codes": torch.zeros(2, 5, dtype=torch.uint8)}, (2, 20), -1)
        with pytest.raises(ValueError, match=r"torch\.uint8, found torch\.int64"):
            E8P(2).unpack({"codes": torch.zeros(2, 6, dtype=torch.int64)}, (2, 20), -1)
