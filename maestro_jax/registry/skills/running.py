"""Skills at run time: stages in, one observation out.

A stage runs as soon as what it needs is there, beside all others that can run. A skill with children hands over to one
of them, by keywords or as the called expert says. Every stage gets the seconds that remain. Where a stage fails, those
that need it do not run and the skill ends with its status; those that do not need it still run, so that what is asked
depends on replies alone and never on who was faster (a journal can then be replayed).
"""

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from maestro_jax.errors import UserError
from maestro_jax.registry.description.boxes import Box, Frame, read_boxes, write_boxes
from maestro_jax.registry.description.config import RegistryConfig, SkillConfig
from maestro_jax.registry.description.interface import Expert, Message, Reply, Request, Service
from maestro_jax.registry.description.names import normalise_name
from maestro_jax.registry.description.stages import (
    OTHER,
    TASK_IMAGES,
    AskStage,
    CropStage,
    DrawStage,
    ParseStage,
    RunStage,
    ServiceStage,
    Stage,
    uses,
)
from maestro_jax.registry.skills.pictures import crops, drawn, shown_size
from maestro_jax.registry.skills.served import NOTHING_FOUND, turned
from maestro_jax.registry.skills.templates import fill, named_in, occurrences, program_in, said, shortened
from maestro_jax.sandbox.interface import Limits, Sandbox
from maestro_jax.sandbox.tested import Verdict, run_tests
from maestro_jax.types import Observation, Status, Usage

NO_USAGE = Usage()
LONGEST_ERROR = 2_000  # characters of a program's error that the expert is shown for a repair

# What the policy reads when the infrastructure failed; details go to the log only.
FAILURE_TEXTS = {
    Status.TIMEOUT: "The expert gave no reply in time.",
    Status.UNAVAILABLE: "The expert is not available now.",
    Status.CONFIG_ERROR: "The expert is not set up correctly.",
}

# What the policy reads of a program.
VERDICTS = {
    Verdict.PASSED: "It passes the tests read from the picture.",
    Verdict.FAILED: "Its tests fail: {why}",
    Verdict.UNTESTED: "There was no test to run.",
}


