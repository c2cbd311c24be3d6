"""Every function that reads text of the policy, of experts or of data, with the longest text that it is given.

`READERS` is the table of `test_growth.py`. A row says how a hostile text is handed in. Errors that a reader raises by
its contract are swallowed here; any other one fails the test. What is decided in other processes (algebra, programs)
has limits of its own there and is left out.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw

from maestro_jax.data import choices, jsonl, verl
from maestro_jax.data.benchmarks import erqa
from maestro_jax.data.rows import Row
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.policy.tokens import Tokens, train_tokens
from maestro_jax.registry.description import boxes, names, published
from maestro_jax.registry.description.interface import Message, Reply, Request
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.description.stages import AskStage
from maestro_jax.registry.experts import chat, retries
from maestro_jax.registry.record import cache, journal
from maestro_jax.registry.skills import running as skills
from maestro_jax.registry.skills import served, templates
from maestro_jax.rewards import graders, ocrbench, reading
from maestro_jax.rewards.graders import BUILT_IN, GRADERS, MAX_ANSWER_CHARS, MAX_PROGRAM_CHARS
from maestro_jax.rewards.judges import Judge
from maestro_jax.rollout import protocol
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.sandbox.interface import Limits
from maestro_jax.sandbox.process import judge
from maestro_jax.sandbox.tested import run_tests
from maestro_jax.suite.specialists import charts
from maestro_jax.suite.specialists.charts import ChartLens
from maestro_jax.suite.specialists.ocr import GlyphReader
from maestro_jax.suite.specialists.prompting import last_user
from maestro_jax.suite.specialists.shapes import ShapeSight, _reply
from maestro_jax.suite.specialists.symbolic import SymSolver
from maestro_jax.suite.specialists.tally import Tally
from maestro_jax.types import Status, StopReason, Task
from maestro_jax.warm_start import demonstrations

LINE = 2**16  # characters of a question or a line of a file, which nobody caps; a picture is a megabyte
BODY = 2**20  # bytes of a server's reply
VALUE = templates.LONGEST_VALUE  # of what a skill's template passes on

TALLY = "maestro_jax.suite.specialists.tally:Tally"
OPTIONS = ("cat", "20 %", "E. coli", "a dog")
# What a row's task has as gold answers, by what grades its source; with options for those after "?".
GOLDS: dict[str, tuple[str, ...]] = {
    "reading": ("red", "12"),
    "counting": ("100",),
    "ChartQA": ("100", "red"),
    "geometry": ("100",),
    "MathVision": (r"\frac{1}{2}", "?B"),
    "ERQA": ("?B", "?a dog", "dog"),
    "SLAKE": ("left, right", "yes", "3", "?B"),
    "TallyQA": ("5",),
    "VLMsAreBlind": ("5,6", "yes", "3", "a"),
    "OCRBench": ("red",),
    "HumanEval-V": ("assert True",),
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a function is handed a foreign text.

    Attributes:
      cap: characters of the longest text that it is given.
      tokens: pieces of its own grammar; hostile texts are made of these, too.
      samples: honest texts that reach its corners.
    """

    read: Callable[[str], object]
    cap: int
    tokens: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()


# ---- answers -----------------------------------------------------------------------------------------------


def _forget() -> None:
    reading.stated.cache_clear()
    reading.fold_text.cache_clear()


class _Undecided:
    """In place of the processes that decide equations and programs."""

    def decide(self, open_: list) -> list[bool]:
        return [False] * len(open_)


def _grading(source: str, golds: tuple[str, ...], options: tuple[str, ...]) -> Reader:
    task = Task("", "", (), golds, source, options)

    def read(text: str) -> None:
        with (
            mock.patch.object(graders, "_equations", _Undecided()),
            mock.patch.object(graders, "_programs", _Undecided()),
        ):
            _forget()
            BUILT_IN.grade(task, text)
            if source == "OCRBench":  # whose formulas are read in another way
                BUILT_IN.grade(dataclasses.replace(task, kind=ocrbench.FORMULA), text)

    is_program = source == "HumanEval-V"
    tokens = ("```python\n", "```", "``` ", "def solution", "~~~") if is_program else _ANSWER_TOKENS
    return Reader(read, MAX_PROGRAM_CHARS if is_program else MAX_ANSWER_CHARS, tokens, _ANSWERS)


