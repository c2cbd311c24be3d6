"""Mistakes in settings and data, met by the main job as a function: one line, before anything is computed."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from configs import quickstart
from maestro_jax import api
from maestro_jax.config import completed, parse_config
from maestro_jax.data.mixture import Mixture
from maestro_jax.errors import ConfigError, UserError
from maestro_jax.jobs.train import is_free
from maestro_jax.observe.progress import Progress
from maestro_jax.session.binding import check_same_run
from maestro_jax.session.tasks import open_held_out, open_training
from maestro_jax.settings import Settings
from tests.data import verl_rows
from tests.main_job import EXAMPLES, TINY, png, verl, write_parquet


def refused(workdir: Path, says: str, **overrides: Any) -> None:
    """The main job at its tiny size, with what says `says`, a pattern, in one line."""
    config = quickstart.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value for key, value in (TINY | overrides).items()})
    with pytest.raises(UserError, match=says) as raised:
        api.train(config, workdir)
    assert "\n" not in str(raised.value)


def test_a_turn_budget_that_cuts_every_call_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    refused(tmp_path, "turn_budget=16 cuts turns that are right.* or more", **{"rollout.turn_budget": 16})
    assert not (tmp_path / "warm_start").exists()


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "run", f"--workdir={tmp_path}/file/run cannot be.*Not a directory")


def test_more_held_out_tasks_than_there_are_are_refused(tmp_path: Path) -> None:
    says = "config.evaluate.tasks=6, and the data has 5 held-out tasks; set it to 5 or less, or to 0 for all"
    refused(tmp_path, re.escape(says), **{"evaluate.tasks": 6})


@pytest.mark.parametrize(
    ("key", "bound", "free"),
    [
        ("data.damage_limit", "", True),  # its own error says to raise it
        ("grpo.steps", "", True),
        ("seed", "", False),
        ("seed", "registry.", True),
        ("registry.services", "registry.", False),
        ("registry.services", None, True),
    ],
)
def test_what_may_differ_from_the_work_directory(key: str, bound: str | None, free: bool) -> None:
    assert is_free(key, bound) == free


def test_a_mistake_does_not_take_the_workdir(tmp_path: Path) -> None:
    """The mended command may be given the same one: nothing has been made with the wrong setting."""
    for name in ("misspelt.parquet", "other.parquet"):
        refused(tmp_path, f"{tmp_path / name}: no such file", **verl(tmp_path / name, tmp_path / name))


def settings_of(expert: dict[str, Any], **others: Any) -> Settings:
    names = {"name": "Chart-R1.5", "description": "charts"}
    skill = {"name": "S", "stages": ({"kind": "ask", "output": "a", "prompt": "{question}"},)} | others
    registry = {"experts": (names | expert, {"name": "Other"}), "skills": (skill,)}
    return Settings.of(completed({"seed": 0, "registry": registry}))


def nothing(key: str) -> bool:
    """No setting may change."""
    return False


SERVED = {"endpoints": ("http://127.0.0.1:1/v1",), "model": "m", "options": {"timeout": 1}, "price_prompt": 1.0}


@pytest.mark.parametrize(
    "moved",
    [
        {"endpoints": ("http://127.0.0.1:2/v1", "http://127.0.0.1:3/v1")},
        {"key": "ANOTHER_KEY"},
        {"concurrency": 8},
        {"attempt_timeout": 20.0},
        {"serve": ("vllm", "{port}")},
    ],
)
def test_servers_may_move_between_a_run_and_its_continuation(moved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    settings_of(SERVED).write(path)
    (name, value), before = *moved.items(), SERVED.get(*moved)
    was = "(not set)" if before is None else repr(before)
    told = f"config.registry.experts.Chart-R1.5.{name} was {was} so far and is now {value!r}"
    assert check_same_run(path, settings_of(SERVED | moved), nothing) == [told]
    assert check_same_run(path, settings_of(SERVED), nothing) == []


@pytest.mark.parametrize(
    ("expert", "others", "names"),
    [
        ({"model": "n"}, {}, "experts.Chart-R1.5.model='m', this one has 'n'"),
        ({"temperature": 0.5}, {}, "experts.Chart-R1.5.temperature=(not set), this one has 0.5"),
        ({"options": {"timeout": 2}}, {}, "experts.Chart-R1.5.options={'timeout': 1}, this one has {'timeout': 2}"),
        ({"price_prompt": 2.0}, {}, "experts.Chart-R1.5.price_prompt=1.0, this one has 2.0"),
        ({"name": "Chart-R2"}, {}, "experts=['Chart-R1.5', 'Other'], this one has ['Chart-R2', 'Other']"),
        ({}, {"description": "new"}, "skills.S.description=(not set), this one has 'new'"),
        ({}, {"stages": ()}, "skills.S.stages="),
    ],
)
def test_what_experts_answer_may_not_change(
    expert: dict[str, Any], others: dict[str, Any], names: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    settings_of(SERVED).write(path)
    with pytest.raises(ConfigError, match=re.escape(f"holds a run with config.registry.{names}")):
        check_same_run(path, settings_of(SERVED | expert, **others), nothing)


def test_a_mixture_is_opened_in_its_shares(tmp_path: Path) -> None:
    files = [write_parquet(tmp_path / f"{name}.parquet", [png(n) for n in range(2 + n)]) for n, name in enumerate("ab")]
    raw = quickstart.get_config()
    raw.data.kind, raw.data.test_files = "verl", (str(files[0]),)
    raw.data.mixture = tuple(
        {"kind": "verl", "files": (str(file),), "split": "", "image_root": "", "weight": weight}
        for file, weight in zip(files, (0.75, 0.25), strict=True)
    )
    opened = parse_config(raw), tmp_path, Progress(io.StringIO())
    train, test = open_training(*opened), open_held_out(*opened)
    assert isinstance(train, Mixture) and train.weights == (3, 1)
    assert (len(train), len(test)) == (5, 2)


def test_a_corrupt_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [png(0)])
    path.write_bytes(path.read_bytes()[:-20])
    says = f"{path}.*not a complete parquet file.*re-download or re-export"
    refused(tmp_path / "run", says, **verl(path, path))


def test_a_broken_image_is_refused(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [png(0), b"\x89PNG but no picture"])
    settings = verl(train, write_parquet(tmp_path / "test.parquet", [png(0)]))
    refused(tmp_path / "run", re.escape(f"{train} row 1, field images[0]"), **settings)


def test_a_source_that_nobody_can_grade_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    rows = [verl_rows.row(n, png(n), data_source="riddles" if n == 7 else "chartqa") for n in range(8)]
    path = verl_rows.write_rows(tmp_path / "train.parquet", rows)
    says = f'{path} row 7: no grader for source "riddles".*name one in config.graders, or correct the row'
    refused(tmp_path / "run", says, **verl(path, write_parquet(tmp_path / "test.parquet", [png(0)])))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.skipif(EXAMPLES is None, reason="the published example rows are not in shared/")
def test_the_published_rows_become_tasks() -> None:
    assert EXAMPLES is not None
    raw = quickstart.get_config()
    raw.data.kind = "verl"
    raw.data.train_files = (str(EXAMPLES / "train_data_example.parquet"),)
    raw.data.test_files = (str(EXAMPLES / "val_data_example.parquet"),)
    opened = parse_config(raw), Path(), Progress(io.StringIO())
    train, test = open_training(*opened), open_held_out(*opened)
    for source, answer in ((train, "Go-Jek"), (test, "Tania Vicenzino")):
        task = source[0]
        assert (len(source), task.source, task.answers, len(task.images)) == (1, "chartqa", (answer,), 1)
        assert task.question.endswith("?") and "<image>" not in task.question
