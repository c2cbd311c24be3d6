"""Chart-Lens: reads bar, line and pie charts from pixels, with a skill's text block for everything written.

In come the prompt of a skill and the picture. Out goes the kind of chart, or a label, a number or a trend.
Its strength is geometry: it does not read text itself, so that ticks and labels must come from an OCR stage.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import cv2
import numpy as np

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists import prompting

_COLOURFUL = 40  # spread of RGB above which a pixel is a mark and not ink, grid or paper
_SIMILAR = 0.75  # two words are the same label when this similar
# Of what is compared with each other, since text and question are foreign; charts have less.
_MOST_LABELS, _MOST_TICKS, _MOST_WORDS, _LONGEST_WORD = 32, 64, 64, 48
_NUMBER = re.compile(r"^(\d+(?:\.\d+)?)\W?$")  # OCR may read the tick itself as a dash


@dataclasses.dataclass(frozen=True)
class _Mark:
    """One connected patch of colour; right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int
    area: int

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    @property
    def fill(self) -> float:
        return self.area / ((self.right - self.left) * (self.bottom - self.top))


class ChartLens:
    """A chart model that follows the rules of the chart type named in its prompt, and takes bars when none is named."""

    def answer(self, messages: Sequence[Message]) -> str:
        """The type of the chart when asked for it, else what pixels and text block say to the question."""
        prompt, images = prompting.last_user(messages)
        rgb = prompting.pixels(images[0]) if images else None
        if rgb is None:
            return prompting.UNKNOWN
        marks = _marks(rgb)
        named = set(re.findall(r"\b(bar|line|pie)s?\b", prompt.instruction.lower().replace("slice", "pie")))
        if len(named) > 1:
            return _kind(rgb, marks)
        kind = named.pop() if named else _implied(prompt.asked)
        return _answer(kind, prompt.asked, prompt.text or (), rgb, marks) or prompting.UNKNOWN


def _implied(question: str) -> str:
    """The chart type that a question speaks of; bars when it does not say."""
    return "line" if re.search(r"\b(line|trend)\b", question.lower()) else "bar"


def _answer(
    kind: str, question: str, text: Sequence[prompting.Item], rgb: np.ndarray, marks: Sequence[_Mark]
) -> str | None:
    lowered = question.lower()
    if re.search(r"\b(rising|falling|trend)\b", lowered):
        return _trend(rgb, marks)
    if re.search(r"\b(many bars|number of bars|count the bars)\b", lowered):
        return str(len(_bars(marks))) if _bars(marks) else None
    values = {"bar": _bar_values, "line": _line_values, "pie": _pie_values}[kind](text, rgb, marks)
    if not values:
        return None
    if re.search(r"\b(highest|largest|maximum)\b", lowered):
        return max(values, key=lambda label: values[label])
    if re.search(r"\b(lowest|smallest|minimum)\b", lowered):
        return min(values, key=lambda label: values[label])
    if re.search(r"\b(difference|exceed|minus|higher)\b", lowered):
        pair = _named(question, tuple(values), 2)
        return _number(abs(values[pair[0]] - values[pair[1]])) if len(pair) == 2 else None
    one = _named(question, tuple(values), 1)
    return _number(values[one[0]]) if one else None


def _marks(rgb: np.ndarray) -> tuple[_Mark, ...]:
    """The connected patches of colourful pixels, largest first."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(_colourful(rgb).astype(np.uint8), connectivity=8)
    marks = (_Mark(int(x), int(y), int(x + w), int(y + h), int(area)) for x, y, w, h, area in stats[1:])
    return tuple(sorted((mark for mark in marks if mark.area >= 12), key=lambda mark: -mark.area))


def _colourful(rgb: np.ndarray) -> np.ndarray:
    return np.ptp(rgb.astype(np.int16), axis=2) > _COLOURFUL


def _kind(rgb: np.ndarray, marks: Sequence[_Mark]) -> str:
    """bar, line, pie or other, from the shapes of the patches."""
    if len(_bars(marks)) >= 2:
        return "bar"
    if not marks:
        return "other"
    width, height = marks[0].right - marks[0].left, marks[0].bottom - marks[0].top
    round_shape = min(width, height) > 48 and abs(width - height) < 6 and abs(marks[0].fill - np.pi / 4) < 0.04
    if round_shape and len(_colours(rgb, marks[0])) >= 2:
        return "pie"
    # a level line fills its box
    return "line" if width > rgb.shape[1] / 3 and (marks[0].fill < 0.5 or height < 12) else "other"


def _bars(marks: Sequence[_Mark]) -> list[_Mark]:
    """Filled upright rectangles on one base line, from left to right."""
    filled = [mark for mark in marks if mark.fill > 0.95 and mark.right - mark.left >= 8]
    base = max((mark.bottom for mark in filled), default=0)
    bars = sorted((mark for mark in filled if base - mark.bottom <= 2), key=lambda mark: mark.left)
    return bars if len(bars) >= 2 else []


def _trend(rgb: np.ndarray, marks: Sequence[_Mark]) -> str | None:
    """Compares the two ends of the line."""
    if not marks or _kind(rgb, marks) != "line":
        return None
    first, last = _line_height(rgb, marks[0], marks[0].left + 3), _line_height(rgb, marks[0], marks[0].right - 4)
    return "rising" if last < first else "falling"


def _line_height(rgb: np.ndarray, line: _Mark, column: float) -> float:
    """The mean row of the line's pixels in the nearest column of the line."""
    x = int(np.clip(round(column), line.left, line.right - 1))
    rows = np.flatnonzero(_colourful(rgb)[line.top : line.bottom, x])
    return line.top + float(rows.mean()) if len(rows) else float(line.top)


