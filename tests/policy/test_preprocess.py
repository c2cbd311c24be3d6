"""Host-side preparation against transformers: sizes, patches, position table, M-RoPE positions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.errors import DataError
from maestro_jax.policy import preprocess
from tests.policy import reference
from tests.policy.reference import IMAGE, Row, noise_image, row

SIZES = [(64, 96), (96, 32), (33, 47), (7, 90), (500, 300), (31, 400), (1, 150)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("limits", [(32 * 32, 20_480), (65_536, 262_144)], ids=["shrinks", "grows"])
def test_patches_are_those_of_transformers_bit_for_bit(size: tuple[int, int], limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
    )
    wanted = processor([pixels], return_tensors="np", input_data_format="channels_last")
    found = preprocess.prepare_image(pixels, reference.architecture().vision, *limits)
    assert [1, found.rows, found.columns] == wanted["image_grid_thw"][0].tolist()
    assert found.patches.dtype == np.float32
    np.testing.assert_array_equal(found.patches, wanted["pixel_values"])


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64), st.integers(64, 4096))
def test_sizes_are_those_of_transformers(height: int, width: int, low: int, high: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = (low * 1024, high * 1024)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DataError, match="too narrow; crop it"):
            preprocess.target_size(height, width, 32, *limits)
    else:
        assert preprocess.target_size(height, width, 32, *limits) == smart_resize(height, width, 32, *limits)


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (6, 2), (10, 14), (64, 50)], ids=str)
def test_patch_order_and_table_are_those_of_transformers(grid: tuple[int, int]) -> None:
    import torch
    from transformers import vision_utils

    thw = torch.tensor([[1, *grid]])
    wanted_order = vision_utils.get_vision_position_ids(thw, 2)
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
        thw, 48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert preprocess.block_order(*grid, 2).tolist() == wanted_order.tolist()
    found_index, found_weight = preprocess.interpolation(*grid, 2, 48)
    # Corners of weight zero may be named differently, so the table itself is compared.
    table = np.random.default_rng(0).standard_normal((48 * 48, 5))
    found = (table[found_index] * found_weight[..., None]).sum(axis=1)
    wanted = (table[index.numpy()] * weight.numpy()[..., None]).sum(axis=1)
    # positions of up to 47 in fp32 are rounded to 4e-6
    np.testing.assert_allclose(found, wanted, atol=2e-5)


ROWS = {
    "text": row(5, 6, 7),
    "one image": row(5, noise_image(64, 96, 1), 7, 8),
    "two images": row(5, noise_image(96, 32, 2), 9, noise_image(32, 128, 3), 11),
    "image last": row(5, noise_image(64, 32, 2)),
}


@pytest.mark.parametrize("name", ROWS)
def test_positions_are_those_of_get_rope_index(name: str, hf_model: Any) -> None:
    import torch

    one: Row = ROWS[name]
    ids = torch.tensor(np.concatenate([reference.ROOT, one.ids]))[None].long()
    grids = torch.tensor([[1, image.rows, image.columns] for image in one.images]) if one.images else None
    wanted, delta = hf_model.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
    start = len(reference.ROOT)
    positions, after = preprocess.mrope_positions(one.ids, IMAGE, one.images, 2, start)
    assert positions.tolist() == wanted[:, 0, start:].T.tolist()
    assert after == ids.shape[1] + delta.item()


def test_padding_images_are_masked_out() -> None:
    image = noise_image(64, 96, 1)
    batch = preprocess.collate_images([[], [image]], reference.architecture().vision, 2, 32)
    assert batch["mask"].sum(axis=1).tolist() == [0, 0, 24, 0]
    np.testing.assert_array_equal(batch["patches"][2, :24], image.patches)
    assert not batch["patches"][~batch["mask"]].any() and not batch["table_weight"][~batch["mask"]].any()


def test_the_smallest_bucket_that_fits() -> None:
    assert [preprocess.bucket(size, (64, 16, 32), "x", "y") for size in (1, 16, 17, 64)] == [16, 16, 32, 64]
    with pytest.raises(DataError, match="a prompt needs 65, the largest bucket is 64; raise the limit"):
        preprocess.bucket(65, (64, 16), "a prompt", "raise the limit")
