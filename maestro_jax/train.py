"""The main job: trains an orchestrator from a config, start to finish.

    python -m maestro_jax.train --config configs/quickstart.py --workdir DIR [--config.grpo.steps=20 ...]

The same command goes on where an earlier one stopped. DIR receives metrics.jsonl, journal.jsonl,
trained.jsonl, checkpoints, and at the end summary.json, curves.png and routing.png. SIGTERM or SIGINT stops it where
nothing is lost (docs/reliability.md).
"""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from maestro_jax import command, failpoints
from maestro_jax.checkpoint.run import has_begun
from maestro_jax.checkpoint.store import CheckpointStore
from maestro_jax.config import Config, parse_config
from maestro_jax.data.mixture import Mixture
from maestro_jax.data.pipeline import Batches
from maestro_jax.data.source import OnDemand, RecentTasks, TaskSource, TaskView
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.baselines import Baselines, run_baselines
from maestro_jax.evaluation.policy import Evaluation, evaluate_policy
from maestro_jax.fleet.trials import Finding, try_experts
from maestro_jax.grpo.learner import Learner
from maestro_jax.grpo.microbatches import Planner
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import (
    GroupBatch,
    Metrics,
    TrainState,
    grpo_loss,
    init_train_state,
    make_reference,
    make_train_step,
    nll_loss,
)
from maestro_jax.observe.figures import plot_curves, plot_routing
from maestro_jax.observe.files import read_json, write_json
from maestro_jax.observe.metrics import MetricsWriter, read_metrics
from maestro_jax.observe.progress import Progress
from maestro_jax.observe.table import summary_table, whole_figures
from maestro_jax.parallel import cluster, preemption
from maestro_jax.parallel.mesh import batch_shards, make_mesh
from maestro_jax.policy.config import PolicyArchitecture, open_architecture
from maestro_jax.policy.hf_export import hf_config
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import Tokens, load_tokens, train_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.replay import Replay, Resumed
from maestro_jax.rollout.engine import Engine, EngineConfig
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange, observation_frames
from maestro_jax.rollout.outages import Outages
from maestro_jax.rollout.supply import Supply, SupplyConfig
from maestro_jax.session import (
    check_batches,
    check_same_run,
    check_tasks,
    fields,
    first_tasks,
    holds_calls,
    open_data,
    open_outages,
    open_params,
    settings_hashes,
    sized_episodes,
    update_config,
)
from maestro_jax.settings import Settings
from maestro_jax.suite.demonstrations import WeakRouter, tokenizer_texts, write_demonstrations
from maestro_jax.training import Files, Training, recall
from maestro_jax.types import Task
from maestro_jax.warm_start.finetune import finetune

T = TypeVar("T")
TRIAL_SECONDS = 60.0  # for a server to answer its first request
CONFIG = command.config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run; an interrupted run there goes on.")
SKIP_DOCTOR = flags.DEFINE_bool("skip_doctor", False, "Start without asking every server once, as doctor does.")
REPLAY = flags.DEFINE_string("replay", "", "A run's journal.jsonl: its calls are answered from there, nobody is asked.")

# Of images of tasks that are demonstrated, which are gone through again and again.
DEMONSTRATED_BYTES = 256 << 20

