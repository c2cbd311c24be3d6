"""The main job as a user starts it: to the end, killed in the middle, with mistakes on its command line.

It is the quickstart at a size where the policy calls now and then when it samples, and never when it is greedy.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.data.benchmarks.catalogue import BENCHMARKS
from maestro_jax.data.prepare import prepare
from maestro_jax.errors import EXIT_CONFIG
from maestro_jax.grpo.update import GroupBatch
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.vision import ImageBatch
from maestro_jax.settings import read_settings
from maestro_jax.training.updates import note_shape
from tests.data.benchmarks import layouts
from tests.main_job import EVERY, EXAMPLES, ROOT, STEPS, TINY, png, verl, without_times, write_parquet

KILLED_EARLY, KILLED_LATE = 2, 7
SECONDS = 400  # far above what is needed: a hang fails instead of hanging the suite
EXIT_SECONDS = 120  # for some steps and the way out; Orbax can hold a process for 300
CANARY = "canary-key-that-nobody-may-write"
ROWS = {"random", "best_single_pair", "warm_start", "trained", "domain_oracle", "task_oracle"}
DOMAINS = {"charts", "counting", "geometry", "reading", "visual_qa"}


@dataclasses.dataclass(frozen=True)
class Job:
    """The command with what its runs share: a built suite and compiled programs."""

    shared: Path

    def command(self, workdir: Path, overrides: dict[str, Any]) -> list[str]:
        settings = TINY | {"data.suite_directory": self.shared / "suite"} | overrides
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        return [*self.bare(), "--config=configs/quickstart.py", f"--workdir={workdir}", *flags]

    def bare(self) -> list[str]:
        return [sys.executable, "-m", "maestro_jax.train"]

    def environment(self) -> dict[str, str]:
        """One CPU device, not the eight of the tests; programs are compiled quickly, and once for all runs."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(self.shared / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "MAESTRO_TEST_KEY": CANARY,
        }

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.environment(), stdout=pipe, stderr=pipe, text=True)

    def run(self, workdir: Path, **overrides: Any) -> subprocess.CompletedProcess[str]:
        return self.finish(self.command(workdir, overrides))

    def finish(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """A run that was killed before its first checkpoint, killed again after it, and then left to end.

    Attributes:
      early: a copy of the work directory, as the first kill left it.
    """

    workdir: Path
    early: Path
    rows_at_kill: list[dict[str, Any]]  # at the second one
    again: subprocess.CompletedProcess[str]

    @property
    def resumed_from(self) -> int:
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.again.stdout)
        assert found, self.again.stdout
        return int(found[1])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("shared_by_runs"))


