"""Before reinforcement: tokens of a tiny policy, and supervised fine-tuning on demonstrations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from maestro_jax import failpoints
from maestro_jax.checkpoint.store import CheckpointStore
from maestro_jax.config import Config
from maestro_jax.data.source import OnDemand, TaskSource, TaskView, remembering
from maestro_jax.errors import ConfigError, NonFiniteError
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.skipped import Skipped, Skips
from maestro_jax.grpo.update import (
    NOTHING,
    GroupBatch,
    Metrics,
    TrainState,
    init_train_state,
    make_train_step,
    nll_loss,
)
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster, preemption
from maestro_jax.policy.tokens import Tokens, load_tokens, train_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.rollout.exchange import observation_frames
from maestro_jax.session.calls import Calls
from maestro_jax.session.policy import update_config
from maestro_jax.session.rollouts import Rollouts
from maestro_jax.suite.demonstrations import WeakRouter, tokenizer_texts, write_demonstrations
from maestro_jax.training.updates import note_shape
from maestro_jax.warm_start.demonstrations import open_demonstrations
from maestro_jax.warm_start.finetune import finetune

# Of images of tasks that are demonstrated, which are gone through again and again.
DEMONSTRATED_BYTES = 256 << 20


def open_tokens(config: Config, workdir: Path, router: WeakRouter, tasks: TaskSource, begun: bool) -> Tokens:
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
            system = render_system_prompt(config.registry, config.rollout.max_calls, config.policy.system_prompt)
            texts = tokenizer_texts(system, view, router, observation_frames())
            train_tokens(texts, config.policy.architecture["text_config"]["vocab_size"], directory)

    cluster.from_main(train)
    return load_tokens(directory)


def warm_start(
    config: Config,
    workdir: Path,
    rollouts: Rollouts,
    router: WeakRouter,
    source: TaskSource,
    calls: Calls,
    progress: Progress,
) -> nnx.State:
    """Parameters after supervised fine-tuning on demonstrations; trained once per work directory."""
    settings, mesh = config.warm_start, rollouts.mesh
    optimizer = make_optimizer(settings.optimizer)
    state = init_train_state(rollouts.params, optimizer, config.policy.freeze, mesh, settings.optimizer.offload)
    # One to fall back on.
    directory, anew = workdir / "warm_start", "delete them: the warm start is made again, and comes out the same"
    store = CheckpointStore(directory, keep=2, note=progress.note, anew=anew)
    done, before, skipped = 0, dict[str, Any](), 0
    if (restored := store.restore_newest(state)) is not None:
        state, done, before = restored.state, restored.run["steps"], restored.run.get("demonstrations", {})
        skipped = restored.run.get("skipped", 0)
    if done == settings.steps:
        store.close()
        return state.params
    calls.journal.begin("warm start")
    exchange, prompts = rollouts.exchange, rollouts.prompts
    if settings.demonstrations:
        size, files = 1, settings.demonstrations
        demonstrations = open_demonstrations(files, settings.image_root, exchange, prompts, progress)
    else:
        size = settings.group_size
        rows = [i % len(source) for i in range(settings.steps * settings.groups) for _ in range(size)]
        tasks = OnDemand(rows, remembering(source, DEMONSTRATED_BYTES))
        demonstrations = write_demonstrations(tasks, router, exchange, config.seed, progress, calls.outages)
    now = {"count": len(demonstrations), "digest": demonstrations.digest} if demonstrations.digest else {}
    if before and before != now:  # the order goes on from the steps that are done
        raise ConfigError(
            f"config.warm_start.demonstrations: the rows are others than at step {done} of the warm start "
            f"({before['count']} then, {len(demonstrations)} now); bring the old ones back, or delete {directory} to "
            "make the warm start again"
        )
    starts = range(0, len(demonstrations), size)
    groups = [demonstrations[i : i + size] for i in starts]
    most = max(sum(demonstrations.authored[i : i + size]) for i in starts)
    update = update_config(config, temperature=1.0)
    update = dataclasses.replace(update, loss=dataclasses.replace(update.loss, aggregation="token"))
    train = make_train_step(rollouts.graph, optimizer, nll_loss, update, mesh, state)
    shapes: set[tuple[Any, ...]] = set()
    skips = Skips(settings.optimizer.max_skipped, "config.warm_start.optimizer", progress.note, skipped)
    given: list[Sequence[str]] = []  # tasks of every batch of this start

    def step(state: TrainState, microbatches: Sequence[GroupBatch]) -> tuple[TrainState, Metrics]:
        (batch,) = microbatches
        note_shape(batch, shapes, progress, "the warm start's update")
        total = train.add(state.params, train.begin(alone=True), batch)
        state, metrics = train.finish(state, total, NOTHING)
        named = Skipped.named(metrics, total, given[-1:]) if metrics["skipped"] else None
        skips.after(f"step {done + 1} of the warm start", named)
        return state, metrics

    progress.phase("warm start", settings.steps, done)
    buckets = config.rollout.member_buckets
    tuned = finetune(
        step,
        state,
        groups,
        most,
        settings.groups,
        settings.steps,
        prompts,
        buckets,
        mesh,
        config.seed,
        done,
        note_tasks=given.append,
    )

    def save(done: int, state: TrainState) -> None:
        calls.journal.sync()
        row = {"steps": done, "skipped": skips.in_a_row}
        store.save(done, state, row | ({"demonstrations": now} if now else {}))

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
    except NonFiniteError:
        store.close()
        raise
    except preemption.Preempted as stop:
        if done > saved:
            save(done, state)
        store.close()
        stop.saved = f"step {done} of the warm start is saved"
        raise
    store.close()
    return state.params
