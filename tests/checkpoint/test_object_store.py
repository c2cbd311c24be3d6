"""What this package itself reads and writes of a checkpoint, on an object store: one in memory, behind gs:// paths.

Arrays are TensorStore's, which has drivers of its own.
"""

import shutil
import sys
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from maestro_jax.checkpoint.committed import (
    Committed,
    Damage,
    committed_steps,
    write_manifest,
)
from maestro_jax.checkpoint.store import CheckpointStore, absolute
from maestro_jax.errors import ConfigError

STEP = 3


class Bucket(MemoryFileSystem):
    """Objects by name; no directories but those that names imply."""

    protocol = ("gcs", "gs")
    cachable = False
    store: dict = {}
    pseudo_dirs: list = [""]

    def __init__(self, finalize_on_close: bool = True):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """The directory of a run's checkpoints in a bucket: one that was saved on a disk, object by object."""
    bucket = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: bucket)
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda name: Bucket)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(STEP, {"w": jnp.arange(8.0)}, {"seed": 4})
    store.close()
    directory = absolute("gs://bucket/run")
    for path in (tmp_path / str(STEP)).rglob("*"):
        if path.is_file():
            bucket.pipe_file(f"gs://bucket/run/{path.relative_to(tmp_path)}", path.read_bytes())
    (directory / str(STEP) / "commit_success.txt").write_text("")  # as Orbax commits there
    shutil.rmtree(tmp_path)
    yield directory
    Bucket.store.clear()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_path_of_an_object_store_stays_one(run: epath.Path) -> None:
    assert str(run) == "gs://bucket/run" and committed_steps(run) == [STEP]
    assert committed_steps(absolute("gs://bucket/other")) == []


def test_a_checkpoint_there_is_whole_or_damaged(run: epath.Path) -> None:
    found = Committed(run, STEP)
    assert found.run == {"seed": 4} and found.leaves["w"].shape == (8,)
    path = run / str(STEP) / "state/_METADATA"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"?")
    with pytest.raises(Damage, match="state/_METADATA is not as it was written"):
        Committed(run, STEP)
    path.unlink()
    with pytest.raises(Damage, match="state/_METADATA is missing"):
        Committed(run, STEP)


def test_a_manifest_written_there_is_the_one_written_on_a_disk(run: epath.Path) -> None:
    path = run / str(STEP) / "MANIFEST"
    text = path.read_text()
    path.unlink()
    with pytest.raises(Damage, match="MANIFEST is missing"):
        Committed(run, STEP)
    write_manifest(run / str(STEP))
    assert path.read_text() == text


def test_what_was_never_committed_there_is_no_checkpoint(run: epath.Path) -> None:
    """A save that a kill cut short has its final name already."""
    (run / "4/state/_METADATA").write_text("{}")
    assert committed_steps(run) == [STEP]
    (run / "4/commit_success.txt").write_text("")
    assert committed_steps(run) == [4, STEP]


def test_a_damaged_one_can_be_renamed_there(run: epath.Path) -> None:
    (run / str(STEP)).rename(run / f"{STEP}.damaged")
    assert committed_steps(run) == []
    assert {path.name for path in (run / f"{STEP}.damaged").iterdir()} >= {"MANIFEST", "run", "state"}


def test_a_store_whose_package_is_missing_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"maestro_jax\[gcs\]"):
        absolute("gs://bucket/run")
