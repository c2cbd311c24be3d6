"""Chat completions as they travel: a request as JSON bytes, JSON bytes as a reply. No I/O.

The format is that of OpenAI's POST /v1/chat/completions, of which vLLM, SGLang, llama.cpp and hosted APIs serve at
least what is used here: messages with images as data URLs in, one choice's text and the usage out. What a server sends
is untrusted: it is read as JSON and nothing else, and all that is used of it is checked.

Servers differ in three ways that are no fault (`Quirk`): content as a list of parts, tool calls in place of content, no
usage.
"""

import base64
import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    return encode({**named, **further})


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in message.images]
    return [*pictures, {"type": "text", "text": message.text}]


def data_url(image: bytes) -> str:
    """Raises BadImageError."""
    return f"data:image/{_image_type(image)};base64,{base64.b64encode(image).decode('ascii')}"


def _image_type(image: bytes) -> str:
    """By its first bytes: nothing that comes with an image is believed."""
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise BadImageError("an image is no PNG, JPEG or WebP")


def read_completion(body: bytes) -> Completion:
    """The first choice's text and the usage.

    Content that is null is no text: of a refusal, or where thoughts have used up the tokens.

    Raises:
      BadReplyError: no UTF-8, no JSON, or not what a chat completion has.
    """
    try:
        reply = decode(body)
    except ValueError as error:
        raise BadReplyError(f"the body is no JSON ({type(error).__name__})") from error
    try:
        message, usage = reply["choices"][0]["message"], reply.get("usage")
        content = message.get("content") if message.get("tool_calls") else message["content"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadReplyError("the body lacks choices[0].message.content") from error
    text = _text(content)
    quirks = [Quirk.PARTS] if isinstance(content, list) else []
    if not text and message.get("tool_calls"):
        quirks.append(Quirk.TOOL_CALLS)
    if not usage:
        return Completion(text, 0, _text_tokens(text), (*quirks, Quirk.NO_USAGE))
    if not isinstance(usage, dict):
        raise BadReplyError(f"usage is {type(usage).__name__}, no numbers of tokens")
    prompt, completion = (_tokens(usage.get(f"{part}_tokens")) for part in ("prompt", "completion"))
    return Completion(text, prompt, completion, tuple(quirks))


def _text(content: Any) -> str:
    """Content as one text; of parts that are no text (thoughts, say), nothing is used."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) for part in parts):
        raise BadReplyError("choices[0].message.content is a list, and no valid text: not all its parts are objects")
    texts = []
    for part in parts:
        if part.get("type") == "text":
            if not isinstance(text := part.get("text"), str):
                raise BadReplyError(f"choices[0].message.content is {type(text).__name__}, no valid text")
            texts.append(text)
    return "".join(texts)


def estimate_tokens(messages: tuple[Message, ...]) -> int:
    """What a prompt of these messages is taken to have, where a server does not count."""
    return sum(_text_tokens(message.text) + TOKENS_AN_IMAGE * len(message.images) for message in messages)


def _text_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_A_TOKEN)


def _tokens(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_TOKENS:
        raise BadReplyError("usage holds no numbers of tokens")
    return value


def read_models(body: bytes) -> list[str]:
    """Names in a reply of GET /models.

    Raises:
      BadReplyError: it is no such reply.
    """
    try:
        names = [entry["id"] for entry in decode(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadReplyError("the body is no list of models") from error
    if not all(isinstance(name, str) for name in names):
        raise BadReplyError("a model has no name")
    return names
