"""The pass over a source before it is used: every row counts, and none is read twice."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maestro_jax.data.jsonl import JsonlSource
from maestro_jax.data.opening import open_source
from maestro_jax.data.source import Label, TaskSource, TaskView, remembering
from maestro_jax.data.store import write_tasks
from maestro_jax.data.survey import Origin, survey
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.evaluation.selection import select
from maestro_jax.observe.progress import Progress
from maestro_jax.rewards.graders import Graders
from maestro_jax.session.tasks import check_tasks
from maestro_jax.types import Task
from tests.data.listed import Listed
from tests.data.verl_rows import row, write_rows


def check(*sources: TaskSource, kept: Path, held_out: TaskSource | None = None) -> None:
    check_tasks(sources, held_out, Graders(), kept, Progress(io.StringIO()))


def write_lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    sound = {"question": "What?", "answers": ["1"], "source": "ChartQA"}
    path.write_text("".join((r if isinstance(r, str) else json.dumps(sound | r)) + "\n" for r in rows))
    return path


def write_verl(path: Path, *sources: Any) -> Path:
    return write_rows(path, [row(n, b"", images=[], data_source=source) for n, source in enumerate(sources)])


def write_set(path: Path, *names: tuple[str, str]) -> Path:
    path.mkdir()
    write_tasks(path, "toy", "", {"train": [Task(id_, "What?", (), ("1",), source) for id_, source in names]})
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


# ---- sources -----------------------------------------------------------------------------------------------


def test_an_unknown_source_in_the_last_row_is_named_with_its_place(tmp_path: Path, kept: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", *[{}] * 30, "", {"source": "riddles"})
    parquet = write_verl(tmp_path / "a.parquet", *["chartqa"] * 7, "riddles")
    tfds = write_set(tmp_path / "set", ("a", "ChartQA"), ("b", "riddles"))
    for kind, path, where in [
        ("jsonl", lines, " line 32"),
        ("verl", parquet, " row 7"),
        ("tfds", tfds, " split train"),
    ]:
        cure = "name one in config.graders, or correct the row"
        says = f'{path}{where}.*: no grader for source "riddles"; known: .*; {cure}'
        with pytest.raises(ConfigError, match=says):
            check(open_source(kind, [str(path)]), kept=kept)
        check(select(open_source(kind, [str(path)]), ["ChartQA"], 0, lambda line: None), kept=kept)


def test_sources_that_can_be_graded_pass_whatever_their_spelling(tmp_path: Path, kept: Path) -> None:
    check(open_source("verl", [str(write_verl(tmp_path / "a.parquet", "chartqa", "hrbench_4k"))]), kept=kept)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_rows_beyond_those_that_are_used_do_not_matter(held_out: bool, tmp_path: Path, kept: Path) -> None:
    view = TaskView(JsonlSource(write_lines(tmp_path / "a.jsonl", {}, {}, {"source": "riddles"})), range(2))
    check(*([] if held_out else [view]), kept=kept, held_out=view if held_out else None)


def test_damaged_rows_are_left_to_the_damage_limit(tmp_path: Path, kept: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", "{", {}, {"source": 3}, {"id": ""}, {"source": None})
    parquet = write_verl(tmp_path / "a.parquet", None, "chartqa", "")
    check(JsonlSource(lines), open_source("verl", [str(parquet)]), kept=kept)


def test_held_out_tasks_must_be_sound(tmp_path: Path, kept: Path) -> None:
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", {}, {"images": [{"bytes": "AAAA"}]}))
    check(source, kept=kept)
    with pytest.raises(ConfigError, match=re.escape("a.jsonl line 2, field images[0]")):
        check(kept=kept, held_out=source)


def test_a_row_may_name_its_grader_and_one_that_nobody_knows_is_named_with_its_place(
    tmp_path: Path, kept: Path
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {}, {"grader": "counting"}, {"grader": None}, {"grader": "strict"})
    rows = [row(n, b"", images=[], data_source="chartqa") for n in range(4)]
    for one, grader in zip(rows, (None, "counting", "", "strict"), strict=True):
        one["extra_info"] = {"question": "What?", "grader": grader}
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet, row_group_size=3)
    (tmp_path / "set").mkdir()
    names = zip("abc", ("", "counting", "strict"), strict=True)
    tasks = [Task(id_, "What?", (), ("1",), "ChartQA", grader=grader) for id_, grader in names]
    write_tasks(tmp_path / "set", "toy", "", {"train": tasks})
    for kind, path, place in [
        ("jsonl", lines, "line 4"),
        ("verl", parquet, "row 3"),
        ("tfds", tmp_path / "set", "row 2"),
    ]:
        source = open_source(kind, [str(path)])
        assert [source[n].grader for n in range(2)] == ["", "counting"]
        with pytest.raises(ConfigError, match=f'{place}: no grader is called "strict"; known: .*, or correct the row'):
            check(source, kept=kept)
        with pytest.raises(ConfigError, match="no grader is called"):
            check(kept=kept, held_out=source)
        check_tasks([source], source, Graders({"strict": "ChartQA"}), kept, Progress(io.StringIO()))


# ---- ids ---------------------------------------------------------------------------------------------------


def test_an_id_that_two_lines_share_is_refused_with_both(tmp_path: Path, kept: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"id": "x"}, {}, {"id": "y"}, {"id": "x"}, {"id": "x"})
    says = f"{path} line 4: its id 'x' is that of {path} line 1, too; give every task an id of its own"
    for used in ({"sources": (JsonlSource(path),)}, {"sources": (), "held_out": JsonlSource(path)}):
        with pytest.raises(ConfigError, match=re.escape(says)):
            check(*used["sources"], kept=kept, held_out=used.get("held_out"))


def test_an_id_may_be_the_place_of_another_line(tmp_path: Path, kept: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {}, {"id": "a/000001"})
    with pytest.raises(ConfigError, match="line 2: its id 'a/000001' is that of .* line 1, too"):
        check(JsonlSource(path), kept=kept)


def test_files_and_data_sets_that_follow_each_other_share_no_id(tmp_path: Path, kept: Path) -> None:
    files = [str(write_lines(tmp_path / f"{name}.jsonl", {"id": "x"})) for name in "ab"]
    with pytest.raises(ConfigError, match=r"b.jsonl line 1: its id 'x' is that of .*a.jsonl line 1"):
        check(open_source("jsonl", files), kept=kept)
    sets = [str(write_set(tmp_path / name, (name, "ChartQA"), ("x", "ChartQA"))) for name in "cd"]
    with pytest.raises(ConfigError, match=r"/d split train row 1: its id 'x' is that of .*/c split train row 1"):
        check(open_source("tfds", sets), kept=kept)
    check(*[open_source("jsonl", [file]) for file in files], kept=kept)  # a mixture tells its sources apart


def test_ids_that_only_share_a_digest_are_two(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak:
        def __init__(self, data: bytes, digest_size: int):
            self.data = data if digest_size > 8 else b"12345678"

        def digest(self) -> bytes:
            return self.data

        def hexdigest(self) -> str:
            return self.data.hex()

    monkeypatch.setattr("maestro_jax.data.survey.hashlib.blake2b", Weak)
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", *[{"id": f"{n}"} for n in range(5)]))
    assert survey(source, "tasks", kept, Progress(io.StringIO())) == [Origin("ChartQA", "", 0)]


# ---- once --------------------------------------------------------------------------------------------------


class Counting(JsonlSource):
    passes = 0

    def labels(self) -> Iterator[Label | None]:
        Counting.passes += 1
        return super().labels()


def test_data_is_gone_through_once_and_again_when_it_has_changed(tmp_path: Path, kept: Path) -> None:
    path, Counting.passes = write_lines(tmp_path / "a.jsonl", {}, {}), 0
    for _ in range(3):
        check(Counting(path), kept=kept)
    assert Counting.passes == 1
    write_lines(path, {}, {"source": "TallyQA"})
    os.utime(path, ns=(1, 1))
    check(Counting(path), kept=kept)
    assert Counting.passes == 2
    write_lines(path, {"source": "riddle"}, {})
    os.utime(path, ns=(2, 2))
    for _ in range(2):
        with pytest.raises(ConfigError, match="line 1: no grader"):
            check(Counting(path), kept=kept)
    assert Counting.passes == 3


def test_images_are_looked_for_again_where_their_root_is_another(tmp_path: Path, kept: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {})
    stamps = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        stamps.append(JsonlSource(path, tmp_path / name).stamp())
    assert stamps[0] != stamps[1]


def test_what_is_kept_may_be_anything(tmp_path: Path, kept: Path) -> None:
    kept.write_text("7")
    check(JsonlSource(write_lines(tmp_path / "a.jsonl", {})), kept=kept)


def test_a_long_pass_is_told(tmp_path: Path, kept: Path) -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        survey(JsonlSource(write_lines(tmp_path / "a.jsonl", *[{}] * 10_000)), "tasks", kept, progress)
    lines = stream.getvalue().splitlines()
    assert (
        15 < len(lines) < 30 and lines[0].startswith("check tasks") and lines[-1].startswith("check tasks: 10000/10000")
    )


# ---- views -------------------------------------------------------------------------------------------------


def test_a_view_reads_a_task_when_it_is_asked_for(tmp_path: Path) -> None:
    source = JsonlSource(write_lines(tmp_path / "a.jsonl", {}, "{", {}, {}))
    view = TaskView(source, range(4))
    part = view[2:]
    assert len(part) == 2 and [task.id for task in part] == ["a/000003", "a/000004"] and part[-1].id == "a/000004"
    whole = TaskView(source, range(2, 4))
    assert whole.where(1) == source.where(3) and [label.id for label in whole.labels() if label] == [t.id for t in part]
    with pytest.raises(DataError, match="line 2"):
        view[1]
    with pytest.raises(IndexError):
        view[4]


def test_recent_tasks_are_kept_up_to_their_bytes() -> None:
    reads: list[int] = []

    class Source(Listed):
        def __getitem__(self, index: int) -> Task:  # type: ignore[override]
            reads.append(index)
            return Task(f"{index}", "What?", (b"x" * 100,), ("1",), "ChartQA")

    recent = remembering(Source(), most_bytes=250)
    assert [recent(index).id for index in (0, 0, 1, 0, 2, 0, 1)] == list("0010201")
    assert reads == [0, 1, 2, 1]  # 1 had not been read for longest
    assert remembering(Source(), most_bytes=10)(7).id == "7"
