"""The commands as functions: several in one process, with values as results and a callback for progress."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from maestro_jax import api
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.observe.trackers import TrackedRun
from tests.main_job import TINY

SMALL = TINY | {  # the batches divide over the eight devices of the tests
    "data.train_per_domain": 2,
    "warm_start.steps": 2,
    "warm_start.groups": 8,
    "grpo.steps": 2,
    "grpo.groups": 8,
    "grpo.group_size": 2,
    "evaluate.batch": 8,
    "evaluate.every": 2,
    "checkpoint.every": 1,
    "optimizer.decay_steps": 0,
}


def small(**changes: Any) -> ConfigDict:
    config = quickstart.get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


class Recorder:
    """A tracker of a user's own."""

    told: ClassVar[dict[int, Mapping[str, float]]] = {}

    def __init__(self, run: TrackedRun):
        assert run.settings["grpo.steps"] == "2" and run.directory.is_dir()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        assert step not in self.told
        self.told[step] = numbers

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[api.TrainResult, list[api.Event]]:
    events: list[api.Event] = []
    config = small(**{"trackers.use": (f"{__name__}:Recorder",)})
    return api.train(config, tmp_path_factory.mktemp("run"), progress=events.append), events


def test_training_gives_values_and_says_where_it_is(trained: tuple[api.TrainResult, list[api.Event]]) -> None:
    result, events = trained
    rows = {"trained", "warm_start", "random", "best_single_pair", "domain_oracle", "task_oracle"}
    assert result.accuracy.keys() == rows and all(0 <= share <= 1 for share in result.accuracy.values())
    assert (result.steps, result.seed, result.held_out_tasks) == (2, 0, 5)
    assert json.loads((result.workdir / "summary.json").read_text())["accuracy"] == dict(result.accuracy)
    phases = list(dict.fromkeys(event.phase for event in events))
    assert phases.index("warm start") < phases.index("train") < phases.index("baselines")
    steps = [event for event in events if event.phase == "train" and event.figures]
    assert [event.done for event in steps][-1] == 2 and "reward" in steps[-1].figures
    assert any("parameters on 8 cpu" in event.note for event in events)
    assert "trained (after RL)" in result.table()


def test_a_tracker_gets_the_numbers_of_every_step(trained: tuple[api.TrainResult, list[api.Event]]) -> None:
    rows = {row.pop("step"): row for row in read_metrics(trained[0].workdir / "metrics.jsonl")}
    assert (
        Recorder.told == rows
        and sorted(rows) == [0, 1, 2]
        and not any(event.note.startswith("tracker") for event in trained[1])
    )


def test_the_same_call_goes_on_where_it_stopped(trained: tuple[api.TrainResult, list[api.Event]]) -> None:
    again = api.train(small(**{"grpo.steps": 3, "optimizer.decay_steps": 0}), trained[0].workdir)
    assert again.steps == 3 and again.accuracy["warm_start"] == trained[0].accuracy["warm_start"]


def test_a_policy_is_evaluated_and_exported(trained: tuple[api.TrainResult, list[api.Event]], tmp_path: Path) -> None:
    run = trained[0].workdir
    report = api.evaluate(tmp_path / "evaluation", checkpoint=run, overrides={"mesh.data": 8, "mesh.fsdp": 1})
    assert report.accuracy_by_benchmark.keys() == {"charts", "counting", "geometry", "reading", "visual_qa"}
    assert report.accuracy == pytest.approx(sum(report.accuracy_by_benchmark.values()) / 5)
    assert report.figures["differences"].keys() == {"mesh.data", "mesh.fsdp"}
    exported = api.export(run, tmp_path / "exported", dtype="float32", verify=False)
    assert (exported.output / "model.safetensors").is_file() or list(exported.output.glob("*.safetensors"))


def test_baselines_and_first_figures_are_a_choice(tmp_path: Path) -> None:
    """Without them training begins at once; the summary, the table and the pictures have what there is."""
    events: list[api.Event] = []
    changes = {"evaluate.baselines": False, "warm_start.steps": 0, "grpo.steps": 1, "optimizer.decay_steps": 0}
    result = api.train(small(**changes), tmp_path / "run", progress=events.append)
    assert result.accuracy.keys() == {"trained"} and result.best_single_pair == ""
    assert not {"baselines", "held-out, before RL (greedy)"} & {event.phase for event in events}
    assert not list((tmp_path / "run").glob("*before*")) and (tmp_path / "run/routing.png").is_file()
    assert "trained (after RL)" in result.table() and "oracle" not in result.table()


def test_errors_are_raised_and_end_nothing(tmp_path: Path) -> None:
    with pytest.raises(api.ConfigError, match="config.grpo.group_size=1 gives no contrast"):
        api.train(small(**{"grpo.group_size": 1}), tmp_path / "run")
    with pytest.raises(api.ConfigError, match="there is no nowhere.py"):
        api.train("nowhere.py", tmp_path / "run")
    with pytest.raises(api.ConfigError, match="there is no policy to evaluate"):
        api.evaluate(tmp_path / "out")
    with pytest.raises(api.ConfigError, match="is no run's work directory"):
        api.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_a_doctor_finds_and_tells(tmp_path: Path) -> None:
    told: list[str] = []
    found = api.doctor(small(), static=True, tell=told.append)
    assert found.problems == [] and told == [f"config: {found.told}, 0 problems"]
    broken = small()
    broken.registry.skills = (
        *broken.registry.skills,
        ConfigDict({"name": "Odd", "description": "", "children": ("No",)}),
    )
    assert any("Odd" in line for line in api.doctor(broken, static=True).problems)


def test_importing_is_quick_and_needs_no_jax() -> None:
    code = "import sys, maestro_jax; print(sorted({'jax', 'flax', 'numpy', 'absl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_functions_define_no_flags() -> None:
    code = "from absl import flags; before = set(flags.FLAGS); import maestro_jax.api; print(set(flags.FLAGS) - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "config" not in found and "workdir" not in found


def test_functions_work_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""

    async def cell() -> list[str]:
        return api.doctor(small()).problems

    assert asyncio.run(cell()) == []
