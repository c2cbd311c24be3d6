"""R7: a checkpoint of the 4B's configuration goes on on any mesh, bit for bit. Its tree, at a tiny width."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs import qwen3_vl_4b
from maestro_jax.checkpoint.fingerprint import fingerprints
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.config import parse_config
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import TrainState, opt_shardings
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_shardings, replicated
from maestro_jax.policy.config import open_architecture
from maestro_jax.session.policy import policy_factory

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": (4, 2, 2)},
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
TOKENS = {"image_token_id": 500, "vision_start_token_id": 501, "vision_end_token_id": 502}


@functools.cache
def make_shapes() -> tuple[optax.GradientTransformation, TrainState]:
    """The 4B's optimiser, and shapes and dtypes of its train state."""
    raw = qwen3_vl_4b.get_config()
    raw.policy.init_from = ""
    own = qwen3_vl_4b.ARCHITECTURE
    small = {"text_config": own["text_config"] | TEXT, "vision_config": own["vision_config"] | VISION}
    raw.policy.architecture = own | TOKENS | small
    config = parse_config(raw)
    architecture = open_architecture(config.policy.architecture, "")
    policy = nnx.eval_shape(policy_factory(config, architecture, "cpu"))
    params, optimizer = nnx.state(policy, nnx.Param), make_optimizer(config.optimizer)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return optimizer, TrainState(params, jax.eval_shape(optimizer.init, params), step)


def make_state(axes: Sequence[int], seed: int) -> TrainState:
    """A train state of random bits that are finite numbers: two states of one seed are equal, on whichever mesh."""
    optimizer, shapes = make_shapes()
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: math.prod(axes)])
    rng, places = np.random.default_rng(seed), param_shardings(shapes.params, mesh, ShardingRules())

    def random_bits(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        words = np.frombuffer(rng.bytes(math.prod(leaf.shape) * 4), np.uint32) & 0xBFFFFFFF  # no exponent of all ones
        bits = words.view(leaf.dtype).reshape(leaf.shape)
        return jax.make_array_from_callback(leaf.shape, place, lambda index: bits[index])

    params = jax.tree.map(random_bits, shapes.params, places)
    home = opt_shardings(optimizer, params, mesh, offload=False)
    opt_state = jax.tree.map(random_bits, shapes.opt_state, home)
    return TrainState(params, opt_state, random_bits(shapes.step, replicated(mesh)))


def save(directory: Path, state: TrainState) -> None:
    store = CheckpointStore(directory, keep=1)
    store.save(1, state, {})
    store.close()


def test_a_checkpoint_of_eight_devices_goes_on_on_any_mesh(tmp_path: Path) -> None:
    saved = make_state((1, 8, 1), seed=0)
    expected = fingerprints(named_leaves(saved))
    stacks = {leaf.shape[0] for leaf in jax.tree.leaves(saved.params) if leaf.ndim > 1}
    assert {33, 24} <= stacks  # the 4B's layers: 36 less three that stand apart; 24 of vision
    save(tmp_path / "0", saved)
    for number, axes in enumerate(((1, 4, 2), (1, 4, 1), (1, 2, 1), (1, 1, 1))):
        store = CheckpointStore(tmp_path / str(number), keep=1)
        target = make_state(axes, seed=1)
        other = fingerprints(named_leaves(target))
        assert all(other[name] != expected[name] for name in expected)
        restored = store.restore_newest(target)
        store.close()
        assert restored is not None
        for leaf in jax.tree.leaves(restored.state):
            assert tuple(leaf.sharding.mesh.shape.values()) == axes
        assert fingerprints(named_leaves(restored.state)) == expected
        save(tmp_path / str(number + 1), restored.state)  # each from the one before
