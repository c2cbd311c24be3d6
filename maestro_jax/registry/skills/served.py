"""Services that are models: OCR, captions, detection and zoom behind the same interface as experts.

In: images and a text. Out: one request to the model for each image, its replies as text or as boxes in those images.
"""

import asyncio
import dataclasses
from collections.abc import Sequence

from maestro_jax.registry.description.boxes import Box, Frame, read_boxes, write_boxes
from maestro_jax.registry.description.config import ServiceConfig
from maestro_jax.registry.description.interface import Expert, Message, Reply, Request, ServiceResult
from maestro_jax.registry.skills.pictures import shown_size, upright
from maestro_jax.registry.skills.templates import fill, said
from maestro_jax.types import Status, Usage

NOTHING_FOUND = "nothing found"


class ServedService:
    """A service whose work an expert does (see `registry.description.interface.Service`). Caching is the expert's own.

    Args:
      expert: not closed with the service; it belongs to the registry.
      frame: what its box coordinates mean.
    """

    def __init__(self, config: ServiceConfig, expert: Expert, frame: Frame):
        self.name = config.name
        self._config, self._expert, self._frame = config, expert, frame

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        seconds = min(deadline, self._config.timeout)
        finds_boxes = self._config.parse == "boxes"
        if finds_boxes:
            images = await turned(images)
        replies = await asyncio.gather(*(self._ask(image, text, seconds) for image in images))
        status = next((reply.status for reply in replies if reply.status is not Status.OK), Status.OK)
        usage = sum((reply.usage for reply in replies), Usage())
        taken = max((reply.seconds for reply in replies), default=0.0)
        if status is not Status.OK:
            return ServiceResult(status=status, seconds=taken, usage=usage)
        if finds_boxes:
            boxes, written = self._boxes(images, replies)
            return ServiceResult(written, seconds=taken, boxes=boxes, usage=usage)
        return ServiceResult(_joined([said(reply.text) for reply in replies]), seconds=taken, usage=usage)

    async def close(self) -> None: ...

    async def _ask(self, image: bytes, text: str, seconds: float) -> Reply:
        message = Message("user", fill(self._config.prompt, {"text": text}), (image,))
        return await self._expert.ask(Request((message,), deadline=seconds))

    def _boxes(self, images: Sequence[bytes], replies: Sequence[Reply]) -> tuple[tuple[Box, ...], str]:
        """The boxes of all images, and the same as text."""
        sizes = [shown_size(image) for image in images]
        boxes: list[Box] = []
        for number, reply in enumerate(replies):
            found = read_boxes(said(reply.text), sizes[number : number + 1], self._frame)
            boxes += [dataclasses.replace(box, image=number) for box in found]
        return tuple(boxes), write_boxes(boxes, sizes) or NOTHING_FOUND


async def turned(images: Sequence[bytes]) -> tuple[bytes, ...]:
    """The images as they are shown, for a model that is to say where things are (`pictures.upright`)."""
    return tuple(await asyncio.gather(*(asyncio.to_thread(upright, image) for image in images)))


def _joined(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"Picture {number}:\n{text}" for number, text in enumerate(texts, start=1))
