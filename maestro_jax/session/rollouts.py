"""Rollouts of a session: prompts, the exchange with experts, the mesh and the engine that decodes episodes."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from maestro_jax.config import Config
from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel.mesh import batch_shards, make_mesh
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import ASSISTANT_HEADER, Tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.rewards.graders import Graders
from maestro_jax.rewards.reward import Scorer
from maestro_jax.rollout.engine import Engine, EngineConfig, rollout_sizes
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.judging import Judging
from maestro_jax.rollout.limits import Limits, check_room, check_turns
from maestro_jax.rollout.protocol import opened_thought, opens_thought
from maestro_jax.session.calls import Calls
from maestro_jax.session.policy import fields

SHORT_THOUGHT = 1024  # tokens of a turn; below, a published checkpoint that thinks would mostly be cut


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """A policy on its devices, and what turns it and tasks into episodes.

    Attributes:
      config: with the sizes that its episodes need (`sized_episodes`).
      params: of the policy, in their shards.
      scorer: of the episodes.
    """

    config: Config
    architecture: PolicyArchitecture
    prompts: Prompts
    exchange: Exchange
    mesh: Mesh
    graph: nnx.GraphDef
    params: nnx.State
    engine: Engine
    scorer: Scorer


def open_rollouts(
    config: Config,
    architecture: PolicyArchitecture,
    load: Callable[[Config, Mesh], tuple[nnx.GraphDef, nnx.State]],
    tokens: Tokens,
    calls: Calls,
    progress: Progress,
    demonstrated: int = 0,
) -> Rollouts:
    """Everything that episodes need.

    Args:
      load: gives the policy for a mesh.
      demonstrated: tokens of the longest turn that demonstrations show.

    Raises:
      ConfigError: turns or episodes do not fit their budgets, or the config does not fit the devices.
    """
    config = sized_episodes(config, tokens.count, progress.note, demonstrated, tokens.header)
    system = render_system_prompt(config.registry, config.rollout.max_calls, config.policy.system_prompt)
    left_out = opened_thought(tokens.header) if config.rollout.earlier_thoughts == "drop" else ""
    prompts = Prompts(tokens, architecture, system, fields(PromptConfig, config.policy), left_out)
    exchange = Exchange(tokens, config.registry, calls.dispatcher, fields(EpisodeConfig, config.rollout))
    progress.note(f"registry prompt: {len(prompts.root)} tokens, shared by every group")
    mesh = make_mesh(config.mesh)
    graph, params = load(config, mesh)
    engine = Engine(graph, mesh, prompts, exchange, fields(EngineConfig, config.rollout))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    progress.note(f"policy: {count:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s)")
    step = config.grpo.groups * config.grpo.group_size // jax.process_count()
    judging = Judging(calls.dispatcher, calls.outages, step)
    scorer = Scorer(config.reward, Graders(config.graders, config.registry), judging, tokens.decode)
    return Rollouts(config, architecture, prompts, exchange, mesh, graph, params, engine, scorer)


def sized_episodes(
    config: Config,
    count: Callable[[str], int],
    note: Callable[[str], None],
    demonstrated: int = 0,
    header: str = ASSISTANT_HEADER,
) -> Config:
    """The config with the room that its episodes need, where it gives none, as the last of the member buckets.

    Args:
      count: tokens of a text.
      note: hears what a given room cuts.
      demonstrated: as of `check_turns`.
      header: of the policy's turns (`Tokens.header`).

    Raises:
      ConfigError: no legal turn fits into the turn budget, or no short episode into the room.
    """
    rollout, episode = config.rollout, fields(EpisodeConfig, config.rollout)
    limits = Limits.of(config.registry, episode, count, header)
    check_turns(limits, episode, demonstrated)
    if opens_thought(header) and rollout.turn_budget < SHORT_THOUGHT:
        note(
            f"the chat template opens a thought in every turn, and config.rollout.turn_budget={rollout.turn_budget} "
            f"cuts turns whose thought is longer; published checkpoints think for thousands of tokens"
        )
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
