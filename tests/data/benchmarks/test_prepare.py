"""`prepare` on small files in every published layout: what is written can be trained and graded on."""

import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from maestro_jax.data.benchmarks.catalogue import BENCHMARKS
from maestro_jax.data.choices import LETTERS
from maestro_jax.data.prepare import prepare
from maestro_jax.data.source import TfdsSource
from maestro_jax.errors import EXIT_CONFIG, ConfigError, DataError
from maestro_jax.images import decode_image
from maestro_jax.observe.progress import Progress
from maestro_jax.types import Task
from tests.data.benchmarks import layouts

ROOT = pathlib.Path(__file__).parents[3]
Read = Callable[..., dict[str, list[Task]]]


@pytest.fixture
def read(tmp_path: pathlib.Path) -> Read:
    """Prepares what lies in the folder "files" and reads all tasks back."""

    def _read(name: str, splits: list[str], log: io.StringIO | None = None, **options: float) -> dict[str, list[Task]]:
        path = prepare(name, tmp_path / "files", tmp_path / "data", Progress(log or io.StringIO()), **options)
        sources = {split: TfdsSource(path, split) for split in splits}
        return {split: [source[index] for index in range(len(source))] for split, source in sources.items()}

    return _read


def test_every_benchmark_has_a_layout_here() -> None:
    assert {name for name, _ in layouts.LAYOUTS.values()} == set(BENCHMARKS)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_becomes_tasks(tmp_path: pathlib.Path, read: Read, layout: str) -> None:
    name, write = layouts.LAYOUTS[layout]
    counts = write(tmp_path / "files")
    splits = read(name, list(counts))
    assert {split: len(tasks) for split, tasks in splits.items()} == counts
    everything = [task for tasks in splits.values() for task in tasks]
    assert len({task.id for task in everything}) == len(everything)
    for task in everything:
        assert task.source == BENCHMARKS[name].source and task.id.startswith(f"{task.source}/")
        assert task.question.strip() and all(answer.strip() for answer in task.answers) and task.answers
        assert "<image>" not in task.question
        assert task.images and all(decode_image(image, task.id).shape == (30, 40, 3) for image in task.images)
        if task.choices:
            assert len(task.answers) == 1 and task.answers[0] in LETTERS[: len(task.choices)]
            in_picture = task.choices == tuple(LETTERS[: len(task.choices)])
            lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, task.choices, strict=False)]
            assert in_picture or all(line in task.question for line in lines)


# ---- what a benchmark says, in its own words ---------------------------------------------------------------


def only(tmp_path: pathlib.Path, read: Read, layout: str, split: str = "test") -> list[Task]:
    name, write = layouts.LAYOUTS[layout]
    write(tmp_path / "files")
    return read(name, [split])[split]


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ("chartqa from parquet", ["human", "augmented"] * 2),
        ("chartqa, official", ["human", "human", "augmented", "augmented"]),
        ("geometry3k from parquet", ["free"] * 3),
        ("geometry3k, official", ["choice"] * 2),
        ("slake", ["closed", "open", "closed"]),
        ("tallyqa", ["complex", "complex", "simple", "complex"]),
        ("hrbench_4k from parquet", ["single", "single", "cross", "cross"]),
        ("vstar", ["direct_attributes", "direct_attributes", "relative_position"]),
        ("mathvision, official", ["free", "choice", "choice"]),
        ("erqa, official", ["Trajectory Reasoning", "Multi-view Reasoning", "Pointing"]),
        ("ocrbench, official", [kind for _, kind, _ in layouts.OCRBENCH]),
        ("vlmsareblind", ["Touching Circles", "Counting Grid - Blank Grids"]),
        ("humaneval_v", ["code", "code"]),
    ],
)
def test_kinds(tmp_path: pathlib.Path, read: Read, layout: str, kinds: list[str]) -> None:
    assert [task.kind for task in only(tmp_path, read, layout)] == kinds


@pytest.mark.parametrize(
    ("layout", "answers"),
    [
        ("chartqa from parquet", [("20",), ("21",), ("22",), ("23",)]),
        ("chartqa, official", [("20.5",), ("21.5",), ("22.5",), ("23.5",)]),
        ("geometry3k from parquet", [(rf"{n} \sqrt {{2}}",) for n in (20, 21, 22)]),
        ("geometry3k, official", [("C",), ("C",)]),
        ("microvqa", [("A",), ("B",), ("C",)]),
        ("msearthmcq", [("B",), ("A",), ("C",)]),
        ("slake", [("No",), ("Left Lung",), ("No",)]),
        ("tallyqa", [(str(n % 16),) for n in range(100, 104)]),
        ("hrbench_8k from tsv", [("A",), ("B",), ("C",), ("D",)]),
        ("vstar", [("B",), ("A",), ("B",)]),
        ("mathvision from parquet", [("60",), ("C",), ("A",)]),
        ("erqa from parquet", [("B",), ("A",), ("D",)]),
        ("ocrbench, official", [tuple(answers) for _, _, answers in layouts.OCRBENCH]),
        ("vlmsareblind", [("Yes",), ("5,7",)]),
        ("humaneval_v", [("def test():\n    assert solution(1) == 2\n\ntest()",)] * 2),
    ],
)
def test_answers(tmp_path: pathlib.Path, read: Read, layout: str, answers: list[tuple[str, ...]]) -> None:
    assert [task.answers for task in only(tmp_path, read, layout)] == answers


