"""The suite's chart domain: bar, line and pie charts of the real tables in `vega_datasets`.

Out go tasks about values, extremes, differences, trends and counts, 256x192 pixels each. Training draws
stocks, barley, cars, wheat, US employment and Seattle's weather; held-out draws other tables
(driving, Crimea, Iowa's electricity, San Francisco's temperatures, airports, iris, LA 1992): none is shared.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw
from vega_datasets import local_data

from maestro_jax.suite.tasks import drawing
from maestro_jax.types import Task

SOURCE = "charts"
T = TypeVar("T")
_WIDTH, _HEIGHT = 256, 192
_TEXT = 12  # px; smaller labels defeat OCR
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 248, 32, 166  # the plot area
_GAP = 18  # px between neighbouring labels, or OCR reads them as one
_READABLE = 0.12  # of the axis: a value below it can hardly be read to 5 %
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "value": (
        "What is the value for {a}?",
        "How high is {a}?",
        "What value does {a} have in the chart?",
        "Give the value of {a}.",
    ),
    "share": (
        "What percentage is {a}?",
        "How many percent does {a} take?",
        "What share in percent has {a}?",
        "Give the percentage of {a}.",
    ),
    "most": (
        "Which category has the highest value?",
        "Which one is the largest?",
        "What has the maximum value in the chart?",
        "Where is the value highest?",
    ),
    "least": (
        "Which category has the lowest value?",
        "Which one is the smallest?",
        "What has the minimum value in the chart?",
        "Where is the value lowest?",
    ),
    "difference": (
        "What is the difference between {a} and {b}?",
        "How much higher is {a} than {b}?",
        "By how much does {a} exceed {b}?",
        "{a} minus {b}: what is the result?",
    ),
    "trend": (
        "Is the line rising or falling overall?",
        "What is the trend of the line, rising or falling?",
        "Does the chart show a rising or falling trend?",
        "From left to right, is the trend rising or falling?",
    ),
    "count": (
        "How many bars are in the chart?",
        "How many bars does the chart have?",
        "Count the bars of the chart.",
        "What is the number of bars?",
    ),
}
_ASKED = {
    "bar": ("value", "value", "most", "least", "difference", "count"),
    "line": ("value", "value", "most", "least", "trend", "trend"),
    "pie": ("share", "share", "most", "least"),
}


@dataclasses.dataclass(frozen=True)
class _Series:
    """Numbers with labels. A `timed` one keeps its order and fits lines; one of `parts` fits pies."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    timed: bool = False
    parts: bool = False


@dataclasses.dataclass(frozen=True)
class _Chart:
    """What one picture shows, and the questions it can bear."""

    kind: str
    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    top: float  # the largest value of the axis; 100 for a pie


