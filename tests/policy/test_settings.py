"""Parity with transformers for several architectures: vision taps, every layer, logits, gradients, decoding.

One row of `SETTINGS` per way in which two numbers could be mixed up. The reference runs in fp64.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.preprocess import block_order
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import DecodeConfig, StopTables, decode_chunk, open_groups, prefill
from maestro_jax.rollout.moves import LaneStarts, assign_lanes
from maestro_jax.rollout.state import RolloutSizes, empty_lanes
from tests.policy import reference
from tests.policy.reference import CONFIG, ROOT, Config, assert_near

# Of the largest value. fp32 over up to five sharp layers with sums of some hundred terms: 1e-6 to 5e-6 off; a wrong
# tap, position, section or mask is above 1e-2.
TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient: products of many such factors
NEW = 32  # tokens decoded


def changed(text: Mapping[str, Any], vision: Mapping[str, Any], **top: Any) -> Config:
    config = copy.deepcopy(CONFIG)
    sections = text.get("mrope_section", config["text_config"]["rope_parameters"]["mrope_section"])
    config["text_config"] |= {key: value for key, value in text.items() if key != "mrope_section"}
    config["text_config"]["rope_parameters"]["mrope_section"] = sections
    config["vision_config"] |= {**vision, "out_hidden_size": config["text_config"]["hidden_size"]}
    return {**config, **top}


SETTINGS: dict[str, Config] = {
    "toy": CONFIG,
    "every layer tapped": changed({"num_hidden_layers": 2}, {"deepstack_visual_indexes": [0, 2]}),
    "one KV head, one tap, odd sections": changed(
        {
            "hidden_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "mrope_section": [3, 2, 1],
        },
        {"depth": 2, "num_heads": 4, "deepstack_visual_indexes": [0]},
    ),
    "untied head, small patches, no taps": changed(
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "mrope_section": [8, 4, 4],
            "rms_norm_eps": 1e-5,
        },
        {"patch_size": 8, "temporal_patch_size": 1, "deepstack_visual_indexes": [], "num_position_embeddings": 49},
        tie_word_embeddings=False,
    ),
    "proportions of the 4B": changed(
        {
            "num_hidden_layers": 5,
            "hidden_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "mrope_section": [24, 20, 20],
            "intermediate_size": 304,
        },
        {"depth": 6, "hidden_size": 64, "num_heads": 1, "deepstack_visual_indexes": [1, 3, 4]},
    ),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """transformers' model and ours, with the same weights."""

    config: Config
    model: Any
    params: dict[str, np.ndarray]

    @functools.cached_property
    def policy(self) -> Policy:
        return reference.load(self.params, self.config)

    @functools.cached_property
    def rows(self) -> list[reference.Row]:
        return reference.three_rows(self.config)

    @functools.cached_property
    def batch(self) -> PrefixBatch:
        width = max(len(row.ids) for row in self.rows) + 3
        most = max(len(image.patches) for row in self.rows for image in row.images)
        return reference.collate(ROOT, self.rows, width, 2, most, filler=3, config=self.config)


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest) -> Pair:
    config = SETTINGS[request.param]
    model = reference.reference_model(config)
    return Pair(config, model, reference.as_params(reference.weights_of(model), config))


def states(policy: Policy, batch: PrefixBatch) -> jax.Array:
    """Final hidden states of every prefix token `[B, P, D]`, of the pass that trains."""
    rows, width = batch.tokens.shape
    member = jnp.zeros((rows, 1, 1), jnp.int32)

    def at(last: jax.Array) -> jax.Array:
        return policy.encode_groups(dataclasses.replace(batch, last=last), member, member[..., 0])[0]

    return jax.vmap(at, out_axes=1)(jnp.broadcast_to(jnp.arange(width)[:, None], (width, rows)))


# ---- vision ------------------------------------------------------------------------------------------------


