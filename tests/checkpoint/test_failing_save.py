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
FREE = "free its disk, or raise its quota"


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


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """As a disk is that the kernel has seen an error on."""
    commands = (("--bind", str(directory), str(directory)), ("-o", "remount,bind,ro", str(directory)))
    if shutil.which("mount") is None or subprocess.run(["mount", *commands[0]], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    subprocess.run(["mount", *commands[1]], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


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
    ("failure", "says", "cure", "noticed"),
    [
        (files_kept_small, "File too large", FREE, fail_by_checking),
        (files_kept_small, "File too large", FREE, CheckpointStore.close),
        (files_kept_small, "File too large", FREE, lambda store: store.save(3, make_state(), {})),
        (something_else_mounted, "Not a directory", "see that its disk is mounted and whole", not_reached),
        (read_only, "Read-only file system", "make it writable for this user", not_reached),
    ],
)
def test_a_failed_save_is_told(
    failure: Callable, says: str, cure: str, noticed: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    assert f"; {cure} and start the run again: it goes on from the checkpoint before" in text
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


@pytest.mark.parametrize(
    "error",
    [
        ValueError("axis 3 is out of bounds for array of dimension 2"),
        ValueError('INVALID_ARGUMENT: Error opening "zarr" driver: unsupported dtype'),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_no_fault_of_the_disk_is_told_in_its_own_words(
    error: Exception, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever frees a disk because of a bug, or of a device without memory, frees it for nothing."""

    def fails(*told: object, **named: object) -> None:
        raise error

    store = CheckpointStore(tmp_path / "checkpoints", keep=5)
    if at_once:
        monkeypatch.setattr(store._manager, "save", fails)
    else:
        monkeypatch.setattr("maestro_jax.checkpoint.store.write_manifest", fails)
    with pytest.raises(type(error)) as caught:
        store.save(2, make_state(), {})
        store.wait()
    assert str(error) in str(caught.value) and "disk" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("RESOURCE_EXHAUSTED: quota of the bucket", FREE),
        ("PERMISSION_DENIED: the account may not write", "make it writable for this user"),
        ("UNAUTHENTICATED: the token is too old", "make it writable for this user"),
        ("UNAVAILABLE: HTTP 503", "see that its disk is mounted and whole"),
        ("OUT_OF_RANGE: Failed to write [os_error_code='122']", FREE),
        ("OUT_OF_RANGE: Failed to write [os_error_code='5']", "see that its disk is mounted and whole"),
    ],
)
def test_what_an_object_store_says_has_its_cure(
    said: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorStore says it: in a ValueError."""

    def fails(*told: object) -> None:
        raise ValueError(said)

    monkeypatch.setattr("maestro_jax.checkpoint.store.write_manifest", fails)
    store = CheckpointStore(tmp_path / "checkpoints", keep=5)
    with pytest.raises(CheckpointError) as caught:
        store.save(2, make_state(), {})
        store.wait()
    assert said in str(caught.value) and f"; {cure} and start the run again" in str(caught.value)
