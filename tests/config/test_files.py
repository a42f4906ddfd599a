"""Whatever a configuration file is, reading it ends, with values or one line."""

from __future__ import annotations

import os

import pytest

from lqer.config import read_config
from lqer.config.files import MAX_BYTES, read_toml
from lqer.config.reader import parse_override
from lqer.errors import ConfigError

MODEL = 'model = "m"\n[formats]\nw4 = { kind = "mxint", bits = 4 }\n[quantize]\nweight = "w4"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x = {'[' * 500}{']' * 500}", "nested"),
        (f"x = {'[' * 100_000}{']' * 100_000}", "nested too deep"),
        (f"{'.'.join(['a'] * 1200)} = 1", "nested"),
        (f"seed = {'9' * 5000}", "not TOML: .*digit"),
        ("x = 1\n" + "#" * MAX_BYTES, "is larger than"),
    ],
)
def test_a_file_beyond_all_bounds_is_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_toml(tmp_path / "a.toml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["/dev/zero", "/proc/self/mem", "x" * 5000, "a\x00b", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(ConfigError, match=r"is not a regular file|cannot be read|is a folder"):
        read_toml(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_toml(tmp_path / "pipe.toml")


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.toml").symlink_to(tmp_path / "b.toml")
    (tmp_path / "b.toml").symlink_to(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match=r"cannot be read|no such config file"):
        read_config(tmp_path / "a.toml")


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert read_toml(tmp_path / "a.toml") == {"seed": 3}


def test_a_long_chain_of_files_is_refused(tmp_path):
    for link in range(40):
        (tmp_path / f"{link}.toml").write_text(f'extends = "{link + 1}.toml"\n')
    (tmp_path / "40.toml").write_text(MODEL)
    with pytest.raises(ConfigError, match="more than 32 files extend one another"):
        read_config(tmp_path / "0.toml")


def test_a_file_that_two_others_extend_counts_once_where_it_is_first(tmp_path):
    (tmp_path / "base.toml").write_text(MODEL + "[calibration]\nnum_samples = 1\nseq_len = 1\n")
    (tmp_path / "left.toml").write_text('extends = "base.toml"\n[calibration]\nnum_samples = 2\n')
    (tmp_path / "right.toml").write_text('extends = "base.toml"\n[calibration]\nseq_len = 2\n')
    (tmp_path / "both.toml").write_text('extends = ["left.toml", "right.toml"]\n')
    calibration = read_config(tmp_path / "both.toml").calibration
    assert (calibration.num_samples, calibration.seq_len) == (2, 2)


def test_diamonds_over_diamonds_are_read_in_linear_time(tmp_path):
    for level in range(25):
        (tmp_path / f"{level}.toml").write_text(f'extends = ["{level + 1}.toml", "{level + 1}.toml"]\n')
    (tmp_path / "25.toml").write_text(MODEL)
    assert read_config(tmp_path / "0.toml").model == "m"


@pytest.mark.parametrize("override", ["--x=" + "[" * 500, "--" + ".".join("a" * 1200) + "=1", "--seed=" + "9" * 5000])
def test_an_override_beyond_all_bounds_is_refused_in_a_short_line(override):
    with pytest.raises(ConfigError) as refused:
        parse_override(override)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("tag", ["a\nb", "..", "", " ", "store", "-x", "a/b", "x" * 300, "a\x00b"])
def test_a_tag_that_cannot_be_a_folder_is_refused(tmp_path, tag):
    (tmp_path / "a.toml").write_text(MODEL)
    with pytest.raises(ConfigError, match="tag: must be"):
        read_config(tmp_path / "a.toml", tag)


@pytest.mark.parametrize("seed", [2**64, -(10**20)])
def test_a_seed_of_more_than_64_bits_is_refused(tmp_path, seed):
    (tmp_path / "a.toml").write_text(MODEL)
    with pytest.raises(ConfigError, match="seed: must be"):
        read_config(tmp_path / "a.toml", None, [f"--seed={seed}"])
