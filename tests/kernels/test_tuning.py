"""The table that launches are read from."""

from __future__ import annotations

import pytest

from lqer.kernels.tuning import BUCKETS, GemmLaunch, bucket_of, gemm_launch, gemv_launch, read_table


@pytest.mark.parametrize(("m", "bucket"), [(1, 16), (16, 16), (17, 32), (130, 256), (256, 256), (257, None)])
def test_a_bucket_serves_all_numbers_of_tokens_up_to_its_own(m, bucket):
    assert bucket_of(m) == bucket


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_width_and_bucket_has_a_launch_or_is_decoded_to_memory(width, bucket):
    launch = gemm_launch(width, 5000, 3000, bucket)
    assert launch is None or launch.block_m <= 128


def test_a_measured_shape_takes_its_own_row_and_another_shape_the_nearest():
    rows = {(entry.n, entry.k): entry.launch for entry in read_table()["gemm", 4, 16]}
    for (n, k), launch in rows.items():
        assert gemm_launch(4, n, k, 16) == launch
    assert gemm_launch(4, 28000, 8000, 16) == rows[28672, 8192]
    assert isinstance(rows[28672, 8192], GemmLaunch)


def test_one_token_has_launches_of_its_own():
    assert gemv_launch(4096, 4096).block_n % 16 == 0