def _gold(source: str) -> Reader:
    """A gold answer is a foreign text, too."""

    def read(text: str) -> None:
        with mock.patch.object(graders, "_equations", _Undecided()):
            _forget()
            BUILT_IN.grade(Task("", "", (), (text,), source, ()), "5 dogs")
            BUILT_IN.grade(Task("", "", (), ("B",), source, ("cat", text)), "the dog")

    return Reader(read, MAX_ANSWER_CHARS, _ANSWER_TOKENS)


_ANSWER_TOKENS = (
    *("a, ", "A. ", "(A) ", "B, ", " and ", " or ", "no ", "not ", "the ", "yes, ", "the answer is ", "answer:"),
    *("\n answer: 5. ", "option ", "i choose ", "\\boxed{", "\\boxed{1}", "\\text{", "\\text{ }", "\\frac", "\\sqrt"),
    *("\\frac{1}{2}", "°", "° ", "\\, ", "\\degree", "sin", "pi", "1/2", "½", "1 ½", "2 rows and ", "{5}", "rows 1 "),
    *("one ", "twenty-", "hundred ", "million ", "zero", "3 dogs ", "there are ", "$5", "%", "1e", "-1", "1-", "5 cm "),
    *("xray ", "x = ", "because ", "E. coli ", "cat ", "a dog ", "circle", "100 ", "red ", "1,000", "1 000"),
)
_ANSWERS = (
    *("B", "(B) the cat", "The answer is B, since A is wrong", "I choose option b", "$\\frac{1}{2}$", "1 1/2", "1:2"),
    *("x = \\sqrt{2} cm^2", "5 rows and 6 columns", "6 columns, 5 rows", "{5}{6}", "{5}", "yes, it is", "right, left"),
    *("103 %", "twenty-one", "3e2", "there are three dogs", "½", "The dog is red.", "\\text{a dog}", "3 - 5", "2\\pi"),
    *(
        "B because B is right",
        "not B",
        "3!",
        "the value is 100",
        "one hundred and one",
        "12 km/h",
        "B) 20 %",
        "A - cat",
    ),
    *("the circle is red", "a dog (D)", "no dogs", "It is the left one, I think"),
)


def compared_by(source: str) -> Callable[..., Any]:
    """What grades a source: one function may grade several."""
    grader = GRADERS[source]
    return grader.__closure__[0].cell_contents if grader.__closure__ else grader


def _answers() -> dict[str, Reader]:
    rows = {
        f"grade {source}, {gold}": _grading(source, (gold.lstrip("?"),), OPTIONS if gold[0] == "?" else ())
        for source, golds in GOLDS.items()
        for gold in golds
    }
    return rows | {f"gold {source}": _gold(source) for source in ("SLAKE", "MathVision", "HRBench-4K", "ChartQA")}


def _judge(text: str) -> None:
    """A question, a gold answer, an answer and a reply: all of them are foreign."""
    asked = JUDGE(Task("", text, (), (text,), "colours"), text)
    asked.read(text)
    asked.read(f"{text}\nVERDICT {asked.code}: {text[:4]}")


def _graders(text: str) -> None:
    """Names of graders and sources come from data."""
    for grader in ("", text):
        with contextlib.suppress(ConfigError):
            BUILT_IN.find(text, grader)


JUDGE = Judge("Referee", points=10)
_VERDICTS = ("VERDICT 12345678: ", "VERDICT ", "yes", "10/10", "[INST]", "[/", "> ", "{answer}", "\u2028", "**")


# ---- turns and observations --------------------------------------------------------------------------------


@functools.cache
def _registry() -> Any:
    skill = {"name": "Read_it", "stages": ({"kind": "ask", "output": "a", "prompt": "{question}"},)}
    expert = {"name": "Chart-Lens", "implementation": TALLY, "description": "d"}
    return parse_registry({"experts": (expert,), "services": (), "skills": (skill,)})


@functools.cache
def _tokens() -> Tokens:
    with tempfile.TemporaryDirectory() as directory:
        return train_tokens(
            ["How many red circles are there? <search> Chart-Lens@@Read_it: look </search>"] * 20, 360, directory
        )