def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
    """Yields `count` tasks of a split; the same arguments give the same tasks."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{SOURCE}/{split}".encode())])
    kinds = ("bar", "line", "bar", "pie", "line")
    for index in range(count):
        chart, question, answer = _drawn(kinds[index % len(kinds)], split, rng)
        image = drawing.encode(_DRAW[chart.kind](chart, rng))
        yield Task(f"{SOURCE}/{split}/{index:05d}", question, (image,), (answer,), SOURCE)


def _drawn(kind: str, split: str, rng: np.random.Generator) -> tuple[_Chart, str, str]:
    """Draws charts until one bears the kind of question drawn with it."""
    groups = [group for group in (_fitting(kind, group) for group in _series(split)) if group]
    while True:
        chart = _cut(kind, _pick(_pick(groups, rng), rng), rng)
        asked = _pick(_ASKED[kind], rng)
        names = None if chart is None else _subjects(asked, chart, rng)
        if chart is not None and names is not None:
            wording = _pick(_QUESTIONS[asked], rng).format(**dict(zip("ab", names, strict=False)))
            return chart, wording, _answer(asked, chart, names)


def _fitting(kind: str, group: Sequence[_Series]) -> list[_Series]:
    return [s for s in group if kind == "bar" or (s.timed if kind == "line" else s.parts)]


def _cut(kind: str, series: _Series, rng: np.random.Generator) -> _Chart | None:
    """A window of a timed series or a subset of another; None when it would be unreadable."""
    size = int(rng.integers(3, 7))
    if series.timed:
        first = int(rng.integers(0, max(1, len(series.labels) - size + 1)))
        chosen = list(range(len(series.labels)))[first : first + size]
    else:
        chosen = sorted(rng.permutation(len(series.labels))[:size].tolist())
    labels = tuple(series.labels[i] for i in chosen)
    values = tuple(series.values[i] for i in chosen)
    slot = max(drawing.font(_TEXT).getlength(label) for label in labels) + _GAP
    # a bar needs some height to be seen
    lowest = 0.03 * max(values, default=0) if kind == "bar" else 0
    crowded = kind != "pie" and slot * len(labels) > _RIGHT - _LEFT + _GAP
    if len(values) < 3 or crowded or max(values) <= 0 or min(values) < lowest:
        return None
    if kind == "pie":
        shares = np.asarray(values) / sum(values)
        return _Chart(kind, series.title, labels, tuple(100 * shares), 100) if np.min(shares) > 0.06 else None
    return _Chart(kind, series.title, labels, values, _step(max(values)) * math.ceil(max(values) / _step(max(values))))


def _step(largest: float) -> float:
    """The tick step: 1, 2 or 5 times a power of ten, three to six of them up to the largest value."""
    rough = largest / 5
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _subjects(asked: str, chart: _Chart, rng: np.random.Generator) -> tuple[str, ...] | None:
    """The labels a question is about; None when the chart does not decide it well enough."""
    values = np.asarray(chart.values)
    order = np.sort(values)
    if asked in ("value", "share"):
        readable = np.flatnonzero(values >= (0.08 if asked == "share" else _READABLE) * chart.top).tolist()
        return (chart.labels[_pick(readable, rng)],) if readable else None
    if asked in ("most", "least"):
        if chart.labels[0].isdigit():  # 5 % tolerance would accept any year
            return None
        apart = order[-1] - order[-2] if asked == "most" else order[1] - order[0]
        return () if apart >= 0.03 * chart.top else None
    if asked == "difference":
        high, low = rng.permutation(len(values))[:2]
        return (chart.labels[high], chart.labels[low]) if values[high] - values[low] >= 0.15 * chart.top else None
    if asked == "trend":
        return () if abs(values[-1] - values[0]) >= 0.6 * (order[-1] - order[0]) > 0.1 * chart.top else None
    return ()


def _answer(asked: str, chart: _Chart, names: tuple[str, ...]) -> str:
    """The gold answer, from the table's numbers."""
    of = dict(zip(chart.labels, chart.values, strict=True))
    if asked in ("value", "share"):
        return _number(of[names[0]])
    if asked == "difference":
        return _number(of[names[0]] - of[names[1]])
    if asked == "trend":
        return "rising" if chart.values[-1] > chart.values[0] else "falling"
    if asked == "count":
        return str(len(chart.values))
    return (max if asked == "most" else min)(of, key=lambda label: of[label])


