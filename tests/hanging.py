"""An expert that hangs, for runs that are stopped meanwhile: a class for a registry, and a config that names it."""

import time
from collections.abc import Sequence
from pathlib import Path

from maestro_jax.registry.description.interface import Message

CONFIG = """
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    hanging = {{"implementation": "tests.hanging:Hanging", "options": {{"until": {until!r}}}}}
    config.registry.experts = tuple(expert | hanging for expert in config.registry.experts)
    return config
"""


class Hanging:
    """Answers when a file is there."""

    def __init__(self, until: str):
        self.until = Path(until)

    def answer(self, messages: Sequence[Message]) -> str:
        while not self.until.exists():
            time.sleep(0.05)
        return "7"
