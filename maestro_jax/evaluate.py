"""Evaluates a policy on held-out tasks: benchmark by benchmark, greedy and sampled, beside routing without learning.

    python -m maestro_jax.evaluate --checkpoint runs/quickstart --output runs/evaluation

A run is evaluated with its own settings; --config.KEY=VALUE changes one, and --config says which tasks and experts to
take instead. The same command goes on where an earlier one stopped. --output receives evaluation.json, evaluation.md,
accuracy.png, routing.png, and the graded episodes, one a line, in episodes.jsonl.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from ml_collections import config_flags

from maestro_jax import command
from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.checkpoint.run import Run, find_run
from maestro_jax.config import Config, parse_config
from maestro_jax.data.pipeline import Batches, check_task
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.baselines import check_pairs, pairs_of, run_pairs
from maestro_jax.evaluation.baselines import summarise as summarise_baselines
from maestro_jax.evaluation.episodes import Episode, by_source, marks_of, routing_of, run_episodes
from maestro_jax.evaluation.log import RecordLog
from maestro_jax.evaluation.report import markdown, summarise
from maestro_jax.evaluation.selection import select
from maestro_jax.evaluation.settings import Difference, changed_lines, combine, differences, ignored_lines
from maestro_jax.observe.accuracy import plot_accuracy
from maestro_jax.observe.figures import plot_routing
from maestro_jax.observe.files import write_json
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster, preemption
from maestro_jax.parallel.mesh import make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf, open_architecture
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.replay import Replay, Resumed
from maestro_jax.rollout.engine import Engine, EngineConfig
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.session import (
    check_same_run,
    check_tasks,
    fields,
    open_held_out,
    open_outages,
    open_params,
    policy_factory,
    sized_episodes,
)
from maestro_jax.settings import Settings, flatten
from maestro_jax.types import Task

CONFIG = command.config_flag()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Work directory of a run, its checkpoints/, or one checkpoint; else config.policy.init_from."
)
OUTPUT = flags.DEFINE_string("output", "", "Directory of the results; an interrupted evaluation there goes on.")
BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Sources of tasks, separated by commas; all if empty.")
TASKS = flags.DEFINE_integer("tasks", 0, "Most tasks of each benchmark, the first ones; 0 takes all.", lower_bound=0)
SAMPLES = flags.DEFINE_integer("samples", 0, "Sampled episodes of each task, besides the greedy one.", lower_bound=0)
BASELINES = flags.DEFINE_bool("baselines", False, "Also call every pair on every task.")
REPLAY = flags.DEFINE_string("replay", "", "The journal.jsonl of an evaluation: its calls are answered from there.")

# Settings that an evaluation does not depend on.
FREE_KEYS = (
    "grpo.",
    "optimizer.",
    "warm_start.",
    "checkpoint.",
    "registry.limits.",
    "registry.endpoints_from",
    "data.train_files",
    "data.train_split",
    "data.mixture",
    "evaluate.every",
    "evaluate.tasks",
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


def main(argv: Sequence[str]) -> None:
    del argv
    began = time.monotonic()
    given = Settings.of(command.load_config(CONFIG)).config
    run = find_run(Path(CHECKPOINT.value)) if CHECKPOINT.value else None
    changed, ignored = dict[str, Difference](), dict[str, Difference]()
    if run is not None:
        trained = run.config
        run = dataclasses.replace(run, config=combine(trained, given, overrides()))
        changed = differences(flatten(trained), flatten(run.config), is_used)
        ignored = differences(flatten(run.config), flatten(given), is_used)
    raw = run.config if run else given
    config = parse_config(raw, trains=False)
    cluster.start()
    reader = ParamReader(run.checkpoints, run.step) if run else None
    policy = f"step {reader.step} of {CHECKPOINT.value}" if reader else config.policy.init_from
    if not policy:
        raise ConfigError("there is no policy to evaluate; give --checkpoint, or set config.policy.init_from")
    output = command.made_directory("--output", OUTPUT.value)
    own = {"--checkpoint": policy, "--benchmarks": repr(sorted(BENCHMARKS.value)), "--tasks": repr(TASKS.value)}
    settings = Settings.of(raw, own)
    cluster.check_shared(output)
    cluster.check_same(settings.flat)
    changes = check_same_run(output / "config.json", settings, lambda key: key.startswith(FREE_KEYS))

    with Progress(curve="accuracy", quiet=not cluster.is_main()) as progress, contextlib.ExitStack() as closing:
        for line in (*changed_lines(changed), *ignored_lines(ignored), *changes):
            progress.note(line)

        # ---- Tasks, registry, tokens -----------------------------------------------------------
        source = open_held_out(config, run.workdir if run else output, progress)
        source = select(source, BENCHMARKS.value, TASKS.value, progress.note)
        check_tasks((source,), None, output / "data.json", progress)
        limit, size = config.data.damage_limit, config.evaluate.batch
        batches = Batches(source, size, check_task, seed=0, shuffle=False, epochs=1, damage_limit=limit)
        journal = Journal(str(cluster.own_path(output / "journal.jsonl")))
        closing.callback(journal.close)
        registry = None  # in a replay nobody is asked
        if not REPLAY.value:
            cache = str(cluster.own_path(output / "expert_cache.jsonl"))
            processes = jax.process_count()
            registry = Registry(config.registry, cache, journal, processes=processes, from_main=cluster.from_main)
        answered = Resumed(registry or Replay(REPLAY.value, journal), journal)
        answered.recall({})
        dispatcher = Dispatcher(answered, journal)
        closing.callback(dispatcher.close)
        tokens = load_tokens(run.tokenizer if run else config.policy.tokenizer or config.policy.init_from)
        config = sized_episodes(config, tokens.count, progress.note)
        system = render_system_prompt(config.registry, config.rollout.max_calls)

        # ---- Mesh, policy, engine --------------------------------------------------------------
        mesh = make_mesh(config.mesh)
        architecture, graph, params = open_policy(config, run, reader, mesh)
        prompts = Prompts(tokens, architecture, system, fields(PromptConfig, config.policy))
        exchange = Exchange(tokens, config.registry, dispatcher, fields(EpisodeConfig, config.rollout))
        engine = Engine(graph, mesh, prompts, exchange, fields(EngineConfig, config.rollout))
        outages = open_outages(config, dispatcher, progress, replayed=bool(REPLAY.value))
        progress.note(f"policy: {policy}, on {mesh.size} {jax.devices()[0].platform} device(s)")
        if cluster.is_main():
            settings.write(output / "config.json")
        closing.enter_context(preemption.at_boundaries())

        # ---- Episodes and baselines, a batch of tasks at a time --------------------------------
        names = ("episodes", "baselines")
        # What an earlier start left without an answer is asked again.
        logs = {name: RecordLog(output / f"{name}.jsonl", is_whole) if cluster.is_main() else None for name in names}
        pairs = pairs_of(config.registry)
        greedy: list[Episode] = []
        sampled: list[Episode] = []
        right: list[Sequence[float]] = []

        def episodes(number: int, part: Sequence[Task], members: int, is_greedy: bool) -> list[Episode]:
            def compute() -> list[dict[str, Any]]:
                settings = size, members, config.reward, config.seed
                made = run_episodes(engine, params, part, *settings, is_greedy, outages)
                return [episode.to_json() for episode in made]

            name = f"{number} greedy" if is_greedy else f"{number} sampled {members} times"
            return [Episode.from_json(record) for record in recorded(logs, "episodes", name, journal, compute)]

        def baselines(number: int, part: Sequence[Task]) -> list[Sequence[float]]:
            def compute() -> list[dict[str, Any]]:
                found = run_pairs(part, pairs, dispatcher, config.rollout.deadline, lambda done: None, outages)
                rows = [[None if np.isnan(x) else x for x in row] for row in found.tolist()]  # JSON has no NaN
                return [{"task": task.id, "right": row} for task, row in zip(part, rows, strict=True)]

            found = recorded(logs, "baselines", f"{number}", journal, lambda: cluster.from_main(compute))
            return [record["right"] for record in found]

        progress.phase("evaluate", len(source))
        for number, part in enumerate(batches):
            greedy += episodes(number, part, 1, True)
            sampled += episodes(number, part, SAMPLES.value, False) if SAMPLES.value else []
            right += baselines(number, part) if BASELINES.value else []
            known = [e for e in greedy if not e.marked]
            accuracy, calls = np.mean([(e.outcome, e.executed_calls) for e in known] or [(0, 0)], axis=0).tolist()
            missing = {"not answered": len(greedy) - len(known)} if len(known) < len(greedy) else {}
            progress.update(len(greedy), {"accuracy": accuracy if known else None, "calls": calls, **missing})
        for name, made in [*by_source(greedy).items(), *by_source(sampled).items()]:
            outages.check(marks_of(made), f"episodes of {name}")
        if right:
            check_pairs(pairs, np.array(right, float), outages)
        for log in filter(None, logs.values()):
            log.close()

    if not cluster.is_main():
        return
    # ---- Results -----------------------------------------------------------------------------------
    routed = summarise_baselines([e.source for e in greedy], pairs, np.array(right, float)) if right else None
    summary = {"policy": policy, "seed": config.seed} | summarise(greedy, sampled, routed, config.seed)
    summary |= {"differences": {key: each._asdict() for key, each in changed.items()}}
    write_json(output / "evaluation.json", summary)
    text = markdown(summary)
    (output / "evaluation.md").write_text(text)
    plot_accuracy(summary, output / "accuracy.png")
    best = routed.by_pair if routed and not routed.missing else None
    plot_routing({policy: routing_of(greedy)}, output / "routing.png", best)
    print(text)
    seconds = time.monotonic() - began
    print(f"written to {output} in {seconds:.0f} s: evaluation.json, .md, accuracy.png, routing.png, episodes.jsonl")


def is_whole(records: Sequence[dict[str, Any]]) -> bool:
    """Whether every episode of a batch, or every call of the baselines, has an answer."""
    return not any(record.get("marked") or None in record.get("right", ()) for record in records)


def config_of_run() -> str:
    return str(find_run(Path(CHECKPOINT.value)).workdir / "config.json") if CHECKPOINT.value else ""


def open_policy(
    config: Config, run: Run | None, reader: ParamReader | None, mesh: Mesh
) -> tuple[PolicyArchitecture, nnx.GraphDef, nnx.State]:
    """The policy of a run's checkpoint, or the one to start from."""
    if run is None or reader is None:
        architecture = open_architecture(config.policy.architecture, config.policy.init_from)
        return architecture, *open_params(config, architecture, mesh)
    architecture = architecture_from_hf(run.architecture, f"{run.workdir}/architecture.json")
    make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
    graph, abstract, shardings = param_layout(make, mesh, ShardingRules())
    return architecture, graph, reader.load(abstract, shardings)


def overrides() -> list[str]:
    """Keys of the config that the command line sets."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


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


if __name__ == "__main__":
    command.run(main, required=("config", "output"), own_config=config_of_run)