@dataclasses.dataclass(frozen=True)
class SkillInput:
    """What a skill works on: the task's question and images, and the policy's query."""

    question: str
    query: str
    images: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class Means:
    """What a skill works with: the called expert, what its box coordinates mean, services by normalised name."""

    expert: Expert
    services: Mapping[str, Service] = dataclasses.field(default_factory=dict)
    sandbox: Sandbox | None = None
    frame: Frame = Frame()


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Attributes:
      seconds: its own; a cached reply counts with the seconds it took when it was first given.
      images, boxes: see `stages.Kind`; boxes are in `seen`.
      seen: the images it worked on.
    """

    text: str = ""
    status: Status = Status.OK
    seconds: float = 0.0
    images: tuple[bytes, ...] = ()
    boxes: tuple[Box, ...] = ()
    seen: tuple[bytes, ...] = ()
    usage: Usage = NO_USAGE


def failure(status: Status, seconds: float = 0.0, usage: Usage = NO_USAGE) -> Observation:
    """The observation of a call that the infrastructure lost."""
    return Observation(FAILURE_TEXTS[status], status, seconds, usage)


# ---- choosing a child --------------------------------------------------------------------------------------


async def run_called(
    config: RegistryConfig, skill: SkillConfig, means: Means, given: SkillInput, deadline: float
) -> Observation:
    """Runs a skill that was called by name: down to a child where it has children, then the stages.

    Args:
      deadline: seconds the whole call may take.
    """
    end = time.monotonic() + deadline
    usage, seconds = NO_USAGE, 0.0
    while skill.children:
        children = config.children_for(skill, means.expert.name)
        chosen = None
        if skill.choose and len(children) > 1:
            reply = await _choice(skill, children, means.expert, given, end)
            usage, seconds = usage + reply.usage, seconds + reply.seconds
            if reply.status is not Status.OK:
                return failure(reply.status, seconds, usage)
            chosen = named_in(said(reply.text), [child.name for child in children])
        named = [child for child in children if child.name == chosen]
        skill = named[0] if named else choose_child(children, f"{given.query}\n{given.question}", len(given.images))
    found = await run_skill(skill, means, given, end - time.monotonic())
    if usage is NO_USAGE:  # nobody was asked to choose
        return found
    return dataclasses.replace(found, usage=usage + found.usage, seconds=seconds + found.seconds)


def choose_child(children: Sequence[SkillConfig], text: str, images: int) -> SkillConfig:
    """The child whose keywords occur most in `text`; ties go to the first."""

    def score(child: SkillConfig) -> int:
        return occurrences(child.keywords, text) + (child.several_images if images > 1 else 0)

    return max(children, key=score)


async def _choice(
    skill: SkillConfig, children: Sequence[SkillConfig], expert: Expert, given: SkillInput, end: float
) -> Reply:
    listed = "\n".join(f"- {child.name}: {child.description}" for child in children)
    prompt = fill(skill.choose, {"question": given.question, "query": given.query, "children": listed})
    return await _ask(expert, prompt, given.images, end)


# ---- running stages ----------------------------------------------------------------------------------------


async def run_skill(skill: SkillConfig, means: Means, given: SkillInput, deadline: float) -> Observation:
    """Runs the stages of `skill`, which has no children.

    Args:
      deadline: seconds the whole skill may take.

    Returns:
      The last stage's text; usage summed over all requests; seconds along the longest path.
    """
    run = _Run(skill, means, given, time.monotonic() + deadline)
    results: Sequence[StageResult | None]
    if len(skill.stages) == 1:  # nothing to wait for, so no task
        results = [await run.begin(skill.stages[0], {})]
    else:
        results = await _together(run, skill.stages)
    usage = sum((result.usage for result in results if result), NO_USAGE)
    for stage, result in zip(skill.stages, results, strict=True):  # in their order, whichever failed first
        if result and result.status is not Status.OK:
            return failure(result.status, run.finished[stage.output], usage)
    last = results[-1]
    assert last is not None  # nothing failed, so everything ran
    return Observation(last.text, Status.OK, run.finished[skill.stages[-1].output], usage)


async def _together(run: "_Run", stages: Sequence[Stage]) -> list[StageResult | None]:
    """Runs stages beside each other, each as soon as it can."""
    try:
        async with asyncio.TaskGroup() as group:
            for stage in stages:
                run.tasks[stage.output] = group.create_task(run.stage(stage))
    except ExceptionGroup as raised:
        # A journal that cannot be written, say: what only the user can mend is to end the run, not this call.
        for_user = raised.subgroup(UserError)
        raise (for_user or raised).exceptions[0] from raised
    return [task.result() for task in run.tasks.values()]


class _Run:
    """One skill under way.

    Attributes:
      tasks: of stages, where there are several, by the name of their output.
      finished: seconds from the start of the skill, along the longest path to a stage and with it.
    """

    def __init__(self, skill: SkillConfig, means: Means, given: SkillInput, end: float):
        self.tasks: dict[str, asyncio.Task[StageResult | None]] = {}
        self.finished: dict[str, float] = {}
        parsed = [stage for stage in skill.stages if isinstance(stage, ParseStage)]
        self._boxed = {stage.text for stage in parsed if stage.into == "boxes"}  # outputs that say where things are
        self._means, self._given, self._end = means, given, end

    async def stage(self, stage: Stage) -> StageResult | None:
        """Waits for what `stage` needs, then runs it; None where that did not come."""
        needed: dict[str, StageResult] = {}
        for name in sorted(uses(stage)):
            result = await self.tasks[name]
            if result is None or result.status is not Status.OK:
                return None
            needed[name] = result
        return await self.begin(stage, needed)

    async def begin(self, stage: Stage, needed: Mapping[str, StageResult]) -> StageResult:
        """Runs `stage`, for which all that it needs is there."""
        late = time.monotonic() >= self._end
        result = StageResult(status=Status.TIMEOUT) if late else await self._work(stage, needed)
        began = max((self.finished[name] for name in needed), default=0.0)
        self.finished[stage.output] = began + result.seconds
        return result

    async def _work(self, stage: Stage, needed: Mapping[str, StageResult]) -> StageResult:
        if isinstance(stage, AskStage):
            values = self._values(needed)
            images = self._images(stage.images, needed)
            images = await turned(images) if stage.output in self._boxed else images
            return _answered(await self._ask(fill(select_prompt(stage, values), values), images), images)
        if isinstance(stage, ServiceStage):
            return await self._serve(stage, needed)
        if isinstance(stage, RunStage):
            return await self._run_program(stage, needed)
        if isinstance(stage, ParseStage):
            return _parsed(stage, needed[stage.text], self._means.frame)
        return await _pictured(stage, needed[stage.boxes])

    async def _serve(self, stage: ServiceStage, needed: Mapping[str, StageResult]) -> StageResult:
        images = self._images(stage.images, needed)
        text = fill(stage.text, self._values(needed))
        found = await self._means.services[normalise_name(stage.service)].run(images, text, self._remaining)
        return StageResult(found.text, found.status, found.seconds, found.images, found.boxes, images, found.usage)

    async def _run_program(self, stage: RunStage, needed: Mapping[str, StageResult]) -> StageResult:
        """Runs, and lets the expert repair, until the tests pass or the rounds are over."""
        assert self._means.sandbox is not None  # the registry makes one where a skill has such a stage
        program, tests = needed[stage.program].text, needed[stage.tests].text
        images, values = self._images(stage.images, needed), self._values(needed)
        usage, seconds = NO_USAGE, 0.0
        for repairs_left in reversed(range(stage.rounds + 1)):
            try:
                async with asyncio.timeout(self._remaining):
                    judged = await run_tests(self._means.sandbox, program, tests, Limits())
            except TimeoutError:
                return StageResult(status=Status.TIMEOUT, seconds=seconds, usage=usage)
            seconds += judged.seconds
            if judged.verdict is Verdict.UNAVAILABLE:
                return StageResult(status=Status.UNAVAILABLE, seconds=seconds, usage=usage)
            why = shortened(judged.why, LONGEST_ERROR)
            if judged.verdict is not Verdict.FAILED or not repairs_left:
                break
            reply = await self._ask(fill(stage.repair, values | {"program": program, "error": why}), images)
            usage, seconds = usage + reply.usage, seconds + reply.seconds
            if reply.status is not Status.OK:
                return StageResult(status=reply.status, seconds=seconds, usage=usage)
            program = program_in(said(reply.text))
        report = f"```python\n{program}\n```\n{VERDICTS[judged.verdict].format(why=why)}"
        return StageResult(report, seconds=seconds, seen=images, usage=usage)

    def _ask(self, prompt: str, images: tuple[bytes, ...]) -> Coroutine[Any, Any, Reply]:
        return _ask(self._means.expert, prompt, images, self._end)

    def _values(self, needed: Mapping[str, StageResult]) -> dict[str, str]:
        inputs = {"question": self._given.question, "query": self._given.query}
        return inputs | {name: result.text for name, result in needed.items()}

    def _images(self, names: Sequence[str], needed: Mapping[str, StageResult]) -> tuple[bytes, ...]:
        sources = {TASK_IMAGES: self._given.images} | {name: result.images for name, result in needed.items()}
        return tuple(image for name in names for image in sources[name])

    @property
    def _remaining(self) -> float:
        return self._end - time.monotonic()


def select_prompt(stage: AskStage, values: Mapping[str, str]) -> str:
    """The stage's template: the key of `prompts` that the output `by` equals or alone contains as words."""
    if not stage.by:
        return stage.prompt
    return stage.prompts[named_in(values[stage.by], stage.prompts) or OTHER]


