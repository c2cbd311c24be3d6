"""What counts as the same request: keys of what experts and services are asked."""

import functools
import hashlib
import threading
from collections.abc import Iterable

from cachetools import LRUCache

from maestro_jax.registry.description.interface import Request, Sampling

MOST_IMAGE_BYTES = 2**26  # of images whose digests are known; one of 2 MB is hashed anew in 2 ms
_ENTRY_BYTES = 600  # of a digest and its place

# Image → its digest and what the pair takes.
_digests: LRUCache[bytes, tuple[str, int]] = LRUCache(MOST_IMAGE_BYTES, getsizeof=lambda kept: kept[1])
_digests_lock = threading.Lock()


def content_key(parts: Iterable[str | bytes]) -> str:
    """sha256 over parts, each with its type and length, so that no two lists of parts collide by joining."""
    return hashlib.sha256(_joined(parts)).hexdigest()


def _joined(parts: Iterable[str | bytes]) -> bytes:
    pieces: list[bytes] = []
    for part in parts:
        if isinstance(part, str):
            data = part.encode("utf-8", "surrogatepass")
            pieces += (b"t%d:" % len(data), data)
        else:
            pieces += (b"b%d:" % len(part), part)
    return b"".join(pieces)


def request_key(identity: str, request: Request) -> str:
    """The key of an expert's reply: who is asked, how it decodes, what it is shown. Not the deadline."""
    parts: list[str | bytes] = []
    for message in request.messages:
        parts += [message.role, message.text, str(len(message.images)), *map(image_digest, message.images)]
    # An expert's own settings are part of its identity.
    return hashlib.sha256(_asked(identity, request.sampling or Sampling()) + _joined(parts)).hexdigest()


def image_digest(image: bytes) -> str:
    """sha256 of an image. The members of a group show the same ones, turn after turn: it is kept. For any thread."""
    with _digests_lock:
        if (known := _digests.get(image)) is not None:
            return known[0]
    digest, size = hashlib.sha256(image).hexdigest(), _ENTRY_BYTES + len(image)
    if size <= MOST_IMAGE_BYTES:
        with _digests_lock:
            _digests[image] = digest, size
    return digest


@functools.lru_cache(maxsize=256)  # experts and how they are asked are few
def _asked(identity: str, sampling: Sampling) -> bytes:
    return _joined(["ask", identity, repr((sampling.temperature, sampling.max_tokens, sampling.top_p))])
