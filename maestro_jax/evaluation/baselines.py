"""What routing without learning reaches: every pair is run on every held-out task.

The answer of a pair is its reply as it stands. Oracles choose with hindsight on these very tasks,
so they are upper bounds for one call: per domain, and per task.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maestro_jax.data.source import OnDemand
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rewards.graders import Answer
from maestro_jax.rewards.reward import Scorer
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.suite.demonstrations import make_calls
from maestro_jax.types import Call, Status, Task

QUERY = "answer the question"
_GRADED = 64  # tasks at a time: graders may need their images


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Accuracy (0 to 1) of fixed routings, overall and by domain."""

    random: dict[str, float]
    best_single_pair: dict[str, float]
    domain_oracle: dict[str, float]
    task_oracle: dict[str, float]
    single_pair: tuple[str, str]
    by_pair: dict[str, dict[tuple[str, str], float]]  # domain → pair → accuracy
    missing: int = 0  # calls without an answer, which count neither as right nor as wrong

    def to_json(self) -> dict[str, Any]:
        by_pair = {d: [[*pair, x] for pair, x in pairs.items()] for d, pairs in self.by_pair.items()}
        return dataclasses.asdict(self) | {"by_pair": by_pair}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Baselines":
        by_pair = {d: {(e, s): x for e, s, x in rows} for d, rows in values["by_pair"].items()}
        return cls(**(values | {"by_pair": by_pair, "single_pair": tuple(values["single_pair"])}))


def run_baselines(
    tasks: Sequence[Task],
    registry: RegistryConfig,
    dispatcher: Dispatcher,
    scorer: Scorer,
    deadline: float,
    tick: Callable[[int], None],
    outages: Outages | None = None,
) -> Baselines:
    """Calls every pair on every task; `tick` hears how many calls have been answered."""
    pairs = pairs_of(registry)
    right = run_pairs(tasks, pairs, dispatcher, scorer, deadline, tick, outages)
    if outages is not None:
        check_pairs(pairs, right, outages)
    return summarise([task.source for task in tasks], pairs, right)


def pairs_of(registry: RegistryConfig) -> list[tuple[str, str]]:
    """(expert, skill) that the policy may call."""
    return [
        (expert.name, skill.name)
        for expert in registry.shown_experts
        for skill in registry.shown_skills
        if registry.allows(skill, expert.name)
    ]


def run_pairs(
    tasks: Sequence[Task],
    pairs: Sequence[tuple[str, str]],
    dispatcher: Dispatcher,
    scorer: Scorer,
    deadline: float,
    tick: Callable[[int], None],
    outages: Outages | None = None,
) -> np.ndarray:
    """Calls every pair on every task: float `[tasks, pairs]`, how right the reply is, NaN without one or a verdict.

    Args:
      outages: as of `make_calls`.

    Raises:
      ConfigError: a judge gives too few verdicts.
    """
    read = functools.lru_cache(maxsize=1)(tasks.__getitem__)  # a task when its turn comes, for all of its pairs
    count = len(pairs)
    calls = OnDemand(range(len(tasks) * count), lambda n: (read(n // count), Call(*pairs[n % count], QUERY)))
    replies = make_calls(dispatcher, calls, deadline, tick, outages)
    texts = [reply.text if reply.status == Status.OK else "" for reply in replies]  # nothing is never right
    outcomes: list[float] = []
    unjudged: list[str] = []
    for first in range(0, len(tasks), _GRADED):
        answers = []
        for number in range(first, min(first + _GRADED, len(tasks))):
            task = tasks[number]
            if not scorer.graders.looks_at_images(task):
                task = dataclasses.replace(task, images=())
            answers += [Answer(task, texts[n], f"ticket {n}") for n in range(number * count, (number + 1) * count)]
        found = scorer.outcomes(answers, len(texts))
        outcomes += found
        unjudged += [
            scorer.graders.judge_of(a.task) if np.isnan(x) else "" for a, x in zip(answers, found, strict=True)
        ]
    scorer.check(unjudged)  # an expert is not to blame for what its judge does
    right = np.array(outcomes, float)
    right[[reply.status.is_infrastructure for reply in replies]] = np.nan
    return right.reshape(len(tasks), len(pairs))


def check_pairs(pairs: Sequence[tuple[str, str]], right: np.ndarray, outages: Outages) -> None:
    """Refuses the figure of a pair that hardly ever answered: it might be the best one by a single task.

    Raises:
      Preempted: as of `Outages.check`.
    """
    for (expert, skill), lost in zip(pairs, np.isnan(right).sum(axis=0).tolist(), strict=True):
        marks = Marks(len(right), lost, 0, {expert: lost} if lost else {})
        outages.check(marks, f"calls of {expert} with {skill}")


def summarise(source_of_task: Sequence[str], pairs: Sequence[tuple[str, str]], right: np.ndarray) -> Baselines:
    """Baselines from the matrix `right [tasks, pairs]` of outcomes; NaN is left out wherever it stands."""
    sources = np.array(source_of_task)
    rows = {"overall": np.ones(len(sources), bool)} | {source: sources == source for source in sorted(set(sources))}
    single = int(np.nan_to_num(known_mean(right, 0)).argmax())
    per_domain = np.zeros(len(sources))
    for source in set(sources):
        of_domain = right[sources == source]
        per_domain[sources == source] = of_domain[:, np.nan_to_num(known_mean(of_domain, 0)).argmax()]

    def mean(values: np.ndarray) -> dict[str, float]:
        return {name: float(np.nan_to_num(known_mean(values[row], 0))) for name, row in rows.items()}

    return Baselines(
        random=mean(known_mean(right, 1)),
        best_single_pair=mean(right[:, single]),
        domain_oracle=mean(per_domain),
        task_oracle=mean(functools.reduce(np.fmax, right.T)),
        single_pair=pairs[single],
        by_pair={
            source: dict(zip(pairs, np.nan_to_num(known_mean(right[sources == source], 0)).tolist(), strict=True))
            for source in sorted(set(sources))
        },
        missing=int(np.isnan(right).sum()),
    )


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is known along an axis; NaN where nothing is."""
    known = ~np.isnan(values)
    counts = known.sum(axis)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(axis) / np.maximum(counts, 1), np.nan)
