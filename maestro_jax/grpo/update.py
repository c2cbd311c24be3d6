"""The train step: group-shaped batches in, new parameters out, in jitted programs with explicit shardings.

The prefix of a group is computed once and its members on top of it, so a group of eight costs little more than its own
tokens. Gradients of microbatches, each of its own static shape, are added up in fp32 as they arrive, and applied once:
the policy is the same for all of them. An update that would not be finite changes nothing. The same step serves
supervised warm start (`nll_loss`) and GRPO.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro_jax.errors import ConfigError
from maestro_jax.grpo.logprobs import put_rows, states_before, take_rows, token_logprobs
from maestro_jax.grpo.losses import (
    PEAKS,
    LossConfig,
    LossCount,
    LossInputs,
    aggregate,
    count_loss,
    loss_denominator,
    masked_mean,
    policy_loss,
)
from maestro_jax.grpo.optimizer import Quantised
from maestro_jax.parallel.sharding import HOST_MEMORY, over_groups, replicated
from maestro_jax.policy.model import Policy, PrefixBatch, at_precision, prompt_shardings
from maestro_jax.policy.vision import Leaf

Array = jax.Array
Metrics = dict[str, Array]


# What `config.policy.freeze` may name: where these parameters stand in the policy.
FREEZABLE = {"vision": ("visual",), "embeddings": ("language_model", "embed_tokens")}
NOTHING = LossCount(0, 0)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch becomes a gradient.

    Attributes:
      temperature: the sampler's.
      chunk: member tokens whose logits exist at a time.
      freeze: keys of `FREEZABLE`.
    """

    loss: LossConfig
    temperature: float
    chunk: int
    freeze: tuple[str, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupBatch:
    """What one update learns from, or a microbatch of it."""

    prompts: PrefixBatch
    tokens: Leaf  # int32 [B, G, R]
    length: Leaf  # int32 [B, G]
    mask: Leaf  # bool [B, G, R]: tokens in the loss
    old_logprobs: Leaf  # float32 [B, G, R]
    reference_logprobs: Leaf  # float32 [B, G, R]
    advantages: Leaf  # float32 [B, G]
    loss_rows: Leaf  # int32 [B, M]: where `mask` is True, as `logprobs.loss_rows` finds it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All parameters, the optimiser state of those that are trained, and the number of updates made."""

    params: nnx.State
    opt_state: optax.OptState
    step: Array  # int32 []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What is known of the loss on some groups, such that it adds up over microbatches."""

    loss: Array  # float32 []
    count: LossCount
    metrics: Metrics  # float32 []: `PEAKS`; of the others the sum over the tokens in the loss

    def __add__(self, other: "Sums") -> "Sums":
        metrics = {name: PEAKS.get(name, jnp.add)(value, other.metrics[name]) for name, value in self.metrics.items()}
        return Sums(self.loss + other.loss, self.count + other.count, metrics)

    def finish(self) -> Metrics:
        """Loss and metrics of the batch, means over tokens."""
        tokens = jnp.maximum(self.count.tokens, 1)
        means = {name: value if name in PEAKS else value / tokens for name, value in self.metrics.items()}
        return means | {"loss": self.loss}


Loss = Callable[[Array, Array, GroupBatch, LossConfig], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Total:
    """Gradients of the microbatches so far, of the loss before it is divided, with what else adds up."""

    gradients: nnx.State | None  # float32, in the shards of the parameters; None: all of the batch are still to come
    sums: Sums | None = None
    # bool [B] of each microbatch: groups with a log-probability, or a slope of the loss, that is not finite
    spoiled: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The programs of an update; call them under `jax.set_mesh`.

    ```
    state, metrics = step(state, microbatches, left_out)  # at hand
    total = step.begin(alone=False)  # or one by one
    for microbatch in arriving:
        total = step.add(state.params, total, microbatch)
    state, metrics = step.finish(state, total, left_out)
    ```

    The update is that of the whole batch, however it is cut: it is divided once, by the tokens or members of all
    microbatches and of the groups that were left out. There must be at least one. On their order it depends by fp32
    rounding only; callers that promise the same bits again feed the same ones in the same order.

    An update whose loss or gradient norm is not finite changes nothing: parameters, moments and the step stay, and the
    metric "skipped" is 1. Every device decides it by the same two numbers.

    Attributes:
      zeros: `() → gradients`.
      accumulate: `(params, gradients, microbatch) → (gradients, sums, spoiled)`; the gradients are donated, and None
        where there are none before the microbatch.
      apply: `(state, gradients, sums, left_out) → (state, metrics)`; the state is donated.
      home: shardings of the optimiser's state between updates, in the host's memory or on the devices.
    """

    zeros: Any
    accumulate: Any
    apply: Any
    home: Any

    def __call__(
        self, state: TrainState, microbatches: Sequence[GroupBatch], left_out: LossCount = NOTHING
    ) -> tuple[TrainState, Metrics]:
        """One update; `left_out` counts groups that have no gradient and are in no microbatch."""
        total = self.begin(alone=len(microbatches) == 1)
        for microbatch in microbatches:
            total = self.add(state.params, total, microbatch)
        return self.finish(state, total, left_out)

    def begin(self, alone: bool) -> Total:
        """Nothing yet. A microbatch that comes `alone` needs no room for a sum besides its own gradients."""
        return Total(None if alone else self.zeros())

    def add(self, params: nnx.State, total: Total, microbatch: GroupBatch) -> Total:
        gradients, sums, spoiled = self.accumulate(params, total.gradients, microbatch)
        return Total(gradients, sums if total.sums is None else total.sums + sums, (*total.spoiled, spoiled))

    def finish(self, state: TrainState, total: Total, left_out: LossCount) -> tuple[TrainState, Metrics]:
        if not self.offloads:
            return self.apply(state, total.gradients, total.sums, left_out)
        # Not within the program: XLA would fetch all moments before it computes anything, so that the peak is higher
        # than with moments on the devices, and it fails to move bytes (docs/architecture.md).
        on_device = jax.device_put(state.opt_state, jax.tree.map(_on_device, self.home))
        for leaf in jax.tree.leaves(state.opt_state):
            if leaf.sharding.memory_kind == HOST_MEMORY:
                leaf.delete()
        state = dataclasses.replace(state, opt_state=on_device)
        state, metrics = self.apply(state, total.gradients, total.sums, left_out)
        return dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, self.home)), metrics

    @property
    def offloads(self) -> bool:
        return any(sharding.memory_kind == HOST_MEMORY for sharding in jax.tree.leaves(self.home))


def split_frozen(params: nnx.State, freeze: Sequence[str]) -> tuple[nnx.State, nnx.State]:
    """The parameters that are trained, and those that `freeze` (keys of `FREEZABLE`) keeps as they are."""
    prefixes = [FREEZABLE[name] for name in freeze]

    def frozen(path: tuple, _: object) -> bool:
        return any(path[: len(prefix)] == prefix for prefix in prefixes)

    kept, trained = nnx.split_state(params, frozen, ...)
    return trained, kept


def member_logprobs(policy: Policy, batch: GroupBatch, temperature: float, chunk: int) -> tuple[Array, Array]:
    """Log-probability and entropy `[B, G, R]` of the member tokens in the loss, 0 of all others.

    The prefix is computed once per group, logits for the rows in the loss only.
    """
    last, hidden = policy.encode_groups(batch.prompts, batch.tokens, batch.length)
    states, targets = states_before(last, hidden, batch.loss_rows), take_rows(batch.tokens, batch.loss_rows)
    with at_precision(policy.precision):
        found = token_logprobs(states, policy.head, targets, temperature, chunk)
    logprobs, entropy = (put_rows(values, batch.loss_rows, *batch.tokens.shape[1:]) for values in found)
    return logprobs, entropy


def nll_loss(logprobs: Array, entropy: Array, batch: GroupBatch, config: LossConfig) -> tuple[Array, Metrics]:
    """Negative log-likelihood of the tokens in the loss, aggregated as `config` says, not yet divided."""
    del entropy
    return aggregate(-logprobs, batch.mask, config, 1.0), {}


def grpo_loss(logprobs: Array, entropy: Array, batch: GroupBatch, config: LossConfig) -> tuple[Array, Metrics]:
    """The policy loss of `losses.py`, not yet divided."""
    arrays = (batch.old_logprobs, batch.reference_logprobs, batch.advantages, batch.mask)
    return policy_loss(LossInputs(logprobs, entropy, *arrays), config, 1.0)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    config: UpdateConfig,
    mesh: Mesh,
    state: TrainState,
) -> TrainStep:
    """The programs of an update; the state stays in the shards and the memory of `state`, which may be abstract."""
    home = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    shardings = jax.tree.map(lambda leaf: _on_device(leaf.sharding), state)
    trained_shardings, _ = split_frozen(shardings.params, config.freeze)
    trained_shapes = jax.eval_shape(lambda params: split_frozen(params, config.freeze)[0], state.params)
    gradient = _gradient(graph, loss, config)
    groups, everywhere = batch_shardings(mesh), replicated(mesh)

    def accumulate(params: nnx.State, total: nnx.State | None, microbatch: GroupBatch) -> tuple[nnx.State, Sums, Array]:
        gradients, sums, spoiled = gradient(params, microbatch)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        return gradients if total is None else jax.tree.map(jnp.add, total, gradients), sums, spoiled

    def apply(state: TrainState, total: nnx.State, sums: Sums, left_out: LossCount) -> tuple[TrainState, Metrics]:
        denominator = loss_denominator(sums.count + left_out, config.loss)
        gradients, loss = jax.tree.map(lambda t: t / denominator, total), sums.loss / denominator
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        trained, frozen = split_frozen(state.params, config.freeze)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        # Chosen element by element by what is known before any of them is computed: so all stay in place.
        trained, opt_state, step = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(trained, updates), opt_state, state.step + 1),
            (trained, state.opt_state, state.step),
        )
        metrics = dataclasses.replace(sums, loss=loss).finish() | {
            "grad_norm": norm,
            "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
            "skipped": 1.0 - finite,
        }
        return TrainState(nnx.merge_state(trained, frozen), opt_state, step), metrics

    def zeros() -> nnx.State:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained_shapes)

    return TrainStep(
        zeros=jax.jit(zeros, out_shardings=trained_shardings),
        accumulate=jax.jit(
            accumulate,
            in_shardings=(shardings.params, None, groups),
            out_shardings=(trained_shardings, everywhere, over_groups(mesh)),
            donate_argnums=1,
        ),
        apply=jax.jit(
            apply,
            in_shardings=(shardings, trained_shardings, everywhere, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        home=home,
    )


def _gradient(
    graph: nnx.GraphDef, loss: Loss, config: UpdateConfig
) -> Callable[[nnx.State, GroupBatch], tuple[nnx.State, Sums, Array]]:
    """`(params, batch) →` gradients of the trained parameters (of the undivided loss), sums, `Total.spoiled`."""

    def gradient(params: nnx.State, batch: GroupBatch) -> tuple[nnx.State, Sums, Array]:
        trained, frozen = split_frozen(params, config.freeze)

        def outputs(trained: nnx.State) -> tuple[Array, Array]:
            return member_logprobs(nnx.merge(graph, trained, frozen), batch, config.temperature, config.chunk)

        def summed(logprobs: Array, entropy: Array) -> tuple[Array, Sums]:
            value, metrics = loss(logprobs, entropy, batch, config.loss)
            metrics["entropy"] = masked_mean(entropy, batch.mask)
            count = count_loss(batch.mask)
            return value, Sums(value, count, {n: x if n in PEAKS else x * count.tokens for n, x in metrics.items()})

        # In two steps, since between them every number belongs to a group.
        found, backward = jax.vjp(outputs, trained)
        slopes, sums = jax.grad(summed, argnums=(0, 1), has_aux=True)(*found)
        spoiled = ~jnp.isfinite(jnp.stack([*found, *slopes])).all(axis=(0, 2, 3))
        with at_precision(nnx.merge(graph, params).precision):
            (gradients,) = backward(slopes)
        return gradients, sums, spoiled

    return gradient


def _on_device(sharding: NamedSharding) -> NamedSharding:
    return sharding.with_memory_kind("device") if sharding.memory_kind == HOST_MEMORY else sharding


def batch_shardings(mesh: Mesh) -> GroupBatch:
    """Shardings of a `GroupBatch`, as a prefix tree: everything over groups, the root everywhere."""
    groups = over_groups(mesh)
    return GroupBatch(prompt_shardings(mesh), *[groups] * 7)


def make_reference(
    graph: nnx.GraphDef, params: nnx.State, temperature: float, chunk: int, mesh: Mesh
) -> Callable[[GroupBatch], GroupBatch]:
    """Compiles what fills in a batch's `reference_logprobs`; keeps its own copy of the parameters."""
    reference = jax.tree.map(jnp.copy, params)  # the train step donates the originals

    def logprobs(params: nnx.State, batch: GroupBatch) -> Array:
        return member_logprobs(nnx.merge(graph, params), batch, temperature, chunk)[0]

    program = jax.jit(logprobs, out_shardings=over_groups(mesh))
    return lambda batch: dataclasses.replace(batch, reference_logprobs=program(reference, batch))


def init_train_state(
    params: nnx.State,
    optimizer: optax.GradientTransformation,
    freeze: Sequence[str],
    mesh: Mesh,
    offload: bool = False,
) -> TrainState:
    """A fresh optimiser around parameters; where it lives, and `offload`: `opt_shardings`.

    Raises:
      ConfigError: `offload`, where devices cannot address the host's memory.
    """
    if offload:
        check_host_memory(mesh.local_devices)
    trained, _ = split_frozen(params, freeze)
    home = opt_shardings(optimizer, trained, mesh, offload)
    opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(_on_device, home))(trained)
    opt_state = jax.device_put(opt_state, home) if offload else opt_state
    # Not by device_put: over several processes it makes an array of one that Orbax cannot take apart.
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated(mesh))()
    return TrainState(params, opt_state, step)


def opt_shardings(
    optimizer: optax.GradientTransformation, trained: nnx.State, mesh: Mesh, offload: bool
) -> optax.OptState:
    """Where the optimiser's state lives: moments in the shards of their parameters, the rest on every device.

    Args:
      trained: parameters, or their shapes and shardings.
      offload: keeps the moments in the host's memory but while an update is applied: rollouts, and the gradients'
        activations, have their room on the devices. (Parameters stay: rollouts decode with them.)
    """

    kind = HOST_MEMORY if offload else None

    def place(moment: Any, parameter: Any) -> Any:
        spec = parameter.sharding.spec
        own = NamedSharding(mesh, spec, memory_kind=kind)
        if not isinstance(moment, Quantised):
            return own
        rows = PartitionSpec(*spec[: len(parameter.shape) - 1])
        return Quantised(own, NamedSharding(mesh, rows, memory_kind=kind))

    return optax.tree.map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda x: isinstance(x, Quantised),
    )


def check_host_memory(devices: Iterable[jax.Device]) -> None:
    for device in devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_MEMORY not in kinds:
            raise ConfigError(
                f"config.optimizer.offload needs {HOST_MEMORY} memory, {device} has {', '.join(kinds)}; set it to False"
            )