@functools.cache
def _exchange() -> Exchange:
    config = EpisodeConfig(
        max_calls=2, observation_tokens=512, observation_multiple=1, deadline=1.0, turn_budget=512, room=4096
    )
    return Exchange(_tokens(), _registry(), SimpleNamespace(reader=None), config)  # type: ignore[arg-type]


def _turn(text: str) -> None:
    for stop in (StopReason.ANSWER, StopReason.BUDGET):
        protocol.parse_turn(text, stop, _registry())


def _call(text: str) -> None:
    names.normalise_name.cache_clear()
    for body in (f"{text}@@Read_it: look", f"Chart-Lens@@{text}: look", f"Chart-Lens@@Read_it:{text}", text):
        protocol.parse_turn(f"<search>{body}</search>", StopReason.CALL, _registry())


_TAGS = (
    *("<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<information>", "< / ", "< think"),
    *("<\n", "</", "<think", "@@", "Chart-Lens@@Read_it: ", ":", "<|im_end|>", "<|im_", "<|im_<|im_end|>end|>", "|>"),
)
_SPECIAL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|image_pad|>")


def _turns() -> dict[str, Reader]:
    return {
        "parse_turn": Reader(_turn, LINE, _TAGS, ("<think>x</think><answer>5</answer>",)),
        "parse_turn, in a call": Reader(_call, LINE, _TAGS, ("Chart-Lens",)),
        "neutralise": Reader(lambda text: protocol.neutralise(text, _SPECIAL), LINE, _TAGS, ("< / think >",)),
        "an observation": Reader(lambda text: _exchange().body_ids(text), LINE, _TAGS),
        "encode_foreign": Reader(lambda text: _tokens().encode_foreign(text), LINE, (*_TAGS, "<|im_end|", "\r\n ")),
        "quote a name": Reader(names.quote, LINE),
    }


# ---- what servers and experts say --------------------------------------------------------------------------


def _completion(text: str) -> None:
    for body in _bodies(text):
        for read in (chat.read_completion, chat.read_models):
            with contextlib.suppress(chat.BadReplyError):
                read(body)


@functools.lru_cache(maxsize=4)  # the server writes them: measured again, they cost no time of the reader
def _bodies(text: str) -> tuple[bytes, ...]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    whole = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})
    bodies = whole, text, f'{{"choices": [{{"message": {{"content": {text}}}}}]}}'
    return tuple(body.encode("utf-8", "replace") for body in bodies)


def _boxes(text: str) -> None:
    for frame in boxes.FRAMES:
        boxes.read_boxes(text, [(100, 80), (50, 50)], boxes.Frame(frame))


def _by_words(text: str) -> None:
    names.normalise_name.cache_clear()
    stage = AskStage("out", by="kind", prompts={"bar chart": "a", "pie": "b", "other": "c"})
    skills.select_prompt(stage, {"kind": text})
    templates.occurrences(("bar chart", "a" * 20), text)


def _filled(text: str) -> None:
    templates.fill("{question} and {query}", {"question": text, "query": text})


def _found(text: str) -> None:
    """A served detector's reply, as a service reads it."""

    class Expert:
        name = "boxes"

        async def ask(self, request: Request) -> Reply:
            return Reply(text, Status.OK)

    config = SimpleNamespace(name="detect", timeout=9.0, parse="", prompt="{text}")
    service = served.ServedService(config, Expert(), boxes.Frame())  # type: ignore[arg-type]

    _run(service.run((b"", b""), text, 1.0))


def _run(work: Coroutine[Any, Any, Any]) -> None:
    """Without a result: at the end of `asyncio.run`, Python's `signal` makes the repr of it."""

    async def alone() -> None:
        await work

    asyncio.run(alone())


def _retry_after(text: str) -> None:
    retries.parse_retry_after(text, datetime.datetime.now(datetime.UTC))


def _sandboxed(text: str) -> None:
    """What a program wrote, judged, and read for the token of its tests."""
    data = text.encode("utf-8", "replace")
    limits = Limits(output_bytes=len(data) + 1)

    class Sandbox:
        name = "scripted"

        async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Any:
            return dataclasses.replace(judge(0, data, data, limits), stdout=text + stdin.decode() + " " + text)

    _run(run_tests(Sandbox(), "", "", limits))  # type: ignore[arg-type]
    judge(1, data, data, limits)


