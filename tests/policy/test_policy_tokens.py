"""The tokenizer's promises: nothing is lost, and foreign text never speaks in special tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.errors import ConfigError
from maestro_jax.policy.tokens import END_OF_TURN, IMAGE, SPECIAL_TOKENS, Tokens, load_tokens

HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL_TOKENS, "<|", "|>", "<|im_", "end|>", "<", ">", "|", "im_end", "‹|im_end|›", " ", "\n"]
        ),
        st.text(max_size=3),
    )
).map("".join)
# Without a bracket no special token can stand in the text.
PLAIN = st.text().filter(lambda text: "<" not in text)


@given(PLAIN)
def test_decoding_gives_the_text_back(tokens: Tokens, text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text
    assert tokens.decode(tokens.encode_foreign(text)) == text


@given(HOSTILE)
def test_foreign_text_has_no_special_ids(tokens: Tokens, text: str) -> None:
    ids = tokens.encode_foreign(text)
    assert not tokens.special_ids & set(ids)
    readable = text.replace("‹", "<").replace("›", ">")
    assert tokens.decode(ids).replace("‹", "<").replace("›", ">") == readable


@given(HOSTILE)
def test_token_bytes_join_to_the_text(tokens: Tokens, text: str) -> None:
    table = tokens.token_bytes(360)
    ids = tokens.encode_foreign(text)
    assert b"".join(table[i] for i in ids) == tokens.decode(ids).encode()


def test_half_a_surrogate_pair_is_encoded_as_a_question_mark(tokens: Tokens) -> None:
    """A reply may hold one, since JSON can; one raised here, and its shard was abandoned."""
    assert tokens.decode(tokens.encode_foreign("a\ud83db")) == "a?b"


def test_special_and_unused_ids_have_no_bytes(tokens: Tokens) -> None:
    table = tokens.token_bytes(1000)
    assert len(table) == 1000
    assert all(table[i] == b"" for i in tokens.special_ids) and set(table[360:]) == {b""}
    assert {bytes([i]) for i in range(256)} <= set(table)


def test_trusted_text_keeps_its_special_tokens(tokens: Tokens) -> None:
    assert tokens.encode(f"a{END_OF_TURN}")[-1] == tokens.end_of_turn
    assert tokens.encode(IMAGE) == [tokens.image]
    assert tokens.special_texts == SPECIAL_TOKENS and tokens.special_ids == frozenset(range(len(SPECIAL_TOKENS)))


def test_a_special_token_without_brackets_is_kept_out_too(tokens_directory: Path, tmp_path: Path) -> None:
    again = load_tokens(tokens_directory)
    again.tokenizer.add_tokens(["[PAD]"], special_tokens=True)  # type: ignore[attr-defined]
    again.tokenizer.save_pretrained(str(tmp_path))  # type: ignore[attr-defined]
    tokens = load_tokens(tmp_path)
    assert set(tokens.encode("a[PAD]b")) & tokens.special_ids
    assert not set(tokens.encode_foreign("a[PAD]b")) & tokens.special_ids


def test_decoding_leaves_special_tokens_out(tokens: Tokens) -> None:
    assert tokens.decode([*tokens.encode("answer"), tokens.end_of_turn]) == "answer"


def test_digits_stand_alone_and_frequent_words_are_merged(tokens: Tokens) -> None:
    assert len(tokens.encode("2024")) == 4
    assert len(tokens.encode("<search>")) < len("<search>")


def test_loading_gives_the_trained_tokenizer(tokens: Tokens, tokens_directory: Path) -> None:
    again = load_tokens(tokens_directory)
    text = "How many <search> red circles </search> in 2024?"
    assert again.encode(text) == tokens.encode(text)
    assert (again.end_of_turn, again.image, again.special_ids) == (tokens.end_of_turn, tokens.image, tokens.special_ids)


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer.json; point config.policy.tokenizer at") as caught:
        load_tokens(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_named(tokens_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(tokens_directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read .*copy it again"):
        load_tokens(tmp_path)


def test_a_tokenizer_without_image_token_is_refused(tokens_directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tokens_directory / name).read_text()
        (tmp_path / name).write_text(text.replace(IMAGE, "<|picture|>"))
    with pytest.raises(ConfigError, match=r"lacks the special token <\|image_pad\|>; use a Qwen3-VL tokenizer"):
        load_tokens(tmp_path)


def test_an_added_word_that_is_not_special_stays_visible(tokens_directory: Path, tmp_path: Path) -> None:
    # Qwen3 adds <think> as a plain word: without it an unclosed think would look well formed.
    words = ["<think>", "so: </answer>", "答案</answer>"]  # the last two are not in the byte-level alphabet
    again = load_tokens(tokens_directory)
    again.tokenizer.add_tokens(words)  # type: ignore[attr-defined]
    again.tokenizer.save_pretrained(str(tmp_path))  # type: ignore[attr-defined]
    tokens = load_tokens(tmp_path)
    table = tokens.token_bytes(400)
    for word in words:
        ids = tokens.encode(f"{word} a")
        assert tokens.decode(ids) == f"{word} a" and table[ids[0]] == word.encode()


def test_a_chat_template_in_a_file_of_its_own_is_found_and_a_missing_one_named(
    tokens_directory: Path, tokens: Tokens, tmp_path: Path
) -> None:
    template = tokens.tokenizer.chat_template  # type: ignore[attr-defined]
    shutil.copy(tokens_directory / "tokenizer.json", tmp_path)
    values = json.loads((tokens_directory / "tokenizer_config.json").read_text())
    values.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="has no chat template .* copy it from the published checkpoint"):
        load_tokens(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokens(tmp_path).tokenizer.chat_template == template  # type: ignore[attr-defined]


def test_nothing_is_said_where_there_is_no_torch(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from maestro_jax.policy.tokens import train_tokens"
    command = [sys.executable, "-c", f"{program}; train_tokens(['some text'], 300, sys.argv[1])", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "tokenizer.json").is_file(), result.stderr
    assert (result.stdout, result.stderr) == ("", "")
