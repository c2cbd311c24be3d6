"""Parts of a batch: every group in one of them, in a static shape, no dearer than padding all to the longest."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_jax.errors import DataError
from maestro_jax.grpo.microbatches import Microbatch, Planner
from tests.policy import reference

PREFIXES, ROOMS = (16, 32, 64), (8, 32)


def make(groups: int, microbatches: int, shards: int = 1) -> Planner:
    return Planner(reference.architecture(), 6, 4, groups, microbatches, shards, PREFIXES, ROOMS)


def total(planner: Planner, microbatches: list[Microbatch]) -> int:
    return sum(planner.cost(*microbatch.shape) for microbatch in microbatches)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Planner, list[int], list[int]]:
    shards, each, microbatches = draw(st.tuples(st.sampled_from((1, 2)), st.integers(1, 4), st.integers(1, 4)))
    planner = make(shards * each * microbatches, microbatches, shards)
    kept = draw(st.integers(1, planner.groups))
    lengths = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 32)), min_size=kept, max_size=kept)
    prefixes, rooms = zip(*draw(lengths), strict=True)
    return planner, list(prefixes), list(rooms)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_parts_hold_every_group_once_and_fit_into_a_microbatch(batch: tuple[Planner, list[int], list[int]]) -> None:
    planner, prefixes, rooms = batch
    microbatches = planner.plan(prefixes, rooms)
    assert sorted(itertools.chain(*(microbatch.groups for microbatch in microbatches))) == list(range(len(prefixes)))
    assert len(microbatches) <= planner.microbatches
    for microbatch in microbatches:
        assert len(microbatch.groups) <= microbatch.size <= planner.groups // planner.microbatches
        assert microbatch.size in planner.sizes and microbatch.size % planner.shards == 0
        assert microbatch.prefix in PREFIXES and microbatch.room in ROOMS
        assert all(prefixes[g] <= microbatch.prefix and rooms[g] <= microbatch.room for g in microbatch.groups)
    costs = [planner.cost(*microbatch.shape) for microbatch in microbatches]
    assert costs == sorted(costs, reverse=True)
    assert planner.plan(prefixes, rooms) == microbatches
    assert 0 <= planner.padding(microbatches, prefixes, rooms) < 1


@settings(max_examples=100, deadline=None)
@given(batches())
def test_padding_everything_to_the_longest_is_never_cheaper(batch: tuple[Planner, list[int], list[int]]) -> None:
    planner, prefixes, rooms = batch
    prefix = min(size for size in PREFIXES if size >= max(prefixes))
    room = min(size for size in ROOMS if size >= max(rooms))
    needed = -(-len(prefixes) // planner.sizes[0])
    assert total(planner, planner.plan(prefixes, rooms)) <= needed * planner.cost(planner.sizes[0], prefix, room)


def partitions(groups: list[int], microbatches: int) -> list[list[list[int]]]:
    if not groups:
        return [[]]
    if not microbatches:
        return []
    first, rest = groups[0], groups[1:]
    found = []
    for count in range(len(rest) + 1):
        for others in itertools.combinations(rest, count):
            left = [g for g in rest if g not in others]
            found += [[[first, *others], *more] for more in partitions(left, microbatches - 1)]
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=6), st.sampled_from((2, 3)))
def test_nothing_is_cheaper_where_one_length_differs(prefixes: list[int], microbatches: int) -> None:
    planner = make(6, microbatches)
    rooms = [8] * len(prefixes)

    def cost(microbatches: list[list[int]]) -> float:
        if max(map(len, microbatches)) > planner.sizes[0]:
            return float("inf")
        sizes = [min(size for size in planner.sizes if size >= len(microbatch)) for microbatch in microbatches]
        return sum(
            planner.cost(size, max(prefixes[g] for g in groups), 8)
            for size, groups in zip(sizes, microbatches, strict=True)
        )

    best = min(map(cost, partitions(list(range(len(prefixes))), microbatches)))
    assert total(planner, planner.plan(prefixes, rooms)) == best


def test_a_long_group_no_longer_pads_the_others() -> None:
    microbatches = make(6, 3).plan([10, 60, 12, 9], [8, 30, 7, 8])
    assert microbatches[0] == Microbatch((1,), 1, 64, 32)
    assert [microbatch.shape for microbatch in microbatches[1:]] == [(2, 16, 8), (1, 16, 8)]


def test_one_microbatch_is_one_part() -> None:
    assert make(4, 1).plan([10, 60, 12, 9], [8, 30, 7, 8]) == [Microbatch((0, 1, 2, 3), 4, 64, 32)]
    assert make(4, 1).plan([10, 60], [8, 7]) == [Microbatch((0, 1), 2, 64, 8)]  # the others were left out


@pytest.mark.parametrize(
    ("groups", "shards", "sizes"), [(8, 1, (8, 4, 2, 1)), (8, 4, (8, 4)), (12, 2, (12, 6)), (6, 2, (6,))]
)
def test_sizes_are_halves_that_spread_evenly(groups: int, shards: int, sizes: tuple[int, ...]) -> None:
    assert make(groups, 1, shards).sizes == sizes


@pytest.mark.parametrize(
    ("prefix", "room", "key"), [(65, 1, "policy.prefix_buckets"), (1, 33, "rollout.member_buckets")]
)
def test_a_length_beyond_the_buckets_names_the_cure(prefix: int, room: int, key: str) -> None:
    with pytest.raises(DataError, match=f"raise config.{key}"):
        make(1, 1).plan([prefix], [room])
