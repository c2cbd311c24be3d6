"""The same episodes on one device, on meshes of eight, and over two processes that each serve their own groups."""

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from tests.conftest import FLAGS
from tests.rollout import episodes, process_worker
from tests.rollout.process_worker import MEMBERS, TASKS, Served

COUNT, DEVICES = 2, 2  # processes, and devices of each
TOLERANCE = 1e-5  # fp32; sums over heads and features are split over devices
MOST_SECONDS = 240  # for both processes, that all they compile is compiled on a busy machine


def in_this_process(talker: episodes.Talker, *axes: int) -> Served:
    devices = jax.devices()[: math.prod(axes)]
    return process_worker.serve(talker, make_mesh(MeshConfig(*axes), devices), seed=7)


@pytest.fixture(scope="module")
def alone(talker: episodes.Talker) -> Served:
    return in_this_process(talker, 1, 1, 1)


# ---- processes ---------------------------------------------------------------------------------------------


def in_processes(talker: episodes.Talker, mesh: str, directory: Path) -> list[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    results = [directory / f"{number}.json" for number in range(COUNT)]
    logs = [directory / f"{number}.log" for number in range(COUNT)]
    with contextlib.ExitStack() as started:
        running = []
        for number in range(COUNT):
            arguments = [talker.directory, address, COUNT, number, mesh, results[number]]
            running.append(launch(arguments, logs[number]))
            started.callback(running[-1].kill)
        done = wait_for_all(running)
    if not done:
        pytest.fail("\n".join(f"---- {log.name}\n{log.read_text()}" for log in logs))
    return [process_worker.read(result) for result in results]


def launch(arguments: Sequence[object], log: Path, module: str = process_worker.__name__) -> subprocess.Popen[bytes]:
    flags = [flag for flag in FLAGS if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={DEVICES}")
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": " ".join(flags)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for_all(running: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether all end well; at the first that does not, the others would wait for it in vain."""
    end = time.monotonic() + MOST_SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in running]
        if any(codes) or None not in codes:
            return not any(codes)
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module", params=["1,2,2", pytest.param("1,4,1", marks=pytest.mark.slow)])
def served(
    request: pytest.FixtureRequest, talker: episodes.Talker, tmp_path_factory: pytest.TempPathFactory
) -> list[Served]:
    return in_processes(talker, request.param, tmp_path_factory.mktemp("processes"))


# ---- tests -------------------------------------------------------------------------------------------------


def test_two_processes_sample_what_one_device_does(served: list[Served], alone: Served) -> None:
    together = {at: episode for process in served for at, episode in process.episodes.items()}
    episodes.assert_same(together, alone.episodes, TOLERANCE)
    assert all(min(process.moved) > 0 for process in served)


def test_each_process_serves_its_own_groups_with_its_own_experts(served: list[Served], alone: Served) -> None:
    own = len(TASKS) // COUNT
    for number, process in enumerate(served):
        groups = range(number * own, (number + 1) * own)
        assert list(process.episodes) == [(g, m) for g in groups for m in range(MEMBERS)]
        questions = {TASKS[g].question for g in groups}
        assert sorted(process.asked) == sorted(question for question in alone.asked if question in questions)
        assert process.asked


@pytest.mark.parametrize("axes", [(1, 4, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)], ids=str)
def test_a_mesh_samples_what_one_device_does(
    axes: tuple[int, int, int], talker: episodes.Talker, alone: Served
) -> None:
    found = in_this_process(talker, *axes)
    episodes.assert_same(found.episodes, alone.episodes, TOLERANCE)
    assert sorted(found.asked) == sorted(alone.asked) and min(found.moved) > 0
