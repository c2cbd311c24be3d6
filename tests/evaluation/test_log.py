"""The log of an evaluation: whole batches survive a kill at any byte, and nothing else does."""

from pathlib import Path

import pytest

from maestro_jax.errors import DataError
from maestro_jax.evaluation.log import RecordLog

BATCHES = {"0 greedy": [{"task": "a", "answer": None}, {"task": "b", "answer": "é"}], "1 greedy": [{"task": "c"}]}


def write(path: Path) -> bytes:
    log = RecordLog(path)
    for name, records in BATCHES.items():
        log.add(name, records)
    log.close()
    return path.read_bytes()


def test_what_is_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write(path)
    again = RecordLog(path)
    assert {name: again.get(name) for name in BATCHES} == BATCHES and again.get("2 greedy") is None


def test_a_batch_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    write(path)
    again = RecordLog(path, is_whole=lambda records: records[0]["task"] != "a")
    assert again.get("0 greedy") is None and again.get("1 greedy") == BATCHES["1 greedy"]
    again.add("0 greedy", [{"task": "d"}])
    again.close()
    found = RecordLog(path)
    assert found.get("0 greedy") == [{"task": "d"}] and found.get("1 greedy") == BATCHES["1 greedy"]
    assert path.read_text().count('"batch": "0 greedy"') == 1 and '"task": "a"' not in path.read_text()


def test_a_kill_at_any_byte_leaves_whole_batches_that_can_be_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    whole = write(path)
    first = whole.index(b'"0 greedy"') + len(b'"0 greedy", "records": 2}\n')
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        log = RecordLog(path)
        found = [name for name in BATCHES if log.get(name) is not None]
        assert found == (["0 greedy"] if size >= first else [])
        for name in BATCHES.keys() - set(found):
            log.add(name, BATCHES[name])
        log.close()
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_damage_within_is_named(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(write(path).replace(b'{"task": "b"', b'{"task": b"'))
    with pytest.raises(DataError, match=r"episodes.jsonl line 2 is damaged; delete the file"):
        RecordLog(path)
