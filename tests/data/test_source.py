"""The stored suite: written and read without TensorFlow, complete or not there at all."""

import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from maestro_jax.data.source import TfdsSource
from maestro_jax.data.store import write_tasks
from maestro_jax.errors import EXIT_CONFIG, ConfigError, DataError
from maestro_jax.observe.progress import Progress
from maestro_jax.suite.tasks import build
from maestro_jax.types import Task

ROOT = pathlib.Path(__file__).parents[2]


def toy(domain: str, split: str, number: int) -> Task:
    """A task whose pixels and texts are told apart from every other's; the bytes end in zeros on purpose."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number, len(domain), 0)).save(buffer, "PNG")
    images = (buffer.getvalue() + b"\0\0",) * (number % 3)
    return Task(f"{domain}/{split}/{number:05d}", f"Wie groß ist {number}?", images, (str(number), "zwölf"), domain)


def fake_domain(domain: str):  # type: ignore[no-untyped-def]
    def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
        return (toy(domain, split, number) for number in range(count))

    return tasks


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_generator", fake_domain)


def make(directory: pathlib.Path, train: int = 4, test: int = 2, seed: int = 0) -> pathlib.Path:
    return build.build_suite(directory, train, test, seed, Progress(io.StringIO()))


@pytest.mark.usefixtures("fakes")
def test_what_is_written_is_read(tmp_path: pathlib.Path) -> None:
    path = make(tmp_path)
    train = TfdsSource(path, "train")
    assert len(train) == 4 * len(build.DOMAINS)
    read = {train[index].id: train[index] for index in range(len(train))}
    assert read == {task.id: task for domain in build.DOMAINS for task in fake_domain(domain)("train", 4, 0)}
    assert len(TfdsSource(path, "test")) == 2 * len(build.DOMAINS)


def test_choices_and_kinds_are_kept_and_need_not_be_there(tmp_path: pathlib.Path) -> None:
    tasks = [Task("a/1", "Which?", (), ("B",), "a", ("red", "blue"), "closed"), Task("a/2", "How?", (), ("so",), "a")]
    write_tasks(tmp_path, "toy", "", {"test": iter(tasks)})
    read = TfdsSource(tmp_path, "test")
    assert [read[0], read[1]] == tasks


@pytest.mark.usefixtures("fakes")
def test_domains_take_turns(tmp_path: pathlib.Path) -> None:
    train = TfdsSource(make(tmp_path), "train")
    assert tuple(train[index].source for index in range(len(build.DOMAINS))) == build.DOMAINS


@pytest.mark.usefixtures("fakes")
def test_part_of_a_split(tmp_path: pathlib.Path) -> None:
    assert len(TfdsSource(make(tmp_path), "train[:3]")) == 3


@pytest.mark.usefixtures("fakes")
def test_second_call_builds_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    monkeypatch.setattr(build, "_generator", None)
    assert make(tmp_path) == path


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("other", [{"train": 5}, {"test": 3}, {"seed": 1}])
def test_another_setting_gets_another_folder(tmp_path: pathlib.Path, other: dict[str, int]) -> None:
    assert make(tmp_path) != make(tmp_path, **other)


@pytest.mark.usefixtures("fakes")
def test_fingerprint_names_arguments_and_versions(tmp_path: pathlib.Path) -> None:
    fingerprint = json.loads((make(tmp_path, seed=7) / "fingerprint.json").read_text())
    assert (fingerprint["seed"], fingerprint["counts"]) == (7, {"train": 4, "test": 2})
    assert fingerprint["packages"]["numpy"]


def test_interrupted_build_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(domain: str):  # type: ignore[no-untyped-def]
        def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
            yield toy(domain, split, 0)
            raise KeyboardInterrupt

        return tasks

    monkeypatch.setattr(build, "_generator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fakes")
def test_a_faster_neighbour_wins(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = build.write_tasks

    def while_another_builds(*arguments: Any) -> None:
        monkeypatch.setattr(build, "write_tasks", write)
        make(tmp_path)
        write(*arguments)

    monkeypatch.setattr(build, "write_tasks", while_another_builds)
    path = make(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert len(TfdsSource(path, "test")) == 2 * len(build.DOMAINS)


def broken_domain(change: dict):  # type: ignore[no-untyped-def]
    import dataclasses

    def generator(domain: str):  # type: ignore[no-untyped-def]
        return lambda split, count, seed: (
            dataclasses.replace(toy(domain, split, n), **change) for n in range(min(count, 3))
        )

    return generator


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "other"}, "source is 'other'"),
        ({"id": "same"}, "used twice"),
        ({"answers": ()}, "answers are empty"),
        ({"images": (b"GIF89a",)}, r"images\[0\]: not a readable PNG"),
        ({}, "has only 3 train tasks, 4 are asked for"),
    ],
)
def test_task_that_breaks_a_promise_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, change: dict, told: str
) -> None:
    monkeypatch.setattr(build, "_generator", broken_domain(change))
    with pytest.raises(DataError, match=f"suite domain visual_qa.*{told}"):
        make(tmp_path)


def test_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "maestro_jax.suite.tasks.charts", None)
    with pytest.raises(ConfigError, match="pip install"):
        build._generator("charts")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("counts", [(0, 2), (4, 0)])
def test_empty_splits_are_refused(tmp_path: pathlib.Path, counts: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 task"):
        make(tmp_path, *counts)


def test_no_data_set(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="dataset_info.json is missing.*build one with"):
        TfdsSource(tmp_path, "train")


@pytest.mark.usefixtures("fakes")
def test_unknown_split(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="split 'dev'.*which has train, test"):
        TfdsSource(make(tmp_path), "dev")


@pytest.mark.usefixtures("fakes")
def test_damaged_record_is_named(tmp_path: pathlib.Path) -> None:
    path = make(tmp_path)
    records = next(path.glob("*train*"))
    data = bytearray(records.read_bytes())
    data[400:600] = b"\xff" * 200  # in the middle of the records; the rest of a small file is padding
    records.write_bytes(data)
    with pytest.raises(DataError, match="split train.*build it again"):
        source = TfdsSource(path, "train")
        for index in range(len(source)):
            source[index]


def test_index_out_of_range(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_generator", fake_domain)
    with pytest.raises(IndexError):
        TfdsSource(make(tmp_path), "test")[10]


OFFLINE = """
import io, socket, sys
def refuse(*args, **kwargs): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from maestro_jax.data.source import TfdsSource
from maestro_jax.data.store import write_tasks
from maestro_jax.suite.tasks import build
from maestro_jax.observe.progress import Progress
from maestro_jax.types import Task
def fake(domain):
    return lambda split, count, seed: (Task(f"{domain}/{split}/{n}", "?", (), ("1",), domain) for n in range(count))