def test_options_are_shown_in_one_form(tmp_path: pathlib.Path, read: Read) -> None:
    task = only(tmp_path, read, "vstar")[0]
    assert task.question == "What is the material of glove 0?\nA. rubber\nB. cotton\nC. kevlar\nD. leather"


def test_options_in_the_picture_are_not_written_again(tmp_path: pathlib.Path, read: Read) -> None:
    tasks = only(tmp_path, read, "mathvision, official")
    assert [task.question.count("\n") for task in tasks] == [1, 1, 6]


@pytest.mark.parametrize("layout", ["erqa from parquet", "erqa, official"])
def test_images_within_a_text_are_marked(tmp_path: pathlib.Path, read: Read, layout: str) -> None:
    first, second, third = only(tmp_path, read, layout)
    assert first.choices == ("It opens.", "It closes.", "It turns.", "Nothing.")
    assert second.question.startswith("First view: [image 1] Second view: [image 2] Same? Choices: A. Yes.")
    assert (len(second.images), third.question) == (2, "Which of the marked points?")


def test_the_chinese_half_of_slake_is_left_out(tmp_path: pathlib.Path, read: Read) -> None:
    assert all(task.question.isascii() for task in only(tmp_path, read, "slake", "train"))


def test_a_caption_with_parts_is_no_list_of_options(tmp_path: pathlib.Path, read: Read) -> None:
    task = only(tmp_path, read, "msearthmcq")[0]
    assert task.choices == ("rain", "snow", "hail", "fog")
    assert task.question.startswith("Caption:\n(A) Map. (B) Height.\nQuestion:\nWhat falls")
    assert task.question.endswith("Options:\nA. rain\nB. snow\nC. hail\nD. fog")


# ---- damage ------------------------------------------------------------------------------------------------


def tallyqa_with(folder: pathlib.Path, **changes: object) -> None:
    layouts.tallyqa(folder)
    entries = json.loads((folder / "train.json").read_text())
    entries[2] |= changes
    layouts.put(folder / "train.json", entries)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": None}, "field answer: expected a whole number, found nothing"),
        ({"question": ""}, "field question: expected a text"),
        ({"image": "VG_100K/absent.jpg"}, "field image: no file"),
        ({"image": "../outside.jpg"}, "field image: path .* leads outside"),
        ({"image": "https://example.com/a.jpg"}, "field image: path is a URL, which is never fetched"),
        ({"image": "train.json"}, "image 0: not a readable PNG"),
        ({"image": "cut.jpg"}, "image 0: image is damaged"),
        ({"question_id": 30095774}, "the id TallyQA/train/30095774 is used twice"),
    ],
)
def test_a_damaged_row_is_named_and_skipped_only_on_request(
    tmp_path: pathlib.Path, read: Read, changes: dict, says: str
) -> None:
    tallyqa_with(tmp_path / "files", **changes)
    layouts.put(tmp_path / "files/cut.jpg", layouts.picture(1, "JPEG")[:-10])
    with pytest.raises(DataError, match=rf"train.json entry 2.*{says}.*--damage_limit=0: repair the data or raise"):
        read("tallyqa", ["train"])
    assert not (tmp_path / "data/tallyqa").exists() and not list((tmp_path / "data").glob(".*"))
    log = io.StringIO()
    assert len(read("tallyqa", ["train"], log, damage_limit=1)["train"]) == 3
    assert "skipped damaged row 1 of at most 1: " in log.getvalue() and "1 damaged rows skipped" in log.getvalue()


def test_a_missing_part_of_a_download_is_named(tmp_path: pathlib.Path, read: Read) -> None:
    layouts.chartqa_parquet(tmp_path / "files")
    os.remove(tmp_path / "files/data/train-00000-of-00002-abc.parquet")
    with pytest.raises(DataError, match="split train has 2 files, number 0 is missing; finish the download"):
        read("chartqa", ["train"])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("chartqa from parquet", "data/test-00000-of-00002-abc.parquet"),
        ("slake", "train.json"),
        ("erqa, official", "data/erqa.tfrecord"),
    ],
)
def test_a_file_that_is_cut_off_is_named(tmp_path: pathlib.Path, read: Read, layout: str, name: str) -> None:
    benchmark, write = layouts.LAYOUTS[layout]
    write(tmp_path / "files")
    path = tmp_path / "files" / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=f"{path}.*download (it|the file) again"):
        read(benchmark, ["test"], damage_limit=9)


