"""Host-side preparation of prompts and images, in numpy: everything whose shape depends on the data.

In: decoded images and token ids. Out: arrays of bucketed static shapes for `PrefixBatch`. Resizing,
normalisation and patch order are those of transformers' `Qwen2VLImageProcessorPil`; positions are
those of `Qwen3VLModel.get_rope_index`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from maestro_jax.errors import DataError
from maestro_jax.policy.config import VisionConfig

# Scaled to [-1, 1] in float64 and then rounded, as transformers does: the patches are the same bit for bit.
_NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32) - 0.5) / 0.5


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """One image cut into patches in merge-block order, kept as bytes: images wait in this form."""

    cut: np.ndarray  # uint8 [N, channels, patch, patch]
    rows: int  # patch rows
    columns: int  # patch columns
    temporal: int  # how often a patch is repeated along time

    def tokens(self, merge: int) -> int:
        return self.rows * self.columns // merge**2

    @property
    def patches(self) -> np.ndarray:
        """float32 `[N, channels * temporal * patch * patch]` in [-1, 1]."""
        count, channels, patch, _ = self.cut.shape
        repeated = np.empty((count, channels, self.temporal, patch, patch), np.float32)
        repeated[:] = _NORMALISED[self.cut][:, :, None]
        return repeated.reshape(count, -1)


def target_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width, multiples of `factor`, near the original and within the pixel limits."""
    if max(height, width) / min(height, width) > 200:
        raise DataError(f"an image of {height} x {width} is too narrow; crop it to an aspect ratio below 200")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def prepare_image(pixels: np.ndarray, config: VisionConfig, min_pixels: int, max_pixels: int) -> PreparedImage:
    """Resizes `pixels` uint8 `[H, W, 3]` (bicubic) and cuts them into patches."""
    patch, merge = config.patch_size, config.spatial_merge_size
    height, width = target_size(pixels.shape[0], pixels.shape[1], patch * merge, min_pixels, max_pixels)
    if (height, width) != pixels.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, config.in_channels)
    cut = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, config.in_channels, patch, patch)
    return PreparedImage(cut, rows, columns, config.temporal_patch_size)


def block_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """(row, column) of every patch in merge-block order, int32 `[N, 2]`."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(-1, 2).astype(np.int32)


def interpolation(rows: int, columns: int, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear corners (int32 `[N, 4]`) and weights (float32 `[N, 4]`) in a `side` x `side` position table."""
    order = block_order(rows, columns, merge)
    low, high, part = [], [], []
    for axis, count in enumerate((rows, columns)):
        at = np.linspace(0, side - 1, count, dtype=np.float32)[order[:, axis]]
        low.append(at.astype(np.int32))
        high.append(np.minimum(at.astype(np.int32) + 1, side - 1))
        part.append(at - at.astype(np.int32))
    corners = [(low[0], low[1]), (low[0], high[1]), (high[0], low[1]), (high[0], high[1])]
    index = np.stack([row * side + column for row, column in corners], axis=-1)
    down, right = part
    weight = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1)
    return index.astype(np.int32), weight.astype(np.float32)


def mrope_positions(
    tokens: np.ndarray, image_token: int, images: Sequence[PreparedImage], merge: int, start: int
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of a prompt.

    Text advances all three axes together; the tokens of an image spread over rows and columns at
    one time, and the text after it continues behind the larger side.

    Args:
      tokens: int32 `[P]`, with one `image_token` per merged patch.
      start: position of the first token (the root's length).

    Returns:
      int32 `[P, 3]` and the position that comes next.
    """
    positions = np.zeros((len(tokens), 3), np.int32)
    remaining, at, position = list(images), 0, start
    while at < len(tokens):
        if tokens[at] != image_token:
            positions[at] = position
            at, position = at + 1, position + 1
            continue
        image = remaining.pop(0)
        rows, columns = image.rows // merge, image.columns // merge
        span = positions[at : at + rows * columns]
        span[:, 0] = position
        span[:, 1] = position + np.repeat(np.arange(rows), columns)
        span[:, 2] = position + np.tile(np.arange(columns), rows)
        at, position = at + rows * columns, position + max(rows, columns)
    return positions, position


def collate_images(
    groups: Sequence[Sequence[PreparedImage]], config: VisionConfig, per_group: int, patches: int
) -> dict[str, np.ndarray]:
    """Pads the images of each group to `per_group` images of `patches` patches (fields of `ImageBatch`)."""
    count = len(groups) * per_group
    side = math.isqrt(config.num_position_embeddings)
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    batch = {
        "patches": np.zeros((count, patches, width), np.float32),
        "table_index": np.zeros((count, patches, 4), np.int32),
        "table_weight": np.zeros((count, patches, 4), np.float32),
        "grid": np.zeros((count, patches, 2), np.int32),
        "mask": np.zeros((count, patches), bool),
    }
    for group, images in enumerate(groups):
        for number, image in enumerate(images):
            at, n = group * per_group + number, len(image.cut)
            index, weight = interpolation(image.rows, image.columns, config.spatial_merge_size, side)
            batch["patches"][at, :n] = image.patches
            batch["table_index"][at, :n] = index
            batch["table_weight"][at, :n] = weight
            batch["grid"][at, :n] = block_order(image.rows, image.columns, config.spatial_merge_size)
            batch["mask"][at, :n] = True
    return batch


def bucket(size: int, buckets: Sequence[int], what: str, cure: str) -> int:
    """The smallest bucket that holds `size`; static shapes keep the number of compiled programs small."""
    for candidate in sorted(buckets):
        if size <= candidate:
            return candidate
    raise DataError(f"{what} needs {size}, the largest bucket is {max(buckets)}; {cure}")
