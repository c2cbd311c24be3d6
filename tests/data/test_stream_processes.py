"""Two processes that read the same file: together they see what one sees, also when one goes on for both."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.data.order import merge_states
from tests.data.stream_worker import read
from tests.data.verl_rows import row, write_rows

ROWS, BROKEN = 100, 42
SECONDS = 120  # for a process to start on a busy machine


def in_processes(file: Path, batches: int, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    results = [file.with_name(f"{index}.json") for index in range(2)]
    module = [sys.executable, "-m", "tests.data.stream_worker", str(file)]
    running = [
        subprocess.Popen([*module, str(index), "2", str(batches), json.dumps(state), str(result)])
        for index, result in enumerate(results)
    ]
    try:
        assert [process.wait(SECONDS) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [json.loads(result.read_text()) for result in results]


@pytest.fixture
def sound(png: bytes, tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sound/train.parquet", [row(number, png) for number in range(ROWS)])


@pytest.fixture
def damaged(png: bytes, tmp_path: Path) -> Path:
    rows = [row(number, png) for number in range(ROWS)]
    rows[BROKEN] = row(BROKEN, png, images=[{"bytes": png[:60], "path": "x.png"}])
    return write_rows(tmp_path / "damaged/train.parquet", rows)


def test_batches_of_two_processes_side_by_side_are_those_of_one(sound: Path) -> None:
    first, second = in_processes(sound, 30, None)
    alone = read(str(sound), 0, 1, 30, None)
    assert [a + b for a, b in zip(first["ids"], second["ids"], strict=True)] == alone["ids"]
    assert first["state"] == second["state"] == alone["state"]


def test_two_processes_one_and_two_again_lose_and_repeat_nothing(sound: Path, damaged: Path) -> None:
    before = in_processes(damaged, 11, None)
    between = read(str(damaged), 0, 1, 7, merge_states([part["state"] for part in before]))
    after = in_processes(damaged, 11, between["state"])

    seen = [name for part in (*before, between, *after) for batch in part["ids"] for name in batch]
    state = merge_states([part["state"] for part in after])
    order = [name for batch in read(str(sound), 0, 1, 40, None)["ids"] for name in batch]
    consumed = [order[position] for position in (*range(state["position"]), *state["beyond"])]
    assert len(seen) == 4 * (11 + 7 + 11) > ROWS
    assert sorted(seen) == sorted(name for name in consumed if name != f"train/{BROKEN:06d}")
