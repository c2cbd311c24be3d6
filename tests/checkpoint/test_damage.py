"""R5: whatever becomes of its files, a damaged checkpoint is found, named, set aside, and the one before is used."""

import dataclasses
import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from maestro_jax.checkpoint import committed
from maestro_jax.checkpoint.committed import CheckpointError, Damage, write_manifest
from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.checkpoint.store import CheckpointStore, Restored
from maestro_jax.errors import DataError

BEFORE, NEWEST = 5, 9
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")  # what Orbax writes when it commits


def make_state(fill: int | None = None) -> dict[str, jax.Array]:
    """Names like those of a train state; arrays that do not compress, since no bits of them are alike."""
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 32), dtype=np.uint32) & 0xBFFFFFFF  # finite numbers
    weights = jnp.asarray(bits if fill is None else np.full_like(bits, fill)).view(jnp.float32)
    return {"params/w/value": weights, "opt_state/mu": weights[::-1].astype(jnp.bfloat16), "step": jnp.int32(3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints; the older one holds zeros."""
    directory = tmp_path_factory.mktemp("saved")
    store = CheckpointStore(directory, keep=2)
    store.save(BEFORE, make_state(fill=0), {"name": "before"})
    store.save(NEWEST, make_state(), {"name": "newest"})
    store.close()
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


@dataclasses.dataclass
class Found:
    """What a restore made of a directory."""

    restored: Restored | None
    notes: list[str]


def restore(directory: Path) -> Found:
    notes: list[str] = []
    store = CheckpointStore(directory, keep=2, note=notes.append)
    try:
        return Found(store.restore_newest(make_state(fill=7)), notes)
    finally:
        store.close()


def files(checkpoint: Path) -> list[Path]:
    """Those that hold it, in a fixed order of kinds (names of data files are random)."""
    found = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA"]
    found.remove(checkpoint / "commit_success.txt")
    return sorted(found, key=lambda path: (str(path.parent), path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, rng: random.Random) -> None:
    del rng
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, delete)


def assert_the_one_before_is_used(directory: Path) -> str:
    """Returns what was said."""
    found = restore(directory)
    assert found.restored is not None and found.restored.step == BEFORE
    assert found.restored.run == {"name": "before"} and not np.asarray(found.restored.state["params/w/value"]).any()
    assert sorted(path.name for path in directory.iterdir()) == [str(BEFORE), f"{NEWEST}.damaged"]
    (line,) = found.notes
    assert f"{directory}/{NEWEST} is damaged" in line and f"goes on from step {BEFORE}" in line and "\n" not in line
    return line


def damaged_in_turn(saved: Path, scratch: Path, times: int) -> None:
    """Every file in turn, each damaged in another way than the time before; `times` restores in all."""
    rng = random.Random(0)
    kinds = len(files(saved / str(NEWEST)))
    for number in range(times):
        directory = shutil.copytree(saved, scratch / str(number))
        path = files(directory / str(NEWEST))[number % kinds]
        damage = DAMAGES[(number + number // kinds) % len(DAMAGES)]
        damage(path, rng)
        try:
            assert_the_one_before_is_used(directory)
        except AssertionError as error:
            raise AssertionError(f"{damage.__name__} of {path.relative_to(directory)} (number {number})") from error
        shutil.rmtree(directory)


def test_an_untouched_copy_is_used(copy: Path) -> None:
    found = restore(copy)
    assert found.restored is not None and found.restored.step == NEWEST and found.notes == []
    for name, leaf in make_state().items():
        assert np.asarray(found.restored.state[name]).tobytes() == np.asarray(leaf).tobytes()


def test_damaged_arrays_are_gone_when_the_next_are_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states need not fit into memory."""
    path = max((copy / str(NEWEST) / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 1
    path.write_bytes(raw)
    write_manifest(epath.Path(copy / str(NEWEST)))  # so that only a fingerprint finds it
    alive: list[int] = []
    read_state = committed.Committed.read_state

    def counted(self: committed.Committed, target: Any) -> Any:
        alive.append(sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()))
        return read_state(self, target)

    monkeypatch.setattr(committed.Committed, "read_state", counted)
    assert_the_one_before_is_used(copy)
    first, second = alive
    assert second <= first


def test_100_damages_of_100_are_found(saved: Path, tmp_path: Path) -> None:
    damaged_in_turn(saved, tmp_path, times=100)


def test_files_larger_than_what_is_hashed_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a real size: their beginning is covered by fingerprints alone."""
    monkeypatch.setattr(committed, "HASHED_BYTES", 1024)
    store = CheckpointStore(tmp_path / "saved", keep=2)
    store.save(BEFORE, make_state(fill=0), {"name": "before"})
    store.save(NEWEST, make_state(), {"name": "newest"})
    store.close()
    rng = random.Random(0)
    for number in range(20):
        directory = shutil.copytree(tmp_path / "saved", tmp_path / str(number))
        largest = max(files(directory / str(NEWEST)), key=lambda path: path.stat().st_size)
        assert largest.stat().st_size > 8 * 1024
        flip(largest, rng)
        assert_the_one_before_is_used(directory)


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_nobody_reads_may_be_damaged(damage: Callable, name: str, copy: Path) -> None:
    damage(copy / str(NEWEST) / name, random.Random(1))
    found = restore(copy)
    assert found.restored is not None and found.restored.step == NEWEST


def test_a_changed_array_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of another checkpoint, all of them whole, behind the manifest of this one: only fingerprints tell."""
    shutil.rmtree(copy / str(NEWEST) / "state")
    shutil.copytree(copy / str(BEFORE) / "state", copy / str(NEWEST) / "state")
    monkeypatch.setattr(committed, "_check_files", lambda path: None)
    line = assert_the_one_before_is_used(copy)
    assert "opt_state/mu has fingerprint" in line


def test_two_damaged_ones_are_both_passed_over(copy: Path) -> None:
    shutil.copytree(copy / str(NEWEST), copy / "12")
    shutil.copytree(copy / str(NEWEST), copy / "12.damaged")  # of an earlier start
    delete(copy / str(NEWEST) / "run/run.json", random.Random(0))
    flip(copy / "12/MANIFEST", random.Random(0))
    found = restore(copy)
    assert found.restored is not None and found.restored.step == BEFORE
    assert sorted(path.name for path in copy.iterdir()) == ["12.damaged", "12.damaged+", "5", "9.damaged"]
    assert len(found.notes) == 2


def test_steps_after_a_damaged_one_can_be_saved_again(copy: Path) -> None:
    flip(copy / str(NEWEST) / "run/run.json", random.Random(0))
    store = CheckpointStore(copy, keep=2, note=lambda line: None)
    restored = store.restore_newest(make_state())
    assert restored is not None
    store.save(NEWEST - 1, restored.state, {})
    store.save(NEWEST, restored.state, {})
    store.close()
    assert sorted(path.name for path in copy.iterdir()) == ["8", "9", "9.damaged"]


def test_where_none_is_whole_nothing_is_renamed_and_nothing_begins(copy: Path) -> None:
    for step in (BEFORE, NEWEST):
        delete(copy / f"{step}/MANIFEST", random.Random(0))
    with pytest.raises(CheckpointError, match=r"no checkpoint that is whole \(9: MANIFEST is missing; 5: MANIFEST"):
        restore(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["5", "9"]


def test_a_failing_file_system_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, size: int) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(committed, "_hash", fail)
    with pytest.raises(CheckpointError, match="cannot be read .*Input/output error.* nothing there was changed"):
        restore(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["5", "9"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("PERMISSION_DENIED: Error opening ", OSError),
        ("UNKNOWN: Failed to read: Input/output error [os_error_code='5']", OSError),
        ("NOT_FOUND: Failed to open: No such file or directory [os_error_code='2']", Damage),
        ("RESOURCE_EXHAUSTED: Out of memory", OSError),
        ("DATA_LOSS: CRC-32C checksum verification failed", Damage),
        ("INVALID_ARGUMENT: Error parsing object member", Damage),
    ],
)
def test_damage_is_told_from_a_failing_file_system(text: str, kind: type[Exception]) -> None:
    def read() -> dict:
        try:
            raise ValueError(text)
        except ValueError as error:
            raise RuntimeError("reading an array failed") from error  # as Orbax does

    with pytest.raises(kind, match=text.split()[0]):
        committed._reading(read)


def test_a_reader_refuses_what_is_damaged(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy / str(NEWEST) / "state/_METADATA", random.Random(0))
    with pytest.raises(DataError, match=rf"9 is damaged: state/_METADATA .*; use the one before, {copy}/5"):
        ParamReader(copy, None)
    with pytest.raises(DataError, match="MANIFEST is missing; and there is none before it"):
        delete(copy / f"{BEFORE}/MANIFEST", random.Random(0))
        ParamReader(copy, BEFORE)
    monkeypatch.setattr(committed, "_check_files", lambda path: None)
    other = shutil.copytree(copy / str(BEFORE), copy / "7")
    shutil.copy(copy / str(NEWEST) / "run/run.json", other / "run/run.json")
    reader = ParamReader(copy, 7)
    with pytest.raises(DataError, match="7 is damaged: params/w/value has fingerprint .* use the one before"):
        reader.read("w")
