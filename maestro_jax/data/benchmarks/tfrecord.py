"""TFRecord files of tf.train.Example, read without TensorFlow.

A record is a length (8 bytes), a checksum of the length (4), the data, a checksum of the data (4); see
tensorflow/core/lib/io/record_writer.h. An Example is a protocol buffer: features.feature[name] is a list of bytes,
floats or integers (tensorflow/core/example/feature.proto). Floats are not needed here and left out. The checksum of
the length is verified, so that a damaged file is not read out of step; that of the data is not: in Python it would
take longer than everything else, and images are decoded anyway.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from maestro_jax.errors import DataError

MAX_RECORD_BYTES = 1 << 30
Features = dict[str, list[bytes] | list[int]]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_records(path: Path) -> Iterator[bytes]:
    """The data of every record.

    Raises:
      DataError: a file that ends within a record, or that is none of this format.
    """
    number = 0
    with open(path, "rb") as file:
        while head := file.read(12):
            if len(head) < 12 or _masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
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


def parse_example(data: bytes) -> Features:
    """Bytes and integers of an Example by name.

    Raises:
      ValueError: not such a message.
    """
    features: Features = {}
    for part in _field(data, 1):  # Example.features
        for entry in _field(part, 1):  # Features.feature, a map: entries of key and value
            key, value = _field(entry, 1), _field(entry, 2)
            if len(key) == 1 and len(value) == 1:
                features[key[0].decode()] = _values(value[0])
    return features


def _values(feature: bytes) -> list[bytes] | list[int]:
    """Feature is one of bytes_list (1), float_list (2), int64_list (3)."""
    numbers = [number for part in _field(feature, 3) for number in _integers(part)]
    return numbers or [value for part in _field(feature, 1) for value in _field(part, 1)]


def _integers(part: bytes) -> list[int]:
    """Int64List.value, packed into one field or one by one."""
    numbers = []
    for name, kind, value in _message(part):
        if name == 1 and kind == _VARINT:
            numbers.append(_signed(int(value)))
        elif name == 1 and isinstance(value, bytes):
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                numbers.append(_signed(number))
    return numbers


def _field(message: bytes, wanted: int) -> list[bytes]:
    return [value for name, _, value in _message(message) if name == wanted and isinstance(value, bytes)]


def _message(data: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """(field number, wire type, value) of a protocol buffer."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, kind, value
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"unknown wire type {kind}")
        length, position = _varint(data, position) if kind == _BYTES else ({_FIXED64: 8, _FIXED32: 4}[kind], position)
        if position + length > len(data):
            raise ValueError("the message ends within a field")
        yield tag >> 3, kind, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number does not end")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
