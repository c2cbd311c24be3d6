"""Stages of every kind: what fits together is checked before a run, and what each gives at run time."""

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from PIL import Image

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.boxes import Frame
from maestro_jax.registry.description.checks import problems
from maestro_jax.registry.description.config import ServiceConfig, SkillConfig
from maestro_jax.registry.description.interface import Reply, Request, Service
from maestro_jax.registry.description.reading import parse_registry, read_registry
from maestro_jax.registry.description.stages import (
    AskStage,
    CropStage,
    DrawStage,
    ParseStage,
    RunStage,
    ServiceStage,
    Stage,
)
from maestro_jax.registry.skills.running import Means, SkillInput, run_skill
from maestro_jax.registry.skills.served import ServedService
from maestro_jax.sandbox.choose import make_sandbox
from maestro_jax.sandbox.interface import Limits, Ran, RanStatus
from maestro_jax.types import Observation, Status, Usage

Raw = Callable[..., dict[str, Any]]


def picture(width: int = 200, height: int = 100) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()


class Model:
    """Says its texts in turn."""

    def __init__(self, *texts: str, name: str = "model", status: Status = Status.OK):
        self.name, self.texts, self.status = name, list(texts), status
        self.requests: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.requests.append(request)
        text = self.texts.pop(0) if self.status is Status.OK else ""
        return Reply(text, self.status, Usage(1, 1, 0.1), 1.0)

    async def close(self) -> None: ...

    @property
    def prompts(self) -> list[str]:
        return [request.messages[0].text for request in self.requests]


class Box:
    """A sandbox that gives its endings in turn; so many asserts hold in a program that ends well."""

    name = "box"

    def __init__(self, *endings: RanStatus, asserts: int = 1):
        self.endings, self.asserts = list(endings), asserts
        self.ran: list[tuple[str, str]] = []  # program and tests

    async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
        self.ran.append((files["program.py"].decode(), files["tests.py"].decode()))
        status = self.endings.pop(0)
        stdout = f"{stdin.decode()} {self.asserts}\n" if status is RanStatus.OK else ""
        return Ran(stdout, "AssertionError: 1 != 2" if status is RanStatus.ERROR else "", status, 0.5)

    async def close(self) -> None: ...


def run(
    stages: tuple[Stage, ...], means: Means, images: tuple[bytes, ...] = (picture(),), deadline: float = 30.0
) -> Observation:
    given = SkillInput("the question", "the query", images)
    return asyncio.run(run_skill(SkillConfig("S", stages=stages), means, given, deadline))


# ---- models behind services --------------------------------------------------------------------------------


def served(model: Model, parse: str = "text", frame: Frame | None = None, **fields: Any) -> Service:
    config = ServiceConfig("service", expert="model", prompt="Do it. {text}", parse=parse, **fields)
    return ServedService(config, model, frame or Frame())


def test_a_served_service_asks_its_model_once_for_each_image() -> None:
    model = Model("<think>x</think> one", "two", "joined")
    images = (picture(10), picture(20))
    stages = (ServiceStage("service", "words", text="{query}"), AskStage("answer", images=(), prompt="{words}"))
    observation = run(stages, Means(model, {"service": served(model)}), images)
    assert model.prompts == ["Do it. the query"] * 2 + ["Picture 1:\none\nPicture 2:\ntwo"]
    assert [request.messages[0].images for request in model.requests] == [images[:1], images[1:], ()]
    assert observation == Observation("joined", Status.OK, 2.0, Usage(3, 3, 0.1 + 0.1 + 0.1))


def test_boxes_of_a_service_are_numbered_over_all_images() -> None:
    model = Model('[{"bbox_2d": [0, 0, 100, 50], "label": "cup"}]', '{"bbox_2d": [0, 0, 20, 10]}', "2")
    stages = (
        ServiceStage("service", "objects"),
        DrawStage("objects", "drawn"),
        CropStage("objects", "parts"),
        AskStage("answer", images=("drawn", "parts", "task"), prompt="{objects}"),
    )
    run(stages, Means(model, {"service": served(model, "boxes")}), (picture(200, 100), picture(20, 10)))
    assert model.prompts[-1] == "1. cup [0, 0, 500, 500] in picture 1\n2. object [0, 0, 1000, 1000] in picture 2"
    assert len(model.requests[-1].messages[0].images) == 6


