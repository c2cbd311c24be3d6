"""verl parquet: the published schema loads as it is, and bad rows are named."""

import io
import json
import os
import pathlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maestro_jax.data.verl import VerlParquetSource
from maestro_jax.errors import ConfigError, DataError
from tests.data.verl_rows import SCHEMA, row, write_rows

# The published rows are handed out in a shared folder inside the checkout or beside it.
ROOTS = pathlib.Path(__file__).parents[2:4]
EXAMPLES = next((path for root in ROOTS if (path := root / "shared/data/maestro_example").is_dir()), None)

Write = Callable[..., pathlib.Path]


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    def _write(rows: list[dict], name: str = "train.parquet", schema: pa.Schema = SCHEMA) -> pathlib.Path:
        return write_rows(tmp_path / name, rows, schema)

    return _write


def with_truth(kind: pa.DataType) -> pa.Schema:
    changed = pa.field("reward_model", pa.struct([("ground_truth", kind), ("style", pa.string())]))
    return SCHEMA.set(SCHEMA.get_field_index("reward_model"), changed)


def test_rows_become_tasks(write: Write, png: bytes) -> None:
    source = VerlParquetSource(write([row(number, png) for number in range(8)]))
    assert len(source) == 8
    for number in (7, 0, 3, 2):
        task = source[number]
        assert (task.id, task.question) == (f"train/{number:06d}", f"Question {number}?")
        assert (task.images, task.answers, task.source) == ((png,), (f"answer {number}",), "chartqa")


def test_files_follow_each_other_with_unique_ids(write: Write, png: bytes) -> None:
    paths = [write([row(number, png) for number in range(4)], f"{name}/train.parquet") for name in "ab"]
    source = VerlParquetSource(paths)
    assert [source[index].id for index in (3, 4)] == ["a/train/000003", "b/train/000000"]


def test_reading_keeps_at_most_the_allowed_bytes(write: Write, png: bytes) -> None:
    source = VerlParquetSource(write([row(number, png) for number in range(9)]), cache_bytes=1)
    assert [source[index].answers[0] for index in (8, 0, 5)] == ["answer 8", "answer 0", "answer 5"]
    assert len(source._cache) == 1


def test_index_out_of_range(write: Write, png: bytes) -> None:
    with pytest.raises(IndexError):
        VerlParquetSource(write([row(0, png)]))[1]


def test_question_falls_back_to_the_user_message(write: Write, png: bytes) -> None:
    source = VerlParquetSource(write([row(5, png, extra_info=None)]))
    assert source[0].question == "From the prompt 5?"


def test_placeholders_inside_a_question_are_taken_out(write: Write, png: bytes) -> None:
    info = {"question": "Compare <image> with <image>.", "index": 0, "split": "train", "answer": ["x"]}
    source = VerlParquetSource(write([row(0, png, extra_info=info, images=[{"bytes": png}, {"bytes": png}])]))
    assert source[0].question == "Compare with ."
    assert len(source[0].images) == 2


@pytest.mark.parametrize(
    ("truth", "answers"),
    [("Go-Jek", ("Go-Jek",)), ("42", ("42",)), ('["a", "b"]', ("a", "b")), ("[3, 4]", ("[3, 4]",)), ("[x", ("[x",))],
)
def test_ground_truth_as_text(write: Write, png: bytes, truth: str, answers: tuple[str, ...]) -> None:
    rows = [row(0, png, reward_model={"style": "rule", "ground_truth": truth})]
    assert VerlParquetSource(write(rows, schema=with_truth(pa.string())))[0].answers == answers


def test_ground_truth_as_number(write: Write, png: bytes) -> None:
    rows = [row(0, png, reward_model={"style": "rule", "ground_truth": 42})]
    assert VerlParquetSource(write(rows, schema=with_truth(pa.int64())))[0].answers == ("42",)


@pytest.mark.parametrize("truth", [[], None, [""], [None]])
def test_row_without_an_answer_is_named(write: Write, png: bytes, truth: object) -> None:
    path = write([row(0, png), row(1, png, reward_model={"style": "rule", "ground_truth": truth})])
    with pytest.raises(DataError, match="train.parquet row 1, field reward_model.ground_truth"):
        VerlParquetSource(path)[1]


def test_row_without_a_question_is_named(write: Write, png: bytes) -> None:
    path = write([row(0, png, extra_info=None, prompt=None)])
    with pytest.raises(DataError, match="row 0, field extra_info.question"):
        VerlParquetSource(path)[0]


def test_row_without_a_source_is_named(write: Write, png: bytes) -> None:
    with pytest.raises(DataError, match="row 0, field data_source"):
        VerlParquetSource(write([row(0, png, data_source=None)]))[0]