# Settings that may change between a run and its continuation.
FREE_KEYS = (
    "data.damage_limit",
    "registry.endpoints_from",
    "registry.limits.calls",
    "registry.limits.tokens",
    "registry.limits.price",
    "rollout.lanes",
    "rollout.parked_tokens",
    "rollout.parked_on_host",
    "rollout.max_marked",
    "rollout.patience",
    "grpo.steps",
    "optimizer.decay_steps",
    "evaluate.every",
    "evaluate.batch",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "warm_start.checkpoint_every",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def main(argv: Sequence[str]) -> None:
    del argv
    began = time.monotonic()
    raw = command.load_config(CONFIG)
    config = parse_config(raw)
    cluster.start()
    check_replayable(config)
    workdir = command.made_directory("--workdir", WORKDIR.value)
    cluster.check_shared(workdir)
    settings = Settings.of(raw)
    cluster.check_same(settings.flat)
    begun = has_begun(workdir)
    # What stopped before it made anything binds nobody, but whom it asked.
    bound = "" if begun else "registry." if holds_calls(workdir) else None
    changes = check_same_run(workdir / "config.json", settings, lambda key: is_free(key, bound))

    with Progress(quiet=not cluster.is_main()) as progress, contextlib.ExitStack() as closing:
        for line in changes:
            progress.note(line)

        # ---- Servers of experts: before anything is computed -----------------------------------
        if not (SKIP_DOCTOR.value or REPLAY.value):
            try_servers(config, workdir, progress)

        # ---- Tasks -----------------------------------------------------------------------------
        train_source, test_source = open_data(config, workdir, progress)
        held_out = first_tasks(test_source, config.evaluate.tasks)
        parts = train_source.sources if isinstance(train_source, Mixture) else (train_source,)
        check_tasks(parts, held_out, workdir / "data.json", progress)

        # ---- Registry, tokens, prompts ---------------------------------------------------------
        journal = Journal(str(cluster.own_path(workdir / "journal.jsonl")))
        closing.callback(journal.close)
        registry = None  # in a replay nobody is asked
        if not REPLAY.value:
            cache = str(cluster.own_path(workdir / "expert_cache.jsonl"))
            processes = jax.process_count()
            registry = Registry(config.registry, cache, journal, processes=processes, from_main=cluster.from_main)
        answered = Resumed(registry or Replay(REPLAY.value, journal), journal)
        dispatcher = Dispatcher(answered, journal)
        closing.callback(dispatcher.close)
        store = open_store(config, workdir, progress)
        # Else training knows from where on (`Training.begin`). A figure with gaps asks only what failed once more.
        has_trained = store.latest() is not None
        figures = [workdir / f"{name}.json" for name in ("baselines", "before", "before_sampled")]
        if not has_trained or not cluster.from_main(lambda: all(path.exists() for path in figures)):
            recall(answered, {}, progress)
        router = WeakRouter(config.registry, config.warm_start)
        system = render_system_prompt(config.registry, config.rollout.max_calls)
        architecture = open_architecture(config.policy.architecture, config.policy.init_from)
        tokens = open_tokens(config, workdir, system, router, train_source, begun)
        demonstrated = router.longest_turn(tokens.count) if config.warm_start.steps else 0
        config = sized_episodes(config, tokens.count, progress.note, demonstrated)
        prompts = Prompts(tokens, architecture, system, fields(PromptConfig, config.policy))
        exchange = Exchange(tokens, config.registry, dispatcher, fields(EpisodeConfig, config.rollout))
        batches = Batches(
            train_source,
            config.grpo.groups,
            prompts.prepare,
            seed=config.seed,
            damage_limit=config.data.damage_limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        outages = open_outages(config, dispatcher, progress, replayed=bool(REPLAY.value))
        progress.note(f"registry prompt: {len(prompts.root)} tokens, shared by every group")

        # ---- Mesh, policy, engine --------------------------------------------------------------
        mesh = make_mesh(config.mesh)
        check_batches(config, mesh)
        graph, params = open_params(config, architecture, mesh)
        engine = Engine(graph, mesh, prompts, exchange, fields(EngineConfig, config.rollout))
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        progress.note(f"policy: {count:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s)")

        # From here on the directory belongs to this run, and a signal waits for a boundary.
        closing.enter_context(preemption.at_boundaries())
        if cluster.is_main():
            settings.write(workdir / "config.json")
            write_json(workdir / "architecture.json", hf_config(architecture, config.policy.param_dtype, None))

        # ---- Warm start (cached in the work directory) -----------------------------------------
        if config.warm_start.steps:
            params = warm_start(
                config,
                workdir,
                params,
                graph,
                mesh,
                exchange,
                prompts,
                router,
                train_source,
                journal,
                outages,
                progress,
            )

        # ---- What can be reached without reinforcement -----------------------------------------
        def evaluate(params: nnx.State, greedy: bool, name: str) -> Evaluation:
            progress.phase(name, len(held_out))
            settings = config.evaluate.batch, config.reward, config.seed
            result = evaluate_policy(engine, params, held_out, *settings, greedy, progress.tick, outages)
            missing = {"not answered": result.missing} if result.missing else {}
            progress.update(len(held_out), {"accuracy": result.accuracy, "calls": result.calls, **missing})
            return result

        def cached(name: str, kind: Any, compute: Callable[[], Any]) -> Any:
            return kept_if_whole(workdir / f"{name}.json", journal, kind, compute, alone=has_trained)

        baselines = cached(
            "baselines", Baselines, lambda: measure_baselines(config, held_out, dispatcher, progress, outages)
        )
        before = cached("before", Evaluation, lambda: evaluate(params, True, "held-out, before RL (greedy)"))
        sampled = cached(
            "before_sampled",
            Evaluation,
            lambda: evaluate(params, False, "held-out, before RL (sampled)"),
        )

        # ---- Updates ---------------------------------------------------------------------------
        optimizer = make_optimizer(config.optimizer)
        state = init_train_state(params, optimizer, config.policy.freeze, mesh, config.optimizer.offload)
        update = update_config(config, config.rollout.temperature)
        step_fn = make_train_step(graph, optimizer, grpo_loss, update, mesh, state)
        planner = make_planner(config, architecture, len(prompts.root), mesh)
        add_reference = None
        if config.grpo.kl_weight:  # the reference is the policy that reinforcement started from
            add_reference = make_reference(graph, params, update.temperature, update.chunk, mesh)
        shapes: set[tuple[Any, ...]] = set()  # that the update is compiled for

        def prepare(part: GroupBatch) -> GroupBatch:
            note_shape(part, shapes, progress)
            return add_reference(part) if add_reference else part

        learner = Learner(
            step=step_fn,
            planner=planner,
            reward=config.reward,
            advantage=config.grpo.advantage,
            # Without contrast, only these terms have a gradient.
            contrast_only=not (config.grpo.kl_weight or config.grpo.entropy_weight),
            parts=supply_config(config).parts,
            prepare=prepare,
            mesh=mesh,
        )
        supply = Supply(engine, iter(batches), supply_config(config), config.seed, outages)
        metrics, ledger = (
            closing.enter_context(MetricsWriter(workdir / name if cluster.is_main() else None))
            for name in ("metrics.jsonl", "trained.jsonl")
        )

        def report() -> None:
            if registry is not None:
                write_json(cluster.own_path(workdir / "experts.json"), registry.report())

        # ---- Reinforcement ---------------------------------------------------------------------
        training = Training(
            config=config,
            hashes=settings_hashes({k: value for k, value in settings.flat.items() if k not in FREE_KEYS}),
            learner=learner,
            supply=supply,
            store=store,
            files=Files(journal, metrics, ledger),
            evaluate=lambda params: evaluate(params, True, "held-out (greedy)"),
            on_save=report,
            outages=outages,
            progress=progress,
            began=began,
        )
        training.begin(state, before, answered)
        training.run()

    if not cluster.is_main():
        return
    last = training.last
    rows = accuracies(baselines, before, last)
    measured = read_metrics(workdir / "metrics.jsonl")
    summary = {
        "accuracy": {name: row.pop("overall") for name, row in rows.items()},
        "accuracy_by_domain": rows,
        "warm_start_sampled": sampled.accuracy,
        "best_single_pair": "@@".join(baselines.single_pair),
        "reward": {"warm_start": before.reward, "trained": last.reward},
        "calls": {"warm_start": before.calls, "trained": last.calls},
        "held_out_tasks": len(held_out),
        # What has no answer counts neither as right nor as wrong: of the tasks, and of the baselines' calls.
        "missing": {"warm_start": before.missing, "trained": last.missing, "baselines": baselines.missing}
        | {"warm_start_sampled": sampled.missing},
        "marked": marked_by_expert(measured),
        "steps": config.grpo.steps,
        "seed": config.seed,
        "wall_seconds": training.seconds,
    }
    write_json(workdir / "summary.json", summary)
    plot_curves(measured, lines_of(whole_figures(summary)), workdir / "curves.png")
    panels = {"Before reinforcement learning": before.routing, "After reinforcement learning": last.routing}
    plot_routing(panels, workdir / "routing.png", None if baselines.missing else baselines.by_pair)
    print(summary_table(summary))
    print(f"\nwritten to {workdir}: summary.json, curves.png, routing.png, metrics.jsonl; {store.directory}")


def try_servers(config: Config, workdir: Path, progress: Progress) -> None:
    """Asks every server once, as `maestro_jax.doctor` does; process 0 asks for all.

    A run that goes on waits for a server that is away (`Outages`). To a new one that is more likely a wrong address.

    Raises:
      ConfigError: a server cannot serve a run as it is set up, or a new run's expert has none that answers.
    """
    if not any(expert.endpoints for expert in config.registry.experts):
        return

    def ask() -> list[Any]:
        found = asyncio.run(try_experts(config.registry, TRIAL_SECONDS))
        return [(workdir / "config.json").exists(), [dataclasses.astuple(finding) for finding in found]]

    goes_on, told = cluster.from_main(ask)
    findings = [Finding(*values) for values in told]
    ready = {finding.expert for finding in findings if not finding.is_problem}
    for finding in findings:
        if finding.is_problem and not (finding.is_absence and (goes_on or finding.expert in ready)):
            cure = "`python -m maestro_jax.doctor` tries all of them, --skip_doctor starts all the same"
            raise ConfigError(f"{finding.line} ({cure})")
        if finding.is_problem:
            progress.note(finding.line)


def check_replayable(config: Config) -> None:
    """Refuses to replay what depends on who answers first."""
    if REPLAY.value and config.rollout.ahead:
        raise ConfigError(
            f"--replay with config.rollout.ahead={config.rollout.ahead}: timing decides which policy writes a token, "
            "so no run of this kind can be repeated; record and replay with config.rollout.ahead=0"
        )


def open_store(config: Config, workdir: Path, progress: Progress) -> CheckpointStore:
    settings = config.checkpoint
    directory = settings.directory or workdir / "checkpoints"
    return CheckpointStore(directory, settings.keep, settings.keep_every, progress.note)


def is_free(key: str, bound: str | None) -> bool:
    """Whether a setting may differ from the work directory's; `bound` begins those that may not (None: all may)."""
    return key in FREE_KEYS or bound is None or not key.startswith(bound)


def open_tokens(
    config: Config, workdir: Path, system: str, router: WeakRouter, tasks: TaskSource, begun: bool
) -> Tokens:
    """The checkpoint's tokenizer, or a tiny one trained once on the training tasks.

    Args:
      begun: whether the run has; else what is there may come from other settings.
    """
    if given := config.policy.tokenizer or config.policy.init_from:
        return load_tokens(given)
    directory = workdir / "tokenizer"

    def train() -> None:
        if not begun or not (directory / "tokenizer_config.json").is_file():
            view = TaskView(tasks, range(len(tasks)))
            texts = tokenizer_texts(system, view, router, observation_frames())
            train_tokens(texts, config.policy.architecture["text_config"]["vocab_size"], directory)

    cluster.from_main(train)
    return load_tokens(directory)


def warm_start(
    config: Config,
    workdir: Path,
    params: nnx.State,
    graph: nnx.GraphDef,
    mesh: Mesh,
    exchange: Exchange,
    prompts: Prompts,
    router: WeakRouter,
    source: TaskSource,
    journal: Journal,
    outages: Outages,
    progress: Progress,
) -> nnx.State:
    """Parameters after supervised fine-tuning on demonstrations; trained once per work directory."""
    settings = config.warm_start
    optimizer = make_optimizer(settings.optimizer)
    state = init_train_state(params, optimizer, config.policy.freeze, mesh, settings.optimizer.offload)
    # One to fall back on.
    directory, anew = workdir / "warm_start", "delete them: the warm start is made again, and comes out the same"
    store = CheckpointStore(directory, keep=2, note=progress.note, anew=anew)
    done = 0
    if (restored := store.restore_newest(state)) is not None:
        state, done = restored.state, restored.run["steps"]
    if done == settings.steps:
        store.close()
        return state.params
    journal.begin("warm start")
    groups_needed = settings.steps * settings.groups
    rows = [i % len(source) for i in range(groups_needed) for _ in range(settings.group_size)]
    tasks = OnDemand(rows, RecentTasks(source, DEMONSTRATED_BYTES).read)
    demonstrations = write_demonstrations(tasks, router, exchange, config.seed, progress, outages)
    size = settings.group_size
    groups = [demonstrations[i : i + size] for i in range(0, len(demonstrations), size)]
    update = update_config(config, temperature=1.0)
    update = dataclasses.replace(update, loss=dataclasses.replace(update.loss, aggregation="token"))
    train = make_train_step(graph, optimizer, nll_loss, update, mesh, state)
    shapes: set[tuple[Any, ...]] = set()

    def step(state: TrainState, parts: Sequence[GroupBatch]) -> tuple[TrainState, Metrics]:
        for part in parts:
            note_shape(part, shapes, progress, "the warm start's update")
        return train(state, parts)

    progress.phase("warm start", settings.steps, done)
    buckets = config.rollout.member_buckets
    tuned = finetune(step, state, groups, settings.groups, settings.steps, prompts, buckets, mesh, config.seed, done)

    def save(done: int, state: TrainState) -> None:
        journal.sync()
        store.save(done, state, {"steps": done})

    saved = done
    try:
        for done, new, values in tuned:
            state = new
            if done % 10 == 0 or done == settings.steps:
                progress.update(done, values)
            else:
                progress.tick(done)
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                save(done, state)
                saved = done
            failpoints.reach("in_warm_start")
            preemption.check()
    except preemption.Preempted as stop:
        if done > saved:
            save(done, state)
        store.close()
        stop.saved = f"step {done} of the warm start is saved"
        raise
    store.close()
    return state.params


def kept_if_whole(path: Path, journal: Journal, kind: Any, compute: Callable[[], Any], alone: bool) -> Any:
    """A result that is computed once and then read from its JSON file; one with gaps is computed again at every start.

    Args:
      kind: its class, with `to_json`, `from_json` and the number of what is `missing`.
      alone: what followed it in the journal stays (`Journal.begin`).
    """
    values = cluster.from_main(lambda: read_json(path))
    if values is not None:
        return kind.from_json(values)
    journal.begin(path.stem, alone)
    found = kind.from_json(compute().to_json())  # the same types as from the file
    journal.sync()
    if cluster.is_main() and not found.missing:
        write_json(path, found.to_json())
    return found


def make_planner(config: Config, architecture: PolicyArchitecture, root: int, mesh: Mesh) -> Planner:
    """Plans this process's part of every batch; the plan is the same in all of them."""
    grpo, count, parts = config.grpo, jax.process_count(), supply_config(config).parts
    buckets = config.policy.prefix_buckets, config.rollout.member_buckets
    sizes = grpo.groups // parts // count, grpo.microbatches // parts
    return Planner(architecture, root, grpo.group_size, *sizes, batch_shards(mesh) // count, *buckets)


def supply_config(config: Config) -> SupplyConfig:
    grpo, rollout = config.grpo, config.rollout
    parts = grpo.microbatches if grpo.stream else 1
    return SupplyConfig(grpo.groups, grpo.group_size, parts, rollout.ahead, rollout.staleness)


def note_shape(part: GroupBatch, shapes: set[tuple[Any, ...]], progress: Progress, of: str = "the update") -> None:
    """Says when a shape is new, for then programs are compiled: they are kept by what every array looks like."""
    if (shape := tuple(map(jax.typeof, jax.tree.leaves(part)))) not in shapes:
        shapes.add(shape)
        (groups, members, room), prefix = part.tokens.shape, part.prompts.tokens.shape[1]
        rows, (images, patches) = part.loss_rows.shape[1], part.prompts.images.patches.shape[:2]
        progress.note(
            f"new shape of {of}: {groups} groups of {prefix} + {members} x {room} tokens, {rows} of them in the loss; "
            f"{images} images of {patches} patches"
        )


def measure_baselines(
    config: Config, held_out: Sequence[Task], dispatcher: Dispatcher, progress: Progress, outages: Outages
) -> Baselines:
    pairs = sum(
        config.registry.allows(skill, expert.name)
        for expert in config.registry.shown_experts
        for skill in config.registry.shown_skills
    )
    progress.phase("baselines", pairs * len(held_out))

    def measure() -> dict[str, Any]:
        found = run_baselines(held_out, config.registry, dispatcher, config.rollout.deadline, progress.tick, outages)
        return found.to_json()

    return Baselines.from_json(cluster.from_main(measure))


def accuracies(baselines: Baselines, before: Evaluation, trained: Evaluation) -> dict[str, dict[str, float]]:
    """Row of the summary → "overall" and each domain → accuracy."""
    return {
        "random": dict(baselines.random),
        "best_single_pair": dict(baselines.best_single_pair),
        "warm_start": {"overall": before.accuracy, **before.accuracy_by_domain},
        "trained": {"overall": trained.accuracy, **trained.accuracy_by_domain},
        "domain_oracle": dict(baselines.domain_oracle),
        "task_oracle": dict(baselines.task_oracle),
    }


def marked_by_expert(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Expert → share of all training episodes that it failed, those that were run again among them."""
    found = collections.Counter[str]()
    for row in rows:
        found.update({name.removeprefix("marked/"): x for name, x in row.items() if name.startswith("marked/")})
    return {expert: total / sum("reward" in row for row in rows) for expert, total in sorted(found.items())}


def lines_of(accuracy: Mapping[str, float]) -> dict[str, float]:
    """The reference lines of the curve: everything but the trained policy itself."""
    return {name: value for name, value in accuracy.items() if name != "trained"}


if __name__ == "__main__":
    command.run(main, required=("config", "workdir"))