@pytest.fixture(scope="module")
def interrupted(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    workdir, early = tmp_path_factory.mktemp("interrupted"), tmp_path_factory.mktemp("early") / "interrupted"
    kill_at(job.start(job.command(workdir, {})), KILLED_EARLY)
    shutil.copytree(workdir, early)
    kill_at(job.start(job.command(workdir, {})), KILLED_LATE)
    assert not (workdir / "summary.json").exists()
    return Interrupted(workdir, early, read_metrics(workdir / "metrics.jsonl"), job.run(workdir))


def kill_at(process: subprocess.Popen[str], step: int) -> None:
    """Kills the run as soon as it reports `step`: one line per step comes out, so nothing has to be polled."""
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith(f"train {step}/{STEPS} "):
            break
    process.send_signal(signal.SIGKILL)
    with process.stdout, process.stderr:
        errors = process.stderr.read()
    assert process.wait(SECONDS) == -signal.SIGKILL, errors


def assert_refused(result: subprocess.CompletedProcess[str], *says: str) -> None:
    """One line that says what is wrong, and the exit code that tells a scheduler not to try again."""
    assert result.returncode == EXIT_CONFIG, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in says:
        assert part in lines[0]


# ---- a run to its end, killed once -------------------------------------------------------------------------


def test_a_killed_run_goes_on_from_its_last_checkpoint(interrupted: Interrupted) -> None:
    assert interrupted.again.returncode == 0, interrupted.again.stderr
    # The last one may still have been on its way to the disk; then it is the one before.
    assert interrupted.resumed_from in (EVERY, 2 * EVERY)
    assert f"\ntrain {interrupted.resumed_from + 1}/{STEPS} " in interrupted.again.stdout
    assert f"\ntrain {interrupted.resumed_from}/{STEPS} " not in interrupted.again.stdout


def test_metrics_hold_every_step_once(interrupted: Interrupted) -> None:
    rows = read_metrics(interrupted.workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "held_out_accuracy" in row] == [0, EVERY, 2 * EVERY, STEPS]


def test_the_logged_terms_of_the_reward_add_up(interrupted: Interrupted) -> None:
    for row in read_metrics(interrupted.workdir / "metrics.jsonl")[1:]:
        terms = row["accuracy"], row["format"], row["cost"], row["latency"]
        assert row["reward"] == pytest.approx(sum(terms))


def test_rows_before_the_checkpoint_are_kept(interrupted: Interrupted) -> None:
    kept = [row for row in interrupted.rows_at_kill if 0 < row["step"] <= interrupted.resumed_from]
    assert [row["step"] for row in kept] == list(range(1, interrupted.resumed_from + 1))
    rows = read_metrics(interrupted.workdir / "metrics.jsonl")
    assert [row for row in rows if 0 < row["step"] <= interrupted.resumed_from] == kept


def test_what_comes_before_training_is_not_repeated(interrupted: Interrupted) -> None:
    for phase in ("suite", "demonstrations", "warm start", "held-out, before RL (greedy)"):
        assert not re.search(rf"^{re.escape(phase)}:? +\d", interrupted.again.stdout, re.MULTILINE)


def test_routing_without_learning_is_measured_when_nobody_waits_for_it(interrupted: Interrupted) -> None:
    said = interrupted.again.stdout
    assert said.index(f"\ntrain {STEPS}/{STEPS} ") < said.index("\nbaselines: ")


def test_the_summary_says_what_is_promised(interrupted: Interrupted) -> None:
    summary = json.loads((interrupted.workdir / "summary.json").read_text())
    assert set(summary["accuracy"]) == ROWS
    assert all(0 <= value <= 1 for value in summary["accuracy"].values())
    assert summary["accuracy"]["domain_oracle"] <= summary["accuracy"]["task_oracle"]
    assert (summary["steps"], summary["seed"]) == (STEPS, 0)
    assert summary["wall_seconds"] > 0
    assert all(set(row) == DOMAINS for row in summary["accuracy_by_domain"].values())


def test_time_before_the_kill_counts(interrupted: Interrupted) -> None:
    summary = json.loads((interrupted.workdir / "summary.json").read_text())
    first = sum(row.get("seconds", 0.0) for row in read_metrics(interrupted.workdir / "metrics.jsonl"))
    assert summary["wall_seconds"] > first


def test_the_table_is_printed(interrupted: Interrupted) -> None:
    printed = interrupted.again.stdout
    assert all(
        word in printed for word in ("random routing", "trained", "domain oracle", "task oracle", "summary.json")
    )


@pytest.mark.parametrize("name", ["curves.png", "routing.png"])
def test_figures_are_drawn(name: str, interrupted: Interrupted) -> None:
    with Image.open(interrupted.workdir / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300
    drawn = (pixels != pixels[0, 0]).any(axis=-1)
    assert 0.01 < drawn.mean() < 0.99
    assert len({color.tobytes() for color in pixels[::8, ::8].reshape(-1, 3)}) > 10


def test_a_killed_run_equals_a_straight_one(interrupted: Interrupted, job: Job, tmp_path: Path) -> None:
    """Same start (warm start and tokenizer are copied), no kill: the same samples, rewards and gradients.

    It is started by nothing but what the killed one wrote down, and writes that down again.
    """
    workdir, written = tmp_path / "straight", interrupted.workdir / "config.json"
    later = ("checkpoints", "metrics.jsonl", "summary.json", "*.png", "config.json")
    shutil.copytree(interrupted.workdir, workdir, ignore=shutil.ignore_patterns(*later))
    result = job.finish([*job.bare(), f"--config={written}", f"--workdir={workdir}"])
    assert result.returncode == 0, result.stderr
    assert (workdir / "config.json").read_bytes() == written.read_bytes()
    assert "resumed" not in result.stdout
    straight, killed = (read_metrics(where / "metrics.jsonl") for where in (workdir, interrupted.workdir))
    assert without_times(straight) == without_times(killed)
    # The comparison would be empty if nothing was called or learned.
    assert sum(row.get("calls", 0) > 0 for row in straight) > STEPS / 2
    assert sum(row.get("grad_norm", 0) > 0 for row in straight) > STEPS / 2


def test_a_cap_counts_what_was_spent_before_a_kill(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    """There was no checkpoint yet, and the run had asked as often as it may: it asks no more."""
    workdir = tmp_path / "capped"
    shutil.copytree(interrupted.early, workdir, ignore=shutil.ignore_patterns("expert_cache.jsonl"))
    asked = requests_in(workdir)
    assert asked > 0 and not any((workdir / "checkpoints").glob("[0-9]*"))
    result = job.run(workdir, **{"registry.limits.calls": asked})
    assert_refused(result, f"the run has reached its cap config.registry.limits.calls={asked};")
    assert requests_in(workdir) == asked


def test_a_disk_that_goes_away_ends_the_run(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    """Its saves fail in the background, while it trains. What it has measured is there."""
    workdir = tmp_path / "lost"
    shutil.copytree(interrupted.early, workdir)
    command = job.command(workdir, {})
    process = job.start(command)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith(f"train 1/{STEPS} "))
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").touch()
    try:
        out, err = process.communicate(timeout=EXIT_SECONDS)
    finally:
        process.kill()
    result = subprocess.CompletedProcess(command, process.returncode, out, err)
    assert_refused(result, "the checkpoint of step", "cannot be written", "Not a directory", "its disk is mounted")
    steps = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and len(steps) > EVERY


def requests_in(workdir: Path) -> int:
    """How often experts were asked, by the journal; services have no price and no tokens."""
    lines = [json.loads(line) for line in (workdir / "journal.jsonl").read_text().splitlines()]
    return sum(line["kind"] == "request" and line["usage"]["prompt_tokens"] > 0 for line in lines)


def test_a_key_of_the_environment_is_written_nowhere(interrupted: Interrupted) -> None:
    files = [path for path in interrupted.workdir.rglob("*") if path.is_file()]
    assert any(path.name == "journal.jsonl" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in interrupted.again.stdout + interrupted.again.stderr


def test_a_finished_run_that_starts_again_asks_nobody(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    """Its last checkpoint knows what its evaluation found. That experts are reached in another way, it says once."""
    workdir, config = tmp_path / "finished", tmp_path / "moved.py"
    shutil.copytree(interrupted.workdir, workdir)
    config.write_text(
        "from configs import quickstart\n\n\ndef get_config():\n    config = quickstart.get_config()\n"
        "    config.registry.experts = tuple(expert | {'timeout': 7.0} for expert in config.registry.experts)\n"
        "    return config\n"
    )
    command = job.command(workdir, {})
    command[command.index("--config=configs/quickstart.py")] = f"--config={config}"
    result = job.finish(command)
    assert result.returncode == 0, result.stderr
    assert "config.registry.experts.Tally.timeout was (not set) so far and is now 7.0" in result.stdout
    written = read_settings(workdir / "config.json")
    assert written is not None and written.flat["registry.experts.Tally.timeout"] == "7.0"
    assert_same_results(interrupted.workdir, workdir)
    assert (workdir / "journal.jsonl").read_text() == (interrupted.workdir / "journal.jsonl").read_text()


def assert_same_results(workdir: Path, other: Path) -> None:
    one, two = (json.loads((where / "summary.json").read_text()) for where in (workdir, other))
    for name in ("accuracy", "accuracy_by_domain", "reward", "calls"):
        assert one[name] == two[name]


@pytest.mark.slow
def test_a_killed_run_is_replayed(interrupted: Interrupted, job: Job, tmp_path: Path) -> None:
    """Nobody is asked: the calls of its three lives are in one journal. The replay is killed, too, and goes on."""
    workdir = tmp_path / "replayed"
    later = ("checkpoints", "metrics.jsonl", "summary.json", "*.png", "before*.json", "baselines.json", "*.jsonl")
    shutil.copytree(interrupted.workdir, workdir, ignore=shutil.ignore_patterns(*later))
    command = [*job.command(workdir, {}), f"--replay={interrupted.workdir / 'journal.jsonl'}"]
    kill_at(job.start(command), KILLED_LATE)
    result = job.finish(command)
    assert result.returncode == 0, result.stderr
    assert "resumed from the checkpoint" in result.stdout
    replayed, killed = (read_metrics(where / "metrics.jsonl") for where in (workdir, interrupted.workdir))
    assert without_times(replayed) == without_times(killed)
    for name in ("baselines.json", "before.json", "before_sampled.json"):
        assert (workdir / name).read_text() == (interrupted.workdir / name).read_text()
    assert_same_results(interrupted.workdir, workdir)
    # The parameters are those of the last step, also where fewer steps are asked for.
    fewer = job.run(workdir, **{"grpo.steps": STEPS - 1})
    assert fewer.returncode == 0, fewer.stderr
    assert_same_results(interrupted.workdir, workdir)
    own = job.finish([*job.command(workdir, {}), f"--replay={workdir / 'journal.jsonl'}"])
    assert_refused(own, "is what this run itself writes to", "another directory")


def test_a_replay_of_a_run_ahead_is_refused(job: Job, tmp_path: Path) -> None:
    ahead = {"rollout.ahead": 1, "rollout.staleness": 1, "grpo.importance_cap": 2.0}
    result = job.finish([*job.command(tmp_path, ahead), f"--replay={tmp_path}/journal.jsonl"])
    assert_refused(result, "config.rollout.ahead=1", "replay with config.rollout.ahead=0")


def part_of(groups: int = 2, prefix: int = 64, room: int = 32, rows: int = 64, patches: int = 4) -> GroupBatch:
    def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return np.zeros((groups, *shape), dtype)

    images = ImageBatch(*(zeros(patches, n) for n in (6, 4, 4, 2)), zeros(patches, dtype=bool))
    row, row_of_three, number = zeros(prefix), zeros(prefix, 3), zeros()
    prompts = PrefixBatch(np.zeros(3), row, row, row_of_three, number, number, images, row)
    tokens = zeros(8, room)
    return GroupBatch(prompts, tokens, zeros(8), tokens, tokens, tokens, zeros(8), zeros(rows))


def test_a_shape_of_the_update_is_noted_whenever_the_update_is_compiled() -> None:
    compiled: list[int] = []

    @jax.jit
    def update(part: GroupBatch) -> jax.Array:
        compiled.append(1)  # runs when it is traced
        return part.mask.sum()

    changed = ({"room": 16}, {"rows": 128}, {"patches": 16}, {"prefix": 96}, {"groups": 1}, {"rows": 128, "room": 16})
    parts = [part_of(), *(part_of(**change) for change in changed)]
    stream, shapes = io.StringIO(), set()
    for part in parts * 2:
        note_shape(part, shapes, Progress(stream))
        update(part)
        assert len(stream.getvalue().splitlines()) == len(compiled)
    assert len(compiled) == len(parts)
    lines = stream.getvalue().splitlines()
    assert len(set(lines)) == len(lines)  # they say what is new
    images = "2 images of 4 patches"
    assert lines[0] == f"new shape of the update: 2 groups of 64 + 8 x 32 tokens, 64 of them in the loss; {images}"


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_a_misspelt_override_is_refused(job: Job, tmp_path: Path) -> None:
    assert_refused(job.run(tmp_path, **{"grpo.group_sze": 4}), "config.grpo.group_sze", "group_size")


def test_an_override_of_the_wrong_type_is_refused(job: Job, tmp_path: Path) -> None:
    assert_refused(job.run(tmp_path, **{"grpo.group_size": "four"}), "group_size", "four")


def test_a_command_without_workdir_is_refused(job: Job) -> None:
    assert_refused(job.finish([*job.bare(), "--config=configs/quickstart.py"]), "--workdir")


def test_a_config_file_that_is_not_there_is_refused(job: Job, tmp_path: Path) -> None:
    assert_refused(job.finish([*job.bare(), "--config=configs/nowhere.py", f"--workdir={tmp_path}"]), "nowhere.py")


def test_a_word_that_is_no_flag_is_refused(job: Job, tmp_path: Path) -> None:
    result = job.finish([*job.command(tmp_path, {}), "config.grpo.steps=3"])
    assert_refused(result, "unexpected argument 'config.grpo.steps=3'; write --config.grpo.steps=3 if")


def test_another_setting_in_the_same_workdir_is_refused(job: Job, interrupted: Interrupted) -> None:
    result = job.run(interrupted.workdir, seed=1)
    assert_refused(result, "config.seed=0", "this one has 1", "another directory")


def test_a_start_that_makes_nothing_does_not_bind_the_next(job: Job, tmp_path: Path) -> None:
    """No demonstration fits: experts were asked, and nothing was trained. Then the mended command runs."""
    assert_refused(job.run(tmp_path, **{"policy.prefix_buckets": "(16,)", "grpo.steps": 1}), "prefix_buckets")
    assert (tmp_path / "config.json").exists() and requests_in(tmp_path)
    others = {"registry.services": "()"}
    assert job.run(tmp_path, **others).returncode == EXIT_CONFIG  # what was asked is answered from the journal
    mended = {"warm_start.steps": 5, "grpo.steps": 1}
    result = job.run(tmp_path, **mended)
    assert result.returncode == 0, result.stderr
    assert_refused(job.run(tmp_path, **mended, seed=1), "config.seed=0, this one has 1")


# ---- tasks from verl parquet files -------------------------------------------------------------------------


def test_a_run_on_parquet_files(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [png(n) for n in range(4)])
    test = write_parquet(tmp_path / "test.parquet", [png(100 + n) for n in range(3)])
    # With the same tokenizer prompts have the same shapes, and no program is compiled anew.
    tokenizer = {"policy.tokenizer": interrupted.workdir / "tokenizer"}
    settings = verl(train, test) | tokenizer | {"warm_start.steps": 0, "grpo.steps": 1}
    result = job.run(tmp_path / "run", **settings)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["held_out_tasks"] == 3
    assert all(set(row) == {"chartqa"} for row in summary["accuracy_by_domain"].values())


@pytest.fixture(scope="module")
def exported(job: Job, interrupted: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interrupted run's last parameters as a Hugging Face directory."""
    output = tmp_path_factory.mktemp("export") / "exported"
    command = [sys.executable, "-m", "maestro_jax.export", f"--checkpoint={interrupted.workdir}"]
    result = job.finish([*command, f"--output={output}", "--dtype=float32"])
    assert result.returncode == 0, result.stderr
    return output


def assert_same_parameters(first: Path, second: Path, below: str = "") -> None:
    """Of the newest checkpoints of two runs, those whose names begin with `below`, bit for bit."""
    one, other = ParamReader(first / "checkpoints", None), ParamReader(second / "checkpoints", None)
    names = [name for name in one.shapes if name.startswith(below)]
    assert names and one.shapes == other.shapes
    for name in names:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


def test_a_run_starts_from_an_exported_one(job: Job, interrupted: Interrupted, exported: Path, tmp_path: Path) -> None:
    """A step at rate 0 leaves the parameters as the first run left them."""
    start = {"policy.init_from": exported, "warm_start.steps": 0, "grpo.steps": 1, "optimizer.learning_rate": 0.0}
    result = job.run(tmp_path / "run", **start)
    assert result.returncode == 0, result.stderr
    assert_same_parameters(interrupted.workdir, tmp_path / "run")
    assert not (tmp_path / "run/tokenizer").exists()  # it is the exported one


def test_the_config_of_the_4b_trains_a_small_checkpoint(
    job: Job, interrupted: Interrupted, exported: Path, tmp_path: Path
) -> None:
    """Its own settings (bf16, recomputed layers, the checkpoint's architecture), with fewer and shorter tasks."""
    keys = ("data.", "rollout.", "reward.", "grpo.", "evaluate.", "checkpoint.", "policy.prefix_buckets")
    small = {key: value for key, value in TINY.items() if key.startswith(keys)}
    small |= {"policy.init_from": exported, "data.suite_directory": job.shared / "suite", "grpo.steps": 2}
    small |= {"policy.image_buckets": "(80,)", "policy.min_pixels": 32 * 32, "policy.max_pixels": 160 * 128}
    small |= {"policy.freeze": "('vision',)", "optimizer.learning_rate": 1e-3, "grpo.microbatches": 2}
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    result = job.finish([*job.bare(), "--config=configs/qwen3_vl_4b.py", f"--workdir={tmp_path}/run", *flags])
    assert result.returncode == 0, result.stderr
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    # Log-probabilities of some -5 from bf16 states (8 bits), which sampler and trainer sum in different orders.
    assert all(0 < row["logprob_gap"] < 5 * 2**-6 for row in rows)
    assert_same_parameters(interrupted.workdir, tmp_path / "run", below="visual/")
    with pytest.raises(AssertionError):
        assert_same_parameters(interrupted.workdir, tmp_path / "run", below="language_model/norm")


@pytest.mark.slow  # its picture and question have shapes of their own, for which programs are compiled
@pytest.mark.skipif(EXAMPLES is None, reason="the published example rows are not in shared/")
def test_the_published_rows_train(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    assert EXAMPLES is not None
    files = verl(EXAMPLES / "train_data_example.parquet", EXAMPLES / "val_data_example.parquet")
    tokenizer = {"policy.tokenizer": interrupted.workdir / "tokenizer"}
    result = job.run(tmp_path / "run", **files | tokenizer | {"warm_start.steps": 0, "grpo.steps": 1})
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["held_out_tasks"] == 1


# ---- rollouts that outlive their step ----------------------------------------------------------------------


STREAMED = {"grpo.microbatches": 2, "grpo.stream": True}
AHEAD = {"rollout.ahead": 1, "rollout.staleness": 1, "grpo.importance_cap": 2.0}


@pytest.mark.parametrize(
    ("taken", "parts"), [(STREAMED, 2), pytest.param(AHEAD, 1, marks=pytest.mark.slow)], ids=["streamed", "ahead"]
)
def test_rollouts_that_outlive_their_step_train(taken: dict[str, Any], parts: int, job: Job, tmp_path: Path) -> None:
    """Fewer lanes than trajectories, parked on the device, in both ways of taking groups as they finish."""
    parked = {"rollout.lanes": 8, "rollout.parked_tokens": 800, "grpo.steps": 3, "warm_start.steps": 2}
    result = job.run(tmp_path, **parked | taken)
    assert result.returncode == 0, result.stderr
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {row["parts"] for row in rows} == {parts}


# ---- evaluation of what was trained --------------------------------------------------------------------------


SAMPLES = 8  # of each task: the policy calls now and then when it samples


def evaluation(job: Job, run: Path, output: Path, *more: str) -> list[str]:
    """The command over the five held-out tasks, two at a time."""
    settings = TINY | {"data.suite_directory": job.shared / "suite", "evaluate.batch": 2}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    own = [f"--checkpoint={run}", f"--output={output}", f"--samples={SAMPLES}", "--baselines", *more]
    return [sys.executable, "-m", "maestro_jax.evaluate", "--config=configs/quickstart.py", *own, *flags]


@pytest.fixture(scope="module")
def evaluated(job: Job, interrupted: Interrupted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated")
    result = job.finish(evaluation(job, interrupted.workdir, output))
    assert result.returncode == 0, result.stderr
    assert "| average |" in result.stdout and "Reported by the authors" not in result.stdout
    return output


def measured(output: Path) -> dict[str, Any]:
    """What no clock has a part in."""
    summary = json.loads((output / "evaluation.json").read_text())
    return {name: value for name, value in summary.items() if name != "latency"}


def test_an_evaluation_says_what_is_promised(interrupted: Interrupted, evaluated: Path) -> None:
    summary = measured(evaluated)
    assert set(summary["benchmarks"]) == DOMAINS and summary["tasks"] == 5
    trained = json.loads((interrupted.workdir / "summary.json").read_text())
    assert summary["average"]["accuracy"]["mean"] == trained["accuracy"]["trained"]
    assert summary["average"]["baselines"]["task_oracle"] == trained["accuracy"]["task_oracle"]
    for row in summary["benchmarks"].values():
        accuracy, sampled = row["accuracy"], row["sampled"]
        assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
        assert sampled["samples"] == SAMPLES and sampled["mean"] == sampled["pass"]["1"] <= sampled["pass"]["2"]
    episodes = [json.loads(line) for line in (evaluated / "episodes.jsonl").read_text().splitlines()]
    assert sum(bool(episode.get("calls")) for episode in episodes) > 0  # it would show little otherwise
    assert all((evaluated / name).stat().st_size > 10_000 for name in ("accuracy.png", "routing.png"))


def test_an_evaluation_that_was_killed_gives_the_same_numbers(
    job: Job, interrupted: Interrupted, evaluated: Path, tmp_path: Path
) -> None:
    command = evaluation(job, interrupted.workdir, tmp_path)
    process = job.start(command)
    assert process.stdout is not None
    assert any(line.startswith("evaluate 2/5 ") for line in process.stdout)
    process.kill()
    process.communicate()
    before = (tmp_path / "episodes.jsonl").read_bytes()
    assert before and not (tmp_path / "evaluation.json").exists()
    result = job.finish(command)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "episodes.jsonl").read_bytes().startswith(before[: before.rindex(b'{"batch"')])
    assert measured(tmp_path) == measured(evaluated)


def test_an_evaluation_refuses_what_it_cannot_do(job: Job, interrupted: Interrupted, evaluated: Path) -> None:
    command = evaluation(job, interrupted.workdir, evaluated)
    assert_refused(job.finish([*command, "--tasks=1"]), "--tasks=0", "this one has 1", "another directory")
    nothing = [*command[:3], "--config=configs/quickstart.py", f"--output={evaluated}"]
    assert_refused(job.finish(nothing), "no policy to evaluate", "--checkpoint", "config.policy.init_from")


def test_a_run_is_evaluated_with_its_own_settings(
    job: Job, interrupted: Interrupted, evaluated: Path, tmp_path: Path
) -> None:
    own = [f"--checkpoint={interrupted.workdir}", f"--output={tmp_path}", f"--samples={SAMPLES}", "--baselines"]
    result = job.finish([sys.executable, "-m", "maestro_jax.evaluate", *own, "--config.evaluate.batch=2"])
    assert result.returncode == 0, result.stderr
    assert "config.evaluate.batch is 2 here; the run had 5" in result.stdout
    assert measured(tmp_path) == measured(evaluated)
    assert measured(tmp_path)["differences"] == {"evaluate.batch": {"run": "5", "here": "2"}}


def test_a_config_file_says_which_tasks_a_run_is_evaluated_on_and_not_how(
    job: Job, interrupted: Interrupted, tmp_path: Path
) -> None:
    """It is refused for nothing that only training would use. The tasks that are done are counted, no others."""
    config, output = tmp_path / "given.py", tmp_path / "evaluation"
    config.write_text(
        "from configs import quickstart\n\n\ndef get_config():\n    config = quickstart.get_config()\n"
        f"    config.data.suite_directory = {str(job.shared / 'suite')!r}\n"
        "    config.data.train_per_domain, config.data.test_per_domain = 8, 1\n"
        "    config.warm_start.claims.charts = ('Nobody', 'Nothing')\n    config.grpo.group_size = 1\n"
        "    return config\n"
    )
    own = [f"--checkpoint={interrupted.workdir}", f"--output={output}", "--benchmarks=charts,counting", "--tasks=1"]
    command = [sys.executable, "-m", "maestro_jax.evaluate", f"--config={config}", *own, "--config.rollout.max_calls=2"]
    result = job.finish(command)
    assert result.returncode == 0, result.stderr
    assert "config.rollout.turn_budget of --config does not count (32): the run had 24" in result.stdout
    assert "config.rollout.max_calls is 2 here; the run had 1" in result.stdout
    assert "\nevaluate 2/2 " in result.stdout and "/5" not in result.stdout
    used = read_settings(output / "config.json")
    assert used is not None and (used.config["rollout"]["turn_budget"], used.config["rollout"]["max_calls"]) == (24, 2)
    changed = measured(output)["differences"]
    assert changed["rollout.max_calls"] == {"run": "1", "here": "2"} and "rollout.turn_budget" not in changed
    assert "| rollout.max_calls | 1 | 2 |" in (output / "evaluation.md").read_text()


# ---- published benchmarks ----------------------------------------------------------------------------------


@pytest.mark.slow  # longer prompts, for which programs are compiled
def test_all_published_benchmarks_are_evaluated(job: Job, interrupted: Interrupted, tmp_path: Path) -> None:
    """Prepared from small files in their published layouts, in one evaluation with in-process experts."""
    layouts_of = {name: write for name, write in layouts.LAYOUTS.values()}
    for name, write in layouts_of.items():
        write(tmp_path / "files" / name)
        prepare(name, tmp_path / "files" / name, tmp_path / "data", Progress(io.StringIO()))
    files = tuple(str(tmp_path / "data" / name) for name in BENCHMARKS)
    settings = TINY | {
        "data.kind": "tfds",
        "data.train_files": f"('{tmp_path}/data/chartqa',)",
        "data.test_files": repr(files),
        "policy.images_per_task": 2,
        "policy.prefix_buckets": "(640,)",
        "evaluate.batch": 7,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    own = [f"--checkpoint={interrupted.workdir}", f"--output={tmp_path}/evaluation", "--tasks=1"]
    command = [sys.executable, "-m", "maestro_jax.evaluate", "--config=configs/quickstart.py", *own, *flags]
    result = job.finish(command)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert set(summary["benchmarks"]) == {benchmark.source for benchmark in BENCHMARKS.values()}
    assert summary["tasks"] == len(BENCHMARKS) == 14
