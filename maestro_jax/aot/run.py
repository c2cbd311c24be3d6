"""A run with shapes in place of arrays, on devices that need not exist."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from maestro_jax.aot.program import Decoded, Program, compile_program
from maestro_jax.config import Config
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import TrainState, opt_shardings, split_frozen
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import ShardingRules, over_groups, param_layout, replicated
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.flops import group_flops
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.vision import ImageBatch
from maestro_jax.session.policy import policy_factory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """The largest static shapes of a run."""

    groups: int  # B, in flight
    microbatch: int  # B, of one microbatch of an update
    root: int  # P0
    prefix: int  # P
    members: int  # G
    room: int  # R
    observation: int  # O
    images: int  # slots a group
    patches: int  # of a slot

    @classmethod
    def of(cls, config: Config, root: int, observation: int) -> "RunSizes":
        grpo, policy = config.grpo, config.policy
        return cls(
            groups=grpo.groups * (1 + config.rollout.ahead),
            microbatch=grpo.groups // grpo.microbatches,
            root=root,
            prefix=max(policy.prefix_buckets),
            members=grpo.group_size,
            room=config.rollout.room,
            observation=observation,
            images=max(policy.images_per_task, 1),
            patches=max(policy.image_buckets),
        )


class Run:
    """What all programs of a run share: mesh, parameters and the optimiser's state.

    Args:
      options: of the compiler.
    """

    def __init__(
        self, config: Config, architecture: PolicyArchitecture, sizes: RunSizes, mesh: Mesh, options: dict[str, Any]
    ):
        self.config, self.architecture, self.sizes, self.mesh, self.options = config, architecture, sizes, mesh, options
        self.groups, self.everywhere = over_groups(mesh), replicated(mesh)
        make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
        self.graph, shapes, shardings = param_layout(make, mesh, ShardingRules())
        self.params: nnx.State = jax.tree.map(placed, shapes, shardings)
        self.state = self._state()
        # The frozen copy that a divergence is measured from.
        self.reference = jax.tree.map(lambda x: x, self.params) if config.grpo.kl_weight else None

    def _state(self) -> TrainState:
        optimizer = make_optimizer(self.config.optimizer)
        trained, _ = split_frozen(self.params, self.config.policy.freeze)
        spread = opt_shardings(optimizer, trained, self.mesh, self.config.optimizer.offload)
        moments = jax.tree.map(placed, jax.eval_shape(optimizer.init, trained), spread)
        return TrainState(self.params, moments, self.array((), jnp.int32, self.everywhere))

    @functools.cached_property
    def gradients(self) -> nnx.State:
        """Their sum over the parts of an update."""
        trained, _ = split_frozen(self.params, self.config.policy.freeze)
        return jax.tree.map(lambda x: self.array(x.shape, jnp.float32, x.sharding), trained)

    @property
    def streams(self) -> bool:
        """Whether gradients are taken while episodes run."""
        return self.config.grpo.stream and self.config.grpo.microbatches > 1

    def array(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None) -> Any:
        """Over the groups, if nothing else is said."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.groups)

    def spread(self, tree: T, sharding: NamedSharding) -> T:
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype, sharding), tree)

    def prompts(self, groups: int) -> PrefixBatch:
        s, vision, array = self.sizes, self.architecture.vision, self.array
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

    def group_flops(self, groups: int, members: int) -> float:
        """Of a forward pass over so many groups behind the root, on one device."""
        s = self.sizes
        group = group_flops(self.architecture, s.root, s.prefix, members, s.room, s.images, s.patches)
        return groups // batch_shards(self.mesh) * group.total / self.mesh.shape["tensor"]

    def compile(
        self,
        name: str,
        function: Any,
        arguments: tuple,
        held: Sequence[Any],
        flops: float = 0.0,
        decoded: Decoded | None = None,
    ) -> Program:
        """A jitted function for the run's mesh; see `compile_program`."""
        with jax.set_mesh(self.mesh):
            return compile_program(name, function, arguments, held, flops, self.options, decoded)


def placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