def test_missing_image_is_named(write: Write, png: bytes) -> None:
    with pytest.raises(DataError, match="field images: the question shows 1 images, the row has 0"):
        VerlParquetSource(write([row(0, png, images=[])]))[0]


def test_broken_image_is_named(write: Write, png: bytes) -> None:
    with pytest.raises(DataError, match=r"train.parquet row 0, field images\[0\]: not a readable PNG"):
        VerlParquetSource(write([row(0, png, images=[{"bytes": b"GIF89a", "path": "x.gif"}])]))[0]


def test_error_never_prints_image_bytes(write: Write, png: bytes) -> None:
    with pytest.raises(DataError) as caught:
        VerlParquetSource(write([row(0, png, images=[{"bytes": b"secretpixels"}])]))[0]
    assert "secretpixels" not in str(caught.value)


class TestImagePaths:
    """Images by path come from under the declared root only."""

    def source(self, write: Write, png: bytes, path: str | None, root: pathlib.Path | None) -> VerlParquetSource:
        return VerlParquetSource(write([row(0, png, images=[{"bytes": None, "path": path}])]), image_root=root)

    @pytest.fixture
    def root(self, tmp_path: pathlib.Path, png: bytes) -> pathlib.Path:
        (tmp_path / "root" / "data").mkdir(parents=True)
        (tmp_path / "root" / "data" / "0.png").write_bytes(png)
        (tmp_path / "outside.png").write_bytes(png)
        return tmp_path / "root"

    @pytest.mark.parametrize("path", ["data/0.png", "data/../data/0.png"])
    def test_path_under_the_root(self, write: Write, png: bytes, root: pathlib.Path, path: str) -> None:
        assert self.source(write, png, path, root)[0].images == (png,)

    @pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname", "data/../../outside.png"])
    def test_escape_is_refused(self, write: Write, png: bytes, root: pathlib.Path, path: str) -> None:
        with pytest.raises(DataError, match="leads outside image_root"):
            self.source(write, png, path, root)[0]

    def test_escape_by_symbolic_link_is_refused(self, write: Write, png: bytes, root: pathlib.Path) -> None:
        os.symlink(root.parent / "outside.png", root / "link.png")
        with pytest.raises(DataError, match="leads outside image_root"):
            self.source(write, png, "link.png", root)[0]

    @pytest.mark.parametrize("path", ["http://example.com/a.png", "file:///etc/hostname", "gs://bucket/a.png"])
    def test_url_is_never_fetched(self, write: Write, png: bytes, root: pathlib.Path, path: str) -> None:
        with pytest.raises(DataError, match="URL, which is never fetched"):
            self.source(write, png, path, root)[0]

    def test_missing_root_is_the_cure(self, write: Write, png: bytes) -> None:
        with pytest.raises(DataError, match="set image_root"):
            self.source(write, png, "data/0.png", None)[0]

    @pytest.mark.parametrize("path", ["nothing.png", "data", "a\0b", "x" * 5000])
    def test_unreadable_path_is_named(self, write: Write, png: bytes, root: pathlib.Path, path: str) -> None:
        with pytest.raises(DataError, match=r"row 0, field images\[0\]: .*correct the path"):
            self.source(write, png, path, root)[0]

    def test_neither_bytes_nor_path(self, write: Write, png: bytes, root: pathlib.Path) -> None:
        with pytest.raises(DataError, match="neither bytes nor a path"):
            self.source(write, png, None, root)[0]

    def test_root_must_be_a_folder(self, write: Write, png: bytes, tmp_path: pathlib.Path) -> None:
        with pytest.raises(ConfigError, match="is not a folder"):
            self.source(write, png, "a.png", tmp_path / "nowhere")


class TestFiles:
    """Files that cannot be read are named with the cure."""

    def test_missing_file(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(DataError, match="cannot read .*no such file"):
            VerlParquetSource(tmp_path / "absent.parquet")

    def test_truncated_file(self, write: Write, png: bytes) -> None:
        path = write([row(number, png) for number in range(5)])
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match="cannot read .*train.parquet: .*re-download or re-export it"):
            VerlParquetSource(path)

    def test_damaged_row_group(self, write: Write, png: bytes) -> None:
        path = write([row(number, png) for number in range(6)])
        data = bytearray(path.read_bytes())
        start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
        data[start : start + 64] = b"\xff" * 64
        path.write_bytes(data)
        source = VerlParquetSource(path)
        assert source[0].answers == ("answer 0",)
        with pytest.raises(DataError, match="row group 1 .from row 3. is damaged"):
            source[4]

    def test_not_the_schema(self, write: Write, png: bytes) -> None:
        rows = [{"data_source": "x", "images": []}]
        path = write(rows, schema=pa.schema([SCHEMA.field("data_source"), SCHEMA.field("images")]))
        with pytest.raises(DataError, match="column reward_model is missing"):
            VerlParquetSource(path)

    def test_same_file_twice(self, write: Write, png: bytes) -> None:
        path = write([row(0, png)])
        with pytest.raises(ConfigError, match="named twice"):
            VerlParquetSource([path, path])

    def test_no_file(self) -> None:
        with pytest.raises(ConfigError, match="at least one path"):
            VerlParquetSource([])


