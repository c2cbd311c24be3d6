"""The programs of a run with shapes in place of arrays: lowered and compiled for devices that need not exist.

The same functions that a run jits (`grpo/update.py`, `rollout/engine.py`), so what the compiler says holds for the run.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maestro_jax.aot.hlo import KINDS, Collective, collectives
from maestro_jax.aot.topology import refusal
from maestro_jax.assemble import fields, policy_factory, update_config
from maestro_jax.config import Config
from maestro_jax.grpo.losses import LossCount
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import GroupBatch, TrainState, grpo_loss, make_train_step, opt_shardings, split_frozen
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import ShardingRules, over_groups, param_layout, replicated
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.flops import group_flops, root_flops
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.vision import ImageBatch
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import DecodeConfig, StopTables
from maestro_jax.rollout.engine import rollout_programs

# TPU programs compile six times as fast so, and need nearly the same memory (docs/performance.md).
QUICK = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The largest static shapes of a run."""

    groups: int  # B, of a rollout
    part: int  # B, of one part of an update
    root: int  # P0
    prefix: int  # P
    members: int  # G
    room: int  # R
    images: int  # slots a group
    patches: int  # of a slot

    @classmethod
    def of(cls, config: Config, root: int) -> "Sizes":
        grpo, policy = config.grpo, config.policy
        return cls(
            groups=grpo.groups,
            part=grpo.groups // grpo.microbatches,
            root=root,
            prefix=max(policy.prefix_buckets),
            members=grpo.group_size,
            room=config.rollout.room,
            images=max(policy.images_per_task, 1),
            patches=max(policy.image_buckets),
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, a device.

    Attributes:
      arguments, temporaries: bytes; what comes in (donated buffers, which results take over, counted once), and what
        exists while it runs. Results that take over no argument are among the temporaries.
      beside: bytes of the run's other arrays that stay on the device meanwhile.
      refused: whether the compiler found that it does not fit; then `temporaries` is all it says it needs.
      flops: operations of matrix products by arithmetic (`policy/flops.py`); 0 where they do not count.
      collectives: kind → (runs, bytes of results), loops counted.
      largest_gather: bytes of the largest result of an all-gather; a stack of all layers would show.
      kernels: whether splash attention is in the program.
      seconds: it took to compile.
    """

    name: str
    arguments: int
    temporaries: int
    beside: int
    refused: bool
    flops: float
    collectives: dict[str, tuple[int, int]]
    largest_gather: int
    kernels: bool
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.beside

    def fits(self, limit: int) -> bool:
        return not self.refused and (not limit or self.total <= limit)


class Programs:
    """All programs of a run on a mesh, to be compiled one by one.

    Args:
      options: of the compiler.
    """

    def __init__(
        self, config: Config, architecture: PolicyArchitecture, sizes: Sizes, mesh: Mesh, options: dict[str, Any]
    ):
        self.config, self.architecture, self.sizes, self.mesh, self.options = config, architecture, sizes, mesh, options
        self.groups, self.everywhere = over_groups(mesh), replicated(mesh)
        make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
        self.graph, shapes, shardings = param_layout(make, mesh, ShardingRules())
        self.params = jax.tree.map(_placed, shapes, shardings)
        self.state = self._state()

    def _state(self) -> TrainState:
        optimizer = make_optimizer(self.config.optimizer)
        trained, _ = split_frozen(self.params, self.config.policy.freeze)
        placed = opt_shardings(optimizer, trained, self.mesh, self.config.optimizer.offload)
        moments = jax.tree.map(_placed, jax.eval_shape(optimizer.init, trained), placed)
        return TrainState(self.params, moments, self._array((), jnp.int32, self.everywhere))

    def _array(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.groups)

    def _prompts(self, groups: int) -> PrefixBatch:
        s, vision, array = self.sizes, self.architecture.vision, self._array
        slots = (groups * s.images, s.patches)
        images = ImageBatch(
            array((*slots, math.prod(vision.patch_shape)), jnp.float32),
            array((*slots, 4), jnp.int32),
            array((*slots, 4), jnp.float32),
            array((*slots, 2), jnp.int32),
            array(slots, jnp.bool_),
        )
        row = (groups, s.prefix)
        return PrefixBatch(
            array((s.root,), jnp.int32, self.everywhere),
            array(row, jnp.int32),
            array(row, jnp.bool_),
            array((*row, 3), jnp.int32),
            array((groups,), jnp.int32),
            array((groups,), jnp.int32),
            images,
            array(row, jnp.int32),
        )

    def _batch(self, groups: int) -> GroupBatch:
        s, array = self.sizes, self._array
        members, tokens = (groups, s.members), (groups, s.members, s.room)
        return GroupBatch(
            self._prompts(groups),
            array(tokens, jnp.int32),
            array(members, jnp.int32),
            array(tokens, jnp.bool_),
            array(tokens, jnp.float32),
            array(tokens, jnp.float32),
            array(members, jnp.float32),
            array((groups, s.members * s.room), jnp.int32),
        )

    # ---- The programs ----------------------------------------------------------------------------

    def update(self) -> list[Program]:
        """The train step: one program, or with microbatches one for a part and one that applies the sum."""
        config = self.config
        step = make_train_step(
            self.graph,
            make_optimizer(config.optimizer),
            grpo_loss,
            update_config(config, config.rollout.temperature),
            self.mesh,
            self.state,
        )
        batch, reference = self._batch(self.sizes.part), self._reference_bytes()
        none = jax.tree.map(lambda x: self._array((), jnp.asarray(x).dtype, self.everywhere), LossCount(0, 0))
        flops = (4 if config.policy.remat else 3) * self._forward_flops(self.sizes.part, with_members=True)
        if config.grpo.microbatches == 1:
            return [self._compile("update", step.whole, (self.state, batch, none), reference, flops)]
        trained, _ = split_frozen(self.params, config.policy.freeze)
        total = jax.tree.map(lambda x: self._array(x.shape, jnp.float32, x.sharding), trained)
        moments = _bytes_on_device(self.state.opt_state)
        part = (self.params, total, batch)
        accumulate = self._compile("accumulate", step.accumulate, part, reference + moments, flops)
        with jax.set_mesh(self.mesh):
            _, sums = jax.eval_shape(step.accumulate, *part)
        sums = jax.tree.map(lambda x: self._array(x.shape, x.dtype, self.everywhere), sums)
        return [accumulate, self._compile("apply", step.apply, (self.state, total, sums, none), reference, 0.0)]

    def rollout(self) -> list[Program]:
        """Prefill, and a chunk of decoding (operations and collectives of decoding are those of one token)."""
        config, s, array = self.config, self.sizes, self._array
        programs = rollout_programs(self.graph, fields(DecodeConfig, config.rollout))
        beside = _bytes_on_device(self.state.opt_state) + self._reference_bytes()
        lanes = (s.groups, s.members)
        arguments = (
            self.params,
            self._prompts(s.groups),
            array((*lanes, 2), jnp.uint32),
            array((s.groups,), jnp.bool_),
        )
        flops = self._forward_flops(s.groups, with_members=False)
        prefill = self._compile("prefill", programs.prefill, arguments, beside, flops)
        with jax.set_mesh(self.mesh):
            prefilled, state = jax.eval_shape(programs.prefill, *arguments)
        state = jax.tree.map(lambda x: array(x.shape, x.dtype), state)
        root = jax.tree.map(lambda x: array(x.shape, x.dtype, self.everywhere), prefilled.root)
        prefilled = jax.tree.map(lambda x: array(x.shape, x.dtype), prefilled)
        prefilled = dataclasses.replace(prefilled, root=root)
        noise = array((), jnp.float32, self.everywhere)
        chunk = (self.params, prefilled, state, self._tables(), noise)
        token = group_flops(self.architecture, s.root, s.prefix, s.members, 1, 0, 0).total
        token -= group_flops(self.architecture, s.root, s.prefix, 0, 1, 0, 0).total
        flops = s.groups // batch_shards(self.mesh) * token / self.mesh.shape["tensor"]
        return [prefill, self._compile("decode", programs.decode, chunk, beside, flops)]

    def _tables(self) -> StopTables:
        states = len(build_automaton([b"a"])[1])
        shape = (states, self.architecture.text.vocab_size)
        return StopTables(*[self._array(each, jnp.int32, self.everywhere) for each in (shape, (states,), ())])

    def _reference_bytes(self) -> int:
        """Of the frozen copy that a divergence is measured from."""
        return _bytes_on_device(self.params) if self.config.grpo.kl_weight else 0

    def _forward_flops(self, groups: int, with_members: bool) -> float:
        """Of one device. The root is computed by every device, whatever its groups."""
        s, tensor = self.sizes, self.mesh.shape["tensor"]
        members = s.members if with_members else 0
        group = group_flops(self.architecture, s.root, s.prefix, members, s.room, s.images, s.patches)
        own = groups // batch_shards(self.mesh) * group.total + root_flops(self.architecture, s.root).total
        return own / tensor

    def _compile(self, name: str, function: Any, arguments: tuple, beside: int, flops: float) -> Program:
        began = time.monotonic()
        given = _bytes_on_device(arguments)
        with jax.set_mesh(self.mesh):
            lowered = function.lower(*arguments)
            try:
                compiled = lowered.compile(compiler_options=self.options)
            except jax.errors.JaxRuntimeError as error:
                needed, _ = refusal(str(error))
                if not needed:
                    raise
                left = max(needed - given, 0)
                return Program(name, given, left, beside, True, flops, {}, 0, False, time.monotonic() - began)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        found = collectives(text)
        own_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(
            name,
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes + own_results,
            beside,
            False,
            flops,
            _by_kind(found),
            max((c.bytes for c in found if c.kind == "all-gather"), default=0),
            "splash_mha" in text,
            time.monotonic() - began,
        )


def _by_kind(found: list[Collective]) -> dict[str, tuple[int, int]]:
    of = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {kind: (sum(c.times for c in cs), sum(c.times * c.bytes for c in cs)) for kind, cs in of.items() if cs}


def _placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _bytes_on_device(tree: Any) -> int:
    """Of the arrays that live in a device's own memory, on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind in (None, "device")]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
