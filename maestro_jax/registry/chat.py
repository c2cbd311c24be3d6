"""Chat completions as they travel: a request as JSON bytes, JSON bytes as a reply. No I/O.

The format is that of OpenAI's POST /v1/chat/completions, of which vLLM, SGLang, llama.cpp and hosted APIs serve at
least what is used here: messages with images as data URLs in, one choice's text and the usage out. What a server sends
is untrusted: it is read as JSON and nothing else, and all that is used of it is checked.
"""

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

from maestro_jax.registry.interface import Message, Sampling
from maestro_jax.registry.strict_json import decode, encode

MOST_TOKENS = 10**9  # no request has more; a server that says so is not believed

# What a request consists of; further fields come from an expert's `options`.
OWN_FIELDS = ("model", "messages", "temperature", "max_tokens", "top_p", "stream")


class BadImageError(ValueError):
    """Bytes that are no PNG, JPEG or WebP."""


class BadReplyError(ValueError):
    """A body that is no chat completion."""


class Completion(NamedTuple):
    """What is used of a chat completion."""

    text: str
    prompt_tokens: int
    completion_tokens: int


def request_body(model: str, messages: tuple[Message, ...], sampling: Sampling, further: Mapping[str, Any]) -> bytes:
    """A request.

    Raises:
      BadImageError: an image is of no type that servers take.
    """
    fields = {
        "model": model,
        "messages": [{"role": message.role, "content": _content(message)} for message in messages],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "top_p": sampling.top_p,
        "stream": False,
        **further,
    }
    return encode(fields)


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
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise BadReplyError("the body lacks choices[0].message.content or usage") from error
    text = "" if text is None else text
    if not isinstance(text, str):
        raise BadReplyError(f"choices[0].message.content is {type(text).__name__}, no valid text")
    return Completion(text, _tokens(prompt), _tokens(completion))


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
