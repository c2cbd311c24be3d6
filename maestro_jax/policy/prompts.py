"""From tasks to the arrays of `PrefixBatch`: chat template, image tokens, positions, buckets.

The system prompt (the rendered registry) is the root that all groups share; each task's images and
question are its prefix. Splits lie at special tokens, so the ids are those of the whole prompt.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from maestro_jax.errors import ConfigError
from maestro_jax.images import decode_image
from maestro_jax.policy import preprocess
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.tokens import Tokens
from maestro_jax.policy.vision import ImageBatch
from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Limits and buckets of prompts; lengths in tokens, image sizes in pixels."""

    prefix_buckets: tuple[int, ...]
    image_buckets: tuple[int, ...]  # patches an image
    images_per_task: int
    min_pixels: int
    max_pixels: int


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task whose images are decoded and cut: what takes long, and needs no other task."""

    task: Task
    images: tuple[preprocess.PreparedImage, ...]


Agree = Callable[[Sequence[int]], Sequence[int]]


class Prompts:
    """Builds the prompts of tasks for one registry text.

    Args:
      left_out: the end of the header behind the question, where the episode brings it along.
    """

    def __init__(
        self,
        tokens: Tokens,
        architecture: PolicyArchitecture,
        system: str,
        config: PromptConfig,
        left_out: str = "",
    ):
        _check_tokens(tokens, architecture)
        self.left_out = left_out
        self.tokens = tokens
        self.architecture = architecture
        self.config = config
        self.merge = architecture.vision.spatial_merge_size
        for size in config.image_buckets:
            if size % self.merge**2:
                raise ConfigError(
                    f"config.policy.image_buckets has {size}: use multiples of {self.merge**2}, the patches of a token"
                )
        self.special = re.compile("|".join(map(re.escape, tokens.special_texts)))
        if (found := self.special.search(system)) is not None:  # would end the system turn, or show an image
            raise ConfigError(
                f"the system prompt holds the special token {found[0]!r}; take it out of the file that "
                "config.policy.system_prompt names, or of the registry's descriptions"
            )
        self.system = {"role": "system", "content": system}
        self.root_text = self._render([self.system], generate=False)
        self.root = np.array(tokens.encode(self.root_text), np.int32)

    def batch(self, tasks: Sequence[Task], agree: Agree = tuple) -> PrefixBatch:
        """Numpy-valued `PrefixBatch` of one group per task; errors as of `prepare` and `collate`."""
        return self.collate([self.prepare(task) for task in tasks], agree=agree)

    def prepare(self, task: Task) -> PreparedTask:
        """Decodes the images and cuts them; may run in any thread, ahead of the step that needs it.

        Raises:
          DataError: a broken image.
          ConfigError: more images than a task may have.
        """
        if len(task.images) > self.config.images_per_task:
            raise ConfigError(
                f"task {task.id} has {len(task.images)} images; set config.policy.images_per_task={len(task.images)}"
            )
        pixels = [decode_image(data, f"task {task.id}, image {i}") for i, data in enumerate(task.images)]
        limits = (self.config.min_pixels, self.config.max_pixels)
        images = [preprocess.prepare_image(p, self.architecture.vision, *limits) for p in pixels]
        return PreparedTask(task, tuple(images))

    def collate(self, prepared: Sequence[PreparedTask], longest: bool = False, agree: Agree = tuple) -> PrefixBatch:
        """Numpy-valued `PrefixBatch` of one group per task.

        Args:
          longest: takes the largest buckets, whatever the tasks, so that batches can be mixed.
          agree: makes of the sizes of this batch those of all processes, whose batches are parts of one.

        Raises:
          DataError: a prompt or an image beyond the largest bucket.
        """
        tasks, images = [one.task for one in prepared], [one.images for one in prepared]
        rows = [self._prefix(task, shown) for task, shown in zip(tasks, images, strict=True)]
        width = max(self._bucket(task, row) for task, row in zip(tasks, rows, strict=True))
        most = max((len(image.cut) for shown in images for image in shown), default=1)
        patches = preprocess.bucket(
            most, self.config.image_buckets, "an image's patches", "raise config.policy.image_buckets"
        )
        if longest:
            width, patches = max(self.config.prefix_buckets), max(self.config.image_buckets)
        width, patches = agree((width, patches))
        per_group = max(self.config.images_per_task, 1)
        return collate_prompts(self.root, rows, images, self.architecture, width, per_group, patches)

    def _prefix(self, task: Task, images: Sequence[preprocess.PreparedImage]) -> np.ndarray:
        """Ids of the user turn and the assistant header, each image expanded to its tokens."""
        # The question is foreign text: no special token in it may be parsed.
        content: list[dict[str, str]] = [{"type": "image"} for _ in images]
        marker = "\x00question\x00"
        text = self._render([self.system, {"role": "user", "content": [*content, {"type": "text", "text": marker}]}])
        if not text.startswith(self.root_text):
            raise ConfigError(
                "the chat template writes the system turn differently where a user turn follows, so that groups "
                "cannot share it; use the published template of a Qwen3-VL checkpoint"
            )
        before, after = text.removeprefix(self.root_text).removesuffix(self.left_out).split(marker)
        # Tokens reach across other borders: the line end of "user\n" merges with those of the question.
        start = max((found.end() for found in self.special.finditer(before)), default=0)
        end = next((found.start() for found in self.special.finditer(after)), len(after))
        ids: list[int] = []
        shown = iter(images)
        for token in self.tokens.encode(before[:start]):
            ids.extend([token] * (next(shown).tokens(self.merge) if token == self.tokens.image else 1))
        ids.extend(self.tokens.encode_foreign(before[start:] + task.question + after[:end]))
        ids.extend(self.tokens.encode(after[end:]))
        return np.array(ids, np.int32)

    def _bucket(self, task: Task, row: np.ndarray) -> int:
        what = f"the prompt of task {task.id}"
        return preprocess.bucket(len(row), self.config.prefix_buckets, what, "raise config.policy.prefix_buckets")

    def _render(self, messages: list[dict], generate: bool = True) -> str:
        tokenizer = self.tokens.tokenizer
        return tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, tokenize=False, add_generation_prompt=generate
        )


def collate_prompts(
    root: np.ndarray,
    rows: Sequence[np.ndarray],
    images: Sequence[Sequence[preprocess.PreparedImage]],
    architecture: PolicyArchitecture,
    width: int,
    per_group: int,
    patches: int,
) -> PrefixBatch:
    """Prefixes of ids, each image expanded to its tokens, as a numpy-valued `PrefixBatch` padded on the right.

    Args:
      width: P.
      per_group: M, image slots a group.
      patches: size of an image slot, a multiple of the patches of a token.
    """
    merge, image_token = architecture.vision.spatial_merge_size, architecture.image_token_id
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    positions = np.zeros((len(rows), width, 3), np.int32)
    image_index = np.full((len(rows), width), -1, np.int32)
    next_position = np.zeros(len(rows), np.int32)
    for at, (row, shown) in enumerate(zip(rows, images, strict=True)):
        n = len(row)
        tokens[at, :n], mask[at, :n] = row, True
        positions[at, :n], next_position[at] = preprocess.mrope_positions(
            row, image_token, shown, merge, start=len(root)
        )
        stride = patches // merge**2
        image_index[at, :n][row == image_token] = [
            i * stride + k for i, image in enumerate(shown) for k in range(image.tokens(merge))
        ]
    collated = ImageBatch(**preprocess.collate_images(images, architecture.vision, per_group, patches))
    last = mask.sum(axis=1).astype(np.int32) - 1
    return PrefixBatch(root, tokens, mask, positions, last, next_position, collated, image_index)


def take_prompts(prompts: PrefixBatch, groups: np.ndarray, width: int) -> PrefixBatch:
    """The prompts of some groups, numpy-valued, with prefixes of `width` tokens; images stay padded as they are."""
    count = len(prompts.tokens)
    cut = {name: getattr(prompts, name)[:, :width] for name in ("tokens", "mask", "positions", "image_index")}

    def rows(leaf: np.ndarray) -> np.ndarray:
        each = len(leaf) // count  # images have several rows a group
        return leaf.reshape(count, each, *leaf.shape[1:])[groups].reshape(-1, *leaf.shape[1:])

    taken = jax.tree.map(rows, dataclasses.replace(prompts, root=None, **cut))
    return dataclasses.replace(taken, root=prompts.root)


def join_prompts(rows: Sequence[tuple[PrefixBatch, int]], root: Any) -> PrefixBatch:
    """Single prompts of batches of equal widths as one batch, behind a root that is taken as it is."""
    taken = [take_prompts(batch, np.array([row]), batch.tokens.shape[1]) for batch, row in rows]
    without = [dataclasses.replace(batch, root=None) for batch in taken]
    return dataclasses.replace(jax.tree.map(lambda *leaves: np.concatenate(leaves), *without), root=root)


def _check_tokens(tokens: Tokens, architecture: PolicyArchitecture) -> None:
    """An id beyond the embedding table would silently read its last row."""
    size, rows = tokens.size, architecture.text.vocab_size
    if size > rows:
        raise ConfigError(
            f"the tokenizer has {size} ids, the policy's vocab_size is {rows}; set "
            f"config.policy.architecture.text_config.vocab_size={size} or use the checkpoint's own tokenizer"
        )
    if tokens.image != architecture.image_token_id:
        raise ConfigError(
            f"the tokenizer's image token is {tokens.image}, config.policy.architecture.image_token_id is "
            f"{architecture.image_token_id}; use the tokenizer and config.json of one checkpoint"
        )