def test_a_service_that_finds_nothing_is_no_failure() -> None:
    model = Model("I see nothing to zoom into.", "fine")
    stages = (
        ServiceStage("service", "parts"),
        CropStage("parts", "crops"),
        AskStage("answer", images=("task", "crops"), prompt="{parts}"),
    )
    assert run(stages, Means(model, {"service": served(model, "boxes")})).text == "fine"
    assert model.prompts[-1] == "nothing found" and len(model.requests[-1].messages[0].images) == 1


def test_a_served_service_fails_as_its_model_does() -> None:
    expert, model = Model(), Model(status=Status.TIMEOUT)
    stages = (ServiceStage("service", "words"), AskStage("answer", prompt="{words}"))
    observation = run(stages, Means(expert, {"service": served(model, timeout=5.0)}), (picture(), picture()))
    assert (observation.status, observation.usage) == (Status.TIMEOUT, Usage(2, 2, 0.2)) and not expert.requests
    assert [request.deadline for request in model.requests] == [5.0, 5.0]


# ---- parsing -----------------------------------------------------------------------------------------------


def test_boxes_of_an_expert_are_read_in_its_own_frame_and_its_own_pictures() -> None:
    expert = Model('{"bbox_2d": [500, 0, 1000, 1000], "image": 2}', "done")
    stages = (
        AskStage("reply", prompt="where?"),
        ParseStage("reply", "places", "boxes"),
        CropStage("places", "crops", margin=0.0),
        AskStage("answer", images=("crops",), prompt="{places}"),
    )
    run(stages, Means(expert, frame=Frame("relative")), (picture(300), picture(400, 80)))
    (crop,) = expert.requests[-1].messages[0].images
    assert Image.open(io.BytesIO(crop)).size == (200, 80)


def test_a_picture_in_which_an_expert_finds_boxes_is_turned_as_it_is_shown() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.new("RGB", (200, 100), "white").save(file, "JPEG", exif=exif)
    expert = Model('{"bbox_2d": [0, 0, 100, 50]}', "done")
    stages = (
        AskStage("reply", prompt="where?"),
        ParseStage("reply", "places", "boxes"),
        AskStage("answer", prompt="{places}"),
    )
    run(stages, Means(expert), (file.getvalue(),))
    (asked,), (shown,) = (request.messages[0].images for request in expert.requests)
    assert Image.open(io.BytesIO(asked)).size == (100, 200) and shown == file.getvalue()
    assert expert.prompts[-1] == "1. object [0, 0, 1000, 250]"


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("First:\n```\nx = 0\n```\nBetter:\n```py\nx = 1\n```\nDone.", "x = 1"),
        ("```python\nx = 1", "x = 1"),  # cut off
        ("x = 1", "x = 1"),
        ("", ""),
    ],
)
def test_the_last_fenced_block_is_the_program(reply: str, program: str) -> None:
    expert = Model(reply, "done")
    stages = (
        AskStage("reply", prompt="?"),
        ParseStage("reply", "code", "program"),
        AskStage("answer", prompt="{code}"),
    )
    run(stages, Means(expert))
    assert expert.prompts[-1] == program


# ---- running -----------------------------------------------------------------------------------------------


def program(rounds: int = 3) -> tuple[Stage, ...]:
    return (
        AskStage("draft", prompt="write"),
        ParseStage("draft", "program", "program"),
        AskStage("examples", images=(), prompt="test"),
        ParseStage("examples", "tests", "program"),
        RunStage("program", "tests", "{program} | {error} | {tests} | {question}", "answer", rounds=rounds),
    )


def test_a_program_that_passes_is_not_repaired() -> None:
    expert, box = Model("x = 1", "assert x"), Box(RanStatus.OK)
    observation = run(program(), Means(expert, sandbox=box))
    assert box.ran == [("x = 1", "assert x")]
    assert observation.text == "```python\nx = 1\n```\nIt passes the tests read from the picture."
    assert observation.seconds == 1.5 and len(expert.requests) == 2


def test_a_repair_sees_the_program_and_its_error() -> None:
    expert, box = Model("x = 1", "assert x == 2", "```\nx = 2\n```"), Box(RanStatus.ERROR, RanStatus.OK)
    observation = run(program(), Means(expert, sandbox=box))
    assert expert.prompts[-1] == "x = 1 | AssertionError: 1 != 2 | assert x == 2 | the question"
    assert box.ran[-1][0] == "x = 2" and observation.text.startswith("```python\nx = 2\n```")
    assert (observation.seconds, observation.usage.prompt_tokens) == (3.0, 3)


