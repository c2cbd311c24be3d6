"""From a config to the parts of a run that more than one command makes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from maestro_jax.config import Config, MixedConfig
from maestro_jax.data.mixture import Mixture
from maestro_jax.data.opening import KINDS, open_source
from maestro_jax.data.source import TaskSource, TaskView, TfdsSource
from maestro_jax.data.survey import survey
from maestro_jax.errors import ConfigError, UserError
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.update import UpdateConfig
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import ShardingRules, init_params, param_layout
from maestro_jax.policy.attention.interface import suited_to
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf, open_architecture
from maestro_jax.policy.huggingface import import_params
from maestro_jax.policy.model import Policy
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.registry.record.journal import journals, read_lines
from maestro_jax.rewards.graders import check_sources, grader_for
from maestro_jax.rollout.engine import EngineConfig, rollout_sizes
from maestro_jax.rollout.exchange import EpisodeConfig
from maestro_jax.rollout.limits import Limits, check_room, check_turns
from maestro_jax.rollout.outages import OutageConfig, Outages
from maestro_jax.settings import Settings, read_settings
from maestro_jax.suite.tasks.build import build_suite
from maestro_jax.types import Status

T = TypeVar("T")

# Settings of experts and services that say how they are reached, not what they answer: these may change, too, and it
# is told. Not prices: they enter the reward.
REACHED_BY = (
    "endpoints",
    "key",
    "key_hosts",
    "concurrency",
    "attempt_timeout",
    "timeout",
    "serve",
    "workers",
    "processes",
)


def fields(cls: type[T], section: Any) -> T:
    """The part of a config section that a room's own settings need."""
    return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def update_config(config: Config, temperature: float) -> UpdateConfig:
    return UpdateConfig(fields(LossConfig, config.grpo), temperature, config.grpo.logprob_chunk, config.policy.freeze)


def policy_factory(config: Config, architecture: PolicyArchitecture, platform: str) -> Callable[[], Policy]:
    """What makes the policy, for devices of a platform ("cpu", "gpu", "tpu")."""
    policy = config.policy
    attention = suited_to(platform)
    if policy.attention != "auto":
        attention = dataclasses.replace(attention, backend=policy.attention)
    if attention.backend == "splash" and platform != "tpu":
        raise ConfigError(f'config.policy.attention="splash" needs a TPU, found {platform}; use "auto"')
    dtypes = jnp.dtype(policy.param_dtype), jnp.dtype(policy.compute_dtype)
    return lambda: Policy(architecture, nnx.Rngs(config.seed), *dtypes, policy.remat, attention)


def known_architecture(config: Config) -> PolicyArchitecture:
    """Of the checkpoint to start from; where that is not at hand, of the config."""
    policy = config.policy
    if policy.architecture and not Path(policy.init_from).is_dir():
        return architecture_from_hf(policy.architecture, "config.policy.architecture")
    return open_architecture(policy.architecture, policy.init_from)


def sized_episodes(
    config: Config, count: Callable[[str], int], note: Callable[[str], None], demonstrated: int = 0
) -> Config:
    """The config with the room that its episodes need, where it gives none, as the last of the member buckets.

    Args:
      count: tokens of a text.
      note: hears what a given room cuts.
      demonstrated: as of `check_turns`.

    Raises:
      ConfigError: no legal turn fits into the turn budget, or no short episode into the room.
    """
    rollout, episode = config.rollout, fields(EpisodeConfig, config.rollout)
    limits = Limits.of(config.registry, episode, count)
    check_turns(limits, episode, demonstrated)
    if rollout.room and (cut := check_room(limits, episode)):
        note(cut)
    room = rollout.room or limits.room(episode)
    buckets = (*sorted(size for size in rollout.member_buckets if size < room), room)
    return dataclasses.replace(config, rollout=dataclasses.replace(rollout, room=room, member_buckets=buckets))


