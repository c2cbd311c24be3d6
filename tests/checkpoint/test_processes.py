"""R7: a checkpoint goes from one process to two and back, and two agree on what is damaged."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from maestro_jax.checkpoint.committed import committed_steps
from maestro_jax.checkpoint.fingerprint import fingerprints
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.errors import EXIT_CONFIG, EXIT_LOST
from tests.checkpoint.process_worker import COUNT, DEVICES
from tests.checkpoint.test_store import RUN, make_state, names, save
from tests.conftest import FLAGS
from tests.parallel.processes import started

MOST_SECONDS = 240  # for both processes on a busy machine


def in_two_processes(directory: Path, results: Path) -> list[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [flag for flag in FLAGS if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={DEVICES}")
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.checkpoint.process_worker", address]
    with contextlib.ExitStack() as started:
        running = []
        for number in range(COUNT):
            arguments = [str(number), str(directory), str(results / f"{number}.json")]
            log = started.enter_context((results / f"{number}.log").open("wb"))
            process = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)
            started.callback(process.kill)
            running.append(process)
        codes = [process.wait(MOST_SECONDS) for process in running]
    if any(codes):
        pytest.fail("\n".join(log.read_text() for log in sorted(results.glob("*.log"))))
    return [json.loads((results / f"{number}.json").read_text()) for number in range(COUNT)]


def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    """The newest of three is damaged in a file of arrays, which the processes read in parts."""
    directory, results = tmp_path / "checkpoints", tmp_path / "results"
    results.mkdir()
    saved = make_state((2, 2, 2))
    expected = fingerprints(named_leaves(saved))
    save(directory, saved, 1, 2, 3, keep=3)
    largest = max((directory / "3/state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)

    found = in_two_processes(directory, results)
    assert [one["step"] for one in found] == [2, 2]
    assert [one["fingerprints"] for one in found] == [expected, expected]
    assert ["3 is damaged" in " ".join(one["notes"]) for one in found] == [True, True]
    assert names(directory) == ["1", "2", "3", "3.damaged"]  # 3 is what both have saved

    store = CheckpointStore(directory, keep=3)
    restored = store.restore_newest(make_state((1, 1, 1), fill=0.0))
    store.close()
    assert restored is not None and (restored.step, restored.run) == (3, RUN)
    assert fingerprints(named_leaves(restored.state)) == expected


@pytest.mark.parametrize("number", range(COUNT))
def test_a_save_that_fails_in_one_process_ends_both(number: int, tmp_path: Path) -> None:
    """Nobody waits for the twenty minutes that Orbax gives a save."""
    directory = tmp_path / "checkpoints"
    arguments = ["tests.checkpoint.failing_worker", f"--directory={directory}", f"--fails={number}"]
    with started(arguments, tmp_path) as running:
        codes = [process.wait(MOST_SECONDS) for process in running]
    text = running[number].text
    assert codes[number] == EXIT_CONFIG, text
    assert f"the checkpoint of step 2 cannot be written to {directory}" in text and "File too large" in text
    assert codes[1 - number] in (EXIT_LOST, -signal.SIGABRT), running[1 - number].text
    assert committed_steps(epath.Path(directory)) == [1]


def test_a_process_that_is_lost_in_a_save_is_no_failing_disk(tmp_path: Path) -> None:
    arguments = ["tests.checkpoint.failing_worker", f"--directory={tmp_path / 'checkpoints'}", "--dies=1"]
    with started(arguments, tmp_path) as running:
        codes = [process.wait(MOST_SECONDS) for process in running]
    assert codes[0] in (EXIT_LOST, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, running[0].text
    assert "cannot be written" not in running[0].text