def test_after_the_last_round_the_program_is_given_with_its_failure() -> None:
    expert, box = Model("x = 1", "assert 0", "x = 2"), Box(RanStatus.ERROR, RanStatus.TIMEOUT)
    observation = run(program(rounds=1), Means(expert, sandbox=box))
    assert observation.status is Status.OK
    assert observation.text == "```python\nx = 2\n```\nIts tests fail: it ended with: timeout"


def test_without_tests_there_is_no_verdict_and_no_repair() -> None:
    observation = run(program(), Means(Model("x = 1", "x"), sandbox=Box(RanStatus.OK, asserts=0)))
    assert observation.text == "```python\nx = 1\n```\nThere was no test to run."


def test_a_program_that_leaves_early_does_not_pass() -> None:
    expert = Model("import sys; sys.exit(0)", "assert f(1) == 2", "def f(x): return x + 1")
    observation = run(program(), Means(expert, sandbox=make_sandbox("unsafe_process")))
    assert "| it ended before its tests were over |" in expert.prompts[-1]
    assert observation.text.endswith("return x + 1\n```\nIt passes the tests read from the picture.")


def test_a_sandbox_that_fails_is_not_the_programs_fault() -> None:
    observation = run(program(), Means(Model("x", "y"), sandbox=Box(RanStatus.UNAVAILABLE)))
    assert observation.status is Status.UNAVAILABLE and observation.usage.prompt_tokens == 2


def test_a_deadline_that_passes_in_the_sandbox_is_not_the_programs_fault() -> None:
    class Busy(Box):
        async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
            assert limits == Limits()  # of the program; the deadline is the call's
            await asyncio.Event().wait()
            raise AssertionError("not reached")

    observation = run(program(), Means(Model("x", "y"), sandbox=Busy()), deadline=0.2)
    assert observation.status is Status.TIMEOUT and observation.usage.prompt_tokens == 2


def test_a_repair_that_gets_no_reply_ends_the_skill() -> None:
    class Gone(Model):
        async def ask(self, request: Request) -> Reply:
            return await super().ask(request) if self.texts else Reply("", Status.TIMEOUT, Usage(1, 0, 0.1), 2.0)

    observation = run(program(), Means(Gone("x", "y"), sandbox=Box(RanStatus.ERROR)))
    assert (observation.status, observation.seconds) == (Status.TIMEOUT, 3.5)


# ---- checks before a run -----------------------------------------------------------------------------------

ASK = {"kind": "ask", "output": "answer", "prompt": "{question}"}
FIND = {"kind": "service", "service": "find", "output": "objects"}
MODEL = {"name": "find", "expert": "Echo-One", "prompt": "where? {text}", "parse": "boxes"}
RUN = {"kind": "run", "output": "answer", "program": "program", "tests": "tests", "repair": "{error}"}


def of(*stages: Mapping[str, Any]) -> dict[str, Any]:
    return {"skills": ({"name": "S", "stages": stages},), "services": (MODEL,)}


def with_service(**fields: Any) -> dict[str, Any]:
    return {"services": (MODEL | fields,), "skills": of({**ASK, "prompt": "x"})["skills"]}


