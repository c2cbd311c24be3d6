"""R6: a save that fails in the background stops the run, and says why."""

import contextlib
import logging
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.checkpoint.committed import CheckpointError
from maestro_jax.checkpoint.store import CheckpointStore

SECONDS = 60  # far above what a failing write needs
MEBIBYTE = 2**20


def make_state() -> dict[str, jax.Array]:
    """A megabyte that does not compress."""
    return {"w": jnp.asarray(np.random.default_rng(0).standard_normal(MEBIBYTE // 4), jnp.float32)}


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A file system that one checkpoint fits into."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * MEBIBYTE // 2}", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def files_kept_small(directory: Path) -> Iterator[None]:
    """The kernel refuses writes behind a few kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE // 4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def something_else_mounted(directory: Path) -> Iterator[None]:
    """The directory is gone."""
    aside = directory.with_name("aside")
    directory.rename(aside)
    directory.touch()
    yield
    directory.unlink()
    aside.rename(directory)


def fail_by_checking(store: CheckpointStore) -> None:
    """As a run does between its steps."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        store.check()
    pytest.fail("nobody heard of the failure")


def is_cleared(directory: Path) -> bool:
    """Whether the next start clears away what was begun. Not while threads of the store that failed still write."""
    CheckpointStore(directory, keep=5).close()
    return [path.name for path in directory.iterdir()] == ["1"]


def not_reached(store: CheckpointStore) -> None:
    pytest.fail("the save itself fails")


@pytest.mark.parametrize(
    ("failure", "says", "noticed"),
    [
        (files_kept_small, "File too large", fail_by_checking),
        (files_kept_small, "File too large", CheckpointStore.close),
        (files_kept_small, "File too large", lambda store: store.save(3, make_state(), {})),
        (something_else_mounted, "Not a directory", not_reached),
    ],
)
def test_a_failed_save_is_told(
    failure: Callable, says: str, noticed: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoints"
    store = CheckpointStore(directory, keep=5)
    store.save(1, make_state(), {})
    store.wait()
    with failure(directory):
        with pytest.raises(CheckpointError) as caught:
            store.save(2, make_state(), {})
            noticed(store)
        text = str(caught.value)
    assert f"the checkpoint of step 2 cannot be written to {directory}" in text and says in text
    assert "free or mount its disk and start the run again: it goes on from the checkpoint before" in text
    assert "\n" not in text and len(text) < 700
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    again = CheckpointStore(directory, keep=5)
    restored = again.restore_newest({"w": jnp.zeros(MEBIBYTE // 4)})
    again.close()
    assert restored is not None and restored.step == 1
    until = time.monotonic() + 30.0
    while not is_cleared(directory) and time.monotonic() < until:
        time.sleep(0.1)
    assert is_cleared(directory)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path):
        store = CheckpointStore(tmp_path, keep=5)
        store.save(1, make_state(), {})
        store.wait()
        store.save(2, make_state(), {})
        with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*RESOURCE_EXHAUSTED.*No space left"):
            store.close()
        again = CheckpointStore(tmp_path, keep=5)
        restored = again.restore_newest({"w": jnp.zeros(MEBIBYTE // 4)})
        again.close()
        assert restored is not None and restored.step == 1