def _bar_values(text: Sequence[prompting.Item], rgb: np.ndarray, marks: Sequence[_Mark]) -> dict[str, float]:
    """Label to value: each bar takes the nearest label below it and the scale's value at its top."""
    bars = _bars(marks)
    if not bars:
        return {}
    labels, scale = _labels(text, bars[0].bottom), _scale(text, rgb, bars[0].left)
    if not labels or scale is None:
        return {}
    values = {}
    for bar in bars:
        name, _ = min(labels, key=lambda label: abs(label[1] - bar.middle))
        values[name] = scale[0] + scale[1] * bar.top
    return values


def _line_values(text: Sequence[prompting.Item], rgb: np.ndarray, marks: Sequence[_Mark]) -> dict[str, float]:
    """Label to value: the scale's value where the line passes over the label."""
    if not marks:
        return {}
    labels, scale = _labels(text, marks[0].bottom), _scale(text, rgb, marks[0].left)
    if not labels or scale is None:
        return {}
    return {name: scale[0] + scale[1] * _line_height(rgb, marks[0], x) for name, x in labels}


def _pie_values(text: Sequence[prompting.Item], rgb: np.ndarray, marks: Sequence[_Mark]) -> dict[str, float]:
    """Label to percentage: the legend's swatch beside the label names the colour, whose area is the share."""
    if not marks:
        return {}
    shares = _colours(rgb, marks[0])
    values = {}
    for swatch in marks[1:]:
        row = (swatch.top + swatch.bottom) / 2
        item = min(
            (item for item in text if item.center[0] > swatch.left and abs(item.center[1] - row) < 8),
            key=lambda item: abs(item.center[1] - row),
            default=None,
        )
        colour = tuple(int(v) for v in rgb[int(row), int(swatch.middle)])
        if item is not None and colour in shares:
            values[item.text] = 100 * shares[colour]
    return values


def _colours(rgb: np.ndarray, mark: _Mark) -> dict[tuple[int, ...], float]:
    """The colours that fill at least 2 % of a patch, with their shares."""
    patch = rgb[mark.top : mark.bottom, mark.left : mark.right]
    colours, counts = np.unique(patch[_colourful(patch)], axis=0, return_counts=True)
    return {
        tuple(int(v) for v in colour): float(count / counts.sum())
        for colour, count in zip(colours, counts, strict=True)
        if count > 0.02 * counts.sum()
    }


def _labels(text: Sequence[prompting.Item], base: int) -> list[tuple[str, float]]:
    """The lowest row of text under a base line, with middles; a box of several labels is cut at its spaces."""
    lowest = max((item.center[1] for item in text), default=0.0)
    labels = []
    for item in text:
        if item.center[1] > max(base + 2, lowest - 8):
            for word in re.finditer(r"\S+", item.text):
                part = (word.start() + word.end()) / 2 / len(item.text)
                labels.append((word[0], item.left + part * item.width))
                if len(labels) == _MOST_LABELS:
                    return labels
    return labels


def _scale(text: Sequence[prompting.Item], rgb: np.ndarray, left: int) -> tuple[float, float] | None:
    """Offset and slope of `value = offset + slope * row`, through the numbers left of the plot; None without two."""
    grid = _grid_rows(rgb, left)
    found = [(item, _NUMBER.match(item.text.replace(",", ""))) for item in text if item.right < left]
    rows = [_snapped(item.center[1], grid) for item, number in found if number][:_MOST_TICKS]
    values = [float(number[1]) for _, number in found if number][:_MOST_TICKS]
    slopes = [
        (values[j] - values[i]) / (rows[j] - rows[i])
        for i in range(len(rows))
        for j in range(i)
        if abs(rows[j] - rows[i]) > 4
    ]
    if not slopes:
        return None
    slope = float(np.median(slopes))  # one number misread does not bend it
    return float(np.median([value - slope * row for value, row in zip(values, rows, strict=True)])), slope


def _grid_rows(rgb: np.ndarray, left: int) -> np.ndarray:
    """Rows where grey runs across most of the plot: grid lines and the axis."""
    grey = (np.ptp(rgb.astype(np.int16), axis=2) < 12) & (rgb.mean(axis=2) < 232)
    return np.flatnonzero(grey[:, left:].mean(axis=1) > 0.25)


def _snapped(row: float, grid: np.ndarray) -> float:
    """The grid line within 4 px of a tick's text, else the middle of the text."""
    if not len(grid):
        return row
    nearest = float(grid[np.argmin(np.abs(grid - row))])
    return nearest if abs(nearest - row) <= 4 else row


def _named(question: str, labels: Sequence[str], count: int) -> list[str]:
    """The labels that the question names best, in its order; at most `count`."""
    words = [word.strip("?,.:;!'\"") for word in question.split(maxsplit=_MOST_WORDS)[:_MOST_WORDS]]
    matches = [
        (score, place, label)
        for place, word in enumerate(words)
        for label in labels
        if (score := _likeness(word, label)) >= _SIMILAR
    ]
    best: dict[str, tuple[float, int]] = {}
    for score, place, label in sorted(matches, key=lambda match: (-match[0], match[1])):
        if label not in best and place not in {taken for _, taken in best.values()} and len(best) < count:
            best[label] = (score, place)
    return sorted(best, key=lambda label: best[label][1])


def _likeness(word: str, label: str) -> float:
    """1 for equal, a little less for equal but for case; numbers are equal or nothing."""
    if word == label:
        return 1.0
    if any(char.isdigit() for char in word) or max(len(word), len(label)) > _LONGEST_WORD:
        return 0.0
    return 0.95 * difflib.SequenceMatcher(None, word.lower(), label.lower()).ratio()


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    value = float(f"{max(value, 0.0):.3g}")
    return str(int(value)) if value == int(value) else f"{value:.2f}".rstrip("0").rstrip(".")