def _lines(read: Callable[[str], object], line: Callable[[str], dict[str, Any]]) -> Callable[[str], None]:
    """Reads a file of two lines: one with the text as a value, one that is the text."""

    def of(text: str) -> None:
        handle, path = tempfile.mkstemp()
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(line(text)).encode() + b"\n" + text.encode("utf-8", "replace") + b"\n")
            read(path)
        finally:
            os.unlink(path)

    return of


_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "price": 0.0}


def _published(text: str) -> None:
    hosts = ("gpu-*.example", "*.internal", "10.0.0.*")
    expert = dataclasses.replace(_registry().experts[0], name="E", key="KEY", key_hosts=hosts)
    path = Path(_folder().name, "host.json")
    urls = [
        text,
        f"http://{text}",
        f"http://gpu-{text}.example",
        f"http://{text}.internal/v1",
        f"http://10.0.0.{text}:1",
    ]
    for content in (*({"E": [url]} for url in urls), {text: ["http://a:1"]}, text):
        data = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(data.encode("utf-8", "replace"))
        with contextlib.suppress(ConfigError):
            published.reached([expert], path.parent)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


_JSON = (
    *(
        "[",
        "{",
        "[1,",
        '{"a":',
        "[]",
        "{}",
        '"',
        '"a",',
        "\\u0041",
        "\\ud800",
        "1e9,",
        "[[1],",
        '{"bbox_2d":[1,2,3,4]},',
    ),
    *('{"objects":[', "null,", "```json\n", "</think>", "bar chart ", "pie ", "<think>"),
)


def _replies() -> dict[str, Reader]:
    return {
        "read_completion, read_models": Reader(_completion, BODY, _JSON, ('{"data": [{"id": "m"}]}',)),
        "read_boxes": Reader(_boxes, BODY, _JSON, ('[{"bbox_2d": [1, 2, 30, 40], "label": "x"}]',)),
        "said": Reader(templates.said, BODY, _JSON),
        "program_in": Reader(templates.program_in, BODY, ("```", "```a\n", "``` ", "```\n")),
        "select_prompt": Reader(_by_words, BODY, _JSON, ("a bar chart",)),
        "fill": Reader(_filled, BODY, ("{question}", "{", "{a")),
        "a served service": Reader(_found, BODY, _JSON),
        "parse_retry_after": Reader(
            _retry_after,
            8190,  # of a header, in aiohttp
            ("Wed, ", "21 Oct 2015 ", "07:28:00 ", "GMT ", "(", "(a)", ":", "1:", "+0", "Oct ", "Oct-"),
            ("12", "Wed, 21 Oct 2015 07:28:00 GMT"),
        ),
        "judge, run_tests": Reader(_sandboxed, BODY, ("0\n", "MemoryError", "MemoryError\n", "\n0123456789abcdef 1\n")),
        "read_lines of a journal": Reader(
            _lines(lambda path: list(journal.read_lines(path)), lambda text: {"kind": "section", "name": text}),
            BODY,
            _JSON,
        ),
        "lines of a reply cache": Reader(
            _lines(
                lambda path: cache.ReplyCache(path).close(),
                lambda text: {"key": text, "text": text, "seconds": 0.0, "usage": _USAGE},
            ),
            BODY,
            _JSON,
        ),
        "published endpoints": Reader(_published, 2**12, ("http://", "http://a:1/v1", ":", "@", "%", "[::1]")),
    }


# ---- the suite's experts -----------------------------------------------------------------------------------

CHART_TEXT = "40 @ 2,17,12,23\n20 @ 2,47,12,53\n0 @ 6,77,12,83\nAda @ 24,85,36,92\nBob @ 54,85,66,92\nEve @ 84,85,96,92"


@functools.cache
def _chart() -> tuple[np.ndarray, tuple[Any, ...], np.ndarray]:
    """A picture of bars with its marks and grid."""
    image = Image.new("RGB", (128, 96), "white")
    for x, top in ((30, 20), (60, 50), (90, 35)):
        ImageDraw.Draw(image).rectangle((x - 7, top, x + 7, 79), "#4c78a8")
    rgb = np.array(image)
    return rgb, charts._marks(rgb), charts._grid_rows(rgb, 20)


