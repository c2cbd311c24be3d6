"""Skills at run time: stages in, one observation out.

A skill's stages run in order; neighbouring service stages that do not need each other run together. A
tier-1 skill with children hands over to the child whose keywords occur most in query and question.
Every stage gets the seconds that remain, and the first one that fails ends the skill with its status.
"""

import asyncio
import dataclasses
import re
import time
from collections.abc import Iterable, Mapping, Sequence

from maestro_jax.registry.config import (
    NO_IMAGES,
    OTHER,
    PLACEHOLDER,
    TASK_IMAGES,
    AskStage,
    RegistryConfig,
    ServiceStage,
    SkillConfig,
    Stage,
    normalise_name,
)
from maestro_jax.registry.interface import Expert, Message, Request, Service
from maestro_jax.types import Observation, Status, Usage

NO_USAGE = Usage()

# What the policy reads when the infrastructure failed; details go to the log only.
FAILURE_TEXTS = {
    Status.TIMEOUT: "The expert gave no reply in time.",
    Status.UNAVAILABLE: "The expert is not available now.",
    Status.CONFIG_ERROR: "The expert is not set up correctly.",
}


@dataclasses.dataclass(frozen=True)
class SkillInput:
    """What a skill works on: the task's question and images, and the policy's query."""

    question: str
    query: str
    images: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage gave; an ask has no images, a service no usage."""

    text: str
    status: Status
    seconds: float
    images: tuple[bytes, ...] = ()
    usage: Usage = NO_USAGE


def failure(status: Status, seconds: float = 0.0, usage: Usage = NO_USAGE) -> Observation:
    """The observation of a call that the infrastructure lost."""
    return Observation(FAILURE_TEXTS[status], status, seconds, usage)


def choose_skill(config: RegistryConfig, skill: SkillConfig, expert: str, text: str) -> SkillConfig:
    """Follows children down to a skill with stages: most keyword occurrences in `text`, ties to the first."""
    while skill.children:
        skill = max(config.children_for(skill, expert), key=lambda child: _occurrences(child.keywords, text))
    return skill


async def run_skill(
    skill: SkillConfig, expert: Expert, services: Mapping[str, Service], given: SkillInput, deadline: float
) -> Observation:
    """Runs the stages of `skill` with `expert`.

    Args:
      skill: one with stages (see `choose_skill`).
      services: by normalised name.
      deadline: seconds the whole skill may take.

    Returns:
      The last stage's text; usage summed over all requests; seconds along the longest path, where a
      cached reply counts with the seconds it took when it was first given.
    """
    end = time.monotonic() + deadline
    results: dict[str, StageResult] = {}
    usage, seconds = NO_USAGE, 0.0
    for wave in waves(skill.stages):
        remaining = end - time.monotonic()
        if remaining <= 0:
            return failure(Status.TIMEOUT, seconds, usage)
        done = await asyncio.gather(*(_run_stage(s, expert, services, given, results, remaining) for s in wave))
        usage = sum((result.usage for result in done), usage)
        seconds += max(result.seconds for result in done)
        for stage, result in zip(wave, done, strict=True):
            if result.status is not Status.OK:
                return failure(result.status, seconds, usage)
            results[stage.output] = result
    return Observation(results[skill.stages[-1].output].text, Status.OK, seconds, usage)


def waves(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages grouped so that those of a group may run together; groups keep the order of the stages."""
    groups: list[list[Stage]] = []
    for stage in stages:
        last = groups[-1] if groups else []
        services_only = isinstance(stage, ServiceStage) and bool(last) and isinstance(last[-1], ServiceStage)
        if services_only and isinstance(stage, ServiceStage) and not stage.uses & {other.output for other in last}:
            last.append(stage)
        else:
            groups.append([stage])
    return groups


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces {name} in one pass: a value is never read as a template."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def select_prompt(stage: AskStage, results: Mapping[str, StageResult]) -> str:
    """The stage's template: the key of `prompts` that the output `by` equals or alone contains as words."""
    if not stage.by:
        return stage.prompt
    said = results[stage.by].text
    equal = [key for key in stage.prompts if normalise_name(key) == normalise_name(said.strip(" \t\r\n.,;:!?\"'"))]
    named = equal or [key for key in stage.prompts if _occurrences([key], said)]
    return stage.prompts[named[0] if len(named) == 1 else OTHER]


async def _run_stage(
    stage: Stage,
    expert: Expert,
    services: Mapping[str, Service],
    given: SkillInput,
    results: Mapping[str, StageResult],
    deadline: float,
) -> StageResult:
    values = {"question": given.question, "query": given.query} | {name: r.text for name, r in results.items()}
    images = {TASK_IMAGES: given.images, NO_IMAGES: ()} | {name: r.images for name, r in results.items()}
    pictures = images[stage.images]
    if isinstance(stage, ServiceStage):
        service = services[normalise_name(stage.service)]
        found = await service.run(pictures, fill(stage.text, values), deadline)
        return StageResult(found.text, found.status, found.seconds, images=found.images)
    prompt = fill(select_prompt(stage, results), values)
    reply = await expert.ask(Request((Message("user", prompt, pictures),), deadline=deadline))
    return StageResult(reply.text, reply.status, reply.seconds, usage=reply.usage)


def _occurrences(phrases: Iterable[str], text: str) -> int:
    """How often the phrases occur in `text` as whole words, whatever their case."""
    folded = text.casefold()
    return sum(len(re.findall(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", folded)) for phrase in phrases)
