"""The main job as a function: trains an orchestrator from a config, start to finish."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from maestro_jax.checkpoint.run import has_begun
from maestro_jax.checkpoint.store import CheckpointStore
from maestro_jax.config import Config, completed, parse_config
from maestro_jax.data.pipeline import Batches
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.baselines import Baselines, pairs_of, run_baselines
from maestro_jax.evaluation.policy import Evaluation, evaluate_policy
from maestro_jax.observe.files import made_directory, read_json, write_json
from maestro_jax.observe.listening import Show, showing
from maestro_jax.observe.metrics import MetricsWriter
from maestro_jax.observe.trackers import FLUSH_SECONDS, LAST_SECONDS, Trackers, check_trackers
from maestro_jax.parallel import cluster, preemption
from maestro_jax.policy.config import open_architecture
from maestro_jax.policy.hf_export import hf_config
from maestro_jax.registry.record.journal import Journal
from maestro_jax.rollout.protocol import opens_thought
from maestro_jax.rollout.supply import Supply
from maestro_jax.session.binding import check_same_run, holds_calls, settings_hashes
from maestro_jax.session.calls import open_calls, try_servers
from maestro_jax.session.policy import open_params
from maestro_jax.session.rollouts import check_batches, open_rollouts
from maestro_jax.session.tasks import open_tasks
from maestro_jax.settings import Settings, read_config
from maestro_jax.suite.demonstrations import WeakRouter
from maestro_jax.training.loop import Record, Training, recall
from maestro_jax.training.result import TrainResult
from maestro_jax.training.updates import make_learner, supply_config
from maestro_jax.training.warm_start import open_tokens, warm_start

# How settings begin that may change between a run and its continuation.
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
    "optimizer.max_skipped",
    "evaluate.every",
    "evaluate.batch",
    "evaluate.baselines",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "warm_start.checkpoint_every",
    "warm_start.optimizer.max_skipped",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "trackers.",
)


def train(
    config: Any,
    workdir: str | Path,
    *,
    replay: str = "",
    skip_doctor: bool = False,
    progress: Show = None,
) -> TrainResult:
    """Trains an orchestrator; goes on where an earlier call or command stopped in the same directory.

    Args:
      config: a `ConfigDict` or nested mapping, or the path of a config file or of a run's config.json.
      workdir: receives metrics.jsonl, journal.jsonl, trained.jsonl, checkpoints, and at the end summary.json,
        curves.png and routing.png.
      replay: a run's journal.jsonl: its calls are answered from there, nobody is asked.
      skip_doctor: starts without asking every server once.
      progress: "terminal", or what hears every `Event`; None shows nothing.

    Returns:
      Figures of the trained policy; the same in all processes of a run.

    Raises:
      UserError: something that the user has to change; one line that says what.
      NonFiniteError: loss or gradients were not finite for several updates in a row; one line that says what to do.
      Preempted: experts did not come back, or the process was told to stop; the same call resumes.
    """
    began = time.monotonic()
    raw = completed(read_config(config))
    settings, config = Settings.of(raw), parse_config(raw)
    check_replayable(config, replay)
    check_trackers(config.trackers)
    cluster.start()
    workdir = made_directory("--workdir", workdir)
    cluster.check_shared(workdir)
    cluster.check_same(settings.flat)
    begun = has_begun(workdir)
    # What stopped before it made anything binds nobody, but whom it asked.
    bound = "" if begun else "registry." if holds_calls(workdir) else None
    changes = check_same_run(workdir / "config.json", settings, lambda key: is_free(key, bound))

    with showing(progress) as shown, contextlib.ExitStack() as closing:
        for line in changes:
            shown.note(line)

        # ---- Servers of experts: before anything is computed -----------------------------------
        if not (skip_doctor or replay):
            try_servers(config, workdir, shown)

        # ---- Tasks, calls, checkpoints ---------------------------------------------------------
        tasks = open_tasks(config, workdir, shown)
        calls = closing.enter_context(open_calls(config, workdir, shown, replay))
        saving = config.checkpoint
        store = CheckpointStore(saving.directory or workdir / "checkpoints", saving.keep, saving.keep_every, shown.note)
        if not cluster.several():  # else one that fails alone would wait for the others
            closing.callback(store.close)
        has_trained = store.latest() is not None

        def is_kept(*names: str) -> bool:
            return cluster.from_main(lambda: all((workdir / f"{name}.json").exists() for name in names))

        # Else training knows from where on (`Training.begin`). A figure with gaps asks only what failed once more.
        if not has_trained or (config.evaluate.baselines and not is_kept("before", "before_sampled")):
            recall(calls, {}, shown)

        # ---- Tokens, policy, rollouts ----------------------------------------------------------
        router = WeakRouter(config.registry, config.warm_start)
        architecture = open_architecture(config.policy.architecture, config.policy.init_from)
        tokens = open_tokens(config, workdir, router, tasks.train, begun)

        def load(config: Config, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, nnx.State]:
            check_batches(config, mesh)
            return open_params(config, architecture, mesh)

        has_router = config.warm_start.steps and not config.warm_start.demonstrations
        demonstrated = router.longest_turn(tokens.count, opens_thought(tokens.header)) if has_router else 0
        rollouts = open_rollouts(config, architecture, load, tokens, calls, shown, demonstrated)
        closing.callback(rollouts.scorer.graders.close)
        config = rollouts.config
        batches = Batches(
            tasks.train,
            config.grpo.groups,
            rollouts.prompts.prepare,
            seed=config.seed,
            damage_limit=config.data.damage_limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        # From here on the directory belongs to this run, and a signal waits for a boundary.
        closing.enter_context(preemption.at_boundaries())
        if cluster.is_main():
            settings.write(workdir / "config.json")
            write_json(workdir / "architecture.json", hf_config(architecture, config.policy.param_dtype, None))

        # ---- Warm start (kept in the work directory) -------------------------------------------
        if config.warm_start.steps:
            params = warm_start(config, workdir, rollouts, router, tasks.train, calls, shown)
            rollouts = dataclasses.replace(rollouts, params=params)

        # ---- The policy before reinforcement ---------------------------------------------------
        def evaluate(params: nnx.State, greedy: bool, name: str) -> Evaluation:
            shown.phase(name, len(tasks.held_out))
            settings = config.evaluate.batch, rollouts.scorer, config.seed
            found = evaluate_policy(
                rollouts.engine, params, tasks.held_out, *settings, greedy, shown.tick, calls.outages
            )
            missing = {"not answered": found.missing} if found.missing else {}
            shown.update(len(tasks.held_out), {"accuracy": found.accuracy, "calls": found.calls, **missing})
            return found

        def before_training(name: str, greedy: bool) -> Evaluation:
            what = f"held-out, before RL ({'greedy' if greedy else 'sampled'})"
            compute = functools.partial(evaluate, rollouts.params, greedy, what)
            return kept_if_whole(workdir / f"{name}.json", calls.journal, Evaluation, compute, alone=has_trained)

        before = sampled = baselines = None
        if config.evaluate.baselines:
            before, sampled = before_training("before", True), before_training("before_sampled", False)

        # ---- Reinforcement ---------------------------------------------------------------------
        learner, state = make_learner(config, rollouts, shown)
        how = supply_config(config)
        supply = Supply(rollouts.engine, iter(batches), how, config.seed, calls.outages, learner.contrast)
        own = workdir if cluster.is_main() else None  # process 0 writes for all
        trackers = Trackers(config.trackers, own, settings.flat, shown.note)
        # Whoever is stopped has little time; what trackers lack then, they get from the next start.
        closing.push(lambda kind, *_: trackers.close(LAST_SECONDS if kind else FLUSH_SECONDS))
        metrics = closing.enter_context(MetricsWriter(own and own / "metrics.jsonl", trackers.write))
        ledger = closing.enter_context(MetricsWriter(own and own / "trained.jsonl"))
        bound_settings = {key: value for key, value in settings.flat.items() if not key.startswith(FREE_KEYS)}
        record = Record(store, metrics, ledger, settings_hashes(bound_settings), began)

        def after(params: nnx.State) -> Evaluation:
            return evaluate(params, True, "held-out (greedy)")

        training = Training(config, learner, supply, calls, record, after, shown)
        training.begin(state, before)
        training.run()

        # ---- Routing without learning: nobody waits for it any more ----------------------------
        if config.evaluate.baselines:

            def measure() -> dict[str, Any]:
                shown.phase("baselines", len(pairs_of(config.registry)) * len(tasks.held_out))
                asked = tasks.held_out, config.registry, calls.dispatcher, rollouts.scorer, config.rollout.deadline
                return run_baselines(*asked, shown.tick, calls.outages).to_json()

            def compute() -> Baselines:
                return Baselines.from_json(cluster.from_main(measure))

            if has_trained and not is_kept("baselines"):  # answers may stand before the last checkpoint's place
                recall(calls, {}, shown)
            try:
                baselines = kept_if_whole(workdir / "baselines.json", calls.journal, Baselines, compute, alone=True)
            except preemption.Preempted as stop:
                stop.saved = f"step {training.step} is saved"
                raise

    result = TrainResult.of(config, workdir, training, len(tasks.held_out), before, sampled, baselines)
    if cluster.is_main():
        result.write()
    return result


def check_replayable(config: Config, replay: str) -> None:
    """Refuses to replay what depends on who answers first."""
    if replay and config.rollout.ahead:
        raise ConfigError(
            f"--replay with config.rollout.ahead={config.rollout.ahead}: timing decides which policy writes a token, "
            "so no run of this kind can be repeated; record and replay with config.rollout.ahead=0"
        )


def is_free(key: str, bound: str | None) -> bool:
    """Whether a setting may differ from the work directory's; `bound` begins those that may not (None: all may)."""
    return key.startswith(FREE_KEYS) or bound is None or not key.startswith(bound)


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
