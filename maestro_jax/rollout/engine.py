"""The rollout engine: tasks in, finished trajectories with their exact tokens out.

A loop of three programs: decode a chunk, exchange with the experts, append what they said. It reads
the trainer's own parameter buffers; the loop's conditions are replicated device values.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import over_groups, replicated
from maestro_jax.policy.model import PrefixBatch, prompt_shardings
from maestro_jax.policy.prompts import Prompts
from maestro_jax.rollout import decode
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.exchange import Exchange, Trajectory, make_exchange_program
from maestro_jax.rollout.state import RolloutState
from maestro_jax.types import Task

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Finished groups: host records and the arrays they were sampled into.

    Groups that only padded the batch to its static size are at the end, without trajectories.
    """

    trajectories: list[list[Trajectory]]  # [tasks][G]
    prompts: PrefixBatch  # numpy-valued
    tokens: np.ndarray  # int32 [B, G, R]
    logprobs: np.ndarray  # float32 [B, G, R]
    authored: np.ndarray  # bool [B, G, R]
    length: np.ndarray  # int32 [B, G]


@dataclasses.dataclass(frozen=True)
class RolloutPrograms:
    """The compiled functions of `rollout/decode.py`, with parameters in place of the policy; states are donated."""

    prefill: Any
    decode: Any
    append: Any


def rollout_programs(graph: nnx.GraphDef, config: decode.DecodeConfig) -> RolloutPrograms:
    def on_policy(function: Callable, **static: object) -> Callable:
        return lambda params, *args: function(nnx.merge(graph, params), *args, **static)

    return RolloutPrograms(
        prefill=jax.jit(on_policy(decode.prefill, room=config.room)),
        decode=jax.jit(on_policy(decode.decode_chunk, config=config), donate_argnums=2),
        append=jax.jit(on_policy(decode.append_observations), donate_argnums=2),
    )


class Engine:
    """Runs episodes of one policy against one registry on one mesh."""

    def __init__(
        self, graph: nnx.GraphDef, mesh: Mesh, prompts: Prompts, exchange: Exchange, config: decode.DecodeConfig
    ):
        self.mesh = mesh
        self.prompts = prompts
        self.exchange = exchange
        self.config = config
        tokens = prompts.tokens
        transitions, reasons = build_automaton(tokens.token_bytes(prompts.architecture.text.vocab_size))
        self.tables = jax.device_put(
            decode.StopTables(transitions, reasons, np.int32(tokens.end_of_turn)), replicated(mesh)
        )

        self.programs = rollout_programs(graph, config)
        self._exchange = make_exchange_program(exchange, mesh)

    def rollout(
        self, params: nnx.State, tasks: Sequence[Task], groups: int, members: int, seed: int, step: int, greedy: bool
    ) -> Rollout:
        """Runs `members` episodes of every task to their end.

        Args:
          params: the policy's parameters, as the trainer holds them.
          tasks: at most `groups` tasks; fewer are padded, so that shapes stay static.
          seed, step: with task id and member, the only sources of randomness.
        """
        shown = [*tasks, *[tasks[-1]] * (groups - len(tasks))]
        prompts = self.prompts.batch(shown)
        on_mesh = self._to_mesh(prompts)
        keys = np.stack([[lane_key(seed, step, task.id, m) for m in range(members)] for task in shown])
        alive = np.arange(groups) < len(tasks)
        slots = np.arange(groups * members, dtype=np.int32).reshape(groups, members)
        keys, alive, slots = jax.device_put((keys, alive, slots), over_groups(self.mesh))
        self.exchange.begin([*tasks, *[None] * (groups - len(tasks))], members)
        state = self._run(params, on_mesh, keys, alive, slots, np.float32(not greedy))
        tokens, logprobs, authored, length = jax.device_get(
            (state.tokens, state.logprobs, state.authored, state.length)
        )
        records = self.exchange.trajectories
        trajectories = [[records[g * members + m] for m in range(members)] for g in range(len(tasks))]
        return Rollout(trajectories, prompts, tokens, logprobs, authored, length)

    def _run(
        self, params: nnx.State, prompts: PrefixBatch, keys: Array, alive: Array, slots: Array, noise: np.float32
    ) -> RolloutState:
        with jax.set_mesh(self.mesh):
            prefilled, state = self.programs.prefill(params, prompts, keys, alive)
            while True:
                state = self.programs.decode(params, prefilled, state, self.tables, noise)
                lane, observations, lengths, counts = self._exchange(state, slots)
                unfinished, arrived = np.asarray(counts)
                if not unfinished:
                    return state
                if arrived:
                    state = self.programs.append(params, prefilled, state, lane, observations, lengths)
                else:
                    state = dataclasses.replace(state, lane=lane)

    def _to_mesh(self, prompts: PrefixBatch) -> PrefixBatch:
        shardings = prompt_shardings(self.mesh)
        groups = prompts.tokens.shape[0]
        if groups % batch_shards(self.mesh):
            raise ValueError(f"{groups} groups do not divide over {batch_shards(self.mesh)} batch shards")
        return jax.device_put(prompts, shardings)


def lane_key(seed: int, step: int, task_id: str, member: int) -> np.ndarray:
    """Random key data uint32 `[2]` of a lane: a hash, so that it does not depend on batch or order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{task_id}/{member}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
