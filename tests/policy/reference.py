"""transformers' Qwen3-VL at toy size, and its weights in our `Policy`.

Widths are chosen to tell mistakes apart: head_dim x heads differs from the hidden size, query heads
from KV heads, and the taps are not the first blocks. Weights are larger than at a usual start, so that
attention is sharp and a wrong position shows. The reference runs in fp64: what differs is our rounding.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.policy import preprocess
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.preprocess import PreparedImage
from maestro_jax.policy.prompts import collate_prompts
from maestro_jax.policy.tokens import Tokens

IMAGE, VISION_START, VISION_END = 290, 292, 293
TEXT_IDS = 280  # ids below are plain text

TEXT = {
    "vocab_size": 304,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 2],
}
Config = Mapping[str, Any]
CONFIG: dict[str, Any] = {
    "text_config": TEXT,
    "vision_config": VISION,
    "image_token_id": IMAGE,
    "video_token_id": 291,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": True,
}


def architecture_for(tokens: Tokens) -> PolicyArchitecture:
    """The toy architecture with the vocabulary of a tokenizer made by a test."""
    toy = architecture()
    text = dataclasses.replace(toy.text, vocab_size=len(tokens.tokenizer))  # type: ignore[arg-type]
    return dataclasses.replace(toy, text=text, image_token_id=tokens.image)


def architecture(config: Config = CONFIG) -> PolicyArchitecture:
    return architecture_from_hf(config, "config.json")


# ---- weights -----------------------------------------------------------------------------------------------


def reference_model(config: Config = CONFIG) -> Any:
    """A `Qwen3VLForConditionalGeneration` with random weights, in eval mode."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.set_num_threads(1)  # rows this small only lose by waiting for threads
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**copy.deepcopy(dict(config)))).eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.15)
    return model.double()


def as_params(tensors: Mapping[str, np.ndarray], config: Config = CONFIG) -> dict[str, np.ndarray]:
    """Arrays named and laid out as in transformers → named and laid out as in `Policy` (weights or gradients)."""
    found: dict[str, np.ndarray] = {}

    def put(ours: str, read: Callable[[str], np.ndarray], biased: bool) -> None:
        found[f"{ours}/kernel"] = np.swapaxes(read("weight"), -1, -2)
        if biased:
            found[f"{ours}/bias"] = read("bias")

    def one(name: str) -> Callable[[str], np.ndarray]:
        return lambda kind: tensors[f"{name}.{kind}"]

    def stacked(name: str, numbers: Iterable[int]) -> Callable[[str], np.ndarray]:
        return lambda kind: np.stack([tensors[f"{name.format(i)}.{kind}"] for i in numbers])

    def layer(ours: str, read: Callable[[str], Callable[[str], np.ndarray]]) -> None:
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            put(f"{ours}/{part[10:]}", read(part), biased=False)
        for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            put(f"{ours}/{part[4:]}", read(part), biased=False)
        for part in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            found[f"{ours}/{part.removeprefix('self_attn.')}/scale"] = read(part)("weight")

    text, layers = "model.language_model", config["text_config"]["num_hidden_layers"]
    taps = range(len(config["vision_config"]["deepstack_visual_indexes"]))
    found["language_model/embed_tokens/embedding"] = tensors[f"{text}.embed_tokens.weight"]
    found["language_model/norm/scale"] = tensors[f"{text}.norm.weight"]
    if not config["tie_word_embeddings"]:
        found["lm_head/embedding"] = tensors["lm_head.weight"]
    for i in taps:
        layer(f"language_model/deepstack_layers/{i}", lambda part, i=i: one(f"{text}.layers.{i}.{part}"))
    if layers > len(taps):
        rest = range(len(taps), layers)
        layer("language_model/layers", lambda part: stacked(f"{text}.layers.{{}}.{part}", rest))

    vision, blocks = "model.visual", range(config["vision_config"]["depth"])
    found["visual/pos_embed/embedding"] = tensors[f"{vision}.pos_embed.weight"]
    patches = tensors[f"{vision}.patch_embed.proj.weight"]  # a convolution whose stride is its size
    found["visual/patch_embed/kernel"] = patches.reshape(len(patches), -1).T
    found["visual/patch_embed/bias"] = tensors[f"{vision}.patch_embed.proj.bias"]
    for part in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        ours = part.split(".")[1].removeprefix("linear_")
        put(f"visual/blocks/{ours}", stacked(f"{vision}.blocks.{{}}.{part}", blocks), biased=True)
    for norm in ("norm1", "norm2"):
        read = stacked(f"{vision}.blocks.{{}}.{norm}", blocks)
        found |= {f"visual/blocks/{norm}/scale": read("weight"), f"visual/blocks/{norm}/bias": read("bias")}
    mergers = {"merger": "merger"} | {f"deepstack_mergers/{i}": f"deepstack_merger_list.{i}" for i in taps}
    for ours, theirs in mergers.items():
        put(f"visual/{ours}/fc1", one(f"{vision}.{theirs}.linear_fc1"), biased=True)
        put(f"visual/{ours}/fc2", one(f"{vision}.{theirs}.linear_fc2"), biased=True)
        read = one(f"{vision}.{theirs}.norm")
        found |= {f"visual/{ours}/norm/scale": read("weight"), f"visual/{ours}/norm/bias": read("bias")}
    return found


