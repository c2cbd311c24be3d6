"""What can be wrong between the entries of a registry that was read: one line with its cure each.

Doubled names, placeholders nobody fills, missing services, cycles, implementations that do not import: all of it is
found before a run.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.plugins import load
from maestro_jax.registry.description.boxes import FRAMES
from maestro_jax.registry.description.config import (
    ExpertConfig,
    RegistryConfig,
    ServiceConfig,
    SkillConfig,
)
from maestro_jax.registry.description.names import listed, nearest, normalise_name
from maestro_jax.registry.description.stages import (
    INPUTS,
    MOST_ROUNDS,
    NO_IMAGES,
    OTHER,
    PARSED,
    PLACEHOLDER,
    TASK_IMAGES,
    AskStage,
    CropStage,
    Kind,
    ParseStage,
    RunStage,
    ServiceStage,
    Stage,
    gives,
    placeholders,
    uses,
)
from maestro_jax.sandbox.choose import KINDS as SANDBOXES

SHOWABLE = ("price", "speed")  # what the policy's prompt may say of an expert besides its description
PARSERS = ("text", "boxes")  # how a service reads what its model wrote

_FORBIDDEN_IN_NAMES = re.compile(r"@@|[:<>\r\n]")  # they would break the call grammar


def problems(config: RegistryConfig) -> Iterator[str]:
    """Everything that is wrong between the entries, a line with its cure each."""
    if not config.shown_experts or not config.shown_skills:
        cure = "add them to registry.experts/skills"
        yield f"registry needs at least one shown expert and one shown skill; {cure}"
    for kind, entries in (("expert", config.experts), ("service", config.services), ("skill", config.skills)):
        yield from _name_problems(kind, [entry.name for entry in entries])
    for skill in config.skills:
        yield from _skill_problems(skill, config)
    yield from _cycle_problems(config)
    for expert in config.experts:
        yield from _expert_problems(expert, config)
    for service in config.services:
        yield from _service_problems(service, config)
    if config.sandbox not in SANDBOXES:
        yield f'registry.sandbox "{config.sandbox}" is unknown; {nearest(config.sandbox, SANDBOXES)}'
    for word in config.show:
        if word not in SHOWABLE:
            yield f'registry.show has "{word}"; {nearest(word, SHOWABLE)}'


def _name_problems(kind: str, names: list[str]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or _FORBIDDEN_IN_NAMES.search(name):
            yield f'{kind} name "{name}" is empty or holds "@@", ":", "<", ">" or a line break; rename it'
        form = normalise_name(name)
        if form in seen:
            same = 'case, "-", "_" and " " do not count'
            yield f'{kind} "{name}" has the same name as "{seen[form]}" ({same}); rename one'
        seen[form] = name


def _expert_problems(expert: ExpertConfig, config: RegistryConfig) -> Iterator[str]:
    where = f'expert "{expert.name}"'
    if expert.implementation:
        yield from _class_problems(expert, where)
    if expert.timeout <= 0:
        yield f"{where}: timeout must be above 0 seconds"
    if expert.frame.kind not in FRAMES:
        yield f'{where}: frame.kind "{expert.frame.kind}" is unknown; {nearest(expert.frame.kind, FRAMES)}'
    for key in ("full", "multiple", "max_pixels"):
        if getattr(expert.frame, key) <= 0:
            yield f"{where}: frame.{key} must be above 0"
    if not 0 <= expert.frame.min_pixels <= expert.frame.max_pixels:
        yield f"{where}: frame.min_pixels must be 0 to frame.max_pixels ({expert.frame.max_pixels})"
    if "speed" in config.show and expert.shown and not expert.typical_seconds:
        yield f'{where}: registry.show has "speed"; set its typical_seconds'


def _service_problems(service: ServiceConfig, config: RegistryConfig) -> Iterator[str]:
    where = f'service "{service.name}"'
    if service.timeout <= 0:
        yield f"{where}: timeout must be above 0 seconds"
    if bool(service.implementation) == bool(service.expert):
        yield f'{where} must have either "implementation" or "expert", and not both'
    elif service.implementation:
        yield from _class_problems(service, where)
    else:
        yield from _served_problems(service, config, where)
        if (service.workers, service.processes) != (1, False):
            yield f'{where}: "workers" and "processes" are for services with an implementation; remove them'


def _served_problems(service: ServiceConfig, config: RegistryConfig, where: str) -> Iterator[str]:
    if normalise_name(service.expert) not in config.experts_by_name:
        cure = nearest(service.expert, [e.name for e in config.experts])
        yield f'{where}: unknown expert "{service.expert}"; {cure}'
    if not service.prompt:
        yield f'{where} has an expert and no "prompt"; write what it is asked'
    for name in placeholders(service.prompt):
        if name != "text":
            yield f"{where}: its prompt has {{{name}}}; only {{text}} is filled in, the text of the stage"
    if service.parse not in PARSERS:
        yield f'{where}: parse "{service.parse}" is unknown; {nearest(service.parse, PARSERS)}'


def _class_problems(entry: ExpertConfig | ServiceConfig, where: str) -> Iterator[str]:
    try:
        load(entry.implementation, f"{where}: implementation")
    except ConfigError as error:
        yield str(error)
    if entry.workers < 1:
        yield f"{where}: workers must be at least 1, found {entry.workers}"
    if entry.processes and not _can_travel(entry.options):
        yield f"{where}: options go to other processes as literals of Python, and do not; simplify them"


def _can_travel(options: Mapping[str, Any]) -> bool:
    try:
        return bool(ast.literal_eval(repr(dict(options))) == options)
    except (ValueError, SyntaxError):
        return False


def _skill_problems(skill: SkillConfig, config: RegistryConfig) -> Iterator[str]:
    where = f'skill "{skill.name}"'
    if skill.tier not in (1, 2):
        yield f"{where}: tier must be 1 or 2, found {skill.tier}"
    if bool(skill.stages) == bool(skill.children):
        yield f"{where} must have either stages or children, and not both"
    for expert in skill.experts:
        if normalise_name(expert) not in config.experts_by_name:
            cure = f"add it to registry.experts or pick one of: {listed(e.name for e in config.experts)}"
            yield f'{where} names expert "{expert}" that the registry does not have; {cure}'
    yield from _stages_problems(skill, config)
    yield from _choice_problems(skill, where)
    for child in skill.children:
        known = config.skills_by_name.get(normalise_name(child))
        if known is None:
            yield f'{where}: unknown child "{child}"; {nearest(child, [s.name for s in config.skills])}'
        elif known.tier != 2:
            yield f'{where}: child "{child}" is of tier {known.tier}; set its tier to 2'


def _choice_problems(skill: SkillConfig, where: str) -> Iterator[str]:
    if skill.choose and not skill.children:
        yield f'{where} has "choose" and no children; name the children or remove it'
    for name in placeholders(skill.choose):
        if name not in (*INPUTS, "children"):
            yield f"{where}: choose has {{{name}}}; {nearest(name, [*INPUTS, 'children'])}"
    if skill.choose and "children" not in placeholders(skill.choose):
        yield f"{where}: choose does not show what there is to choose from; put {{children}} into it"


def _stages_problems(skill: SkillConfig, config: RegistryConfig) -> Iterator[str]:
    before: dict[str, tuple[Stage, frozenset[Kind]]] = {}  # output → its stage and what it holds
    for i, stage in enumerate(skill.stages):
        where = _at(skill, i)
        yield from _stage_problems(stage, config, where, before)
        for name, kind in stage.needs:
            yield from _need_problems(name, kind, where, {output: held for output, (_, held) in before.items()})
        taken = (*INPUTS, TASK_IMAGES, NO_IMAGES, *before)
        if stage.output in taken or not PLACEHOLDER.fullmatch(f"{{{stage.output}}}"):
            yield f"{where}: the output name is taken or no identifier; choose another"
        before[stage.output] = stage, _held(stage, config)
    needed = {name for stage in skill.stages for name in uses(stage)}
    for i, stage in enumerate(skill.stages[:-1]):
        if stage.output not in needed:
            yield f"{_at(skill, i)}: no later stage uses it; use it or remove the stage"
    if skill.stages and Kind.TEXT not in _held(skill.stages[-1], config):
        yield f"{_at(skill, len(skill.stages) - 1)} is the last one and gives no text; end with a stage that does"


def _at(skill: SkillConfig, i: int) -> str:
    return f'skill "{skill.name}" stage {i + 1} ("{skill.stages[i].output}")'


def _held(stage: Stage, config: RegistryConfig) -> frozenset[Kind]:
    """What the stage's output holds; everything where that cannot be known, which is another problem's line."""
    unknown = frozenset(Kind)
    if isinstance(stage, ServiceStage):
        service = config.services_by_name.get(normalise_name(stage.service))
        return unknown if service is None else gives(stage, service.gives)
    return unknown if isinstance(stage, ParseStage) and stage.into not in PARSED else gives(stage, unknown)


def _stage_problems(
    stage: Stage, config: RegistryConfig, where: str, before: Mapping[str, tuple[Stage, frozenset[Kind]]]
) -> Iterator[str]:
    """What is wrong with one stage by itself."""
    if isinstance(stage, ServiceStage) and normalise_name(stage.service) not in config.services_by_name:
        cure = nearest(stage.service, [s.name for s in config.services])
        yield f'{where}: unknown service "{stage.service}"; {cure}'
    if isinstance(stage, AskStage):
        yield from _prompt_problems(stage, where)
    if isinstance(stage, ParseStage):
        if stage.into not in PARSED:
            yield f'{where}: into "{stage.into}" is unknown; {nearest(stage.into, PARSED)}'
        if stage.text in before and not isinstance(before[stage.text][0], AskStage):
            yield f'{where}: "{stage.text}" is no ask stage; parse what an expert was asked'
    if isinstance(stage, CropStage) and stage.most < 1:
        yield f"{where}: most must be at least 1, found {stage.most}"
    if isinstance(stage, RunStage) and not 0 <= stage.rounds <= MOST_ROUNDS:
        yield f"{where}: rounds must be 0 to {MOST_ROUNDS}, found {stage.rounds}"


def _prompt_problems(stage: AskStage, where: str) -> Iterator[str]:
    if bool(stage.prompt) == bool(stage.by) or bool(stage.by) != bool(stage.prompts):
        yield f'{where} must have either "prompt", or "by" with "prompts"'
    if stage.by and OTHER not in stage.prompts:
        yield f'{where}: prompts lack "{OTHER}", used when no key matches; add it'


def _need_problems(name: str, kind: Kind, where: str, held: Mapping[str, frozenset[Kind]]) -> Iterator[str]:
    """What is wrong with needing the output `name` as `kind` of the stages so far."""
    if kind in held.get(name, ()):
        return
    fitting = [output for output, kinds in held.items() if kind in kinds]
    valid = {Kind.TEXT: [*INPUTS, *fitting], Kind.IMAGES: [TASK_IMAGES, NO_IMAGES, *fitting]}.get(kind, fitting)
    if name not in held:
        written = f"{{{name}}}" if kind is Kind.TEXT else f'{kind.value} "{name}"'
        yield f"{where}: no earlier stage gives {written}; {nearest(name, valid)}"
    else:
        given = " and ".join(sorted(k.value for k in held[name]))
        yield f'{where}: "{name}" gives {given}, needed is {kind.value}; {nearest(name, valid)}'


def _cycle_problems(config: RegistryConfig) -> Iterator[str]:
    def walk(skill: SkillConfig, path: tuple[str, ...]) -> Iterator[str]:
        if skill.name in path:
            if path[0] == skill.name:  # a loop further down is told by its own members
                loop = " -> ".join((*path, skill.name))
                yield f'skill "{skill.name}": children form a cycle {loop}; remove one of them'
            return
        for child in skill.children:
            known = config.skills_by_name.get(normalise_name(child))
            if known is not None:
                yield from walk(known, (*path, skill.name))

    for skill in config.skills:
        yield from walk(skill, ())
