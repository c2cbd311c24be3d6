"""Checks an exported directory: tensors bit for bit, and, where torch is installed, what it computes."""

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.errors import DataError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.huggingface import Counterpart, TensorFiles, import_params
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.types import Task

GREEDY_TOKENS = 16
# Of the largest logit. fp32 on both sides, sums in another order: 5e-6 on the trained quickstart, whose logits reach
# some tens; an error in a weight or a position is parts of one.
TOLERANCE = 1e-4


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


def verify_logits(directory: Path, architecture: PolicyArchitecture) -> str:
    """Continues an image-and-text prompt greedily in transformers and in our policy, both in fp32.

    Raises:
      DataError: logits or tokens differ.
    """
    if importlib.util.find_spec("torch") is None:
        return "not verified: what the weights compute (torch is not installed)"
    prompt = _prompt(directory, architecture)
    continued, theirs = _transformers(directory, architecture, prompt)
    ours = _policy_logits(directory, architecture, prompt, continued)
    gap = float(np.abs(ours - theirs).max())
    if not gap <= TOLERANCE * max(1.0, float(np.abs(theirs).max())):  # NaN differs, too
        raise DataError(f"{directory}: logits differ from transformers' by {gap:.1e}; please report this")
    if ours[:-1].argmax(axis=-1).tolist() != continued.tolist():
        raise DataError(f"{directory}: greedy tokens differ from transformers'; please report this")
    return f"verified: {len(continued)} greedy tokens equal transformers', largest gap of logits {gap:.1e}"


def _prompt(directory: Path, architecture: PolicyArchitecture) -> PrefixBatch:
    """A question about a picture of two by three image tokens."""
    vision = architecture.vision
    side = vision.patch_size * vision.spatial_merge_size  # pixels of an image token
    noise = np.random.default_rng(0).integers(0, 256, (3 * side, 2 * side, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    task = Task("verify", "What is shown?", (png.getvalue(),), (), "verify")
    limits = PromptConfig((128,), (6 * vision.spatial_merge_size**2,), 1, side**2, 6 * side**2)
    return Prompts(load_tokens(directory), architecture, "You answer questions.", limits).batch([task])


def _transformers(
    directory: Path, architecture: PolicyArchitecture, prompt: PrefixBatch
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens `[T]`, and the logits `[T + 1, V]` from which they and one more were chosen."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    row = torch.tensor(np.concatenate([prompt.root, prompt.tokens[prompt.mask]]))[None].long()
    start, image = row.shape[1], prompt.images
    rows, columns = image.grid[image.mask].max(axis=0) + 1
    images = {
        "pixel_values": torch.tensor(image.patches[image.mask]),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    logits = []
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS + 1):
            kinds = (row == architecture.image_token_id).int()
            out = model(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds, **images)
            logits.append(out.logits[0, -1].numpy())
            row = torch.cat([row, out.logits[:, -1:].argmax(-1)], dim=1)
    return row[0, start : start + GREEDY_TOKENS].numpy().astype(np.int32), np.stack(logits)


def _policy_logits(
    directory: Path, architecture: PolicyArchitecture, prompt: PrefixBatch, continued: np.ndarray
) -> np.ndarray:
    """Our logits `[T + 1, V]` on the prompt continued by these tokens."""
    # transformers computes on the CPU; accelerators would round fp32 products to bf16 or TF32.
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices("cpu")[:1])
    graph, abstract, shardings = param_layout(lambda: Policy(architecture, nnx.Rngs(0)), mesh, ShardingRules())
    params = import_params(directory, abstract, shardings, architecture.vision.patch_shape)

    def logits(params: nnx.State, prompt: PrefixBatch, members: jax.Array) -> jax.Array:
        policy = nnx.merge(graph, params)
        last, hidden = policy.encode_groups(prompt, members, jnp.full((1, 1), members.shape[-1]))
        return policy.logits(jnp.concatenate([last, hidden[0, 0]]))

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(logits)(params, prompt, continued[None, None]))
