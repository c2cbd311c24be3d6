import logging
import socket
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists import prompting
from maestro_jax.suite.specialists.ocr import Engine, GlyphReader, OcrService, find_value, reading_order
from maestro_jax.suite.tasks import drawing

KEY_PROMPT = "Find the key that the question names.\nText in the image:\n{text}\nQuestion: {question}\nFocus: "


def picture(*lines: tuple[int, int, str]) -> bytes:
    image = Image.new("RGB", (256, 96), "white")
    for x, y, text in lines:
        ImageDraw.Draw(image).text((x, y), text, "black", drawing.font(20), anchor="lm")
    return drawing.encode(image)


def ask(prompt: str, *images: bytes) -> str:
    return GlyphReader().answer([Message("user", prompt, images)])


class CountingNetwork:
    """Finds one word in every image and counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, image: np.ndarray, use_cls: bool) -> types.SimpleNamespace:
        self.runs += 1
        return types.SimpleNamespace(boxes=np.array([[[1, 2], [9, 2], [9, 8], [1, 8]]]), txts=("word",))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, CountingNetwork]:
    engine, network = Engine(memory=2), CountingNetwork()
    monkeypatch.setattr(engine, "_loaded", lambda: network)
    return engine, network


def test_an_image_is_recognised_once(counted):
    engine, network = counted
    image = picture((10, 40, "a"))
    assert engine.read(image) == engine.read(image)
    assert network.runs == 1


def test_memory_of_pages_is_bounded(counted):
    engine, network = counted
    pages = [picture((10, 40, str(number))) for number in range(3)]
    for page in [*pages, pages[0]]:
        engine.read(page)
    assert network.runs == 4


def test_service_writes_boxes_in_reading_order():
    text, images = OcrService().run((picture((150, 30, "Right"), (20, 30, "Left"), (20, 70, "Below")),), "")
    assert [item.text for item in prompting.read_items(text.splitlines())] == ["Left", "Right", "Below"]
    assert images == ()


def test_service_says_nothing_about_a_blank_or_broken_image(capfd):
    assert OcrService().run((picture(), b"not an image"), "") == ("", ())
    assert capfd.readouterr() == ("", "")


def test_the_network_is_loaded_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no connection is made here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert [item.text for item in Engine().read(picture((10, 40, "Offline")))] == ["Offline"]


def test_network_logs_only_errors():
    OcrService().run((picture((10, 40, "quiet")),), "")
    names = [name for name in logging.root.manager.loggerDict if name.lower().startswith("rapidocr")]
    assert names and all(logging.getLogger(name).level >= logging.ERROR for name in names)


def test_reader_transcribes_the_largest_text():
    image = Image.new("RGB", (256, 96), "white")
    drawing.centered(ImageDraw.Draw(image), (128, 40), "HARBOR", 34)
    drawing.centered(ImageDraw.Draw(image), (220, 80), "XYZ", 14)
    assert ask("Transcribe the text.\nQuestion: What does the sign say?", drawing.encode(image)) == "HARBOR"


def test_reader_finds_the_value_of_a_key_in_pixels():
    image = picture((20, 30, "Milk"), (180, 30, "3.25"), (20, 70, "Total"), (180, 70, "9.75"))
    assert ask(KEY_PROMPT.format(text="", question="What is the total?"), image) == "9.75"


def test_reader_without_images_works_on_the_text_block():
    text = "City: @ 10,10,50,24\nDover @ 100,10,150,24"
    assert ask(KEY_PROMPT.format(text=text, question="What is the city?")) == "Dover"


def test_reader_without_any_text_cannot_tell():
    assert ask("Transcribe the text.\nQuestion: what?", picture()) == prompting.UNKNOWN


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("Name: Ada @ 10,10,90,24", "Ada"),
        ("Name @ 10,10,50,24\nAda @ 80,11,110,25", "Ada"),
        ("Name @ 10,10,50,24\nAda @ 10,28,40,42", "Ada"),
        ("Nane @ 10,10,50,24\nAda @ 80,11,110,25", "Ada"),  # one letter misread
        ("Other @ 10,10,50,24\nAda @ 80,11,110,25", None),
    ],
)
def test_value_of_a_key_by_layout(lines, value):
    assert find_value(prompting.read_items(lines.splitlines()), "What is written in the field name?") == value


def test_reading_order_keeps_rows_together():
    items = prompting.read_items(["b @ 50,11,60,21", "c @ 0,40,10,50", "a @ 0,10,10,20"])
    assert [item.text for item in reading_order(items)] == ["a", "b", "c"]


@given(st.text())
def test_reader_never_raises(text):
    assert isinstance(ask(text), str)
