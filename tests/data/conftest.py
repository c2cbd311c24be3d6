"""Tasks for the tests of the data room."""

import io

import pytest
from PIL import Image

from maestro_jax.types import Task
from tests.data.listed import Listed


@pytest.fixture(scope="session")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tasks(png: bytes) -> Listed:
    return Listed(Task(f"toy/{i:05d}", f"question {i}?", (png,), (str(i),), "toy") for i in range(11))
