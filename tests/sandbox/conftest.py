"""Every back end that works on this machine, made once."""

import asyncio
from collections.abc import Iterator

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox.choose import make_sandbox
from maestro_jax.sandbox.interface import Sandbox
from maestro_jax.sandbox.process import BackEnd, ProcessSandbox


@pytest.fixture(scope="session", params=["wasm", "bubblewrap", "unsafe_process"])
def back_end(request: pytest.FixtureRequest) -> Iterator[BackEnd]:
    try:
        made = make_sandbox(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(made, ProcessSandbox)
    yield made._back_end
    asyncio.run(made.close())


@pytest.fixture
def sandbox(back_end: BackEnd) -> Sandbox:
    """A new one for every test: where programs wait for their turn, it belongs to an event loop."""
    return ProcessSandbox(back_end)
