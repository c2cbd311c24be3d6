"""What a training run comes to: figures of the policy before and after, beside routing without learning."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.config import Config
from maestro_jax.evaluation.baselines import Baselines
from maestro_jax.evaluation.episodes import Routing
from maestro_jax.evaluation.policy import Evaluation
from maestro_jax.observe.figures import plot_curves, plot_routing
from maestro_jax.observe.files import write_json
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.observe.table import summary_table, whole_figures
from maestro_jax.parallel import cluster
from maestro_jax.training.loop import Training


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Figures of a finished run; accuracies are mean outcomes on held-out tasks, 0 to 1.

    Attributes:
      checkpoints: the directory with the trained policy, for `evaluate` and `export`.
      accuracy: by row: "trained", and with `config.evaluate.baselines` "warm_start" (the policy before reinforcement),
        "random", "best_single_pair", "domain_oracle" and "task_oracle".
      accuracy_by_domain: the same, by row and source of tasks.
      reward, calls: means over held-out episodes of "trained" and "warm_start".
      missing: what has no answer, of the tasks and of the baselines' calls; it counts neither as right nor as wrong.
      skipped_updates: of reinforcement, since their loss or gradient norm was not finite.
      marked: expert -> share of all training episodes that it failed, those that were run again among them.
      seconds: that the run has taken, with all its processes one after the other.
    """

    workdir: Path
    checkpoints: str
    steps: int
    seed: int
    held_out_tasks: int
    accuracy: Mapping[str, float]
    accuracy_by_domain: Mapping[str, Mapping[str, float]]
    reward: Mapping[str, float]
    calls: Mapping[str, float]
    missing: Mapping[str, int]
    skipped_updates: int
    marked: Mapping[str, float]
    warm_start_sampled: float | None
    best_single_pair: str
    seconds: float
    routing: Mapping[str, Routing]  # title -> domain -> pair -> calls
    # domain -> pair -> accuracy; None without baselines, or where some have no answer
    accuracy_of_pairs: Mapping[str, Mapping[tuple[str, str], float]] | None

    @classmethod
    def of(
        cls,
        config: Config,
        workdir: Path,
        training: Training,
        held_out_tasks: int,
        before: Evaluation | None,
        sampled: Evaluation | None,
        baselines: Baselines | None,
    ) -> "TrainResult":
        """The figures of a run that is over."""
        last = training.last
        policies = {name: found for name, found in (("warm_start", before), ("trained", last)) if found is not None}
        rows = {name: {"overall": found.accuracy, **found.accuracy_by_domain} for name, found in policies.items()}
        if baselines is not None:
            names = ("random", "best_single_pair", "domain_oracle", "task_oracle")
            rows |= {name: dict(getattr(baselines, name)) for name in names}
        missing = {name: found.missing for name, found in policies.items()}
        if baselines is not None:
            missing["baselines"] = baselines.missing
        if sampled is not None:
            missing["warm_start_sampled"] = sampled.missing
        titles = {"warm_start": "Before reinforcement learning", "trained": "After reinforcement learning"}
        return cls(
            workdir=workdir,
            checkpoints=str(training.checkpoints),
            steps=config.grpo.steps,
            seed=config.seed,
            held_out_tasks=held_out_tasks,
            accuracy={name: row.pop("overall") for name, row in rows.items()},
            accuracy_by_domain=rows,
            reward={name: found.reward for name, found in policies.items()},
            calls={name: found.calls for name, found in policies.items()},
            missing=missing,
            skipped_updates=cluster.from_main(
                lambda: sum(row.get("skipped") == 1.0 for row in read_metrics(workdir / "metrics.jsonl"))
            ),
            marked=cluster.from_main(lambda: marked_by_expert(read_metrics(workdir / "metrics.jsonl"))),
            warm_start_sampled=sampled.accuracy if sampled else None,
            best_single_pair="@@".join(baselines.single_pair) if baselines else "",
            seconds=training.seconds,
            routing={titles[name]: found.routing for name, found in policies.items()},
            accuracy_of_pairs=baselines.by_pair if baselines and not baselines.missing else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        left_out = ("workdir", "checkpoints", "routing", "accuracy_of_pairs", "seconds")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in left_out} | {"wall_seconds": self.seconds}

    def table(self) -> str:
        """The figures as text for a terminal."""
        return summary_table(self.to_json())

    def write(self) -> None:
        """Writes summary.json, curves.png and routing.png."""
        summary = self.to_json()
        write_json(self.workdir / "summary.json", summary)
        lines = {name: value for name, value in whole_figures(summary).items() if name != "trained"}
        plot_curves(read_metrics(self.workdir / "metrics.jsonl"), lines, self.workdir / "curves.png")
        plot_routing(self.routing, self.workdir / "routing.png", self.accuracy_of_pairs)


def marked_by_expert(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Expert → share of all training episodes that it failed, those that were run again among them."""
    found = collections.Counter[str]()
    for row in rows:
        found.update({name.removeprefix("marked/"): x for name, x in row.items() if name.startswith("marked/")})
    return {expert: total / sum("reward" in row for row in rows) for expert, total in sorted(found.items())}
