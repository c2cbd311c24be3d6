"""The rollout engine: tasks in, finished trajectories with their exact tokens out.

It holds what outlives a rollout: compiled programs by size, the stop automaton, the limits. The loop itself is
`rollout/session.py`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.errors import ConfigError
from maestro_jax.parallel import cluster
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import over_groups, replicated
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.prompts import Prompts
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import DecodeConfig, StopTables
from maestro_jax.rollout.exchange import Exchange, make_exchange_program
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.rollout.programs import RolloutPrograms, rollout_programs
from maestro_jax.rollout.scheduler import Capacity
from maestro_jax.rollout.session import Compiled, Session
from maestro_jax.rollout.state import RolloutSizes
from maestro_jax.rollout.trajectory import GroupRecord, Trajectory
from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Static limits of rollouts; numbers of lanes and groups are over all devices, lengths in tokens.

    Attributes:
      lanes: trajectories that decode side by side; 0 gives every trajectory in flight a lane.
      decode_chunk: tokens between two exchanges with the experts.
      turn_budget: most tokens of one turn.
      room: most tokens of a member, turns and observations together.
      append_rows: lanes that receive an observation per program call; 0: all of them.
      prefill_groups: groups prefilled per program call; 0: all of them.
      parked_tokens: room for keys and values of trajectories without a lane, in the memory of each batch shard.
      parked_on_host: the same on each host, in bytes.
    """

    lanes: int
    decode_chunk: int
    turn_budget: int
    room: int
    append_rows: int
    prefill_groups: int
    parked_tokens: int
    parked_on_host: int
    temperature: float

    @property
    def decoding(self) -> DecodeConfig:
        return DecodeConfig(self.decode_chunk, self.temperature)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Finished groups of this process: host records, and their tokens as arrays.

    Groups that only pad the batch to its static size are at the end, without trajectories.

    Attributes:
      refilled: how many of the groups are of further tasks, in the place of groups without contrast.
      replaced: members of the groups that were run and left out for them; None where no group is replaced.
    """

    trajectories: list[list[Trajectory]]  # [tasks][G]
    prompts: PrefixBatch  # numpy-valued
    tokens: np.ndarray  # int32 [B, G, R]
    logprobs: np.ndarray  # float32 [B, G, R]
    authored: np.ndarray  # bool [B, G, R]
    length: np.ndarray  # int32 [B, G]
    refilled: int = 0
    replaced: list[list[Trajectory]] | None = None


class Engine:
    """Runs episodes of one policy against one registry on one mesh."""

    def __init__(self, graph: nnx.GraphDef, mesh: Mesh, prompts: Prompts, exchange: Exchange, config: EngineConfig):
        self.graph = graph
        self.mesh = mesh
        self.prompts = prompts
        self.exchange = exchange
        self.config = config
        self.local_shards = shards_of_this_process(mesh)
        tokens = prompts.tokens
        transitions, reasons = build_automaton(tokens.token_bytes(prompts.architecture.text.vocab_size))
        self.tables = jax.device_put(StopTables(transitions, reasons, np.int32(tokens.end_of_turn)), replicated(mesh))
        self.root = jax.device_put(prompts.root, replicated(mesh))
        self.shard_numbers = jax.device_put(np.arange(batch_shards(mesh), dtype=np.int32), over_groups(mesh))
        self._compiled: dict[RolloutSizes, Compiled] = {}

    def rollout(
        self,
        params: nnx.State,
        tasks: Sequence[Task],
        groups: int,
        members: int,
        seed: int,
        step: int,
        greedy: bool,
        outages: Outages | None = None,
    ) -> Rollout:
        """Runs `members` episodes of every task to their end, those of `own_rows` in this process.

        Args:
          params: the policy's parameters, as the trainer holds them.
          tasks: at most `groups` tasks, the same in all processes; fewer leave room, so that shapes stay static.
          seed, step: with task id and member, the only sources of randomness.
          outages: has marked episodes run again; None leaves them.
        """
        rows = self.own_rows(groups)
        own = [tasks[row] for row in rows if row < len(tasks)]
        left = len(rows) - len(own)
        shown = [*own, *([tasks[-1]] * left if left else [])]  # reading a task may cost something
        prompts = self.prompts.batch(shown, cluster.most)
        session = self.session(params, groups, members, prompts.tokens.shape[1], greedy)
        keys = [[lane_key(seed, step, task.id, m) for m in range(members)] for task in own]
        records = session.submit(own, prompts, keys, batch=len(rows))

        def run() -> None:
            for _ in session.run(params, version=step):
                pass

        def again() -> None:
            session.again(records)
            run()

        run()
        if outages is not None:
            outages.insist(lambda: marks_of(records), again, f"a batch of {len(tasks) * members} episodes")
        return assemble(records, prompts, len(rows), members, self.config.room)

    def own_rows(self, groups: int) -> list[int]:
        """Which of a batch of `groups` groups, as they lie over the shards, are of this process."""
        shards = batch_shards(self.mesh)
        return [row for row in range(groups) if row * shards // groups in self.local_shards]

    def session(self, params: nnx.State, groups: int, members: int, prefix: int, greedy: bool) -> "Session":
        """Room for so many groups at a time, with prefixes of at most `prefix` tokens."""
        sizes = rollout_sizes(self.config, batch_shards(self.mesh), groups, members, prefix)
        if sizes not in self._compiled:
            self._compiled[sizes] = self._compile(params, sizes)
        return Session(self._compiled[sizes], self.exchange, self.local_shards, greedy)

    def _compile(self, params: nnx.State, sizes: RolloutSizes) -> Compiled:
        programs = rollout_programs(self.graph, sizes, self.config.decoding)
        capacity = self._capacity(programs, params, sizes)
        exchange = make_exchange_program(self.exchange, self.mesh, capacity)
        return Compiled(self.mesh, sizes, capacity, programs, exchange, self.tables, self.root, self.shard_numbers)

    def _capacity(self, programs: RolloutPrograms, params: nnx.State, sizes: RolloutSizes) -> Capacity:
        with jax.set_mesh(self.mesh):
            _, lanes, _ = jax.eval_shape(programs.open, params, self.root)
        bytes_of_lanes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(lanes.cache))
        return Capacity(
            lanes=sizes.lanes,
            groups=sizes.groups,
            members=sizes.members,
            room=sizes.room,
            pages=sizes.pages,
            page=sizes.page,
            append_rows=sizes.append_rows,
            prefill_groups=sizes.prefill_groups,
            observation=self.exchange.observation_bucket,
            token_bytes=bytes_of_lanes // (sizes.shards * sizes.lanes * sizes.room),
            host_bytes=self.config.parked_on_host // len(self.local_shards),
        )


def rollout_sizes(config: EngineConfig, shards: int, groups: int, members: int, prefix: int) -> RolloutSizes:
    """Static shapes of a shard, with `groups` in flight over all of them and prefixes of at most `prefix` tokens.

    Raises:
      ConfigError: something does not divide over the shards.
    """
    lanes = min(config.lanes or groups * members, groups * members)
    rows, prefill = min(config.append_rows or lanes, lanes), min(config.prefill_groups or groups, groups)
    named = {"grpo.groups": groups, "rollout.lanes": lanes}
    named |= {"rollout.append_rows": rows, "rollout.prefill_groups": prefill}
    for key, number in named.items():
        if number % shards:
            raise ConfigError(
                f"config.{key}={number} does not divide over {shards} batch shards (mesh axes data x fsdp); "
                f"set it to a multiple of {shards}"
            )
    made = RolloutSizes(
        shards=shards,
        lanes=lanes // shards,
        groups=groups // shards,
        members=members,
        prefix=prefix,
        room=config.room,
        turn_budget=config.turn_budget,
        pages=0,
        append_rows=rows // shards,
        prefill_groups=prefill // shards,
    )
    # More pages than all trajectories without a lane can fill would never be used.
    most = (groups * members // shards - made.lanes) * made.pages_of_lane
    return dataclasses.replace(made, pages=min(config.parked_tokens // made.page, most))


def marks_of(records: Sequence[GroupRecord]) -> Marks:
    """Of these groups of all processes."""
    return Marks.of_episodes(member for record in records for member in record.members).everywhere()


def assemble(records: Sequence[GroupRecord], prompts: PrefixBatch, groups: int, members: int, room: int) -> Rollout:
    """Host records as a batch of arrays."""
    shape = (groups, members, room)
    tokens, logprobs, authored = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    length = np.zeros(shape[:2], np.int32)
    for g, record in enumerate(records):
        for m, (ids, found, own) in enumerate(record.arrays()):
            n = length[g, m] = len(ids)
            tokens[g, m, :n], logprobs[g, m, :n], authored[g, m, :n] = ids, found, own
    trajectories = [record.members for record in records]
    return Rollout(trajectories, prompts, tokens, logprobs, authored, length)


def shards_of_this_process(mesh: Mesh) -> list[int]:
    """Numbers of the batch shards whose lanes this process serves.

    Raises:
      ConfigError: a shard's tensor axis reaches into another process.
    """
    mine = jax.process_index()
    by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
    owners = [{device.process_index for device in row} for row in by_shard]
    for number, found in enumerate(owners):
        if len(found) > 1:
            raise ConfigError(
                f"batch shard {number} is spread over processes {sorted(found)}; "
                "set config.mesh.tensor to a divisor of the devices of one process"
            )
    return [number for number, found in enumerate(owners) if mine in found]


def lane_key(seed: int, step: int, task_id: str, member: int) -> np.ndarray:
    """Random key data uint32 `[2]` of a trajectory: a hash, so that it does not depend on batch or order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{task_id}/{member}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
