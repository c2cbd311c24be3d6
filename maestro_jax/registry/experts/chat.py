"""Chat completions as they travel: a request as JSON bytes, JSON bytes as a reply. No I/O.

The format is that of OpenAI's POST /v1/chat/completions, of which vLLM, SGLang, llama.cpp and hosted APIs serve at
least what is used here: messages with images as data URLs in, one choice's text and the usage out. What a server sends
is untrusted: it is read as JSON and nothing else, and all that is used of it is checked.

Servers differ in three ways that are no fault (`Quirk`): content as a list of parts, tool calls in place of content, no
usage.
"""

import binascii
import enum
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from maestro_jax.registry.description.interface import Message, Sampling
from maestro_jax.strict_json import decode, encode

MOST_TOKENS = 10**9  # no request has more; a server that says so is not believed

# What tokens are taken to be where a server does not count them.
BYTES_A_TOKEN = 4
TOKENS_AN_IMAGE = 1000  # of a million pixels, the vision encoders of Qwen and GPT make about as many


class BadImageError(ValueError):
    """Bytes that are no PNG, JPEG or WebP."""


class BadReplyError(ValueError):
    """A body that is no chat completion."""


class Quirk(enum.StrEnum):
    """What is unusual about a chat completion, and what is made of it."""

    PARTS = "its content is a list of parts, of which the texts are joined"
    TOOL_CALLS = "its reply holds tool_calls and no content"
    NO_USAGE = (
        f"it tells no usage: tokens are estimated, 1 for every {BYTES_A_TOKEN} bytes of text and {TOKENS_AN_IMAGE} "
        "for an image"
    )


class Completion(NamedTuple):
    """What is used of a chat completion; with `Quirk.NO_USAGE`, its body cannot say what the prompt had (0 here)."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    quirks: tuple[Quirk, ...] = ()


# ---- what is sent ------------------------------------------------------------------------------------------


# Stands for an image's data URL until all else is encoded: the encoder need not carry megabytes of base64, nor look
# through them for what to escape. Nobody's text holds it.
_PICTURE = secrets.token_hex(16)


def request_body(
    model: str,
    messages: tuple[Message, ...],
    sampling: Sampling,
    further: Mapping[str, Any],
    rename: Mapping[str, str],
) -> bytes:
    """A request.

    Args:
      further: fields beside our own.
      rename: the server's names of our fields; one whose name is empty is left out.

    Raises:
      BadImageError: an image is of no type that servers take.
    """
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": _content(message)} for message in messages],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "top_p": sampling.top_p,
        "stream": False,
    }
    named = {rename.get(field, field): value for field, value in fields.items()}
    named.pop("", None)
    body, images = encode({**named, **further}), [image for message in messages for image in message.images]
    if not images:
        return body
    head, *tails = body.split(_PICTURE.encode())
    pieces = [head]
    for image, tail in zip(images, tails, strict=False):  # none has a place where `rename` leaves messages out
        encoded = binascii.b2a_base64(image, newline=False)
        pieces += b"data:image/", _image_type(image), b";base64,", encoded, tail
    return b"".join(pieces)


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    picture = {"type": "image_url", "image_url": {"url": _PICTURE}}
    return [picture] * len(message.images) + [{"type": "text", "text": message.text}]


def _image_type(image: bytes) -> bytes:
    """By its first bytes: nothing that comes with an image is believed."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"png"
    if image.startswith(b"\xff\xd8\xff"):
        return b"jpeg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return b"webp"
    raise BadImageError("an image is no PNG, JPEG or WebP")


def estimate_tokens(messages: tuple[Message, ...]) -> int:
    """What a prompt of these messages is taken to have, where a server does not count."""
    return sum(_text_tokens(message.text) + TOKENS_AN_IMAGE * len(message.images) for message in messages)


def _text_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN)


# ---- what comes back ---------------------------------------------------------------------------------------


class _Part(msgspec.Struct):
    """Of content; those of another type than "text" (thoughts, say) hold anything, and nothing of them is used."""

    type: Any = None
    text: Any = None


class _Message(msgspec.Struct):
    content: str | list[_Part] | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    message: _Message


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: dict[str, Any] | None = None  # `_Usage`, or empty


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_COMPLETIONS, _LISTS = msgspec.json.Decoder(_Completion), msgspec.json.Decoder(_Models)
_INDEX = re.compile(r"\[\d+\]")
T = TypeVar("T")


def read_completion(body: bytes) -> Completion:
    """The first choice's text and the usage.

    Content that is null is no text: of a refusal, or where thoughts have used up the tokens.

    Raises:
      BadReplyError: no UTF-8, no JSON, or not what a chat completion has.
    """
    found = _read(body, _COMPLETIONS)
    message = found.choices[0].message
    if message.content is msgspec.UNSET and not message.tool_calls:
        raise BadReplyError("the body lacks choices[0].message.content")
    text, quirks = message.content or "", []
    if not isinstance(text, str):
        texts, quirks = [part.text for part in text if part.type == "text"], [Quirk.PARTS]
        if not all(isinstance(one, str) for one in texts):
            raise BadReplyError("choices[0].message.content has a part of type text without a text")
        text = "".join(texts)
    if not text and message.tool_calls:
        quirks.append(Quirk.TOOL_CALLS)
    if not found.usage:
        return Completion(text, 0, _text_tokens(text), (*quirks, Quirk.NO_USAGE))
    try:
        usage = msgspec.convert(found.usage, _Usage)
    except msgspec.ValidationError as error:
        raise BadReplyError(f"usage holds no numbers of tokens ({error})") from error
    return Completion(text, usage.prompt_tokens, usage.completion_tokens, tuple(quirks))


def read_models(body: bytes) -> list[str]:
    """Names in a reply of GET /models.

    Raises:
      BadReplyError: it is no such reply.
    """
    return [model.id for model in _read(body, _LISTS).data]


def _read(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decode(body, decoder)
    except msgspec.ValidationError as error:
        why = _INDEX.sub("[...]", str(error))  # each text is logged once, so there must be few
        raise BadReplyError(f"the body is not as it should be: {why}") from error
    except ValueError as error:
        raise BadReplyError("the body is no JSON") from error
