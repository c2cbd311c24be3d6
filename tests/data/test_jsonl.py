"""JSONL: lines become tasks, and a bad line is named with its field and the cure."""

import base64
import json
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from maestro_jax.data.jsonl import JsonlSource
from maestro_jax.errors import ConfigError, DataError

Write = Callable[..., pathlib.Path]


@pytest.fixture
def root(tmp_path: pathlib.Path, png: bytes) -> pathlib.Path:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "1.png").write_bytes(png)
    (tmp_path / "outside.png").write_bytes(png)
    return tmp_path / "root"


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    def _write(*lines: dict | str | bytes, name: str = "own.jsonl") -> pathlib.Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        path.write_bytes(b"\n".join(encoded))
        return path

    return _write


def line(**changes: Any) -> dict:
    return {"question": "How many?", "images": ["a/1.png"], "answers": ["3"], "source": "TallyQA"} | changes


def test_lines_become_tasks(write: Write, root: pathlib.Path, png: bytes) -> None:
    inline = {"bytes": base64.b64encode(png).decode()}
    path = write(
        line(), "", line(question="Größe?", images=[inline, "a/1.png"], answers=7, id="x", kind="complex"), "  "
    )
    source = JsonlSource(path, root)
    assert len(source) == 2
    first, second = source[0], source[1]
    assert (first.id, first.question, first.answers, first.source) == ("own/000001", "How many?", ("3",), "TallyQA")
    assert first.images == (png,) and second.images == (png, png)
    assert (second.id, second.question, second.answers, second.kind) == ("x", "Größe?", ("7",), "complex")


def test_tasks_need_no_images(write: Write) -> None:
    bare = line()
    del bare["images"]
    assert JsonlSource(write(bare))[0].images == ()


@pytest.mark.parametrize("answers", [["B"], "dog", ["b", "dog"], ["(B)"]])
def test_choices_are_shown_and_the_answer_is_a_letter(write: Write, root: pathlib.Path, answers: Any) -> None:
    task = JsonlSource(write(line(choices=["cat", "dog"], answers=answers)), root)[0]
    assert (task.question, task.choices, task.answers) == ("How many?\nA. cat\nB. dog", ("cat", "dog"), ("B",))


def test_files_follow_each_other_with_unique_ids(write: Write, root: pathlib.Path) -> None:
    paths = [write(line(), line(), name=f"{name}/own.jsonl") for name in "ab"]
    source = JsonlSource(paths, root)
    assert [source[index].id for index in range(4)] == [f"{name}/own/00000{n}" for name in "ab" for n in (1, 2)]
    with pytest.raises(IndexError):
        source[4]


def test_a_source_can_be_sent_to_another_process(write: Write, root: pathlib.Path) -> None:
    source = JsonlSource(write(line()), root)
    assert pickle.loads(pickle.dumps(source))[0] == source[0]  # noqa: S301


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"question": " "}, "field question: expected a text, found a str; fill it"),
        ({"answers": []}, "field answers: expected a text, a number or a list of them, found an empty list"),
        ({"answers": [None]}, "field answers: "),
        ({"answers": True}, "field answers: "),
        ({"source": None}, "field source: expected a text, found nothing"),
        ({"images": "a/1.png"}, "field images: expected a list, found a str"),
        ({"images": [7]}, r"field images\[0\]: expected a path or .* found a int"),
        ({"images": [{"bytes": "?"}]}, r"field images\[0\]: bytes are not base64"),
        ({"images": [{"bytes": "AAAA"}]}, r"field images\[0\]: not a readable PNG"),
        ({"images": ["a/2.png"]}, r"field images\[0\]: no file 'a/2.png' under image_root"),
        ({"images": ["../outside.png"]}, r"field images\[0\]: .* leads outside image_root"),
        ({"images": ["link.png"]}, r"field images\[0\]: .* leads outside image_root"),
        ({"images": ["https://example.com/a.png"]}, r"field images\[0\]: path is a URL, which is never fetched"),
        ({"id": "\ud800"}, "field id: holds half of a surrogate pair"),
        ({"answers": ["\udfff"]}, "field answers: "),
        ({"choices": ["cat"]}, "field choices: expected 2 to 26 options, found 1"),
        ({"choices": ["cat", ""]}, r"field choices\[1\]: expected a text"),
        (
            {"choices": ["cat", "dog"], "answers": ["3"]},
            "field answers: expected the letter or the text of one of the 2",
        ),
        ({"choices": ["cat", "dog"], "answers": ["A", "B"]}, "field answers: expected the letter"),
        ({"choises": ["cat", "dog"]}, "field choises: unknown, did you mean choices?"),
        ({"answer": ["3"]}, "field answer: unknown, did you mean answers?"),
    ],
)
def test_a_bad_line_is_named(write: Write, root: pathlib.Path, changes: dict, says: str) -> None:
    os.symlink(root.parent / "outside.png", root / "link.png")
    source = JsonlSource(write(line(), line(**changes)), root)
    assert source[0].answers == ("3",)
    with pytest.raises(DataError, match=f"own.jsonl line 2, {says}"):
        source[1]


@pytest.mark.parametrize("text", ["{", "[1]", "3", b'{"question": "\xff"}', "[" * 100_000])
def test_a_line_that_is_no_object_is_named(write: Write, root: pathlib.Path, text: str | bytes) -> None:
    with pytest.raises(DataError, match="own.jsonl line 2: .*(write one JSON object a line|write one object a line)"):
        JsonlSource(write(line(), text), root)[1]


def test_other_fields_are_the_users_own(write: Write, root: pathlib.Path) -> None:
    assert JsonlSource(write(line(difficulty=3, split="train", idx=7, source_id="x")), root)[0].answers == ("3",)


def test_a_path_needs_a_root(write: Write) -> None:
    with pytest.raises(DataError, match=r"line 1, field images\[0\]: is a path; set image_root"):
        JsonlSource(write(line()))[0]


def test_a_line_that_is_too_long_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_jax.data.jsonl.MAX_LINE_BYTES", 50)
    with pytest.raises(DataError, match="own.jsonl line 2 has more than"):
        JsonlSource(write("{}", line()))


def test_files_are_checked_at_once(tmp_path: pathlib.Path, write: Write) -> None:
    with pytest.raises(DataError, match="cannot read .*absent.jsonl: No such file.*check the path"):
        JsonlSource(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="named twice"):
        JsonlSource([write(line()), write(line())])
    with pytest.raises(ConfigError, match="at least one path"):
        JsonlSource([])
