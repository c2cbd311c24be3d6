"""The suite's text domain: words on signs, receipts and filled-in forms, rendered from real values.

In come tables of `vega_datasets` (cities, airports, cars, weather days, stock prices). Out go tasks
whose answer is a piece of the picture's text. Cities and table rows are split by a hash of their name,
goods and price series by the lists below, so that no held-out answer source is seen in training.
"""

import dataclasses
import functools
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from vega_datasets import local_data

from maestro_jax.suite.tasks import drawing
from maestro_jax.types import Task

SOURCE = "reading"
T = TypeVar("T")
_WIDTH = 256
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", None)  # None: Pillow's own
# fmt: off
_GOODS = {
    "train": (
        "Bread", "Milk", "Apples", "Cheese", "Coffee", "Butter", "Rice", "Honey", "Tomato", "Onion", "Pasta",
        "Yogurt", "Orange", "Salad", "Juice", "Beans", "Cookies", "Pepper", "Salmon", "Garlic", "Noodles",
        "Olives", "Spinach", "Walnuts",
    ),
    "test": (
        "Lemon", "Carrot", "Flour", "Sugar", "Grapes", "Chicken", "Potato", "Cereal", "Melon", "Peanuts",
        "Cream", "Muffin", "Shrimp", "Celery",
    ),
}
# fmt: on
_PRICED = {"train": ("MSFT", "AMZN", "AAPL"), "test": ("IBM", "GOOG")}

_WORD_QUESTIONS = (
    "What word is written in the picture?",
    "Which word does the sign show?",
    "Read the word on the sign.",
    "What does the sign say?",
    "Which word is written in large letters?",
)
_TOTAL_QUESTIONS = (
    "What is the total on the receipt?",
    "How much is the total?",
    "Which total was paid according to the receipt?",
    "Give the total of this receipt.",
)
_PRICE_QUESTIONS = (
    "What did {key} cost?",
    "How much does the receipt charge for {key}?",
    "What is the price of {key}?",
    "Which price is listed for {key}?",
)
_FIELD_QUESTIONS = (
    "What is written in the field {key}?",
    "What is the {key} on the form?",
    "What does the form show for {key}?",
    "Read the form entry for {key}.",
)


@dataclasses.dataclass(frozen=True)
class _Form:
    """A filled-in form: its title and (field, value) rows, all from one row of a table."""

    title: str
    fields: tuple[tuple[str, str], ...]


def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
    """Yields `count` tasks of a split; the same arguments give the same tasks."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{SOURCE}/{split}".encode())])
    makers: tuple[Callable[[str, np.random.Generator], tuple[Image.Image, str, str]], ...] = (_word, _receipt, _form)
    for index in range(count):
        image, question, answer = makers[index % len(makers)](split, rng)
        noisy = drawing.encode(_speckled(image, rng))
        yield Task(f"{SOURCE}/{split}/{index:05d}", question, (noisy,), (answer,), SOURCE)


def _word(split: str, rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """One city name in large letters, slightly turned, over its small airport code."""
    word, code = _pick(_cities(split), rng)
    word = _pick((word, word.upper(), word.lower()), rng)
    image, ink = _paper(96, rng)
    size = min(int(rng.integers(18, 40)), 297 // len(word))
    draw = ImageDraw.Draw(image)
    draw.text((_WIDTH / 2 + rng.integers(-12, 13), 44), word, ink, _font(rng, size), anchor="mm")
    draw.text((216, 82), code, ink, drawing.font(14), anchor="mm")
    turned = image.rotate(rng.uniform(-3, 3), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))
    return turned, _pick(_WORD_QUESTIONS, rng), word


def _receipt(split: str, rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """Two to four goods with prices, and their total."""
    goods = [str(name) for name in rng.choice(_GOODS[split], rng.integers(2, 5), replace=False)]
    cents = [int(price) for price in rng.choice(_prices(split), len(goods))]
    lines = [(name, f"{price / 100:.2f}") for name, price in zip(goods, cents, strict=True)]
    lines.append(("Total", f"{sum(cents) / 100:.2f}"))
    image = _rows(_pick(_cities(split), rng)[0].upper(), lines, 192, rng, right_aligned=True)
    if rng.random() < 0.4:
        return image, _pick(_TOTAL_QUESTIONS, rng), lines[-1][1]
    name, price = lines[rng.integers(len(goods))]
    return image, _pick(_PRICE_QUESTIONS, rng).format(key=name.lower()), price


def _form(split: str, rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """One row of a table as a form; asks for one field."""
    form = _pick(_pick(_forms(split), rng), rng)
    image = _rows(form.title, list(form.fields), 160, rng, right_aligned=False)
    key, value = _pick(form.fields, rng)
    return image, _pick(_FIELD_QUESTIONS, rng).format(key=key.lower()), value


def _rows(
    title: str, lines: list[tuple[str, str]], height: int, rng: np.random.Generator, right_aligned: bool
) -> Image.Image:
    """A title over `key value` lines, in one font."""
    image, ink = _paper(height, rng)
    draw = ImageDraw.Draw(image)
    font = _font(rng, int(rng.integers(12, 17)))
    step = (height - 44) / len(lines)
    draw.text((_WIDTH / 2, 18), title, ink, _font(rng, 17), anchor="mm")
    draw.line((16, 32, _WIDTH - 16, 32), ink)
    for number, (key, value) in enumerate(lines):
        middle = 36 + (number + 0.5) * step
        colon = "" if right_aligned else ":"
        draw.text((20, middle), key + colon, ink, font, anchor="lm")
        draw.text((236 if right_aligned else 132, middle), value, ink, font, anchor="rm" if right_aligned else "lm")
    return image


def _paper(height: int, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int]]:
    """A light sheet with dark ink, or now and then the reverse."""
    light, dark = _colour(rng.integers(205, 256, 3)), _colour(rng.integers(0, 130, 3))
    sheet, ink = (dark, light) if rng.random() < 0.15 else (light, dark)
    return Image.new("RGB", (_WIDTH, height), sheet), ink


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = values.tolist()
    return red, green, blue


def _speckled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds the grain of a cheap camera."""
    pixels = np.asarray(image, np.float32)
    grain = rng.standard_normal(pixels.shape[:2], np.float32)[:, :, None] * rng.uniform(0, 46)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return _typeface(_pick(_FONTS, rng), size)