@pytest.mark.skipif(EXAMPLES is None, reason="the published example rows are not in shared/")
@pytest.mark.parametrize(
    ("name", "answer"), [("train_data_example", "Go-Jek"), ("val_data_example", "Tania Vicenzino")]
)
def test_published_example_loads(name: str, answer: str) -> None:
    assert EXAMPLES is not None
    source = VerlParquetSource(EXAMPLES / f"{name}.parquet")
    task = source[0]
    assert (len(source), task.source, task.answers) == (1, "chartqa", (answer,))
    assert task.question.endswith("?") and "<image>" not in task.question and "Plan how" not in task.question
    assert Image.open(io.BytesIO(task.images[0])).format == "JPEG"


def test_json_text_of_mixed_items_stays_one_answer(write: Write, png: bytes) -> None:
    truth = json.dumps(["a", 1])
    rows = [row(0, png, reward_model={"style": "rule", "ground_truth": truth})]
    assert VerlParquetSource(write(rows, schema=with_truth(pa.string())))[0].answers == (truth,)


# ---- multiple choice ---------------------------------------------------------------------------------------

OPTIONS = "A. rubber\nB. cotton wool\nC. glass"


def multiple_choice(png: bytes, truth: list[str], question: str) -> dict:
    info = {"question": question, "index": 0, "split": "train", "answer": truth}
    return row(0, png, extra_info=info, reward_model={"style": "rule", "ground_truth": truth})


def with_choices(choices: list[str], truth: list[str], png: bytes) -> tuple[list[dict], pa.Schema]:
    """Rows whose `extra_info` has a list of choices, and their schema."""
    rows = [multiple_choice(png, truth, "What is it?")]
    rows[0]["extra_info"]["choices"] = choices
    info = SCHEMA.field("extra_info").type
    changed = pa.field("extra_info", pa.struct([*info, pa.field("choices", pa.list_(pa.string()))]))
    return rows, SCHEMA.set(SCHEMA.get_field_index("extra_info"), changed)


@pytest.mark.parametrize("truth", [["B", "cotton wool"], ["B"], ["B. cotton wool"]])
def test_choices_are_those_that_the_question_shows(write: Write, png: bytes, truth: list[str]) -> None:
    """["B", "cotton wool"] is how the paper's repository writes MSEarthMCQ and MicroVQA."""
    question = f"<image>What is it?\n{OPTIONS}"
    task = VerlParquetSource(write([multiple_choice(png, truth, question)]))[0]
    assert task.choices == ("rubber", "cotton wool", "glass")
    assert (task.question, task.answers) == (f"What is it?\n{OPTIONS}", tuple(truth))


@pytest.mark.parametrize("truth", [["7"], ["D"], ["B", "silk"], ["A", "B"]])
def test_options_that_no_answer_points_to_are_part_of_an_open_question(
    write: Write, png: bytes, truth: list[str]
) -> None:
    task = VerlParquetSource(write([multiple_choice(png, truth, f"Which?\n{OPTIONS}")]))[0]
    assert (task.choices, task.answers) == ((), tuple(truth))


def test_listed_choices_are_shown(write: Write, png: bytes) -> None:
    rows, schema = with_choices(["rubber", "silk"], ["silk"], png)
    task = VerlParquetSource(write(rows, schema=schema))[0]
    assert (task.choices, task.question) == (("rubber", "silk"), "What is it?\nA. rubber\nB. silk")


def test_an_answer_outside_the_listed_choices_is_named(write: Write, png: bytes) -> None:
    rows, schema = with_choices(["rubber", "silk"], ["C"], png)
    with pytest.raises(DataError, match="row 0, field reward_model.ground_truth: neither the letter nor the text"):
        VerlParquetSource(write(rows, schema=schema))[0]


def test_a_url_is_refused_before_a_root_is_asked_for(write: Write, png: bytes) -> None:
    with pytest.raises(DataError, match="URL, which is never fetched"):
        VerlParquetSource(write([row(0, png, images=[{"bytes": None, "path": "http://example.com/a.png"}])]))[0]
