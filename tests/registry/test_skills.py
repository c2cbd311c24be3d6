"""Skills at run time: templates, choices, order of stages, deadlines, failures."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from maestro_jax.registry.config import AskStage, ServiceStage, SkillConfig, parse_registry
from maestro_jax.registry.interface import Reply, Request, ServiceResult
from maestro_jax.registry.skills import SkillInput, StageResult, choose_skill, fill, run_skill, select_prompt, waves
from maestro_jax.types import Observation, Status, Usage

GIVEN = SkillInput("how many?", "red dots", (b"img",))


class ScriptedExpert:
    """Gives its replies in turn and keeps the requests."""

    name = "scripted"

    def __init__(self, *replies: Reply):
        self.replies = list(replies)
        self.requests: list[Request] = []

    async def ask(self, request: Request) -> Reply:
        self.requests.append(request)
        return self.replies.pop(0)

    async def close(self) -> None: ...


class ScriptedService:
    def __init__(self, name: str, result: ServiceResult, meet: asyncio.Barrier | None = None):
        self.name, self.result, self.meet = name, result, meet
        self.seen: list[tuple[tuple[bytes, ...], str]] = []

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        self.seen.append((images, text))
        if self.meet:
            await self.meet.wait()
        return self.result

    async def close(self) -> None: ...


def ok(text: str, seconds: float = 1.0) -> Reply:
    return Reply(text, Status.OK, Usage(2, 1, 0.5), seconds)


def run(
    stages: tuple[Any, ...], expert: ScriptedExpert, *services: ScriptedService, deadline: float = 30.0
) -> Observation:
    skill = SkillConfig("S", stages=stages)
    return asyncio.run(run_skill(skill, expert, {s.name: s for s in services}, GIVEN, deadline))


def test_prompt_is_filled_and_images_are_passed_on() -> None:
    expert = ScriptedExpert(ok("3"))
    observation = run((AskStage("answer", prompt="Question: {question}\nFocus: {query}"),), expert)
    message = expert.requests[0].messages[0]
    assert (message.role, message.text, message.images) == ("user", "Question: how many?\nFocus: red dots", (b"img",))
    assert observation == Observation("3", Status.OK, 1.0, Usage(2, 1, 0.5))


def test_outputs_of_earlier_stages_reach_later_ones() -> None:
    ocr = ScriptedService("ocr", ServiceResult("a @ 1,2,3,4", (b"boxed",)))
    expert = ScriptedExpert(ok("bar"), ok("7"))
    stages = (
        ServiceStage("OCR", "words", text="{query}"),
        AskStage("type", images="none", prompt="kind? {words}"),
        AskStage("answer", images="words", prompt="{type}: {words}"),
    )
    observation = run(stages, expert, ocr)
    assert ocr.seen == [((b"img",), "red dots")]
    assert [m.messages[0].text for m in expert.requests] == ["kind? a @ 1,2,3,4", "bar: a @ 1,2,3,4"]
    assert [m.messages[0].images for m in expert.requests] == [(), (b"boxed",)]
    assert (observation.text, observation.usage) == ("7", Usage(4, 2, 1.0))


def test_values_are_never_read_as_templates() -> None:
    assert fill("{query} {question}", {"query": "{question}", "question": "{query}"}) == "{question} {query}"


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("bar", "B"),
        (" Bar. ", "B"),
        ("This is a line chart", "L"),
        ("stacked bar", "S"),
        ("bar or line", "O"),
        ("barometer", "O"),
        ("", "O"),
    ],
)
def test_prompt_follows_an_earlier_output(said: str, prompt: str) -> None:
    stage = AskStage("a", by="type", prompts={"bar": "B", "line": "L", "stacked bar": "S", "other": "O"})
    assert select_prompt(stage, {"type": StageResult(said, Status.OK, 0.0)}) == prompt


def test_independent_services_run_together() -> None:
    async def scenario() -> Observation:
        meet = asyncio.Barrier(2)  # neither can pass alone
        services = [ScriptedService(n, ServiceResult(n, seconds=s), meet) for n, s in (("ocr", 2.0), ("caption", 3.0))]
        stages = (
            ServiceStage("ocr", "ocr"),
            ServiceStage("caption", "caption"),
            AskStage("answer", prompt="{ocr} {caption}"),
        )
        expert = ScriptedExpert(ok("x", seconds=1.0))
        skill = SkillConfig("S", stages=stages)
        return await run_skill(skill, expert, {s.name: s for s in services}, GIVEN, 30.0)

    assert asyncio.run(scenario()).seconds == 4.0


def test_services_that_need_each_other_do_not_share_a_wave() -> None:
    zoom, ocr, caption = (
        ServiceStage("zoom", "crop"),
        ServiceStage("ocr", "ocr", images="crop"),
        ServiceStage("c", "caption", text="{ocr}"),
    )
    ask = AskStage("a", prompt="x")
    assert waves((zoom, ocr, caption, ask)) == [[zoom], [ocr], [caption], [ask]]
    assert waves((zoom, ServiceStage("d", "boxes"), ask, zoom)) == [[zoom, ServiceStage("d", "boxes")], [ask], [zoom]]


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.UNAVAILABLE, Status.CONFIG_ERROR])
def test_a_failed_stage_ends_the_skill_with_its_status(status: Status) -> None:
    expert = ScriptedExpert(ok("first"), Reply("", status, Usage(1, 0, 0.1), 2.0))
    stages = tuple(AskStage(name, prompt="x") for name in ("a", "b", "c"))
    observation = run(stages, expert)
    assert (observation.status, observation.seconds, observation.usage) == (status, 3.0, Usage(3, 1, 0.6))
    assert observation.text.startswith("The expert") and len(expert.requests) == 2


def test_a_failed_service_ends_the_skill() -> None:
    ocr = ScriptedService("ocr", ServiceResult(status=Status.UNAVAILABLE))
    expert = ScriptedExpert()
    assert run((ServiceStage("ocr", "o"), AskStage("a", prompt="{o}")), expert, ocr).status is Status.UNAVAILABLE


def test_stages_get_the_seconds_that_remain() -> None:
    expert = ScriptedExpert(ok("a"), ok("b"))
    run((AskStage("a", prompt="x"), AskStage("b", prompt="x")), expert, deadline=20.0)
    first, second = (request.deadline for request in expert.requests)
    assert 20.0 >= first > second > 15.0


def test_no_time_left_is_a_timeout_without_asking() -> None:
    expert = ScriptedExpert()
    assert run((AskStage("a", prompt="x"),), expert, deadline=0.0).status is Status.TIMEOUT


def family(raw: Callable[..., dict[str, Any]], **restrict: Any) -> Any:
    stage = {"kind": "ask", "output": "a", "prompt": "x"}
    skills = (
        {"name": "P", "children": ("Words", "Fields")},
        {"name": "Words", "tier": 2, "stages": (stage,), "keywords": ("word", "say"), **restrict},
        {"name": "Fields", "tier": 2, "stages": (stage,), "keywords": ("total", "invoice number")},
    )
    return parse_registry(raw(skills=skills))


@pytest.mark.parametrize(
    ("text", "child"),
    [
        ("what WORD is it", "Words"),
        ("the total: which word? total", "Fields"),
        ("Invoice Number", "Fields"),
        ("nothing fits", "Words"),  # a tie goes to the first
        ("totally word", "Words"),  # no substring
        ("word total", "Words"),
    ],
)
def test_the_child_with_most_keywords_runs(raw: Callable[..., dict[str, Any]], text: str, child: str) -> None:
    config = family(raw)
    assert choose_skill(config, config.skills[0], "Echo-One", text).name == child


def test_a_child_closed_to_the_expert_is_not_chosen(raw: Callable[..., dict[str, Any]]) -> None:
    config = family(raw, experts=("Echo-Two",))
    assert choose_skill(config, config.skills[0], "Echo-One", "word word").name == "Fields"
    assert choose_skill(config, config.skills[0], "Echo-Two", "word word").name == "Words"
