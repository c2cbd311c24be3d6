"""What the tests of this room share: a tiny random policy with prompts, and a tiny tokenizer with a task."""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import SPECIAL_TOKENS, Tokens, train_tokens
from maestro_jax.registry.description.config import Pair
from maestro_jax.rollout.exchange import observation_frames
from maestro_jax.types import Call, Observation, Task
from tests.policy import reference

VOCABULARY = 400  # room for a token per word
PAIRS = (("Glyph", "Reading"), ("Glyph", "Charting"), ("Lens", "Charting"))
# Call and answer differ in punctuation, so that a tag's neighbours tell which of the two it belongs to.
CALLS = [f"<search> {expert}@@{skill}: look;</search>" for expert, skill in PAIRS]
ANSWER = "<answer>\nseven </answer>"


def architecture() -> PolicyArchitecture:
    """Two decoder layers with grouped queries, one tapped vision block; ids as in `tokens`."""
    toy = reference.architecture()
    return dataclasses.replace(
        toy,
        text=dataclasses.replace(toy.text, vocab_size=VOCABULARY, num_hidden_layers=2, intermediate_size=48),
        vision=dataclasses.replace(toy.vision, depth=1, deepstack_visual_indexes=(0,)),
        image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
        vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
    )


@functools.cache
def policy() -> Policy:
    return Policy(architecture(), nnx.Rngs(0))


def prompts(groups: Sequence[int] = (0, 1, 2)) -> PrefixBatch:
    """Some of three prompts: without an image, with a wide one, with two."""
    rows = reference.three_rows()
    return reference.collate(reference.ROOT, [rows[i] for i in groups], width=24, per_group=2, patches=24, filler=3)


# ---- text --------------------------------------------------------------------------------------------------


def make_tokens(directory: Path) -> Tokens:
    """A tokenizer whose words are those of calls, answers and observation frames."""
    return train_tokens([*CALLS, ANSWER, "I am lost.", *observation_frames()] * 50, VOCABULARY, directory)


def make_prompts(tokens: Tokens) -> Prompts:
    limits = PromptConfig(
        prefix_buckets=(32,), image_buckets=(8,), images_per_task=1, min_pixels=32 * 32, max_pixels=32 * 64
    )
    return Prompts(tokens, architecture(), "You may call.", limits)


def task(number: int) -> Task:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (40 * number % 256, 90, 20)).save(buffer, "PNG")
    return Task(f"toy/{number:03d}", f"how many {number}?", (buffer.getvalue(),), ("seven",), "toy")


class Names:
    """A resolver that knows the pairs, spelt exactly."""

    def resolve(self, expert: str, skill: str) -> Pair | str:
        return Pair(expert, skill) if (expert, skill) in PAIRS else f"Unknown: {expert}."


class Desk:
    """A dispatcher without threads: answers are ready at once, or when the test says so."""

    def __init__(self, answer: Callable[[Call], Observation] | None = None):
        self.answer = answer
        self.submitted: list[tuple[int, Call, str, tuple[bytes, ...], float]] = []
        self.ready: list[tuple[int, Observation]] = []
        self.waited = 0

    def submit(
        self, ticket: int, call: Call, question: str, images: tuple[bytes, ...], deadline: float, asker: str
    ) -> None:
        self.submitted.append((ticket, call, question, images, deadline))
        if self.answer is not None:
            self.ready.append((ticket, self.answer(call)))

    def collect(self) -> list[tuple[int, Observation]]:
        ready, self.ready = self.ready, []
        return ready

    def check(self) -> None:
        """No call ends with an error of the user's."""

    def wait(self, timeout: float) -> bool:
        self.waited += 1
        return bool(self.ready)


def lanes(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random key data uint32 `[B, G, 2]`."""
    return np.random.default_rng(seed).integers(0, 2**32, (*shape, 2), dtype=np.uint32)