build._generator = fake
path = build.build_suite(sys.argv[1], 2, 1, 0, Progress(io.StringIO()))
assert TfdsSource(path, "test")[0].answers == ("1",)
print(sorted(name for name in sys.modules if name in ("tensorflow", "jax", "torch")))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_builds_and_reads_without_tensorflow_jax_or_network(tmp_path: pathlib.Path) -> None:
    done = run_python("-c", OFFLINE, str(tmp_path))
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_importing_the_package_stays_quick() -> None:
    heavy = "('tensorflow_datasets', 'grain', 'matplotlib', 'rich', 'pyarrow')"
    modules = "maestro_jax, maestro_jax.data.pipeline, maestro_jax.data.verl, maestro_jax.suite.tasks.build"
    modules += ", maestro_jax.observe.figures, maestro_jax.observe.table, maestro_jax.observe.metrics"
    done = run_python("-c", f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_command_shows_progress_and_prints_the_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    monkeypatch.setattr(build, "_generator", fake_domain)
    values = types.SimpleNamespace(directory=str(tmp_path), train_per_domain=2, test_per_domain=1, seed=0)
    monkeypatch.setattr(build.flags, "FLAGS", values)
    build.main(["build"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[: len(build.DOMAINS)]] == list(build.DOMAINS)
    assert TfdsSource(lines[-1], "test")[0].source == "visual_qa"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--directory", "{place}"], "cannot write {place}: File exists; name another directory"),
        (
            ["--directory", "{place}", "stray"],
            "unexpected argument 'stray'; write --stray if it is meant as a flag, or leave it out",
        ),
        ([], "--directory is missing; see --help, or the README for the whole command"),
    ],
)
def test_command_reports_user_errors_in_one_line(tmp_path: pathlib.Path, arguments: list[str], told: str) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    done = run_python("-m", "maestro_jax.suite.tasks.build", *(text.format(place=place) for text in arguments))
    assert done.returncode == EXIT_CONFIG
    assert done.stderr.splitlines() == [f"error: {told.format(place=place)}"]
