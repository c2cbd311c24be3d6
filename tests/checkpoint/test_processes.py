"""R7: a checkpoint goes from one process to two and back, and two agree on what is damaged."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.checkpoint.fingerprint import fingerprints
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from tests.checkpoint.process_worker import COUNT, DEVICES
from tests.checkpoint.test_store import RUN, make_state, names, save
from tests.conftest import FLAGS

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
