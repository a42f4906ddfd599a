"""The table of kernel launches."""

from __future__ import annotations

import pytest

from lqer.kernels.tuning import BUCKETS, GemmLaunch, bucket_of, gemm_launch, gemv_launch, read_table


@pytest.mark.parametrize(("m", "bucket"), [(1, 16), (16, 16), (17, 32), (130, 256), (256, 256), (257, None)])
def test_a_bucket_holds_all_numbers_of_tokens_up_to_its_own(m, bucket):
    assert bucket_of(m) == bucket


def test_the_table_has_rows_for_every_code_width_and_bucket():
    gemm = {("gemm", width, bucket) for width in (2, 4, 8) for bucket in BUCKETS}
    assert read_table().keys() == gemm | {("gemv",)}


def test_a_measured_shape_uses_its_own_row_and_another_shape_the_nearest():
    rows = {(entry.n, entry.k): entry.launch for entry in read_table()["gemm", 4, 16]}
    for (n, k), launch in rows.items():
        assert gemm_launch(4, n, k, 16) == launch
    assert gemm_launch(4, 28000, 8000, 16) == rows[28672, 8192]
    assert isinstance(rows[28672, 8192], GemmLaunch)


def test_one_token_uses_the_launch_of_the_nearest_shape():
    rows = {(entry.n, entry.k): entry.launch for entry in read_table()["gemv",]}
    assert gemv_launch(4096, 11008) == rows[4096, 11008]
    assert gemv_launch(4000, 12000) == rows[4096, 11008]