@contextlib.contextmanager
def _seen() -> Iterator[None]:
    """The picture was looked at before: what that costs is no text's fault."""
    rgb, marks, grid = _chart()
    known = {"_marks": marks, "_grid_rows": grid, "_line_height": 50.0, "_trend": "rising"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(charts.prompting, "pixels", lambda image: rgb))
        for name, value in known.items():
            stack.enter_context(mock.patch.object(charts, name, lambda *_, value=value: value))
        yield


def _asking(expert: Any, instruction: str, place: str, images: bool = False) -> Callable[[str], None]:
    """Asks with a hostile question, one that fits what is written, labels, or both at once."""

    def read(text: str) -> None:
        flat = " ".join(text.split("\n"))
        block = {
            "question": CHART_TEXT,
            "labels": f"{CHART_TEXT}\n{flat} @ 84,85,96,92\n{flat} @ 2,47,12,53",
            "both": f"{CHART_TEXT}\n{text}\nObjects:\n{text}",
        }[place]
        question = "What is the value for Bob?" if place == "labels" else text
        prompt = f"{instruction}\nText in the image:\n{block}\nQuestion: {question}\nFocus: {flat}"
        with _seen() if images else contextlib.nullcontext():
            expert.answer([Message("user", prompt, (b"picture",) if images else ())])

    return read


_ASKED = (
    *(
        "how many ",
        "number of ",
        "red circles ",
        "is there ",
        "not ",
        "what is the value for ",
        "Bob ",
        "Ada ",
        "higher ",
    ),
    *(
        "highest ",
        "a @ 1,2,3,4\n",
        "7 @ 1,2,3,40\n",
        "7 @ 0,85,3,92\n",
        " @ ",
        " @ 1,1,1,1",
        "-1,",
        "Ada @ 24,85,36,92\n",
    ),
    *(
        "1+",
        "1 + ",
        "1.1",
        "1-1*",
        "x = 5 ",
        "5cm",
        "angle ",
        "leg ",
        "perimeter ",
        "area ",
        "line trend ",
        "pie ",
        "key: ",
    ),
    *("question:", "\nObjects:\n", "\nText in the image:\n", "1 ", "°", "1\n", "--"),
)
_QUESTIONS = (
    *(
        "How many red circles are there?",
        "Is there no red circle?",
        "Which colour is it?",
        "What shape is it?",
        "1 + 2",
    ),
    *(
        "Work out 3*4-1",
        "What is the perimeter?",
        "What is the missing angle of the triangle?",
        "Which is the highest?",
    ),
    *("What is the area of the rectangle?", "How long is the leg?", "How much higher is Ada than Eve?", "lowest?"),
    *("Is the trend rising?", "Count the bars", "How long is the hypotenuse?", "red circle @ 1,2,3,4"),
)


class _ShapeSight(ShapeSight):
    """Sees a red circle, whatever it is shown."""

    def answer(self, messages: Any) -> str:
        prompt, _ = last_user(messages)
        return _reply(prompt.asked, "red", "circle")


def _specialists() -> dict[str, Reader]:
    rows = {}
    for place in ("question", "labels", "both"):
        asked: dict[str, tuple[Any, str, bool]] = {
            "Chart-Lens": (ChartLens(), "This is a bar chart.", True),
            "Chart-Lens, any": (ChartLens(), "Look.", True),
            "Chart-Lens, lines": (ChartLens(), "This is a line chart.", True),
            "Glyph-Reader": (GlyphReader(), "Find the key.", False),
            "Shape-Sight": (_ShapeSight(), "Look.", False),
            "Sym-Solver": (SymSolver(), "Solve.", False),
            "Tally": (Tally(), "Count.", False),
        }
        for name, (expert, instruction, images) in asked.items():
            rows[f"{name}, {place}"] = Reader(_asking(expert, instruction, place, images), VALUE, _ASKED, _QUESTIONS)
    return rows


# ---- data --------------------------------------------------------------------------------------------------


def _options(text: str) -> None:
    choices.split_options(text)
    choices.letter_of(text, ("cat", text, "dog"))
    choices.with_options(text, (text, "b"))


