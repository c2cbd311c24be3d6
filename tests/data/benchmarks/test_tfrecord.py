"""TFRecord without TensorFlow: framing, checksums, damage."""

import pathlib

import pytest

from maestro_jax.data.benchmarks.tfrecord import count_records, masked_crc, parse_example, read_records
from maestro_jax.errors import DataError
from tests.data.benchmarks.layouts import example, framed

RECORDS = [b"", b"one", b"\0" * 1000]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(framed(record) for record in RECORDS))
    return path


def test_the_checksum_is_that_of_crc32c() -> None:
    """The check value of CRC-32C ("123456789" → e3069283), rotated right by 15 plus TensorFlow's constant."""
    crc = 0xE3069283
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_records_are_read_back(path: pathlib.Path) -> None:
    assert list(read_records(path)) == RECORDS
    assert count_records(path) == len(RECORDS)


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_file_that_ends_within_a_record(path: pathlib.Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="a.tfrecord record 2: the file ends within it"):
        list(read_records(path))


def test_a_damaged_length_is_not_believed(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 64
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.tfrecord record 0: not a TFRecord or damaged"):
        list(read_records(path))


def test_examples() -> None:
    features = {"question": [b"What?"], "images": [b"a", b"b"], "places": [0, 2**40, -1]}
    assert parse_example(example(features)) == features
    with pytest.raises(ValueError, match="."):
        parse_example(b"\xff\xff no message")
