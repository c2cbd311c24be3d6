"""The data pipeline against the steps that it feeds: seconds of a batch, what is left to the step, memory.

    python -m benchmarks.data --run runs/quickstart [--json FILE] [--pairs 7] [--smoke]

In: the work directory of a quickstart run, which has its tasks, its tokenizer and its seconds (metrics.jsonl). Measured
are its own tasks, and four kinds of larger images under the limits of the 4B. Each load has a process of its own, where
nothing else runs: the batches come as fast as they can.
"""

import concurrent.futures
import dataclasses
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import pairs
from benchmarks.pairs import Figure, Result
from configs import quickstart, qwen3_vl_4b
from maestro_jax import command
from maestro_jax.config import parse_config
from maestro_jax.data.pipeline import READ_THREADS, Batches
from maestro_jax.data.source import TfdsSource
from maestro_jax.data.store import write_tasks
from maestro_jax.errors import ConfigError
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import open_architecture
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.session.policy import fields
from maestro_jax.suite.tasks.build import build_suite
from maestro_jax.types import Task

RUN = flags.DEFINE_string("run", "", "Work directory of a quickstart run: its tasks, tokenizer and seconds.")

GROUPS = 16  # of a quickstart step
WINDOW = 3  # batches that are timed together
KEPT = 32  # tasks of a load with larger images
WAIT = 0.5  # seconds between two batches where memory is measured: enough for all that is read ahead
# Of an image while it is decoded: Pillow's pixels, their bytes, the array.
BYTES_A_PIXEL = 4 + 3 + 3


@dataclasses.dataclass(frozen=True)
class Load:
    """Tasks with one image each: those of the run, or pictures of one size."""

    name: str
    width: int = 0
    height: int = 0
    format: str = ""

    @property
    def policy(self) -> ConfigDict:
        """Whose limits hold for the images."""
        return (qwen3_vl_4b if self.width else quickstart).get_config().policy


QUICKSTART = Load("quickstart")
LOADS = (
    QUICKSTART,
    Load("640x480", 640, 480, "JPEG"),
    Load("1024x1024", 1024, 1024, "PNG"),
    Load("1600x1200", 1600, 1200, "JPEG"),
    Load("3840x2160", 3840, 2160, "JPEG"),
)


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = Path(RUN.value)
    step = step_seconds(workdir)
    smoke = pairs.SMOKE.value
    results: dict[str, Result | Figure] = {}
    with Progress(sys.stderr) as progress, tempfile.TemporaryDirectory() as scratch:
        loads = LOADS[:2] if smoke else LOADS
        progress.phase("loads", len(loads))
        for number, load in enumerate(loads):
            directory = tasks_of(load, workdir, Path(scratch) / str(number), progress)
            measured = in_process(load, workdir, directory, windows=1 if smoke else pairs.PAIRS.value)
            results |= results_of(load, measured, step)
            progress.update(number + 1, {"tasks/s": GROUPS / statistics.median(measured["ahead"])})
    pairs.report(results)


def step_seconds(workdir: Path) -> float:
    """The median over a run's steps; the first one compiles.

    Raises:
      ConfigError: no run with some steps is there.
    """
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    seconds = [row["seconds"] for row in rows if row["step"] > 1]
    if not seconds:
        raise ConfigError(f"{path} has no steps; run maestro_jax.train with configs/quickstart.py first")
    return statistics.median(seconds)


def results_of(load: Load, measured: dict[str, Any], step: float) -> dict[str, Result | Figure]:
    details = {
        "tasks_per_second": GROUPS / statistics.median(measured["ahead"]),
        "encoded_kib": measured["encoded"] / 2**10,
        "prepared_kib": measured["prepared"] / 2**10,
        "read_threads": READ_THREADS,
    }
    ahead = [(seconds, step) for seconds in measured["ahead"]]
    left = list(zip(measured["collate"], measured["whole"], strict=True))
    what = f"resident memory at its highest, less that before the stream, over {2 * WINDOW} batches of {GROUPS}"
    later = {f"after {len(ahead) * WINDOW} more": measured["later"] / 2**20}
    return {
        f"{load.name} ahead": Result(
            f"a batch of {GROUPS} read, decoded, cut", "a quickstart step, the median of the run", ahead, details
        ),
        f"{load.name} step": Result("collate a prepared batch", "decode, cut and collate it", left, details),
        f"{load.name} memory": Figure(what, measured["peak"] / 2**20, "MiB", measured["bound"] / 2**20, later),
    }


