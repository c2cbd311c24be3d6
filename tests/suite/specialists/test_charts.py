import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists import prompting
from maestro_jax.suite.specialists.charts import ChartLens
from maestro_jax.suite.tasks import drawing

WHICH = "Name the type of this chart: bar, line, pie or other."
# The base line is row 160 and 30 px are ten units: bars of 40, 20 and 30.
BAR_TEXT = (
    "40 @ 10,34,30,46\n20 @ 10,94,30,106\n0 @ 20,154,30,166\n"
    "Ada @ 50,170,70,184\nBob @ 110,170,130,184\nEve @ 170,170,190,184"
)
PIE_TEXT = "Cats @ 180,48,220,62\nDogs @ 180,70,220,84"


def encoded(draw_on) -> bytes:
    image = Image.new("RGB", (256, 192), "white")
    draw_on(ImageDraw.Draw(image))
    return drawing.encode(image)


def bars(draw: ImageDraw.ImageDraw) -> None:
    for x, top in ((60, 40), (120, 100), (180, 70)):
        draw.rectangle((x - 15, top, x + 15, 159), "#4c78a8")


def line(draw: ImageDraw.ImageDraw) -> None:
    draw.line(((60, 100), (120, 70), (180, 40)), "#e45756", width=2)


def pie(draw: ImageDraw.ImageDraw) -> None:
    for start, end, colour, row in ((0, 90, "#4c78a8", 48), (90, 360, "#f58518", 70)):
        draw.pieslice((12, 40, 148, 176), start, end, colour)
        draw.rectangle((164, row, 175, row + 11), colour)


def ask(instruction: str, question: str, draw_on, text: str | None = None) -> str:
    block = "" if text is None else f"Text in the image:\n{text}\n"
    prompt = f"{instruction}\n{block}Question: {question}\nFocus: "
    return ChartLens().answer([Message("user", prompt, (encoded(draw_on),))])


@pytest.mark.parametrize(("draw_on", "kind"), [(bars, "bar"), (line, "line"), (pie, "pie"), (str, "other")])
def test_kind_of_chart(draw_on, kind):
    assert ask(WHICH, "What is the value for Bob?", draw_on) == kind


def test_a_level_line_is_a_line():
    assert ask(WHICH, "", lambda draw: draw.line((60, 80, 200, 80), "#e45756", width=2)) == "line"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the value for Bob?", "20"),
        ("Which one is the largest?", "Ada"),
        ("Where is the value lowest?", "Bob"),
        ("How much higher is Ada than Eve?", "10"),
        ("Count the bars of the chart.", "3"),
        ("What is the value for Zoe?", prompting.UNKNOWN),
    ],
)
def test_bars_with_text_block(question, answer):
    assert ask("This is a bar chart.", question, bars, BAR_TEXT) == answer


def test_line_value_over_its_label():
    assert float(ask("This is a line chart.", "How high is Bob?", line, BAR_TEXT)) == pytest.approx(30, rel=0.02)


@pytest.mark.parametrize(("question", "answer"), [("What percentage is Cats?", 25), ("What share has Dogs?", 75)])
def test_pie_shares_by_colour(question, answer):
    assert float(ask("This is a pie chart.", question, pie, PIE_TEXT)) == pytest.approx(answer, rel=0.02)


def test_labels_that_ocr_ran_together_are_cut_at_spaces():
    text = BAR_TEXT.split("Ada")[0] + "Ada Bob Eve @ 50,170,190,184"
    assert ask("This is a bar chart.", "How high is Eve?", bars, text) == "30"


def test_one_misread_tick_does_not_bend_the_scale():
    text = "30 @ 10,64,30,76\n7 @ 10,124,30,136\n" + BAR_TEXT
    assert ask("This is a bar chart.", "How high is Eve?", bars, text) == "30"


def test_a_tick_read_as_a_dash_is_ignored():
    assert ask("This is a bar chart.", "How high is Bob?", bars, BAR_TEXT.replace("20 @", "20- @")) == "20"


def test_without_text_it_counts_bars_but_reads_no_value():
    assert ask("Look closely.", "How many bars are in the chart?", bars) == "3"
    assert ask("Look closely.", "How high is Bob?", bars) == prompting.UNKNOWN


def test_without_text_it_sees_the_trend():
    assert ask("Look closely.", "Is the line rising or falling?", line) == "rising"


def test_without_rules_of_the_type_it_takes_bars():
    assert ask("Answer.", "What percentage is Cats?", pie, PIE_TEXT) == prompting.UNKNOWN


def test_a_broken_image_cannot_be_told():
    assert ChartLens().answer([Message("user", WHICH, (b"no image",))]) == prompting.UNKNOWN


@given(st.text(), st.sampled_from((bars, line, pie)))
def test_never_raises(text, draw_on):
    assert isinstance(ask("This is a pie chart.", text, draw_on, text), str)
