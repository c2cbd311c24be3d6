"""Tokens of the policy: the Hugging Face tokenizer, and a small one trained for offline runs.

Token ids are produced once and kept (token in, token out): a prompt is encoded here, a turn is
what was sampled, an observation is encoded by the exchange. Nothing is ever decoded and encoded again.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError

END_OF_TURN = "<|im_end|>"
IMAGE = "<|image_pad|>"
ASSISTANT_HEADER = "<|im_start|>assistant\n"  # of the templates of checkpoints that do not think
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE,
    "<|video_pad|>",
)

# ChatML with images, for tokenizers made here. A published checkpoint brings its own template.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

# Letters with one leading sign, digits one by one, runs of signs, line ends, spaces: the split Qwen's
# vocabulary uses, written anew, so that the tiny tokenizer cuts tags and numbers as the large one does.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenizer with what the rollout needs to know of it."""

    tokenizer: object  # transformers.PreTrainedTokenizerFast
    end_of_turn: int
    image: int
    special_ids: frozenset[int]
    special_texts: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of ids, special and added ones included."""
        return len(self.tokenizer)  # type: ignore[arg-type]

    @functools.cached_property
    def header(self) -> str:
        """What the chat template writes where a turn of the policy begins; `ASSISTANT_HEADER`, and "<think>" behind it
        in the templates of checkpoints that think.

        Raises:
          ConfigError: the template writes no such header behind a conversation.
        """
        messages = [{"role": "user", "content": [{"type": "text", "text": "0"}]}]
        without, whole = (
            self.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                messages, tokenize=False, add_generation_prompt=generate
            )
            for generate in (False, True)
        )
        header = whole.removeprefix(without)
        if not header or header == whole:
            raise ConfigError(
                "the chat template writes no header for the assistant's turn behind a conversation "
                "(add_generation_prompt); use the published template of a Qwen3-VL checkpoint"
            )
        return header

    def special_id(self, text: str) -> int | None:
        """The id of a special token, None if the vocabulary has no such one."""
        return self.tokenizer.get_added_vocab().get(text)  # type: ignore[attr-defined]

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text; special tokens are recognised, none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]

    def count(self, text: str) -> int:
        """How many ids trusted text has."""
        return len(self.encode(text))

    def encode_foreign(self, text: str) -> list[int]:
        """Ids of untrusted text: no special id can come out, whatever the text says."""
        # Half a surrogate pair, which JSON can say and UTF-8 cannot: the tokenizer would refuse the whole text.
        text = text.encode("utf-8", "replace").decode("utf-8")
        for special in self.special_texts:
            text = text.replace(special, special.replace("<", "‹").replace(">", "›"))
        return [i for i in self.encode(text) if i not in self.special_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids; special tokens are left out."""
        keep = [int(i) for i in ids if i not in self.special_ids]
        # What `tokenizer.decode` calls, without its checks of every id: turns are decoded while the device waits.
        return self.tokenizer.backend_tokenizer.decode(keep, skip_special_tokens=False)  # type: ignore[attr-defined]

    def token_bytes(self, vocab_size: int) -> list[bytes]:
        """The raw bytes of every id below `vocab_size` (empty for special and unused ids)."""
        table = byte_level_alphabet()
        backend = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        result = []
        for i in range(vocab_size):
            piece = None if i in self.special_ids else backend.id_to_token(i)
            result.append(_piece_bytes(piece or "", table))
        return result


def _piece_bytes(piece: str, table: dict[str, int]) -> bytes:
    if all(letter in table for letter in piece):
        return bytes(table[letter] for letter in piece)
    return piece.encode()  # an added word with a space, say: the decoder takes it as it is


def byte_level_alphabet() -> dict[str, int]:
    """The reversible byte ↔ character table of byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + i): b for i, b in enumerate(others)}


def load_tokens(directory: str | Path) -> Tokens:
    """Loads `tokenizer.json` and its chat template from a checkpoint directory, never from a hub."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory} has no tokenizer.json; point config.policy.tokenizer at a checkpoint directory")
    try:
        tokenizer = _tokenizer_class().from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise ConfigError(f"{directory}/tokenizer.json cannot be read ({error}); copy it again") from error
    # Qwen3 also adds plain words such as <think>: those are text, and must stay visible to the parser.
    added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {text: added.get(text) for text in (END_OF_TURN, IMAGE)}
    missing = [text for text, i in ids.items() if i is None]
    if missing:
        raise ConfigError(f"{directory}/tokenizer.json lacks the special token {missing[0]}; use a Qwen3-VL tokenizer")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _separate_template(directory)
    return Tokens(tokenizer, added[END_OF_TURN], added[IMAGE], frozenset(added.values()), tuple(added))


def _tokenizer_class() -> Any:
    """`transformers.PreTrainedTokenizerFast`, without the note that there is no PyTorch: nothing here needs it."""
    logger = logging.getLogger("transformers")

    def wanted(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        logger.removeFilter(wanted)
    return PreTrainedTokenizerFast


def _separate_template(directory: Path) -> str:
    """The chat template from `chat_template.json`, where older checkpoints of vision-language models keep it."""
    try:
        return json.loads((directory / "chat_template.json").read_text("utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{directory} has no chat template (in tokenizer_config.json, chat_template.jinja or chat_template.json); "
            "copy it from the published checkpoint"
        ) from None


def train_tokens(texts: Iterable[str], vocab_size: int, directory: str | Path) -> Tokens:
    """Trains a byte-level BPE tokenizer and saves it in Hugging Face form.

    Args:
      texts: what it should be good at.
      vocab_size: total number of ids, special tokens included.
      directory: receives tokenizer.json, tokenizer_config.json and chat_template.jinja.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = _tokenizer_class()(
        tokenizer_object=backend, eos_token=END_OF_TURN, pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(str(directory))
    return load_tokens(directory)