def _jsonl(text: str) -> None:
    row = {"question": text, "answers": [text], "source": text, "id": text, "choices": ["a", text]}
    for fields in (row, {"question": "q", "source": "s", "answers": "A", text: 1, "questions": 1}):
        with contextlib.suppress(DataError):
            jsonl._task(Row(jsonl._parse(json.dumps(fields).encode(), "x"), "x", 1), "x", None)
    with contextlib.suppress(DataError):
        jsonl._parse(text.encode("utf-8", "replace"), "x")
    with contextlib.suppress(DataError):
        jsonl.read_image(Row({}, "x", 1), "images", {"bytes": text}, None)


def _demonstration(text: str) -> None:
    """Each message of a row, its kinds and its images."""
    call, answer = "<search> Chart-Lens@@Read_it: look </search>", "<answer> 5 </answer>"
    roles = ("user", "assistant", "tool", "assistant")
    parts = [{"type": "text", "text": text}, {"type": "image", "image": f"data:image/png;base64,{text}"}]
    for said in (
        (text, answer),
        (parts, answer),
        ([{"type": text}], answer),
        ("q", text),
        ("q", f"<answer>{text}</answer>"),
        ("q", call.replace("look", text), "x", answer),
        ("q", call, text, answer),
        ("q", call, f"<information>{text}</information>", answer),
    ):
        messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]
        for fields in ({"messages": messages}, {"messages": [{"role": text}], text: 1}):
            with contextlib.suppress(DataError):
                row = Row(fields, "x", 1)
                demonstrations.write_chat(demonstrations.read_chat(row, "x", None), row, _exchange())


def _verl(text: str) -> None:
    user = [{"role": "user", "content": text}]
    for extra in ({"question": text}, {"choices": [text, "b"]}, None):
        for truth in (text, [text, "B"]):
            row = {"data_source": "s", "prompt": user, "extra_info": extra, "reward_model": {"ground_truth": truth}}
            with contextlib.suppress(DataError):
                verl._task(row, "x", "x", None)


def _erqa(text: str) -> None:
    fields = {"question": f"{text}Choices: A. {text} B. x", "answer": "A", "visual_indices": [3, 9]}
    for question in (fields["question"], text):
        with contextlib.suppress(DataError):
            erqa._task(Row({**fields, "question": question}, "x", 1), (b"", b""))


def _configured(text: str) -> None:
    skill = {"name": "S", "stages": ({"kind": "ask", "output": "a", "prompt": text},)}
    expert = {"name": "E", "implementation": TALLY, "description": text}
    server = {"name": "F", "endpoints": (text,), "model": text, "description": "d", "key": text}
    for experts in ((expert,), (server,), ({**expert, "name": text},), ({**expert, text: 1},)):
        with contextlib.suppress(ConfigError):
            parse_registry({"experts": experts, "services": (), "skills": (skill,)})


_ITEMS = (
    " Please answer with only the letter",
    "A. ",
    "\nA. ",
    "(A) ",
    "A. a B. ",
    "\nB) ",
    "<image>",
    "Please answer",
    " Please answer with only the letter",
)


def _data() -> dict[str, Reader]:
    return {
        "split_options, letter_of": Reader(_options, LINE, _ITEMS, ("What? A. cat B. dog", "Which?\nA. x\nB. y")),
        "a line of JSONL": Reader(_jsonl, LINE, (*_JSON, "=", "QUJD", "http://")),
        "a demonstration": Reader(_demonstration, LINE, (*_TAGS, "data:", ";base64,")),
        "a row of verl": Reader(_verl, LINE, (*_ITEMS, *_JSON), ('["a"]',)),
        "a row of ERQA": Reader(_erqa, LINE, (*_ITEMS, "Choices:"), (" Please answer directly with only the letter.",)),
        "a registry": Reader(_configured, LINE, ("{question}", "{", "{a", "@@", "http://", "@", ":", "%")),
    }


@functools.cache
def readers() -> dict[str, Reader]:
    """The table, by what errors call a row."""
    judges = {
        "a judge's prompt and verdict": Reader(_judge, MAX_ANSWER_CHARS, _VERDICTS),
        "names of graders": Reader(_graders, LINE),
    }
    return {**_answers(), **judges, **_turns(), **_replies(), **_specialists(), **_data()}
