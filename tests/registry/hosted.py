"""Specialists for other processes, where the fake ones of `conftest.py` are not to be had."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from maestro_jax.registry.description.interface import Message

FOREVER = 10_000.0  # seconds; whoever sleeps so long is killed


class Obeys:
    """Does what it is told; else says who it is: its process and how often it has been asked."""

    def __init__(self, sizes: tuple[int, ...] = (1,)):
        assert isinstance(sizes, tuple)
        self.asked = 0

    def answer(self, messages: Sequence[Message]) -> str:
        self.asked += 1
        print("noise on standard output", sys.stdin.read(), flush=True)
        match messages[-1].text.split():
            case ["exit", code]:
                os._exit(int(code))
            case ["hang"]:
                time.sleep(FOREVER)
            case ["hang", "with", "child"]:
                subprocess.run(["sleep", str(FOREVER)])
            case ["raise"]:
                raise ValueError("secret detail")
            case ["quit"]:
                raise SystemExit(3)
            case ["write", number]:
                return "\N{GRINNING FACE}" * int(number)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["echo"]:
                return f"{messages[0].role} {messages[0].text!r} {[image.hex() for image in messages[-1].images]}"
        return f"{os.getpid()} {self.asked}"


class Mirror:
    """A service that returns what it was given."""

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        return text, images


class DiesYoung:
    def __init__(self) -> None:
        os._exit(7)


class Slow:
    """Takes longer to build than a request may last, and dies when it is told to."""

    def __init__(self, seconds: float):
        time.sleep(seconds)

    def answer(self, messages: Sequence[Message]) -> str:
        if messages[-1].text == "hang":
            time.sleep(FOREVER)
        return "there"
