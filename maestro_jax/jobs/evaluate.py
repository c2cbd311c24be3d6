"""The evaluation of a policy as a function: benchmark by benchmark, greedy and sampled, beside fixed routings."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.checkpoint.run import find_run
from maestro_jax.config import Config, completed, inlined, parse_config
from maestro_jax.data.pipeline import Batches, check_task
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.baselines import check_pairs, pairs_of, run_pairs
from maestro_jax.evaluation.baselines import summarise as summarise_baselines
from maestro_jax.evaluation.episodes import Episode, by_source, marks_of, routing_of, run_episodes
from maestro_jax.evaluation.log import RecordLog
from maestro_jax.evaluation.report import markdown, summarise
from maestro_jax.evaluation.selection import select
from maestro_jax.evaluation.settings import (
    Difference,
    changed_lines,
    combine,
    differences,
    ignored_lines,
    overridden,
)
from maestro_jax.observe.accuracy import plot_accuracy
from maestro_jax.observe.figures import plot_routing
from maestro_jax.observe.files import made_directory, write_json
from maestro_jax.observe.listening import Show, showing
from maestro_jax.parallel import cluster, preemption
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import architecture_from_hf, open_architecture
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.registry.record.journal import Journal
from maestro_jax.rewards.graders import Graders
from maestro_jax.session.binding import check_same_run
from maestro_jax.session.calls import open_calls
from maestro_jax.session.policy import open_params, policy_factory
from maestro_jax.session.rollouts import open_rollouts
from maestro_jax.session.tasks import check_tasks, open_held_out
from maestro_jax.settings import Settings, flatten, read_config
from maestro_jax.types import Task

# Settings that an evaluation does not depend on.
FREE_KEYS = (
    "grpo.",
    "optimizer.",
    "warm_start.",
    "checkpoint.",
    "trackers.",
    "registry.limits.",
    "registry.endpoints_from",
    "data.train_files",
    "data.train_split",
    "data.mixture",
    "evaluate.every",
    "evaluate.tasks",
    "evaluate.baselines",
    "rollout.ahead",
    "rollout.staleness",
    "rollout.member_buckets",
    "rollout.lanes",
    "rollout.parked",
    "rollout.max_marked",
    "rollout.patience",
)
# Of a run, only what it trained is evaluated.
TRAINED_KEYS = ("policy.architecture.", "policy.freeze")


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      output: its directory, with evaluation.json, evaluation.md, accuracy.png, routing.png and episodes.jsonl.
      policy: which one it was.
      accuracy: the mean over benchmarks of the mean outcome, 0 to 1.
      accuracy_by_benchmark: of each source of tasks.
      missing: tasks without an answer since an expert failed; they count neither as right nor as wrong.
      figures: the content of evaluation.json (`evaluation.report.summarise`).
      seconds: that this call has taken.
    """

    output: Path
    policy: str
    accuracy: float
    accuracy_by_benchmark: Mapping[str, float]
    missing: int
    figures: Mapping[str, Any]
    seconds: float

    def markdown(self) -> str:
        """All figures as tables."""
        return markdown(self.figures)


