"""A short soak: 240 tasks with 2 MiB each, of which a run keeps next to nothing."""

import pytest

from benchmarks.soak import MOST_GROWTH, Pictures, figures, in_process, picture
from maestro_jax.images import decode_image

MIB = 2**20
IN_FLIGHT = 64  # calls of baselines at a time, each with its task


def test_memory_is_flat_once_it_is_warm() -> None:
    found = in_process(240, 2 * MIB)
    assert found["right"] == 1.0  # the expert saw every picture
    assert found["growth_mib"] < MOST_GROWTH
    assert found["held_out_mib"] < 1.5 * IN_FLIGHT * 2  # of 200 tasks, which have 400


def test_pictures_are_large_and_differ() -> None:
    one, other = (Pictures(3, MIB)[index].images[0] for index in (0, 1))
    assert one == picture(0, MIB) != other and MIB < len(one) < MIB + 4096
    assert decode_image(one, "x").shape == (128, 160, 3)


def test_growth_is_counted_from_the_warm_process_on() -> None:
    seen = [(100, 50 * MIB, 0), (200, 80 * MIB, MIB), (600, 84 * MIB, 2 * MIB), (1000, 88 * MIB, 6 * MIB)]
    found = figures({"seen": seen, "held_out_growth": 3 * MIB, "right": 0.5}, 1000)
    assert (found["warm_mib"], found["end_mib"], found["held_out_mib"]) == (80, 88, 3)
    assert (found["replies_mib"], found["growth_mib"]) == (5, 3)
    assert found["mib_per_thousand"] == pytest.approx(10)
