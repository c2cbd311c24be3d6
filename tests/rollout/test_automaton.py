"""The stop automaton against a search in the plain bytes, for vocabularies cut anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.rollout.automaton import CLOSING_TAGS, START, build_automaton
from maestro_jax.types import StopReason

TAGS = {tag.encode(): reason for tag, reason in CLOSING_TAGS}
SEARCH, ANSWER = b"</search>", b"</answer>"

# Text that is near a tag: whole tags, their pieces, doubled brackets, and bytes that occur in them.
NEAR = st.sampled_from([SEARCH, ANSWER, b"</", b"<", b"</sea", b"rch>", b"</an", b"swer>", b"<<", b"search>", b">"])
BYTES = st.one_of(NEAR, st.text("</>searchnw", max_size=4).map(str.encode), st.binary(max_size=3))
TEXT = st.lists(BYTES, max_size=8).map(b"".join)


def first_tag(text: bytes) -> StopReason:
    """Which closing tag is complete first, by a plain search."""
    ends = {text.find(tag) + len(tag): reason for tag, reason in TAGS.items() if tag in text}
    return ends[min(ends)] if ends else StopReason.NONE


def run(vocabulary: list[bytes], ids: list[int]) -> list[StopReason]:
    """The reason after each token."""
    table, reasons = build_automaton(vocabulary)
    state, found = START, []
    for token in ids:
        state = table[state, token]
        found.append(StopReason(reasons[state]))
    return found


@st.composite
def cut_text(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """A text cut at random places into tokens of a vocabulary that also holds other cuts and special tokens."""
    text = draw(TEXT)
    cuts = sorted(draw(st.sets(st.integers(1, max(len(text) - 1, 1)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    others = draw(st.lists(BYTES, max_size=4))
    vocabulary = draw(st.permutations([*{*pieces, *others, b""}]))
    specials = draw(st.lists(st.integers(0, len(pieces)), max_size=2))
    for at in specials:  # a special token has no bytes: it neither makes nor breaks a tag
        pieces.insert(at, b"")
    return list(vocabulary), [vocabulary.index(piece) for piece in pieces]


@given(cut_text())
def test_stops_with_the_token_that_completes_a_tag(case: tuple[list[bytes], list[int]]) -> None:
    vocabulary, ids = case
    wanted = [first_tag(b"".join(vocabulary[i] for i in ids[: n + 1])) for n in range(len(ids))]
    assert run(vocabulary, ids) == wanted


@given(st.lists(BYTES, min_size=1, max_size=6), st.lists(st.integers(0, 5), max_size=12))
def test_random_tokens_of_a_random_vocabulary(vocabulary: list[bytes], ids: list[int]) -> None:
    ids = [i % len(vocabulary) for i in ids]
    wanted = [first_tag(b"".join(vocabulary[i] for i in ids[: n + 1])) for n in range(len(ids))]
    assert run(vocabulary, ids) == wanted


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("cut", range(1, 9))
def test_a_tag_split_anywhere(tag: bytes, cut: int) -> None:
    found = run([b"x<", tag[:cut], tag[cut:] + b" and more"], [0, 1, 2, 1])
    assert found == [StopReason.NONE, StopReason.NONE, TAGS[tag], TAGS[tag]]


def test_bytes_after_the_tag_in_the_same_token() -> None:
    assert run([SEARCH + b"\n\n" + ANSWER], [0]) == [StopReason.CALL]
    assert run([b"</answer></se", b"arch>"], [0, 1]) == [StopReason.ANSWER, StopReason.ANSWER]


def test_a_multibyte_character_may_be_cut_too() -> None:
    arrow = "é</search>".encode()
    assert run([arrow[:1], arrow[1:]], [0, 1])[-1] is StopReason.CALL


def test_no_token_leaves_a_state_that_found_a_tag() -> None:
    table, reasons = build_automaton([b"a", b"<", SEARCH, ANSWER, b"</", b""])
    found = np.flatnonzero(reasons)
    assert set(reasons[found]) == {StopReason.CALL, StopReason.ANSWER}
    np.testing.assert_array_equal(table[found], np.broadcast_to(found[:, None], table[found].shape))
