"""SLAKE: questions on radiology images, open or closed; the English half of a bilingual data set, as is usual.

Hugging Face, BoKelvin/SLAKE (and med-vqa.com/slake): `train.json`, `validation.json`, `test.json` (img_name, question,
answer, q_lang, answer_type OPEN or CLOSED, qid) and `imgs.zip`, unpacked to `imgs/`; read so by lmms-eval
(lmms_eval/tasks/slake/utils.py).
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, json_rows, tasks_of
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.errors import DataError
from maestro_jax.types import Task

SPLITS = ("train", "validation", "test")


def tasks(directory: Path) -> dict[str, Tasks]:
    paths = {split: path for split in SPLITS if (path := directory / f"{split}.json").is_file()}
    if not paths:
        return {}
    if not (directory / "imgs").is_dir():
        raise DataError(f"{directory}: no folder imgs beside the questions; unpack imgs.zip there")
    root = open_root(directory / "imgs", str(directory / "imgs"))
    return {
        split: tasks_of(json_rows(path, keep=lambda row: row.get("q_lang") != "zh"), partial(_task, split, root))
        for split, path in paths.items()
    }


def _task(split: str, root: ImageRoot, row: Row) -> Task:
    kind = row.text("answer_type").lower()
    if kind not in ("open", "closed"):
        raise row.error("answer_type", f"expected OPEN or CLOSED, found {kind[:20]!r}; correct it or remove the row")
    return Task(
        id=f"SLAKE/{split}/{row.integer('qid')}",
        question=row.text("question"),
        images=(root.read(row.text("img_name"), f"{row.where}, field img_name"),),
        answers=row.scalars("answer"),
        source="SLAKE",
        kind=kind,
    )
