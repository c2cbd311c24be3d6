"""The train step: group-shaped batch in, new parameters out, one jitted and donated program.

The prefix of a group is computed once and its members on top of it, so a group of eight costs
little more than its own tokens. The same step serves supervised warm start (`nll`) and GRPO.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.grpo.logprobs import put_rows, states_before, take_rows, token_logprobs
from maestro_jax.grpo.losses import LossConfig, LossInputs, aggregate, loss_denominator, masked_mean, policy_loss
from maestro_jax.parallel.sharding import over_groups, replicated
from maestro_jax.policy.model import Policy, PrefixBatch, prompt_shardings
from maestro_jax.policy.vision import Leaf

Array = jax.Array
Metrics = dict[str, Array]


# What `config.policy.freeze` may name: where these parameters stand in the policy.
FREEZABLE = {"vision": ("visual",), "embeddings": ("language_model", "embed_tokens")}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a global-norm clip; the rate warms up linearly and, if `decay_steps` is not 0, falls to 0 by then."""

    learning_rate: float
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupBatch:
    """What one update learns from."""

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


def split_frozen(params: nnx.State, freeze: Sequence[str]) -> tuple[nnx.State, nnx.State]:
    """The parameters that are trained, and those that `freeze` (keys of `FREEZABLE`) keeps as they are."""
    prefixes = [FREEZABLE[part] for part in freeze]

    def frozen(path: tuple, _: object) -> bool:
        return any(path[: len(prefix)] == prefix for prefix in prefixes)

    kept, trained = nnx.split_state(params, frozen, ...)
    return trained, kept


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    rate, warmup = config.learning_rate, max(config.warmup_steps, 1)
    schedule = optax.linear_schedule(rate / warmup, rate, warmup)
    if config.decay_steps:
        schedule = optax.warmup_cosine_decay_schedule(rate / warmup, rate, warmup, config.decay_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )


def member_logprobs(policy: Policy, batch: GroupBatch, temperature: float, chunk: int) -> tuple[Array, Array]:
    """Log-probability and entropy `[B, G, R]` of the member tokens in the loss, 0 of all others.

    The prefix is computed once per group, logits for the rows in the loss only.
    """
    last, hidden = policy.encode_groups(batch.prompts, batch.tokens, batch.length)
    states, targets = states_before(last, hidden, batch.loss_rows), take_rows(batch.tokens, batch.loss_rows)
    found = token_logprobs(states, policy._head(), targets, temperature, chunk)
    logprobs, entropy = (put_rows(values, batch.loss_rows, *batch.tokens.shape[1:]) for values in found)
    return logprobs, entropy


def nll_loss(
    logprobs: Array, entropy: Array, batch: GroupBatch, config: LossConfig, whole: Array
) -> tuple[Array, Metrics]:
    """Mean negative log-likelihood of the tokens in the loss; `whole` as in `grpo_loss`."""
    del entropy
    token_mean = dataclasses.replace(config, aggregation="token")
    return aggregate(-logprobs, batch.mask, token_mean, loss_denominator(whole, token_mean)), {}


def grpo_loss(
    logprobs: Array, entropy: Array, batch: GroupBatch, config: LossConfig, whole: Array
) -> tuple[Array, Metrics]:
    """The policy loss of `losses.py` on a batch, or on a part of the batch with the mask `whole [B, G, R]`."""
    arrays = (batch.old_logprobs, batch.reference_logprobs, batch.advantages, batch.mask)
    return policy_loss(LossInputs(logprobs, entropy, *arrays), config, loss_denominator(whole, config))


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Array, Array, GroupBatch, LossConfig, Array], tuple[Array, Metrics]],
    config: LossConfig,
    temperature: float,
    chunk: int,
    freeze: Sequence[str],
    microbatches: int,
    mesh: Mesh,
    state: TrainState,
) -> Callable[[TrainState, GroupBatch], tuple[TrainState, Metrics]]:
    """Compiles `(state, batch) → (state, metrics)`; the state is donated and stays in the shards of `state`.

    The gradient of `microbatches` parts of the batch is taken one after the other and summed in fp32; it is that of
    the whole batch, whatever the parts.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def objective(trained: nnx.State, frozen: nnx.State, batch: GroupBatch, whole: Array) -> tuple[Array, Metrics]:
        policy = nnx.merge(graph, trained, frozen)
        logprobs, entropy = member_logprobs(policy, batch, temperature, chunk)
        value, metrics = loss(logprobs, entropy, batch, config, whole)
        return value, metrics | {"loss": value, "entropy": masked_mean(entropy, batch.mask)}

    def accumulated(trained: nnx.State, frozen: nnx.State, batch: GroupBatch) -> tuple[nnx.State, Metrics]:
        def add(total: nnx.State, part: GroupBatch) -> tuple[nnx.State, tuple[Metrics, Array]]:
            part = dataclasses.replace(part, prompts=dataclasses.replace(part.prompts, root=batch.prompts.root))
            gradients, metrics = jax.grad(objective, has_aux=True)(trained, frozen, part, batch.mask)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients), (metrics, jnp.sum(part.mask))

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
        total, (metrics, tokens) = jax.lax.scan(add, zeros, split_groups(batch, microbatches))
        gradients = jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), total, trained)
        return gradients, {name: _over_parts(name, values, tokens) for name, values in metrics.items()}

    def step(state: TrainState, batch: GroupBatch) -> tuple[TrainState, Metrics]:
        trained, frozen = split_frozen(state.params, freeze)
        if microbatches == 1:
            gradients, metrics = jax.grad(objective, has_aux=True)(trained, frozen, batch, batch.mask)
        else:
            gradients, metrics = accumulated(trained, frozen, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params = nnx.merge_state(optax.apply_updates(trained, updates), frozen)
        norms = {"grad_norm": optax.global_norm(gradients), "update_norm": optax.global_norm(updates)}
        return TrainState(params, opt_state, state.step + 1), metrics | norms

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_shardings(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def split_groups(batch: GroupBatch, parts: int) -> GroupBatch:
    """A batch of B groups as `parts` batches of B / parts, stacked in front; the root, which all share, is left out.

    Part i takes every `parts`-th group from i on, so that all parts are spread over the devices as the batch is, and
    no group moves.
    """
    groups = batch.tokens.shape[0]

    def split(leaf: Array) -> Array:
        each = leaf.shape[0] // groups  # images have several rows a group
        rows = leaf.reshape(groups // parts, parts, each, *leaf.shape[1:])
        return jnp.moveaxis(rows, 1, 0).reshape(parts, groups // parts * each, *leaf.shape[1:])

    return jax.tree.map(split, dataclasses.replace(batch, prompts=dataclasses.replace(batch.prompts, root=None)))


def _over_parts(name: str, values: Array, tokens: Array) -> Array:
    """A metric of the batch from those of its parts: losses add up, peaks are peaks, means are over tokens."""
    if name == "loss":
        return jnp.sum(values)
    if name in ("ratio_max", "logprob_gap"):
        return jnp.max(values)
    return jnp.sum(values * tokens) / jnp.maximum(jnp.sum(tokens), 1)


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
    params: nnx.State, optimizer: optax.GradientTransformation, freeze: Sequence[str], mesh: Mesh
) -> TrainState:
    """A fresh optimiser around parameters; moments are sharded like the parameters they belong to."""
    trained, _ = split_frozen(params, freeze)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trained)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)))
