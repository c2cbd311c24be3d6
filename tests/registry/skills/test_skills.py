"""Skills at run time: templates, choices, order of stages, deadlines, failures."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from maestro_jax.registry.description.config import SkillConfig
from maestro_jax.registry.description.interface import Reply, Request, ServiceResult
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.description.stages import AskStage, ServiceStage
from maestro_jax.registry.skills.running import Means, SkillInput, choose_child, run_called, run_skill, select_prompt
from maestro_jax.registry.skills.templates import fill
from maestro_jax.types import Observation, Status, Usage

GIVEN = SkillInput("how many?", "red dots", (b"img",))


class ScriptedExpert:
    """Gives its replies in turn and keeps the requests."""

    name = "scripted"

    def __init__(self, *replies: Reply, meet: asyncio.Barrier | None = None):
        self.replies = list(replies)
        self.requests: list[Request] = []
        self.meet = meet

    async def ask(self, request: Request) -> Reply:
        self.requests.append(request)
        if self.meet and len(self.requests) == 1:
            await self.meet.wait()
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


def means(expert: ScriptedExpert, *services: ScriptedService) -> Means:
    return Means(expert, {service.name: service for service in services})


def run(
    stages: tuple[Any, ...], expert: ScriptedExpert, *services: ScriptedService, deadline: float = 30.0
) -> Observation:
    skill = SkillConfig("S", stages=stages)
    return asyncio.run(run_skill(skill, means(expert, *services), GIVEN, deadline))


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
        AskStage("type", images=(), prompt="kind? {words}"),
        AskStage("answer", images=("words",), prompt="{type}: {words}"),
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
    assert select_prompt(stage, {"type": said}) == prompt


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
        return await run_skill(skill, means(expert, *services), GIVEN, 30.0)

    assert asyncio.run(scenario()).seconds == 4.0


def test_stages_run_by_what_they_need_and_not_by_their_place() -> None:
    async def scenario() -> Observation:
        meet = asyncio.Barrier(3)  # an ask and two services; the first ask stands between them
        services = [ScriptedService(n, ServiceResult(n, seconds=2.0), meet) for n in ("ocr", "caption")]
        expert = ScriptedExpert(ok("facts", seconds=5.0), ok("all"), meet=meet)
        stages = (
            ServiceStage("ocr", "ocr"),
            AskStage("facts", prompt="facts?"),
            ServiceStage("caption", "caption"),
            AskStage("answer", prompt="{ocr} {facts} {caption}"),
        )
        found = await run_skill(SkillConfig("S", stages=stages), means(expert, *services), GIVEN, 30.0)
        assert expert.requests[1].messages[0].text == "ocr facts caption"
        return found

    assert asyncio.run(scenario()).seconds == 6.0  # the longest path


def test_what_needs_a_failed_stage_does_not_run_and_the_rest_does() -> None:
    ocr = ScriptedService("ocr", ServiceResult(status=Status.TIMEOUT, seconds=1.0))
    expert = ScriptedExpert(ok("facts", seconds=4.0))
    stages = (
        AskStage("facts", prompt="facts?"),
        ServiceStage("ocr", "ocr"),
        AskStage("answer", prompt="{ocr} {facts}"),
    )
    observation = run(stages, expert, ocr)
    assert len(expert.requests) == 1
    assert (observation.status, observation.seconds, observation.usage) == (Status.TIMEOUT, 1.0, Usage(2, 1, 0.5))


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.UNAVAILABLE, Status.CONFIG_ERROR])
def test_a_failed_stage_ends_the_skill_with_its_status(status: Status) -> None:
    expert = ScriptedExpert(ok("first"), Reply("", status, Usage(1, 0, 0.1), 2.0))
    stages = (AskStage("a", prompt="x"), AskStage("b", prompt="{a}"), AskStage("c", prompt="{b}"))
    observation = run(stages, expert)
    assert (observation.status, observation.seconds, observation.usage) == (status, 3.0, Usage(3, 1, 0.6))
    assert observation.text.startswith("The expert") and len(expert.requests) == 2


def test_a_failed_service_ends_the_skill() -> None:
    ocr = ScriptedService("ocr", ServiceResult(status=Status.UNAVAILABLE))
    expert = ScriptedExpert()
    assert run((ServiceStage("ocr", "o"), AskStage("a", prompt="{o}")), expert, ocr).status is Status.UNAVAILABLE


def test_stages_get_the_seconds_that_remain() -> None:
    expert = ScriptedExpert(ok("a"), ok("b"))
    run((AskStage("a", prompt="x"), AskStage("b", prompt="{a}")), expert, deadline=20.0)
    first, second = (request.deadline for request in expert.requests)
    assert 20.0 >= first > second > 15.0


def test_no_time_left_is_a_timeout_without_asking() -> None:
    expert = ScriptedExpert()
    assert run((AskStage("a", prompt="x"),), expert, deadline=0.0).status is Status.TIMEOUT


def family(raw: Callable[..., dict[str, Any]], **restrict: Any) -> Any:
    def stages(name: str) -> tuple[dict[str, Any], ...]:
        return ({"kind": "ask", "output": "a", "prompt": f"I am {name}"},)

    skills = (
        {"name": "P", "children": ("Words", "Fields")},
        {"name": "Words", "tier": 2, "stages": stages("Words"), "keywords": ("word", "say"), **restrict},
        {"name": "Fields", "tier": 2, "stages": stages("Fields"), "keywords": ("total", "invoice number")},
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
    assert choose_child(config.skills[1:], text, 1).name == child


def test_a_child_closed_to_the_expert_is_not_chosen(raw: Callable[..., dict[str, Any]]) -> None:
    config = family(raw, experts=("Echo-Two",))
    parent = config.skills[0]
    assert [child.name for child in config.children_for(parent, "Echo-One")] == ["Fields"]
    assert [child.name for child in config.children_for(parent, "Echo-Two")] == ["Words", "Fields"]


def test_several_images_count_like_keywords(raw: Callable[..., dict[str, Any]]) -> None:
    words, fields = family(raw, several_images=2).skills[1:]
    assert choose_child((fields, words), "total", 1) is fields
    assert choose_child((fields, words), "total", 2) is words


@pytest.mark.parametrize(
    ("said", "child"),
    [("Fields", "Fields"), ("I would take fields.", "Fields"), ("Words or Fields", "Words"), ("neither", "Words")],
)
def test_the_expert_chooses_a_child_and_keywords_where_it_does_not(
    raw: Callable[..., dict[str, Any]], said: str, child: str
) -> None:
    config = family(raw)
    parent = dataclasses.replace(config.skills[0], choose="{question} {query}\n{children}")
    expert = ScriptedExpert(ok(f"<think>Words?</think>{said}"), ok("done"))
    expert.name = "Echo-One"
    given = SkillInput("a word", "?", (b"img",))
    observation = asyncio.run(run_called(config, parent, means(expert), given, 30.0))
    choice, work = (request.messages[0] for request in expert.requests)
    assert choice.text == "a word ?\n- Words: \n- Fields: " and choice.images == (b"img",)
    assert work.text == f"I am {child}"
    assert observation == Observation("done", Status.OK, 2.0, Usage(4, 2, 1.0))


def test_a_failed_choice_ends_the_call(raw: Callable[..., dict[str, Any]]) -> None:
    config = family(raw)
    parent = dataclasses.replace(config.skills[0], choose="{children}")
    expert = ScriptedExpert(Reply("", Status.UNAVAILABLE, Usage(1, 0, 0.1), 3.0))
    expert.name = "Echo-One"
    observation = asyncio.run(run_called(config, parent, means(expert), GIVEN, 30.0))
    assert (observation.status, observation.seconds, observation.usage) == (Status.UNAVAILABLE, 3.0, Usage(1, 0, 0.1))


def test_thoughts_of_an_expert_go_no_further() -> None:
    expert = ScriptedExpert(ok("<think>a\nb</think>\nbar"), ok("7"))
    run((AskStage("type", prompt="x"), AskStage("answer", prompt="{type}!")), expert)
    assert expert.requests[1].messages[0].text == "bar!"


def test_a_long_value_keeps_head_and_tail_in_a_prompt() -> None:
    text = fill("{a}", {"a": "x" * 50_000 + "end"})
    assert len(text) <= 16_000 and text.startswith("xxx") and text.endswith("end") and "[...]" in text