def _number(value: float) -> str:
    """A short number: at least three significant digits, two decimals at most."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _blank(chart: _Chart, rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A near-white sheet with the title."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _pick(("white", "#fbfaf5", "#f6f8fb"), rng))
    draw = ImageDraw.Draw(image)
    drawing.centered(draw, (_WIDTH / 2, 12), chart.title, _TEXT + 1)
    return image, draw


def _axes(chart: _Chart, draw: ImageDraw.ImageDraw, grid: bool) -> list[float]:
    """Grid (or only ticks), tick labels and category labels; returns the middle of each category."""
    step = _step(max(chart.values))
    for number in range(round(chart.top / step) + 1):
        height = _y(number * step, chart)
        draw.line((_LEFT - 4, height, _RIGHT if grid else _LEFT, height), "#d8d8d8" if grid else "black")
        label = f"{number * step:.{max(0, -math.floor(math.log10(step)))}f}"
        draw.text((_LEFT - 6, height), label, "black", drawing.font(_TEXT), anchor="rm")
    draw.line((_LEFT, _TOP, _LEFT, _BOTTOM, _RIGHT, _BOTTOM), "black")
    width = (_RIGHT - _LEFT) / len(chart.labels)
    middles = [_LEFT + (index + 0.5) * width for index in range(len(chart.labels))]
    for middle, label in zip(middles, chart.labels, strict=True):
        drawing.centered(draw, (middle, _BOTTOM + 14), label, _TEXT)
    return middles


def _y(value: float, chart: _Chart) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * value / chart.top


def _draw_bar(chart: _Chart, rng: np.random.Generator) -> Image.Image:
    image, draw = _blank(chart, rng)
    middles = _axes(chart, draw, grid=rng.random() < 0.6)
    half = (_RIGHT - _LEFT) / len(chart.labels) * rng.uniform(0.25, 0.4)
    one = _pick(_COLOURS, rng)
    colours = _shuffled(rng) if rng.random() < 0.5 else [one] * len(_COLOURS)
    for middle, value, colour in zip(middles, chart.values, colours, strict=False):
        draw.rectangle((middle - half, _y(value, chart), middle + half, _BOTTOM - 1), colour)
    return image


def _draw_line(chart: _Chart, rng: np.random.Generator) -> Image.Image:
    image, draw = _blank(chart, rng)
    middles = _axes(chart, draw, grid=rng.random() < 0.6)
    colour = _pick(_COLOURS, rng)
    points = [(x, _y(value, chart)) for x, value in zip(middles, chart.values, strict=True)]
    draw.line(points, colour, width=2)
    if rng.random() < 0.5:
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    return image


def _draw_pie(chart: _Chart, rng: np.random.Generator) -> Image.Image:
    image, draw = _blank(chart, rng)
    colours = _shuffled(rng)
    angle = float(rng.uniform(0, 360))
    for index, (label, share, colour) in enumerate(zip(chart.labels, chart.values, colours, strict=False)):
        draw.pieslice((12, 40, 148, 176), angle, angle + 3.6 * share, colour)
        angle += 3.6 * share
        y = 48 + 22 * index
        draw.rectangle((164, y, 175, y + 11), colour)
        draw.text((182, y + 6), label, "black", drawing.font(_TEXT), anchor="lm")
    return image


_DRAW: Mapping[str, Callable[[_Chart, np.random.Generator], Image.Image]] = {
    "bar": _draw_bar,
    "line": _draw_line,
    "pie": _draw_pie,
}


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _shuffled(rng: np.random.Generator) -> list[str]:
    return [_COLOURS[i] for i in rng.permutation(len(_COLOURS))]


@functools.cache
def _series(split: str) -> tuple[tuple[_Series, ...], ...]:
    """The series of a split, one group per table, so that a wide table is not drawn more often than a small one."""
    tables = (
        (_stocks, _barley, _cars, _wheat, _employment, _seattle)
        if split == "train"
        else (_driving, _crimea, _iowa, _san_francisco, _airports, _iris, _los_angeles)
    )
    return tuple(tuple(table()) for table in tables)


def _rowwise(title: str, table: Any, timed: bool = False, parts: bool = False) -> Iterator[_Series]:
    """One series per row of a pandas table: the columns are the labels, `title` is given the row's name."""
    for name, row in table.iterrows():
        row = row.dropna()
        yield _Series(title.format(name), tuple(map(str, row.index)), tuple(map(float, row)), timed, parts)


def _stocks() -> Iterator[_Series]:
    table = local_data.stocks()
    yearly = table.groupby(["symbol", table["date"].dt.year])["price"].mean().unstack()
    yield from _rowwise("{} share price", yearly, timed=True)
    yield from _rowwise("Share prices {}", yearly.T)


def _barley() -> Iterator[_Series]:
    table = local_data.barley()
    table["site"] = table["site"].str.split().str[0]  # "University Farm", "Grand Rapids"
    table = table[~table["variety"].str.contains("No.", regex=False)].rename(columns={"variety": "label"})
    for year, rows in table.groupby("year"):
        yield from _rowwise(f"{{}} barley {year}", rows.pivot_table("yield", "label", "site"), parts=True)
        yield from _rowwise(f"Barley at {{}} {year}", rows.pivot_table("yield", "site", "label"), parts=True)


def _cars() -> Iterator[_Series]:
    table = local_data.cars()
    table["brand"] = table["Name"].str.split().str[0].str.capitalize()
    common = table[table.groupby("brand")["brand"].transform("size") >= 5]
    wanted = {"Miles_per_Gallon": "Mileage", "Horsepower": "Power", "Displacement": "Engine size"}
    by_brand = common.groupby("brand")[list(wanted)].mean().rename(columns=wanted).T
    by_year = common.groupby(common["Year"].dt.year)[list(wanted)].mean().rename(columns=wanted).T
    yield from _rowwise("{} by brand", by_brand)
    yield from _rowwise("{} by year", by_year, timed=True)
    counts = common.groupby([common["Year"].dt.year, "brand"]).size().unstack()
    yield from _rowwise("Car models {}", counts, parts=True)


