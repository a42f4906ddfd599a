"""What a tensor with learned codebooks takes, counted from GPTVQ's description (arXiv 2402.15319)."""

from lqer.formats import Codebook


def codebook_storage_bits(number_format: Codebook, shape: tuple[int, int]) -> dict[str, int]:
    """Bits that a tensor (rows, length) takes once packed, counted part by part, padding included."""
    rows, length = shape
    layout = number_format.layout(rows, length)
    per_codebook = (number_format.codebook_rank or number_format.centroids * number_format.dimension) * 8 + 16
    basis = number_format.codebook_rank * number_format.centroids * 32
    blocks = -(-length // number_format.scale_block_size) if number_format.scale_block_size else 0
    return {
        "index": 8 * rows * -(-length * number_format.bits // 8),
        "codebook": layout.row_groups * layout.column_groups * per_codebook + basis,
        "scale": 8 * rows * -(-blocks * 4 // 8) + blocks * 2 * 16,
    }