def check_batches(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Groups and lanes are spread over devices, so every batch of them must divide.

    Raises:
      ConfigError: one does not.
    """
    shards = batch_shards(mesh)
    batches = {"grpo.groups": config.grpo.groups, "evaluate.batch": config.evaluate.batch}
    batches["grpo.groups / microbatches"] = config.grpo.groups // config.grpo.microbatches
    if config.warm_start.steps:
        batches["warm_start.groups"] = config.warm_start.groups
    for key, size in batches.items():
        if size % shards:
            raise ConfigError(
                f"config.{key}={size} does not divide over {shards} devices (mesh axes data x fsdp); "
                f"set it to a multiple of {shards}"
            )
    episodes, prefix = fields(EngineConfig, config.rollout), max(config.policy.prefix_buckets)
    under_way = config.grpo.groups * (1 + config.rollout.ahead)
    rollout_sizes(episodes, shards, under_way, config.grpo.group_size, prefix)
    rollout_sizes(episodes, shards, config.evaluate.batch, 1, prefix)


def check_same_run(path: Path, mine: Settings, is_free: Callable[[str], bool]) -> list[str]:
    """Refuses to go on in a work directory that holds a run with other settings.

    Args:
      path: the run's config.json; without it, all is well.
      is_free: which keys may differ.

    Returns:
      A line for each expert and service that is reached in another way than before.
    """
    changes: list[str] = []
    theirs, own = (read_settings(path) or mine).flat, mine.flat
    for key in sorted(own.keys() | theirs.keys()):
        before, now = (settings.get(key, "(not set)") for settings in (theirs, own))
        if before == now or is_free(key):
            continue
        if _only_reaches(key):
            changes.append(f"config.{key} was {before} so far and is now {now}")
            continue
        name = key if key.startswith("--") else f"config.{key}"  # a flag of the command, or a setting
        raise ConfigError(
            f"{path.parent} holds a run with {name}={before}, this one has {now}; "
            f"use another directory, or the same setting to go on"
        )
    return changes


def holds_calls(workdir: Path) -> bool:
    """Whether experts have answered a run there: that is paid for, and later starts are answered from the journal."""
    found = (line for path in journals(str(workdir / "journal.jsonl")) for line in read_lines(str(path)))
    return any(line["kind"] in ("call", "request") and line["status"] == Status.OK.name for line in found)


def settings_hashes(settings: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint knows of its run: hashes of all settings, and of the registry's, without how it is reached."""
    kept = {k: value for k, value in settings.items() if k != "checkpoint.directory" and not _only_reaches(k)}
    registry = {key: value for key, value in kept.items() if key.startswith("registry.")}
    return {name: _hash(values) for name, values in (("config", kept), ("registry", registry))}


def check_same_settings(saved: Mapping[str, str], mine: Mapping[str, str], where: str) -> None:
    """Refuses a checkpoint of a run with other settings; both as `settings_hashes` makes them.

    Raises:
      ConfigError: they differ.
    """
    if saved != mine:
        part = "registry" if saved.get("registry") != mine["registry"] else "config"
        raise ConfigError(
            f"the checkpoint in {where} belongs to a run with another {part}; go on with that run's settings, or use "
            "another config.checkpoint.directory"
        )


def _only_reaches(key: str) -> bool:
    return key.startswith(("registry.experts.", "registry.services.")) and key.rsplit(".", 1)[-1] in REACHED_BY


def _hash(settings: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def open_outages(config: Config, dispatcher: Dispatcher, progress: Progress, replayed: bool) -> Outages:
    """What waits for the experts of a run."""
    called = [expert.name for expert in config.registry.shown_experts]
    return Outages(fields(OutageConfig, config.rollout), called, dispatcher.shunned, progress.note, replayed)


def open_data(config: Config, workdir: Path, progress: Progress) -> tuple[TaskSource, TaskSource]:
    """Training and held-out tasks; the suite is built on first use."""
    return open_training(config, workdir, progress), open_held_out(config, workdir, progress)


def open_training(config: Config, workdir: Path, progress: Progress) -> TaskSource:
    data = config.data
    if data.mixture:
        return open_mixture(data.mixture)
    if data.kind in KINDS:
        return open_source(data.kind, data.train_files, split=data.train_split, image_root=data.image_root)
    return TfdsSource(open_suite(config, workdir, progress), "train")


def open_held_out(config: Config, workdir: Path, progress: Progress) -> TaskSource:
    data = config.data
    if data.kind in KINDS:
        return open_source(data.kind, data.test_files, split=data.test_split, image_root=data.image_root)
    return TfdsSource(open_suite(config, workdir, progress), "test")


def open_suite(config: Config, workdir: Path, progress: Progress) -> str:
    """The directory of the suite, built if it is not there."""
    directory = config.data.suite_directory or workdir / "suite"
    counts = config.data.train_per_domain, config.data.test_per_domain
    return cluster.from_main(lambda: str(build_suite(directory, *counts, config.seed, progress)))


def first_tasks(source: TaskSource, count: int) -> TaskView:
    """The held-out tasks that a run looks at: `config.evaluate.tasks` of them, 0 for all.

    Raises:
      ConfigError: there are not so many.
    """
    if count > len(source):
        raise ConfigError(
            f"config.evaluate.tasks={count}, and the data has {len(source)} held-out tasks; set it to {len(source)} or "
            "less, or to 0 for all"
        )
    return TaskView(source, range(count or len(source)))


def check_tasks(
    sources: Sequence[TaskSource],
    held_out: TaskSource | None,
    kept: Path,
    progress: Progress,
) -> None:
    """That all tasks can be told apart and graded, before anything is computed; process 0 reads for all.

    Args:
      held_out: must be readable as a whole besides, for no row of it may be skipped.
      kept: file of what is known of the data's files already.

    Raises:
      ConfigError: two tasks of a source share an id, nobody can grade one, or one that is held out is damaged.
    """

    def read() -> tuple[list[str], str]:
        found: set[str] = set()
        try:
            for number, source in enumerate(sources):
                name = f"data source {number}" if len(sources) > 1 else "tasks"
                found |= graded_sources(source, survey(source, name, kept, progress))
            if held_out is not None:
                rows = survey(held_out, "held-out tasks", kept, progress, whole=True)
                found |= graded_sources(held_out, rows)
        except UserError as error:
            return [], str(error)
        return sorted(found), ""

    names, problem = cluster.from_main(read)
    if problem:
        raise ConfigError(problem)
    check_sources(names)


def graded_sources(source: TaskSource, rows: Mapping[str, int]) -> set[str]:
    """All of them; raises ConfigError with the row of one that has no grader."""
    for name in sorted(rows, key=rows.__getitem__):
        try:
            grader_for(name)
        except ConfigError as error:
            raise ConfigError(f"{source.where(rows[name])}: {error}, or correct the row") from None
    return set(rows)


def open_mixture(parts: Sequence[MixedConfig]) -> Mixture:
    opened = [open_source(part.kind, part.files, split=part.split, image_root=part.image_root) for part in parts]
    return Mixture(opened, [part.weight for part in parts])


def open_params(config: Config, architecture: PolicyArchitecture, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Parameters in their shards: those of the checkpoint to start from, or random ones."""
    make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
    if not config.policy.init_from:
        return init_params(make, mesh, ShardingRules())
    graph, abstract, shardings = param_layout(make, mesh, ShardingRules())
    return graph, import_params(config.policy.init_from, abstract, shardings, architecture.vision.patch_shape)
