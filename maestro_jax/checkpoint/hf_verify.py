"""Checks an exported directory: tensors bit for bit, and, where torch is installed, what it computes."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.checkpoint.store import ParamReader
from maestro_jax.errors import DataError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_shardings
from maestro_jax.policy import preprocess
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.huggingface import Counterpart, TensorFiles, import_params
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.policy.vision import ImageBatch

GREEDY_TOKENS = 16
# fp32 on both sides; logits of a trained policy reach some tens, and sums are taken in another order.
TOLERANCE = 1e-3


def verify_tensors(directory: Path, reader: ParamReader, table: Mapping[str, Counterpart], dtype: str) -> str:
    """Compares every exported tensor with the checkpoint.

    Raises:
      DataError: one differs.
    """
    files, count = TensorFiles(directory), 0
    for name, part in table.items():
        for tensor_name, wanted in part.to_hf(reader.read(name)).items():
            found = files.read(tensor_name, tuple(slice(None) for _ in part.shape))
            expected = np.ascontiguousarray(wanted).astype(jnp.dtype(dtype))
            if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                raise DataError(f"{directory}: {tensor_name} is not what was exported; check the disk, export again")
            count += 1
    return f"verified: {count} tensors, bit for bit"


def verify_logits(directory: Path, architecture: PolicyArchitecture, pixels: tuple[int, int]) -> str:
    """Continues an image-and-text prompt greedily in transformers and in our policy, both in fp32.

    Raises:
      DataError: logits or tokens differ.
    """
    if importlib.util.find_spec("torch") is None:
        return "not verified: what the weights compute (torch is not installed)"
    ids, image = _prompt(directory, architecture, pixels)
    continued, theirs = _transformers(directory, architecture, ids, image)
    ours = _policy_logits(directory, architecture, ids, image, continued)
    gap = float(np.abs(ours - theirs).max())
    if gap > TOLERANCE * max(1.0, float(np.abs(theirs).max())):
        raise DataError(f"{directory}: logits differ from transformers' by {gap:.1e}; please report this")
    if ours[:-1].argmax(axis=-1).tolist() != continued.tolist():
        raise DataError(f"{directory}: greedy tokens differ from transformers'; please report this")
    return f"verified: {len(continued)} greedy tokens equal transformers', largest gap of logits {gap:.1e}"


def _prompt(
    directory: Path, architecture: PolicyArchitecture, pixels: tuple[int, int]
) -> tuple[np.ndarray, preprocess.PreparedImage]:
    """Ids of a prompt with one picture that is not square."""
    tokens = load_tokens(directory)
    least = max(architecture.vision.patch_size * architecture.vision.spatial_merge_size, 1) ** 2
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    image = preprocess.prepare_image(noise, architecture.vision, least, max(pixels[1], least))
    picture = [tokens.image] * image.tokens(architecture.vision.spatial_merge_size)
    before, after = (
        tokens.encode("<|im_start|>user\n"),
        tokens.encode("What is shown?<|im_end|>\n<|im_start|>assistant\n"),
    )
    ids = [*before, architecture.vision_start_token_id, *picture, architecture.vision_end_token_id, *after]
    return np.array(ids, np.int32), image


def _transformers(
    directory: Path, architecture: PolicyArchitecture, ids: np.ndarray, image: preprocess.PreparedImage
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens `[T]`, and the logits `[T + 1, V]` from which they and one more were chosen."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    row = torch.tensor(ids)[None].long()
    images = {
        "pixel_values": torch.tensor(image.patches),
        "image_grid_thw": torch.tensor([[1, image.rows, image.columns]]),
    }
    logits = []
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS + 1):
            kinds = (row == architecture.image_token_id).int()
            out = model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds, **images)
            logits.append(out.logits[0, -1].numpy())
            row = torch.cat([row, out.logits[:, -1:].argmax(-1)], dim=1)
    return row[0, len(ids) : len(ids) + GREEDY_TOKENS].numpy().astype(np.int32), np.stack(logits)


def _policy_logits(
    directory: Path,
    architecture: PolicyArchitecture,
    ids: np.ndarray,
    image: preprocess.PreparedImage,
    continued: np.ndarray,
) -> np.ndarray:
    """Our logits `[T + 1, V]` on the prompt continued by these tokens."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Policy(architecture, nnx.Rngs(0))), nnx.Param)
    shardings = param_shardings(abstract, mesh, ShardingRules())
    params = import_params(directory, abstract, shardings, architecture.vision.patch_shape)

    def logits(params: nnx.State, batch: PrefixBatch, members: jax.Array) -> jax.Array:
        policy = nnx.merge(graph, params)
        root = policy.encode_root(batch.root)
        prefix, last = policy.encode_prefix(batch, root)
        length = jnp.full((1, 1), members.shape[-1])
        hidden = policy.encode_members(members, length, batch.next_position, (root, prefix))
        return policy.logits(jnp.concatenate([last, hidden[0, 0]]))

    batch = _batch(architecture, ids, image)
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(logits)(params, batch, jnp.asarray(continued)[None, None]))


def _batch(architecture: PolicyArchitecture, ids: np.ndarray, image: preprocess.PreparedImage) -> PrefixBatch:
    """One group of one prompt; its first token stands as the root."""
    merge, row = architecture.vision.spatial_merge_size, ids[1:]
    positions, next_position = preprocess.mrope_positions(row, architecture.image_token_id, (image,), merge, start=1)
    image_index = np.full(len(row), -1, np.int32)
    image_index[row == architecture.image_token_id] = np.arange(image.tokens(merge))
    collated = preprocess.collate_images([(image,)], architecture.vision, 1, len(image.patches))
    batch = PrefixBatch(
        ids[:1],
        row[None],
        np.ones((1, len(row)), bool),
        positions[None],
        np.array([len(row) - 1], np.int32),
        np.array([next_position], np.int32),
        ImageBatch(**collated),
        image_index[None],
    )
    return jax.tree.map(jnp.asarray, batch)
