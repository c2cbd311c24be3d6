"""ChartQA: questions about charts, written by people ("human") or made from chart summaries ("augmented").

Two layouts. Official, vis-nlp/ChartQA ("ChartQA Dataset" in the repository): a folder for each of train, val and test
with `<split>_human.json`, `<split>_augmented.json` ({imgname, query, label}) and `png/`. Hugging Face,
HuggingFaceM4/ChartQA: `data/{train,val,test}-*.parquet` (image, query, label as a list, human_or_machine as 0 or 1);
columns as read by public conversion scripts, the data set's own card is not among the documents that were looked up.
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, json_rows, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

SPLITS = {"train": "train", "validation": "val", "test": "test"}
KINDS = ("human", "augmented")


def tasks(directory: Path) -> dict[str, Tasks]:
    found = {}
    for split, name in SPLITS.items():
        if paths := parquet_files(directory, name):
            rows = parquet_rows(paths, ("image", "query", "label", "human_or_machine"))
            found[split] = tasks_of(rows, partial(_of_parquet, split))
        elif parts := _official(directory, split, name):
            found[split] = parts
    return found


def _official(directory: Path, split: str, name: str) -> Tasks:
    parts = Tasks(())
    for folder in (directory / name, directory / "ChartQA Dataset" / name):
        for kind in KINDS:
            if (path := folder / f"{name}_{kind}.json").is_file():
                convert = partial(_of_json, split, kind, open_root(folder, str(folder)))
                parts += tasks_of(json_rows(path), convert)
    return parts


def _of_json(split: str, kind: str, folder: ImageRoot, row: Row) -> Task:
    image = folder.read(f"png/{row.text('imgname')}", f"{row.where}, field imgname")
    return _task(row, f"ChartQA/{split}/{kind}/{row.number:06d}", image, kind)


def _of_parquet(split: str, row: Row) -> Task:
    maker = row.integer("human_or_machine")
    if maker not in (0, 1):
        raise row.error("human_or_machine", f"expected 0 or 1, found {maker}; correct it or remove the row")
    return _task(row, f"ChartQA/{split}/{row.number:06d}", row.picture("image"), KINDS[maker])


def _task(row: Row, name: str, image: bytes, kind: str) -> Task:
    return Task(name, row.text("query"), (image,), row.scalars("label"), "ChartQA", kind=kind)