# ---- tasks -------------------------------------------------------------------------------------------------


def tasks_of(load: Load, workdir: Path, directory: Path, progress: Progress) -> Path:
    """Folder of the TFDS data set with a load's tasks."""
    if not load.width:
        config = quickstart.get_config()
        per_domain = config.data.train_per_domain, config.data.test_per_domain
        return build_suite(workdir / "suite", *per_domain, config.seed, progress)
    directory.mkdir()
    tasks = (Task(f"{number:03d}", "what?", (picture(load, number),), ("1",), "toy") for number in range(KEPT))
    write_tasks(directory, "pictures", "Pictures of one size.", {"train": tasks})
    return directory


def picture(load: Load, seed: int) -> bytes:
    """Coloured clouds with some noise, which compress as photographs do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (load.height // 40, load.width // 40, 3), dtype=np.uint8)
    clouds = Image.fromarray(coarse).resize((load.width, load.height), Image.Resampling.BICUBIC)
    noise = rng.integers(-4, 5, (load.height, load.width, 3))
    pixels = np.clip(np.asarray(clouds) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, load.format)
    return buffer.getvalue()


# ---- in a process of its own -------------------------------------------------------------------------------


def in_process(load: Load, workdir: Path, directory: Path, windows: int) -> dict[str, Any]:
    """`measure` where nothing else has been: memory that others gave back would hide ours."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, load, workdir, directory, windows).result()


def measure(load: Load, workdir: Path, directory: Path, windows: int) -> dict[str, Any]:
    """Seconds of batches and bytes of memory; see `results_of`."""
    source, prompts = TfdsSource(directory, "train"), make_prompts(load, workdir)
    stream = iter(Batches(source, GROUPS, prompts.prepare, seed=0))
    prompts.prepare(source[0])  # loads what reading and decoding need
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    for _ in range(2 * WINDOW):
        batch = next(stream)
        time.sleep(WAIT)  # the next one is read meanwhile
    peak = resident("VmHWM") - before
    ahead = [seconds_of(stream) for _ in range(windows)]
    later = resident("VmHWM") - before
    prompts.collate(batch)
    tasks = [one.task for one in batch]
    waiting = [len(one.task.images[0]) + one.images[0].cut.nbytes for one in batch]
    pixels = load.width * load.height or batch[0].images[0].cut.size // 3
    return {
        "ahead": ahead,
        "collate": [pairs.timed(lambda: prompts.collate(batch))[0] for _ in range(windows)],
        "whole": [pairs.timed(lambda: prompts.batch(tasks))[0] for _ in range(windows)],
        "encoded": statistics.mean(len(task.images[0]) for task in tasks),
        "prepared": statistics.mean(one.images[0].cut.nbytes for one in batch),
        "peak": peak,
        "later": later,
        # The batch that was handed out, the one that follows it, the one ahead, and images under preparation.
        "bound": 3 * GROUPS * max(waiting) + READ_THREADS * BYTES_A_PIXEL * pixels,
    }


def make_prompts(load: Load, workdir: Path) -> Prompts:
    config = parse_config(quickstart.get_config())
    limits = fields(PromptConfig, load.policy)
    architecture = open_architecture(config.policy.architecture, "")
    system = render_system_prompt(config.registry, config.rollout.max_calls)
    return Prompts(load_tokens(workdir / "tokenizer"), architecture, system, limits)


def seconds_of(stream: Any) -> float:
    """Of a batch, where nobody but the pipeline takes time."""
    return pairs.timed(lambda: [len(next(stream)) for _ in range(WINDOW)])[0] / WINDOW


def resident(key: str) -> int:
    """Bytes, as /proc/self/status has them under a key."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    command.run(main, required=("run",))