def plain_inputs(root: np.ndarray, row: "Row", member: np.ndarray) -> dict[str, Any]:
    """One whole, unpadded row `[1, len(root) + len(row.ids) + len(member)]` as transformers takes it."""
    import torch

    ids = torch.tensor(np.concatenate([root, row.ids, member]))[None].long()
    images = {}
    if row.images:
        images["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in row.images])).double()
        images["image_grid_thw"] = torch.tensor([[1, image.rows, image.columns] for image in row.images])
    kinds = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **images}


def plain_logits(model: Any, root: np.ndarray, row: "Row", member: np.ndarray) -> Any:
    """transformers on one whole, unpadded row: torch tensor `[len(root) + len(row.ids) + len(member), V]`."""
    return model(**plain_inputs(root, row, member)).logits[0]


def load(params: Mapping[str, np.ndarray], config: Config = CONFIG, **options: Any) -> Policy:
    """A policy of these fp32 parameters; names and shapes must match exactly."""
    made = nnx.eval_shape(lambda: Policy(architecture(config), nnx.Rngs(0), **options))
    graph, state = nnx.split(made, nnx.Param)
    shapes = {name.removesuffix("/value"): leaf.shape for name, leaf in named_leaves(state).items()}
    assert shapes == {name: params[name].shape for name in params}
    leaves = [jnp.asarray(params[name], jnp.float32) for name in shapes]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


# ---- prompts -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt without its root: ids with images expanded, and the images."""

    ids: np.ndarray
    images: tuple[PreparedImage, ...]


def noise_image(height: int, width: int, seed: int, config: Config = CONFIG) -> PreparedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return preprocess.prepare_image(pixels, architecture(config).vision, 32 * 32, 10**6)


def row(*parts: int | PreparedImage) -> Row:
    """Token ids and images in the order in which they stand in the prompt."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += [VISION_START, *[IMAGE] * part.tokens(2), VISION_END]
    return Row(np.array(ids, np.int32), tuple(part for part in parts if not isinstance(part, int)))


def collate(
    root: Sequence[int] | np.ndarray,
    rows: Sequence[Row],
    width: int,
    per_group: int,
    patches: int,
    filler: int = 0,
    config: Config = CONFIG,
) -> PrefixBatch:
    """Rows as a padded `PrefixBatch`; `filler` is the token on padding, which must not matter."""
    root = np.asarray(root, np.int32)
    ids, images = [one.ids for one in rows], [one.images for one in rows]
    batch = collate_prompts(root, ids, images, architecture(config), width, per_group, patches)
    batch.tokens[~batch.mask], batch.positions[~batch.mask] = filler, filler
    batch.images.patches[~batch.images.mask] = filler
    return jax.tree.map(jnp.asarray, batch)


ROOT = np.random.default_rng(7).integers(0, TEXT_IDS, 6).astype(np.int32)


def three_rows(config: Config = CONFIG) -> list[Row]:
    """No image; one that is not square; two of different shapes."""
    sizes = ((64, 96), (96, 32), (32, 64))
    wide, tall, small = (noise_image(*size, seed, config) for seed, size in enumerate(sizes, start=1))
    return [row(5, 6, 7, 8), row(5, wide, 9, 10, 11), row(5, 6, tall, 9, small, 11, 12, 13)]


def members(groups: int, count: int, room: int, seed: int = 3) -> np.ndarray:
    """Random member tokens int32 `[groups, count, room]`."""
    return np.random.default_rng(seed).integers(0, TEXT_IDS, (groups, count, room)).astype(np.int32)


def assert_near(found: Any, wanted: Any, tolerance: float, what: str = "") -> None:
    """The largest difference, as a fraction of the largest wanted value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    error = np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    assert error <= tolerance, f"{what} differs by {error:.2e}"