def test_a_damaged_line_is_named(tmp_path: pathlib.Path, read: Read) -> None:
    layouts.vstar(tmp_path / "files")
    path = tmp_path / "files/test_questions.jsonl"
    path.write_text(path.read_text() + "\n{\n[1]\n")
    log = io.StringIO()
    assert len(read("vstar", ["test"], log, damage_limit=2)["test"]) == 3
    assert "test_questions.jsonl line 5: not JSON" in log.getvalue()
    assert "test_questions.jsonl line 6: expected an object, found a list" in log.getvalue()


# ---- splits ------------------------------------------------------------------------------------------------


def many(folder: pathlib.Path, order: int = 1) -> None:
    layouts.tallyqa(folder)
    entry = json.loads((folder / "train.json").read_text())[0]
    entries = [entry | {"question_id": n, "question": f"How many {n}?"} for n in range(60)]
    layouts.put(folder / "train.json", entries[::order])


def test_validation_is_split_off_by_item(tmp_path: pathlib.Path, read: Read) -> None:
    many(tmp_path / "files")
    splits = read("tallyqa", ["train", "validation", "test"], validation_share=0.25)
    first = {split: {task.id for task in tasks} for split, tasks in splits.items()}
    assert not first["train"] & first["validation"] and len(first["train"] | first["validation"]) == 60
    assert 5 <= len(first["validation"]) <= 25 and len(first["test"]) == 4
    (tmp_path / "data").rename(tmp_path / "before")
    many(tmp_path / "files", order=-1)
    again = read("tallyqa", ["validation"], validation_share=0.25)
    assert {task.id for task in again["validation"]} == first["validation"]


@pytest.mark.parametrize(
    ("layout", "share", "says"),
    [
        ("chartqa from parquet", 0.1, "has the splits train, validation, test; leave it out"),
        ("vstar", 0.1, "has the splits test; leave it out"),
        ("tallyqa", 1.5, "must be between 0 and 1"),
        ("tallyqa", 1e-9, "split validation of TallyQA holds no task; raise --validation_share"),
    ],
)
def test_a_validation_share_that_cannot_be(
    tmp_path: pathlib.Path, read: Read, layout: str, share: float, says: str
) -> None:
    name, write = layouts.LAYOUTS[layout]
    write(tmp_path / "files")
    with pytest.raises((ConfigError, DataError), match=says):
        read(name, ["train"], validation_share=share)


def test_tasks_in_two_splits_are_reported(tmp_path: pathlib.Path, read: Read) -> None:
    log = io.StringIO()
    layouts.mathvision_parquet(tmp_path / "files")
    read("mathvision", ["test"], log)
    told = "2 tasks of testmini are in test too (same question, same images): MathVision/testmini/1 = MathVision/test/1"
    assert told in log.getvalue()
    assert "MathVision: 3 test, 2 testmini tasks; 0 damaged rows skipped" in log.getvalue()


# ---- the command -------------------------------------------------------------------------------------------


def test_what_cannot_be_prepared_is_named(tmp_path: pathlib.Path, read: Read) -> None:
    with pytest.raises(ConfigError, match="unknown benchmark 'chart_qa'; use one of chartqa, geometry3k"):
        read("chart_qa", [])
    with pytest.raises(ConfigError, match="--from .* is not a folder; name the one with the files of chartqa"):
        read("chartqa", [])
    (tmp_path / "files").mkdir()
    for name, benchmark in BENCHMARKS.items():
        with pytest.raises(DataError, match=f"no files of {name} in .*expected .*download them from ") as caught:
            read(name, [])
        assert benchmark.publisher in str(caught.value)


def test_a_data_set_is_not_written_over(tmp_path: pathlib.Path, read: Read) -> None:
    layouts.vlmsareblind(tmp_path / "files")
    read("vlmsareblind", ["test"])
    with pytest.raises(ConfigError, match="is there already; delete it to prepare vlmsareblind again"):
        read("vlmsareblind", ["test"])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maestro_jax.data.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(tmp_path: pathlib.Path) -> None:
    layouts.slake(tmp_path / "files")
    done = run("slake", f"--from={tmp_path}/files", "--to", f"{tmp_path}/data")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{tmp_path}/data/slake" and len(TfdsSource(lines[-1], "train")) == 3
    assert any(line.startswith("slake 9/9  split test  damaged 0") for line in lines)
    assert "SLAKE: 3 train, 3 validation, 3 test tasks; 0 damaged rows skipped" in lines


def test_neither_tensorflow_nor_jax_is_needed(tmp_path: pathlib.Path) -> None:
    layouts.erqa_tfrecord(tmp_path / "files")
    program = (
        "import sys; from maestro_jax.data.prepare import prepare; from maestro_jax.observe.progress import Progress; "
        "prepare('erqa', sys.argv[1] + '/files', sys.argv[1] + '/data', Progress()); "
        "print([name for name in ('tensorflow', 'jax', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_the_command_teaches_its_use() -> None:
    listed = run("--list")
    assert listed.returncode == 0 and all(f"{name}: {BENCHMARKS[name].source}" in listed.stdout for name in BENCHMARKS)
    told = run("chartqa")
    assert told.returncode == EXIT_CONFIG
    assert told.stderr.startswith("error: use `python -m maestro_jax.data.prepare NAME --from DIR --to DIR`")