async def _ask(expert: Expert, prompt: str, images: tuple[bytes, ...], end: float) -> Reply:
    left = end - time.monotonic()
    if left <= 0:
        return Reply("", Status.TIMEOUT)
    return await expert.ask(Request((Message("user", prompt, images),), deadline=left))


def _answered(reply: Reply, seen: tuple[bytes, ...]) -> StageResult:
    return StageResult(said(reply.text), reply.status, reply.seconds, seen=seen, usage=reply.usage)


def _parsed(stage: ParseStage, reply: StageResult, frame: Frame) -> StageResult:
    if stage.into == "program":
        return StageResult(program_in(reply.text))
    sizes = [shown_size(image) for image in reply.seen]
    boxes = read_boxes(reply.text, sizes, frame)
    return StageResult(write_boxes(boxes, sizes) or NOTHING_FOUND, boxes=boxes, seen=reply.seen)


async def _pictured(stage: CropStage | DrawStage, found: StageResult) -> StageResult:
    """Crops or drawn boxes, made in a thread: decoding takes longer than the event loop may be held."""
    if isinstance(stage, CropStage):
        made = await asyncio.to_thread(crops, found.seen, found.boxes, stage.margin, stage.most)
    else:
        made = await asyncio.to_thread(drawn, found.seen, found.boxes)
    return StageResult(images=made)