def _wheat() -> Iterator[_Series]:
    table = local_data.wheat().set_index("year").rename(columns={"wheat": "Wheat price", "wages": "Wages"})
    yield from _rowwise("{}", table[["Wheat price", "Wages"]].T, timed=True)


def _employment() -> Iterator[_Series]:
    names = {"construction": "Build", "manufacturing": "Factory", "information": "Media", "retail_trade": "Retail"}
    names |= {"financial_activities": "Bank", "government": "State", "mining_and_logging": "Mining"}
    names |= {"utilities": "Energy", "leisure_and_hospitality": "Leisure", "education_and_health_services": "Health"}
    table = local_data.us_employment()
    yearly = table.groupby(table["month"].str[:4])[list(names)].mean().rename(columns=names)
    yield from _rowwise("{} jobs, thousands", yearly.T, timed=True)
    yield from _rowwise("US jobs {}, thousands", yearly, parts=True)


def _seattle() -> Iterator[_Series]:
    table = local_data.seattle_weather()
    year, month = table["date"].dt.year, table["date"].dt.month.map(lambda number: _MONTHS[number - 1])
    for column, title in (("temp_max", "Daily high"), ("wind", "Wind"), ("precipitation", "Rainfall")):
        yield from _rowwise(f"{title} {{}}", table.groupby([year, month])[column].mean().unstack()[list(_MONTHS)], True)
    days = table.groupby([year, table["weather"].str.capitalize()]).size().unstack()
    yield from _rowwise("Days by sky {}", days, parts=True)


def _driving() -> Iterator[_Series]:
    table = local_data.driving().set_index("year").rename(columns={"miles": "Miles driven", "gas": "Gas price"})
    yield from _rowwise("{}", table[["Miles driven", "Gas price"]].T, timed=True)


def _crimea() -> Iterator[_Series]:
    table = local_data.crimea()
    table.columns = table.columns.str.capitalize()
    table["Month"] = table["Date"].dt.month.map(lambda number: _MONTHS[number - 1])
    causes = ["Wounds", "Other", "Disease"]
    for start in (0, 12):  # a month's name is unique within twelve rows
        yield from _rowwise("Deaths: {}", table[start : start + 12].set_index("Month")[causes].T, True)
    yield from _rowwise("Deaths {}", table.set_index(table["Date"].dt.strftime("%b %Y"))[causes], parts=True)


def _iowa() -> Iterator[_Series]:
    table = local_data.iowa_electricity()
    short = {"Fossil Fuels": "Fossil", "Nuclear Energy": "Nuclear", "Renewables": "Green"}
    wide = table.assign(source=table["source"].map(short), year=table["year"].dt.year)
    wide = wide.pivot_table("net_generation", "year", "source")
    yield from _rowwise("Iowa power {}", wide, parts=True)
    yield from _rowwise("{} power in Iowa", wide.T, timed=True)


def _san_francisco() -> Iterator[_Series]:
    table = local_data.sf_temps()
    month = table["date"].dt.month.map(lambda number: _MONTHS[number - 1])
    hour = table["date"].dt.strftime("%Hh")
    yield from _rowwise("Temperature in {}", table.groupby([month, hour])["temp"].mean().unstack(), timed=True)
    # degrees over freezing, so that the months differ visibly on an axis that starts at zero
    over = (table["temp"] - 32).clip(lower=0)
    yield from _rowwise("Degrees over 32F, {}", over.groupby([hour, month]).mean().unstack()[list(_MONTHS)], timed=True)


def _airports() -> Iterator[_Series]:
    states = local_data.airports()["state"].value_counts()
    largest = states[states >= 40].sort_index()
    yield _Series("Airports by state", tuple(largest.index), tuple(map(float, largest)), parts=True)


def _iris() -> Iterator[_Series]:
    table = local_data.iris()
    means = table.assign(species=table["species"].str.capitalize()).groupby("species").mean()
    means.columns = [column.replace("Length", " length").replace("Width", " width") for column in means.columns]
    yield from _rowwise("Iris {}, cm", means.T)


def _los_angeles() -> Iterator[_Series]:
    table = local_data.la_riots()
    ages = (table["age"].dropna() // 10 * 10).astype(int).astype(str) + "s"
    for title, column in (("Deaths by day, 1992", table["death_date"].dt.strftime("%m-%d")), ("Deaths by age", ages)):
        counts = column.value_counts().sort_index()
        yield _Series(title, tuple(counts.index), tuple(map(float, counts)), parts=True)
