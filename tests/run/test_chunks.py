"""Shares of the decoder blocks: together they are all of them, each once."""

from __future__ import annotations

import pytest

from lqer.errors import ConfigError
from lqer.run.chunks import Chunk, parse_chunk


@pytest.mark.parametrize("total", [1, 7, 32])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_chunks_together_are_all_blocks_in_order_and_nearly_equal(total, count):
    chunks = [Chunk(index, count).blocks(total) for index in range(1, count + 1)]
    assert [block for chunk in chunks for block in chunk] == list(range(total))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_a_share_is_read_from_its_place_and_their_number():
    assert parse_chunk("2/4") == Chunk(2, 4)
    assert str(Chunk(2, 4)) == "2/4"


@pytest.mark.parametrize(
    ("text", "rule"),
    [("0/4", "i must be between 1 and n; found '0/4'"), ("5/4", "found '5/4'"), ("a/b", "must have the form i/n")],
)
def test_a_chunk_that_cannot_be_is_refused(text, rule):
    with pytest.raises(ConfigError, match=rule):
        parse_chunk(text)