MISTAKES = [
    (
        of({**ASK, "output": "a"}, {"kind": "crop", "boxes": "a", "output": "c"}, {**ASK, "images": "c"}),
        'skill "S" stage 2 ("c"): "a" gives text, needed is boxes; valid: none yet',
    ),
    (
        of(FIND, {"kind": "crop", "boxes": "objects", "output": "c"}, {**ASK, "prompt": "{c}"}),
        'skill "S" stage 3 ("answer"): "c" gives images, needed is text; valid: question, query, objects',
    ),
    (
        of(FIND, {**ASK, "images": "objects"}),
        'skill "S" stage 2 ("answer"): "objects" gives boxes and text, needed is images; valid: task, none',
    ),
    (
        of({"kind": "draw", "boxes": "objects", "output": "d"}, {**ASK, "images": ("task", "d")}),
        'skill "S" stage 1 ("d"): no earlier stage gives boxes "objects"; valid: none yet',
    ),
    (
        of({**ASK, "output": "program"}, {**ASK, "output": "tests"}, RUN),
        'skill "S" stage 3 ("answer"): "program" gives text, needed is a program; valid: none yet',
    ),
    (
        of(FIND, {"kind": "parse", "text": "objects", "output": "p", "into": "boxes"}, {**ASK, "prompt": "{p}"}),
        'skill "S" stage 2 ("p"): "objects" is no ask stage; parse what an expert was asked',
    ),
    (
        of(
            {**ASK, "output": "a"},
            {"kind": "parse", "text": "a", "output": "p", "into": "box"},
            {**ASK, "prompt": "{p}"},
        ),
        'skill "S" stage 2 ("p"): into "box" is unknown; did you mean "boxes"?',
    ),
    (
        of(
            {**ASK, "output": "a"},
            {"kind": "parse", "text": "a", "output": "program", "into": "program"},
            {**RUN, "tests": "program", "rounds": 4},
        ),
        'skill "S" stage 3 ("answer"): rounds must be 0 to 3, found 4',
    ),
    (
        of(FIND, {"kind": "crop", "boxes": "objects", "output": "c", "most": 0}, {**ASK, "images": "c"}),
        'skill "S" stage 2 ("c"): most must be at least 1, found 0',
    ),
    (of(FIND, ASK), 'skill "S" stage 1 ("objects"): no later stage uses it; use it or remove the stage'),
    (
        of(FIND, {"kind": "draw", "boxes": "objects", "output": "d"}),
        'skill "S" stage 2 ("d") is the last one and gives no text; end with a stage that does',
    ),
    (with_service(expert="Echo-On"), 'service "find": unknown expert "Echo-On"; did you mean "Echo-One"?'),
    (with_service(expert=""), 'service "find" must have either "implementation" or "expert", and not both'),
    (with_service(prompt=""), 'service "find" has an expert and no "prompt"; write what it is asked'),
    (
        with_service(prompt="{query}"),
        'service "find": its prompt has {query}; only {text} is filled in, the text of the stage',
    ),
    (with_service(parse="box"), 'service "find": parse "box" is unknown; did you mean "boxes"?'),
    ({"show": ("cost",)}, 'registry.show has "cost"; valid: price, speed'),
    ({"show": ("speed",)}, 'expert "Echo-One": registry.show has "speed"; set its typical_seconds'),
    ({"sandbox": "wasn"}, 'registry.sandbox "wasn" is unknown; did you mean "wasm"?'),
    (
        {"skills": ({"name": "S", "stages": (ASK,), "choose": "{children}"},)},
        'skill "S" has "choose" and no children; name the children or remove it',
    ),
    (
        {
            "skills": (
                {"name": "P", "children": ("C",), "choose": "which? {child}"},
                {"name": "C", "tier": 2, "stages": (ASK,)},
            )
        },
        'skill "P": choose has {child}; did you mean "children"?',
    ),
]


@pytest.mark.parametrize(("parts", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_each_mistake_is_one_line_with_its_cure(raw: Raw, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_registry(raw(**parts))
    assert str(caught.value) == message


def test_a_frame_is_checked(raw: Raw) -> None:
    experts = ({**raw()["experts"][0], "frame": {"kind": "relativ"}},)
    with pytest.raises(
        ConfigError, match='expert "Echo-One": frame.kind "relativ" is unknown; did you mean "relative"'
    ):
        parse_registry(raw(experts=experts))
    for key in ("full", "multiple", "max_pixels"):
        experts = ({**raw()["experts"][0], "frame": {key: 0}},)
        with pytest.raises(ConfigError, match=f'expert "Echo-One": frame.{key} must be above 0'):
            parse_registry(raw(experts=experts))
    experts = ({**raw()["experts"][0], "frame": {"min_pixels": 10, "max_pixels": 9}},)
    with pytest.raises(ConfigError, match=r"frame.min_pixels must be 0 to frame.max_pixels \(9\)"):
        parse_registry(raw(experts=experts))
    experts = ({**raw()["experts"][0], "frame": {"sort": "relative"}},)
    with pytest.raises(ConfigError, match=r'unknown key registry.experts\["Echo-One"\].frame.sort'):
        parse_registry(raw(experts=experts))


def test_all_problems_are_found_and_not_only_the_first(raw: Raw) -> None:
    skills = (
        {"name": "A", "stages": ({**ASK, "prompt": "{ocr}"},)},
        {"name": "A", "children": ("B",), "tier": 2},
        {"name": "C", "children": ("C",), "tier": 2},
    )
    found = list(problems(read_registry(raw(skills=skills, show=("cost",)))))
    assert len(found) == 5 and all("\n" not in line for line in found)