def test_image_tokens_and_every_tap(pair: Pair) -> None:
    import torch

    tokens, taps = nnx.jit(lambda policy, images: policy.visual(images))(pair.policy, pair.batch.images)
    merge = pair.config["vision_config"]["spatial_merge_size"]
    for group, row in enumerate(pair.rows):
        for number, image in enumerate(row.images):
            with torch.no_grad():
                wanted = pair.model.model.visual(
                    torch.tensor(image.patches).double(), torch.tensor([[1, image.rows, image.columns]])
                )
            at, count = group * 2 + number, image.tokens(merge)
            assert (np.asarray(pair.batch.images.grid)[at, : 4 * count] == block_order(*_grid(image), merge)).all()
            assert_near(tokens[at, :count], wanted.pooler_output.numpy(), TOLERANCE, "image tokens")
            assert len(taps) == len(wanted.deepstack_features)
            for tap, wanted_tap in zip(taps, wanted.deepstack_features, strict=True):
                assert_near(tap[at, :count], wanted_tap.numpy(), TOLERANCE, "tap")


def _grid(image: Any) -> tuple[int, int]:
    return image.rows, image.columns


# ---- decoder -----------------------------------------------------------------------------------------------


def layer_states(model: Any, row: reference.Row) -> list[np.ndarray]:
    """What each layer leaves behind (DeepStack added), through the final norm: `[P, D]` per layer."""
    import torch

    text, seen = model.model.language_model, []
    modules = [*text.layers[1:], text.norm]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    with torch.no_grad():
        reference.plain_logits(model, ROOT, row, np.zeros(0, np.int32))
        for hook in hooks:
            hook.remove()
        return [text.norm(state)[0, len(ROOT) :].numpy() for state in seen]


def first_layers(config: Config, count: int) -> Config:
    config = copy.deepcopy(dict(config))
    config["text_config"]["num_hidden_layers"] = count
    vision = config["vision_config"]
    vision["deepstack_visual_indexes"] = vision["deepstack_visual_indexes"][:count]
    return config


def test_every_layers_hidden_states(pair: Pair) -> None:
    """Policies of the first 1, 2, ... layers: what the scan and the layers apart from it leave behind."""
    wanted = [layer_states(pair.model, row) for row in pair.rows]
    for count in range(1, pair.config["text_config"]["num_hidden_layers"] + 1):
        config = first_layers(pair.config, count)
        policy = reference.load(reference.as_params(reference.weights_of(pair.model), config), config)
        found = nnx.jit(states)(policy, pair.batch)
        for group, row in enumerate(pair.rows):
            what = f"layer {count}, row {group}"
            assert_near(found[group, : len(row.ids)], wanted[group][count - 1], TOLERANCE, what)


def left_padded(batch: PrefixBatch) -> PrefixBatch:
    """The same prefixes with their padding in front."""
    width = batch.tokens.shape[1]
    shift = width - np.asarray(batch.mask).sum(axis=1)

    def turn(rows: jax.Array) -> jax.Array:
        return jnp.stack([jnp.roll(row, by, axis=0) for row, by in zip(rows, shift, strict=True)])

    turned = {name: turn(getattr(batch, name)) for name in ("tokens", "mask", "positions", "image_index")}
    return dataclasses.replace(batch, **turned, last=jnp.full(len(shift), width - 1))


def test_logits_of_left_and_right_padded_prompts(pair: Pair) -> None:
    import torch

    logits = nnx.jit(lambda policy, batch: policy.logits(states(policy, batch)))
    right, left = logits(pair.policy, pair.batch), logits(pair.policy, left_padded(pair.batch))
    for group, row in enumerate(pair.rows):
        with torch.no_grad():
            wanted = reference.plain_logits(pair.model, ROOT, row, np.zeros(0, np.int32)).numpy()[len(ROOT) :]
        assert_near(right[group, : len(row.ids)], wanted, TOLERANCE, f"right-padded row {group}")
        assert_near(left[group, -len(row.ids) :], wanted, TOLERANCE, f"left-padded row {group}")