def evaluate(
    output: str | Path,
    *,
    checkpoint: str | Path = "",
    config: Any = None,
    overrides: Mapping[str, Any] | None = None,
    benchmarks: Sequence[str] = (),
    tasks: int = 0,
    samples: int = 0,
    baselines: bool = False,
    replay: str = "",
    progress: Show = None,
) -> Report:
    """Evaluates a policy on held-out tasks; goes on where an earlier call stopped in the same directory.

    Args:
      output: directory of the results.
      checkpoint: a run's work directory, its checkpoints/, or one checkpoint; empty takes the policy that
        `config.policy.init_from` names.
      config: as of `train`. Of a run, it says which tasks and experts to take instead of the run's own; None: those.
      overrides: dotted keys of the config → values, which count whatever the run had.
      benchmarks: sources of tasks; all if empty.
      tasks: most tasks of each benchmark, the first ones; 0 takes all.
      samples: sampled episodes of each task, besides the greedy one.
      baselines: also calls every pair on every task.
      replay: the journal.jsonl of an evaluation: its calls are answered from there.
      progress: as of `train`.

    Raises:
      UserError: something that the user has to change; one line that says what.
      Preempted: experts did not come back, or the process was told to stop; the same call resumes.
    """
    began = time.monotonic()
    run = find_run(Path(checkpoint)) if checkpoint else None
    if config is None and run is None:
        raise ConfigError("there is no policy to evaluate; give a checkpoint, or a config with policy.init_from")
    given = Settings.of(read_config(run.config if config is None and run else config)).config
    groups = tuple(given)
    given = inlined(overridden(given, overrides or {}))
    said = flatten(given)
    given = completed(given)
    changed, ignored = dict[str, Difference](), dict[str, Difference]()
    if run is not None:
        trained = completed(run.config)
        run = dataclasses.replace(run, config=combine(trained, given, overrides or {}, groups))
        changed = differences(flatten(trained), flatten(run.config), is_used)
        ignored = differences(flatten(run.config), said, lambda key: is_used(key) and key in said)
    raw = run.config if run else given
    config = parse_config(raw, trains=False)
    cluster.start()
    reader = ParamReader(run.checkpoints, run.step) if run else None
    policy = f"step {reader.step} of {checkpoint}" if reader else config.policy.init_from
    if not policy:
        raise ConfigError("there is no policy to evaluate; give --checkpoint, or set config.policy.init_from")
    output = made_directory("--output", output)
    own = {"--checkpoint": policy, "--benchmarks": repr(sorted(benchmarks)), "--tasks": repr(tasks)}
    settings = Settings.of(raw, own)
    cluster.check_shared(output)
    cluster.check_same(settings.flat)
    changes = check_same_run(output / "config.json", settings, lambda key: key.startswith(FREE_KEYS))

    with showing(progress, curve="accuracy") as shown, contextlib.ExitStack() as closing:
        for line in (*changed_lines(changed), *ignored_lines(ignored), *changes):
            shown.note(line)

        # ---- Tasks, calls ----------------------------------------------------------------------
        source = open_held_out(config, run.workdir if run else output, shown)
        source = select(source, benchmarks, tasks, shown.note)
        graders = Graders(config.graders, config.registry)
        check_tasks((source,), None, graders, output / "data.json", shown)
        limit, size = config.data.damage_limit, config.evaluate.batch
        batches = Batches(source, size, check_task, seed=0, shuffle=False, epochs=1, damage_limit=limit)
        calls = closing.enter_context(open_calls(config, output, shown, replay))
        calls.answered.recall({})

        # ---- The policy: of a run's checkpoint, or the one to start from -----------------------
        if run is None:
            architecture = open_architecture(config.policy.architecture, config.policy.init_from)
        else:
            architecture = architecture_from_hf(run.architecture, f"{run.workdir}/architecture.json")

        def load(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
            if reader is None:
                return open_params(config, architecture, mesh)
            make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
            graph, abstract, shardings = param_layout(make, mesh, ShardingRules())
            return graph, reader.load(abstract, shardings)

        tokens = load_tokens(run.tokenizer if run else config.policy.tokenizer or config.policy.init_from)
        rollouts = open_rollouts(config, architecture, load, tokens, calls, shown)
        closing.callback(rollouts.scorer.graders.close)
        config, engine, params = rollouts.config, rollouts.engine, rollouts.params
        shown.note(f"evaluated is {policy}")
        if cluster.is_main():
            settings.write(output / "config.json")
        closing.enter_context(preemption.at_boundaries())

        # ---- Episodes and baselines, a batch of tasks at a time --------------------------------
        # What an earlier start left without an answer is asked again.
        logs = {
            name: RecordLog(output / f"{name}.jsonl", is_whole) if cluster.is_main() else None
            for name in ("episodes", "baselines")
        }
        pairs = pairs_of(config.registry)
        greedy: list[Episode] = []
        sampled: list[Episode] = []
        right: list[Sequence[float]] = []

        def episodes(number: int, part: Sequence[Task], members: int, is_greedy: bool) -> list[Episode]:
            def compute() -> list[dict[str, Any]]:
                settings = size, members, rollouts.scorer, config.seed
                made = run_episodes(engine, params, part, *settings, is_greedy, calls.outages)
                return [episode.to_json() for episode in made]

            name = f"{number} greedy" if is_greedy else f"{number} sampled {members} times"
            return [Episode.from_json(record) for record in recorded(logs, "episodes", name, calls.journal, compute)]

        def outcomes_of_pairs(number: int, part: Sequence[Task]) -> list[Sequence[float]]:
            def compute() -> list[dict[str, Any]]:
                asked = part, pairs, calls.dispatcher, rollouts.scorer, config.rollout.deadline
                found = run_pairs(*asked, lambda done: None, calls.outages)
                rows = [[None if np.isnan(x) else x for x in row] for row in found.tolist()]  # JSON has no NaN
                return [{"task": task.id, "right": row} for task, row in zip(part, rows, strict=True)]

            found = recorded(logs, "baselines", f"{number}", calls.journal, lambda: cluster.from_main(compute))
            return [record["right"] for record in found]

        shown.phase("evaluate", len(source))
        for number, part in enumerate(batches):
            greedy += episodes(number, part, 1, True)
            sampled += episodes(number, part, samples, False) if samples else []
            right += outcomes_of_pairs(number, part) if baselines else []
            known = [e for e in greedy if not e.marked]
            accuracy, made = np.mean([(e.outcome, e.executed_calls) for e in known] or [(0, 0)], axis=0).tolist()
            missing = {"not answered": len(greedy) - len(known)} if len(known) < len(greedy) else {}
            shown.update(len(greedy), {"accuracy": accuracy if known else None, "calls": made, **missing})
        for name, own_episodes in [*by_source(greedy).items(), *by_source(sampled).items()]:
            calls.outages.check(marks_of(own_episodes), f"episodes of {name}")
        if right:
            check_pairs(pairs, np.array(right, float), calls.outages)
        for log in filter(None, logs.values()):
            log.close()

    # ---- Results -----------------------------------------------------------------------------------
    routed = summarise_baselines([e.source for e in greedy], pairs, np.array(right, float)) if right else None
    summary = {"policy": policy, "seed": config.seed} | summarise(greedy, sampled, routed, config.seed)
    summary |= {"differences": {key: each._asdict() for key, each in changed.items()}}
    report = Report(
        output=output,
        policy=policy,
        accuracy=summary["average"]["accuracy"]["mean"],
        accuracy_by_benchmark={name: row["accuracy"]["mean"] for name, row in summary["benchmarks"].items()},
        missing=summary["missing"],
        figures=summary,
        seconds=time.monotonic() - began,
    )
    if cluster.is_main():
        write_json(output / "evaluation.json", summary)
        (output / "evaluation.md").write_text(report.markdown())
        plot_accuracy(summary, output / "accuracy.png")
        best = routed.by_pair if routed and not routed.missing else None
        plot_routing({policy: routing_of(greedy)}, output / "routing.png", best)
    return report


def is_whole(records: Sequence[dict[str, Any]]) -> bool:
    """Whether every episode of a batch, or every call of the baselines, has an answer."""
    return not any(record.get("marked") or None in record.get("right", ()) for record in records)


def is_used(key: str) -> bool:
    """Whether the evaluation of a run depends on a setting."""
    return not key.startswith((*FREE_KEYS, *TRAINED_KEYS))


def recorded(
    logs: Mapping[str, RecordLog | None],
    name: str,
    batch: str,
    journal: Journal,
    compute: Callable[[], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The records of a batch, computed unless an earlier start has them; the logs are process 0's.

    One that is made again since it had gaps leaves what follows it in the journal.
    """
    log = logs[name]
    found, is_alone = cluster.from_main(
        lambda: (log.get(batch) if log else None, any(other.is_ahead for other in logs.values() if other))
    )
    if found is None:
        journal.begin(batch, alone=is_alone)
        found = compute()
        journal.sync()
        if log:
            log.add(batch, found)
    return found
