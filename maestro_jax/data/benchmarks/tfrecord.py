"""TFRecord files of tf.train.Example, read without TensorFlow.

A record is a length (8 bytes), a checksum of the length (4), the data, a checksum of the data (4); see
tensorflow/core/lib/io/record_writer.h. The checksum of the length is verified, so that a damaged file is not read out
of step; that of the data is not: in Python it would take longer than everything else, and images are decoded anyway.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from maestro_jax.errors import DataError

MAX_RECORD_BYTES = 1 << 30


def read_records(path: Path) -> Iterator[bytes]:
    """The data of every record.

    Raises:
      DataError: a file that ends within a record, or that is none of this format.
    """
    number = 0
    with open(path, "rb") as file:
        while head := file.read(12):
            if len(head) < 12 or masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise DataError(f"{path} record {number}: not a TFRecord or damaged; download the file again")
            (length,) = struct.unpack("<Q", head[:8])
            data = file.read(length + 4) if length <= MAX_RECORD_BYTES else b""
            if len(data) != length + 4:
                raise DataError(f"{path} record {number}: the file ends within it; download the file again")
            yield data[:length]
            number += 1


def count_records(path: Path) -> int:
    """How many records the lengths in the file announce."""
    size, position, count = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while position + 12 <= size:
            file.seek(position)
            (length,) = struct.unpack("<Q", file.read(8))
            position += 16 + length
            count += 1
    return count


def parse_example(data: bytes) -> dict[str, list[bytes] | list[int]]:
    """Texts, images and integers of a tf.train.Example by name.

    Raises:
      ValueError: not such a message.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return {
        name: list(feature.bytes_list.value) or list(feature.int64_list.value) for name, feature in features.items()
    }


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
