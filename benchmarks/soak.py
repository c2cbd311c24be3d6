"""Memory over thousands of tasks with large images: does what a run keeps stay within its bounds?

    python -m benchmarks.soak [--tasks 10000] [--mib 2] [--json FILE]

Every task has a picture of its own, most of it data that decoders pass over: no two are equal, none is on disk. They
go through the pipeline, an in-process expert behind its service, reply cache and journal, and the grader; there is no
policy. Then some of them are asked once more, as held-out tasks are for the baselines. What is measured is the
resident memory of the process, in which nothing else runs.
"""

import concurrent.futures
import io
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from benchmarks import pairs
from benchmarks.data import resident
from benchmarks.pairs import Figure
from configs import quickstart
from maestro_jax import command
from maestro_jax.config import parse_config
from maestro_jax.data.pipeline import Batches
from maestro_jax.data.source import Label, TaskView
from maestro_jax.evaluation.baselines import run_pairs
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import open_architecture
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import train_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.rewards.graders import BUILT_IN, Answer
from maestro_jax.rewards.reward import Scorer
from maestro_jax.session.policy import fields
from maestro_jax.suite.demonstrations import make_calls
from maestro_jax.types import Call, Task

TASKS = flags.DEFINE_integer("tasks", 10_000, "How many tasks.", lower_bound=100)
MIB = flags.DEFINE_integer("mib", 2, "MiB of each picture.", lower_bound=1)

BATCH = 16
WARM = 0.2  # share of the tasks by whose end all caches are full
HELD_OUT = 200  # tasks, at least: more than are in flight at a time
PAIR = "Shape-Sight", "Perception_Problem_Solver"
QUERIES = "what is it", "look closely"  # of the two members of a group
DEADLINE = 600.0
MOST_GROWTH = 64  # MiB, of the 20 GiB that 10,000 tasks have
_SEGMENT = 65_533  # most bytes of a JPEG's comment


class Pictures:
    """Tasks whose pictures are made when they are read: a shape, and `size` bytes that differ."""

    def __init__(self, count: int, size: int):
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return Task(
            f"soak/{index:06d}", "What shape is it?", (picture(index, self._size),), ("rectangle",), "visual_qa"
        )

    def where(self, index: int) -> str:
        return f"picture {index}"

    def labels(self) -> Iterator[Label]:
        return (Label(f"soak/{index:06d}", "visual_qa") for index in range(self._count))

    def stamp(self) -> list[Any]:
        return [self._count, self._size]


def picture(number: int, size: int) -> bytes:
    """A JPEG of a square, with comments of random bytes that make it `size` bytes larger."""
    image = Image.new("RGB", (160, 128), "white")
    left, top = 10 + number % 90, 10 + number // 90 % 60
    ImageDraw.Draw(image).rectangle((left, top, left + 40, top + 40), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    data, filling = buffer.getvalue(), random.Random(number).randbytes(size)
    parts = (filling[at : at + _SEGMENT] for at in range(0, size, _SEGMENT))
    return data[:2] + b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2) + part for part in parts) + data[2:]


def soak(count: int, size: int, scratch: Path) -> dict[str, Any]:
    """(tasks done, resident bytes, bytes of replies that are kept) again and again, and the rest for `figures`."""
    config = parse_config(quickstart.get_config())
    system = render_system_prompt(config.registry, 1)
    tokens = train_tokens([system, "What shape is it?"] * 9, 768, scratch / "tokenizer")
    architecture = open_architecture(config.policy.architecture, "")
    prompts = Prompts(tokens, architecture, system, fields(PromptConfig, config.policy))
    journal = Journal(str(scratch / "journal.jsonl"))
    replies = scratch / "expert_cache.jsonl"
    dispatcher = Dispatcher(Registry(config.registry, str(replies), journal), journal)
    source = Pictures(count, size)
    stream = Batches(source, BATCH, prompts.prepare, seed=0, epochs=1)
    seen, right, done = [], 0.0, 0
    with Progress(sys.stderr) as progress:
        progress.phase("tasks", count)
        for number, batch in enumerate(stream):
            prompts.collate(batch)
            calls = [(one.task, Call(*PAIR, query)) for one in batch for query in QUERIES]
            answers = make_calls(dispatcher, calls, DEADLINE, lambda answered: None)
            graded = [Answer(task, reply.text) for (task, _), reply in zip(calls, answers, strict=True)]
            right += sum(BUILT_IN.outcomes(graded))
            done += len(batch)
            if number % 8 == 0 or done == count:
                seen.append((done, resident("VmRSS"), replies.stat().st_size * 3 // 4))  # in there, images are base64
                progress.update(done, {"MiB": seen[-1][1] / 2**20})
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        held_out = TaskView(source, range(min(count, max(count // 10, HELD_OUT))))
        progress.phase("held-out tasks", len(held_out))
        run_pairs(held_out, [PAIR], dispatcher, Scorer(), DEADLINE, progress.tick)
        held_out_growth = resident("VmHWM") - before
    dispatcher.close()
    journal.close()
    return {"seen": seen, "right": right / (len(QUERIES) * count), "held_out_growth": held_out_growth}


def figures(found: dict[str, Any], count: int) -> dict[str, float]:
    """MiB of the process when it is warm and at its end, and what each thousand tasks adds between.

    `growth_mib` leaves out the replies, which the cache keeps up to a bound of its own (`registry/record/cache.py`).
    """
    done, mib, replies = np.array(found["seen"], float).T / [[1], [2**20], [2**20]]
    warm = done >= WARM * count
    beside = (mib - replies)[warm]
    slope = np.polyfit(done[warm], mib[warm], 1)[0] if warm.sum() > 1 else 0.0
    return {
        "tasks": count,
        "warm_mib": float(mib[warm][0]),
        "end_mib": float(mib[-1]),
        "replies_mib": float(replies[-1] - replies[warm][0]),
        "growth_mib": float(beside.max() - beside[0]),
        "mib_per_thousand": float(1000 * slope),
        "held_out_mib": found["held_out_growth"] / 2**20,
        "right": found["right"],
    }


def in_process(count: int, size: int) -> dict[str, float]:
    """The figures of a process of its own: memory that others gave back would hide what is kept."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        return figures(pool.submit(soak, count, size, Path(scratch)).result(), count)


def main(argv: Sequence[str]) -> None:
    del argv
    found = in_process(TASKS.value, MIB.value << 20)
    what = f"growth of resident memory after {WARM:.0%} of the tasks, at its highest, without replies that are kept"
    pairs.report({"soak": Figure(what, found["growth_mib"], "MiB", MOST_GROWTH, found)})


if __name__ == "__main__":
    command.run(main, required=())