# ---- gradients ---------------------------------------------------------------------------------------------

MEMBER = 4


def test_gradients_of_the_mean_log_likelihood(pair: Pair) -> None:
    """With respect to every tensor; layers are recomputed in the backward pass."""
    members = reference.members(3, 1, MEMBER)
    graph, state = nnx.split(reference.load(pair.params, pair.config, remat=True), nnx.Param)

    def mean(state: nnx.State) -> jax.Array:
        policy = nnx.merge(graph, state)
        last, hidden = policy.encode_groups(pair.batch, jnp.asarray(members), jnp.full((3, 1), MEMBER))
        before = jnp.concatenate([last[:, None, None], hidden[:, :, :-1]], axis=2)
        logprobs = jax.nn.log_softmax(policy.logits(before))
        return jnp.take_along_axis(logprobs, members[..., None], axis=-1).mean()

    found = {name.removesuffix("/value"): leaf for name, leaf in named_leaves(jax.jit(jax.grad(mean))(state)).items()}
    wanted = _their_gradients(pair, members)
    assert found.keys() == wanted.keys()
    # A tap behind the last layer changes image positions only, from which nothing is predicted.
    unused = f"visual/deepstack_mergers/{pair.config['text_config']['num_hidden_layers'] - 1}/"
    for name, gradient in wanted.items():
        if name.startswith(unused):
            assert not np.any(found[name]) and not gradient.any()
            continue
        assert np.abs(gradient).max() > 1e-5, f"{name} takes no part; the comparison would be empty"
        assert_near(found[name], gradient, GRADIENT_TOLERANCE, name)


def _their_gradients(pair: Pair, members: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    pair.model.zero_grad()
    for row, member in zip(pair.rows, members[:, 0], strict=True):
        start = len(ROOT) + len(row.ids) - 1
        logits = reference.plain_logits(pair.model, ROOT, row, member)[start : start + MEMBER]
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(member).long()[:, None])
        (chosen.sum() / members.size).backward()
    gradients = {name: p.grad.numpy() for name, p in pair.model.named_parameters()}
    return reference.as_params(gradients, pair.config)


# ---- decoding ----------------------------------------------------------------------------------------------


def test_greedy_tokens_with_the_cache(pair: Pair) -> None:
    import torch

    vocabulary = pair.config["text_config"]["vocab_size"]
    tables = StopTables(*build_automaton([b"y"] * vocabulary), np.int32(-1))  # nothing stops
    sizes = RolloutSizes(
        shards=1,
        lanes=3,
        groups=3,
        members=1,
        prefix=pair.batch.tokens.shape[1],
        room=NEW,
        turn_budget=NEW,
        pages=0,
        append_rows=3,
        prefill_groups=3,
    )
    nothing, ones, member_slot = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32), jnp.arange(3)[None]
    start = LaneStarts(ones, ones, member_slot, nothing, nothing, jnp.zeros((1, 3, 2), jnp.uint32))

    def decode(policy: Policy, batch: PrefixBatch) -> jax.Array:
        groups = prefill(policy, open_groups(policy, batch.root, sizes), batch, member_slot)
        lanes = assign_lanes(groups, empty_lanes(sizes, policy.architecture.text, jnp.float32), start, sizes)
        config = DecodeConfig(NEW, temperature=1.0)
        device_tables = jax.tree.map(jnp.asarray, tables)
        return decode_chunk(policy.for_decoding(), groups, lanes, device_tables, jnp.zeros(()), sizes, config).tokens[0]

    found = np.asarray(nnx.jit(decode)(pair.policy, pair.batch))
    for group, row in enumerate(pair.rows):
        inputs = reference.plain_inputs(ROOT, row, np.zeros(0, np.int32))
        with torch.no_grad():
            wanted = pair.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=True)[0]
        assert found[group].tolist() == wanted[-NEW:].tolist(), f"row {group}"
    assert len(set(found.ravel().tolist())) > 6, "texts of one token would hide mistakes"
