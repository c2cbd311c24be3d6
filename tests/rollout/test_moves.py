"""Trajectories get lanes, and their keys and values are carried out of them and back, bit for bit."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from maestro_jax.policy.attention.cascade import LaneKV
from maestro_jax.rollout.decode import DecodeConfig
from maestro_jax.rollout.moves import LaneStarts
from maestro_jax.rollout.programs import RolloutPrograms, rollout_programs
from maestro_jax.rollout.state import Groups, Lane, Lanes, RolloutSizes, empty_groups, empty_lanes, empty_pages
from tests.rollout import toy

SIZES = RolloutSizes(
    shards=2,
    lanes=4,
    groups=2,
    members=3,
    prefix=4,
    room=24,
    turn_budget=5,
    pages=6,
    append_rows=3,
    prefill_groups=1,
)
PAGE = 8  # tokens; three pages make a lane
NO_LANE, NO_PAGE = SIZES.lanes, SIZES.pages
OUT = np.array([[2, 0, NO_LANE], [1, NO_LANE, 3]], np.int32)
INTO = np.array([[1, 3, NO_LANE], [0, NO_LANE, 2]], np.int32)
TABLE = np.array(
    [
        [[4, 0, 2], [1, NO_PAGE, NO_PAGE], [NO_PAGE] * 3],
        [[5, 1, NO_PAGE], [NO_PAGE] * 3, [3, NO_PAGE, NO_PAGE]],
    ],
    np.int32,
)


@pytest.fixture(scope="module")
def run() -> RolloutPrograms:
    graph, _ = nnx.split(toy.policy(), nnx.Param)
    return rollout_programs(graph, SIZES, DecodeConfig(4, temperature=1.0))


def filled(make: Any, seed: int) -> Any:
    """The arrays that `make` gives, with random bits in place of zeros; numpy-valued."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.integers(0, 2**31, x.shape).astype(x.dtype),
        jax.eval_shape(lambda: make(SIZES, text(), "float32")),
    )


def text() -> Any:
    return toy.architecture().text


def lanes(seed: int) -> Lanes:
    return filled(empty_lanes, seed)


def leaves(cache: LaneKV) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]


def assert_only_moved(found: Lanes, before: Lanes) -> None:
    """Nothing but the caches of lanes `INTO` differs."""
    for name in ("status", "stop", "tokens", "logprobs", "written", "length", "turn", "automaton", "hidden", "keys"):
        np.testing.assert_array_equal(getattr(found, name), getattr(before, name), err_msg=name)
    for one, other in zip(leaves(found.cache), leaves(before.cache), strict=True):
        for d, lane in np.ndindex(one.shape[:2]):
            if lane not in INTO[d]:
                np.testing.assert_array_equal(one[d, lane], other[d, lane])


def test_parked_tokens_come_back_to_other_lanes(run: RolloutPrograms) -> None:
    before, pages, other = lanes(0), filled(empty_pages, 1), lanes(2)
    parked = run.park(before, pages, OUT, TABLE)
    for found, old, cache in zip(leaves(parked), leaves(pages), leaves(before.cache), strict=True):
        wanted = old.copy()
        for d, row, part in np.argwhere(TABLE < NO_PAGE):
            wanted[d, TABLE[d, row, part]] = cache[d, OUT[d, row]][:, part * PAGE : (part + 1) * PAGE]
        np.testing.assert_array_equal(found, wanted)
    loaded = run.load(other, parked, INTO, TABLE)
    assert_only_moved(loaded, other)
    for found, cache in zip(leaves(loaded.cache), leaves(before.cache), strict=True):
        for d, row in np.argwhere(OUT < NO_LANE):
            tokens = PAGE * int((TABLE[d, row] < NO_PAGE).sum())
            assert tokens
            np.testing.assert_array_equal(found[d, INTO[d, row], :, :tokens], cache[d, OUT[d, row], :, :tokens])


def test_unloaded_tokens_come_back_to_other_lanes(run: RolloutPrograms) -> None:
    before, other = lanes(0), lanes(2)
    rows = jax.device_get(run.unload(before, OUT))
    back = run.bring_back(other, INTO, rows)
    assert_only_moved(back, other)
    for found, cache in zip(leaves(back.cache), leaves(before.cache), strict=True):
        for d, row in np.argwhere(OUT < NO_LANE):
            np.testing.assert_array_equal(found[d, INTO[d, row]], cache[d, OUT[d, row]])


def test_a_lane_gets_its_trajectory_and_the_others_keep_theirs(run: RolloutPrograms) -> None:
    before, groups = lanes(0), filled(empty_groups, 3)
    rng = np.random.default_rng(4)
    changed = np.array([[1, 0, 1, 0], [0, 1, 0, 0]])
    empty = SIZES.groups * SIZES.members
    starts = LaneStarts(
        changed=changed.astype(np.int32),
        status=np.array([[Lane.DECODING, 0, Lane.EMPTY, 0], [0, Lane.DECODING, 0, 0]], np.int32),
        member_slot=np.array([[5, empty, empty, empty], [empty, 1, empty, empty]], np.int32),
        length=rng.integers(0, 24, (2, 4)).astype(np.int32),
        turn=rng.integers(0, 4, (2, 4)).astype(np.int32),
        keys=rng.integers(0, 2**32, (2, 4, 2), dtype=np.uint32),
    )
    found = run.assign(groups, before, starts)
    new = changed > 0
    for name in ("status", "member_slot", "length", "turn", "keys"):
        given, old = getattr(starts, name), getattr(before, name)
        np.testing.assert_array_equal(found_of(found, name)[new], given[new], err_msg=name)
        np.testing.assert_array_equal(found_of(found, name)[~new], old[~new], err_msg=name)
    for name in ("stop", "written", "automaton"):
        np.testing.assert_array_equal(found_of(found, name), np.where(new, 0, getattr(before, name)), err_msg=name)
    for d, lane in np.ndindex(2, 4):
        begins = new[d, lane] and starts.status[d, lane] == Lane.DECODING
        wanted = groups.hidden[d, starts.member_slot[d, lane] // SIZES.members] if begins else before.hidden[d, lane]
        if begins or not new[d, lane]:  # an empty lane has no state
            np.testing.assert_array_equal(found.hidden[d, lane], wanted)
    for name in ("tokens", "logprobs"):
        np.testing.assert_array_equal(found_of(found, name), getattr(before, name), err_msg=name)
    for one, other in zip(leaves(found.cache), leaves(before.cache), strict=True):
        np.testing.assert_array_equal(one, other)


def found_of(lanes: Lanes | Groups, name: str) -> np.ndarray:
    return np.asarray(getattr(lanes, name))