@functools.cache
def _typeface(name: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that ships inside the matplotlib wheel (located without importing it), or Pillow's own."""
    spec = importlib.util.find_spec("matplotlib")
    if name is None or spec is None or spec.origin is None:
        return drawing.font(size)
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name, size)


def _in_split(split: str, name: str) -> bool:
    """A quarter of all names is held out, by hash: stable across runs and machines."""
    return (zlib.crc32(name.encode()) % 4 == 0) == (split == "test")


@functools.cache
def _cities(split: str) -> tuple[tuple[str, str], ...]:
    """(city, airport code) for one-word city names of 4 to 11 letters."""
    table = local_data.airports().drop_duplicates("city")
    pairs = zip(table["city"], table["iata"], strict=True)
    # a missing city is not a string
    return tuple(
        (city, code)
        for city, code in pairs
        if isinstance(city, str) and city.isalpha() and city.isascii() and 4 <= len(city) <= 11
        if _in_split(split, city)
    )


@functools.cache
def _prices(split: str) -> np.ndarray:
    """Month prices of stocks below 100 dollars, in cents."""
    table = local_data.stocks()
    prices = table[table["symbol"].isin(_PRICED[split])]["price"]
    return np.unique((prices[prices < 100] * 100).round().astype(int))


@functools.cache
def _forms(split: str) -> tuple[tuple[_Form, ...], ...]:
    """Airport, vehicle and weather forms of a split."""
    return _airport_forms(split), _vehicle_forms(split), _weather_forms(split)


def _airport_forms(split: str) -> tuple[_Form, ...]:
    table = local_data.airports().set_index("iata")
    forms = []
    for city, code in _cities(split):
        row = table.loc[code]
        if code.isalpha():
            latitude = ("Latitude", f"{row['latitude']:.2f}")
            forms.append(_Form("Airport", (("City", city), ("State", row["state"]), ("Code", code), latitude)))
    return tuple(forms)


def _vehicle_forms(split: str) -> tuple[_Form, ...]:
    table = local_data.cars().dropna()
    return tuple(
        _Form(
            "Vehicle",
            (
                ("Brand", car.Name.split()[0].capitalize()),
                ("Year", str(car.Year.year)),
                ("Power", str(int(car.Horsepower))),
                ("Weight", str(car.Weight_in_lbs)),
            ),
        )
        for car in table.itertuples()
        if _in_split(split, car.Name)
    )


def _weather_forms(split: str) -> tuple[_Form, ...]:
    table = local_data.seattle_weather()
    return tuple(
        _Form(
            "Daily log",
            (
                ("Date", f"{day.date:%Y-%m-%d}"),
                ("Sky", day.weather.capitalize()),
                ("High", f"{day.temp_max:.1f}"),
                ("Wind", f"{day.wind:.1f}"),
            ),
        )
        for day in table.itertuples()
        if _in_split(split, f"{day.date:%Y-%m-%d}")
    )
