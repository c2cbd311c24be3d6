"""The registry as data: a plain mapping from a config file in, checked frozen dataclasses out.

Everything a user can get wrong is found here, before a run, as one line that names the entry and the
cure: unknown keys, doubled names, placeholders nobody fills, missing services, cycles, implementations
that do not import. Names resolve exactly (case-insensitive; "-", "_" and " " are equal), never by
substring.
"""

import dataclasses
import difflib
import functools
import importlib
import json
import math
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_origin

from maestro_jax.errors import ConfigError
from maestro_jax.registry.boxes import FRAMES, Frame
from maestro_jax.registry.chat import OWN_FIELDS
from maestro_jax.registry.sandbox.choose import KINDS as SANDBOXES
from maestro_jax.registry.stages import (
    INPUTS,
    MOST_ROUNDS,
    NO_IMAGES,
    OTHER,
    PARSED,
    PLACEHOLDER,
    STAGES,
    TASK_IMAGES,
    AskStage,
    Kind,
    ParseStage,
    RunStage,
    ServiceStage,
    Stage,
    gives,
    placeholders,
    uses,
)

SHOWABLE = ("price", "speed")  # what the policy's prompt may say of an expert besides its description
PARSERS = ("text", "boxes")  # how a service reads what its model wrote

_SEPARATORS = str.maketrans({"-": "_", " ": "_"})
_FORBIDDEN_IN_NAMES = re.compile(r"@@|[:<>\r\n]")  # they would break the call grammar


def normalise_name(name: str) -> str:
    """The form in which two names are compared."""
    return name.strip().casefold().translate(_SEPARATORS)


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A frozen model: a class of this process (`implementation`) or behind servers (`endpoints`).

    Attributes:
      description: one line shown to the policy: what it is good at.
      options: arguments of the class; of servers, further fields of each request.
      price_prompt, price_completion: US dollars per million tokens.
      deterministic: same request, same reply; such replies are cached, if the temperature is 0.

    Of a class:
      implementation: "package.module:Class".
      latency_mean: seconds of extra latency, exponentially distributed, that imitate a remote server.
      latency_seed: changes which requests are slow.
      timeout: seconds a single request may take.

    Of servers:
      endpoints: base URLs of OpenAI-compatible servers of the same model, such as "http://127.0.0.1:8000/v1".
      model: its name there.
      key: name of the environment variable with the API key; empty sends none.
      temperature, max_tokens, top_p: how it decodes.
      concurrency: requests that each endpoint gets at a time.
      attempt_timeout: seconds a single attempt of a request may take; all of them end with the episode's deadline.
      serve: the command, word by word, that `python -m maestro_jax.experts up` starts for each endpoint; {host}, {port}
        and {model} are filled in.

    Of both:
      shown: whether the policy's prompt lists it and the policy may call it; a model behind a service is not.
      frame: what its box coordinates mean.
      typical_seconds: of one call; what the policy's prompt says where the registry shows "speed".
    """

    name: str
    description: str
    implementation: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    price_prompt: float = 0.0
    price_completion: float = 0.0
    deterministic: bool = True
    latency_mean: float = 0.0
    latency_seed: int = 0
    timeout: float = 60.0
    endpoints: tuple[str, ...] = ()
    model: str = ""
    key: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024
    top_p: float = 1.0
    concurrency: int = 64
    attempt_timeout: float = 60.0
    serve: tuple[str, ...] = ()
    shown: bool = True
    frame: Frame = Frame()
    typical_seconds: float = 0.0

    @property
    def cacheable(self) -> bool:
        return self.deterministic and self.temperature == 0


# Settings that only one kind of expert has.
_OF_CLASSES = ("latency_mean", "latency_seed", "timeout")
_OF_SERVERS = ("model", "key", "temperature", "max_tokens", "top_p", "concurrency", "attempt_timeout", "serve")


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """What a run may spend on experts before it stops; 0 is no limit.

    Attributes:
      calls: requests to experts; retries and replies from the cache are not counted.
      tokens: prompt and completion tokens of their replies.
      price: US dollars.
    """

    calls: int = 0
    tokens: int = 0
    price: float = 0.0


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """A helper of skills: a class of this process, or a model behind the expert interface.

    Attributes:
      implementation: "package.module:Class", built with `options`; other fields as in `ExpertConfig`.
      expert: name of the expert that is asked instead, once for each image.
      prompt: what it is asked; {text} is the text of the stage.
      parse: how its replies are read, "text" or "boxes" (in the expert's frame).
    """

    name: str
    implementation: str = ""
    expert: str = ""
    prompt: str = ""
    parse: str = "text"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = True
    timeout: float = 60.0

    @property
    def gives(self) -> frozenset[Kind]:
        if not self.expert:
            return frozenset({Kind.TEXT, Kind.IMAGES})
        return frozenset({Kind.TEXT, Kind.BOXES}) if self.parse == "boxes" else frozenset({Kind.TEXT})


@dataclasses.dataclass(frozen=True)
class SkillConfig:
    """A pipeline of stages, or a choice between children.

    Attributes:
      tier: 1 (coarse) or 2 (fine, chosen by a parent).
      stages: each runs when what it needs is there; the last one's text is the skill's result.
      children: names of tier-2 skills; the one whose `keywords` occur most in query and question runs, the first of
        several.
      several_images: occurrences that a task with more than one image adds to those of the keywords.
      choose: where it is set, the called expert chooses among the children: the template it is asked, with {children}
        for their names and descriptions. Keywords decide where its reply names none, or more than one.
      experts: the only experts that may run it; empty means all.
      shown: whether the policy's prompt lists it and the policy may call it by name; tier 1 unless said.
    """

    name: str
    description: str = ""
    tier: int = 1
    stages: tuple[Stage, ...] = ()
    children: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    several_images: int = 0
    choose: str = ""
    experts: tuple[str, ...] = ()
    shown: bool = True


class Pair(NamedTuple):
    """Canonical names of an expert and a skill that may be called together."""

    expert: str
    skill: str


@dataclasses.dataclass(frozen=True)
class RegistryConfig:
    """Experts, services and skills, checked against each other. Build it with `parse_registry`.

    Attributes:
      show: what the policy's prompt says of each expert besides its description: "price", "speed", both or nothing.
      sandbox: which code sandbox "run" stages use (`sandbox/choose.py`).
    """

    experts: tuple[ExpertConfig, ...]
    services: tuple[ServiceConfig, ...]
    skills: tuple[SkillConfig, ...]
    limits: LimitsConfig = LimitsConfig()
    show: tuple[str, ...] = ()
    sandbox: str = "auto"

    @functools.cached_property
    def experts_by_name(self) -> dict[str, ExpertConfig]:
        return {normalise_name(e.name): e for e in self.experts}

    @functools.cached_property
    def skills_by_name(self) -> dict[str, SkillConfig]:
        return {normalise_name(s.name): s for s in self.skills}

    @functools.cached_property
    def services_by_name(self) -> dict[str, ServiceConfig]:
        return {normalise_name(s.name): s for s in self.services}

    @property
    def shown_experts(self) -> tuple[ExpertConfig, ...]:
        return tuple(e for e in self.experts if e.shown)

    @property
    def runs_code(self) -> bool:
        return any(isinstance(stage, RunStage) for skill in self.skills for stage in skill.stages)

    @property
    def shown_skills(self) -> tuple[SkillConfig, ...]:
        return tuple(s for s in self.skills if s.shown)

    def children_for(self, skill: SkillConfig, expert: str) -> tuple[SkillConfig, ...]:
        """The children of `skill` that `expert` may run, in config order."""
        children = (self.skills_by_name[normalise_name(child)] for child in skill.children)
        return tuple(child for child in children if self.allows(child, expert))

    def allows(self, skill: SkillConfig, expert: str) -> bool:
        """Whether `expert` may run `skill` (and at least one of its children, where it has any)."""
        named = {normalise_name(e) for e in skill.experts}
        if named and normalise_name(expert) not in named:
            return False
        return not skill.children or bool(self.children_for(skill, expert))

    def resolve(self, expert: str, skill: str) -> Pair | str:
        """Canonical names, or a short text for the policy that says what is wrong and lists what is valid."""
        found = self.experts_by_name.get(normalise_name(expert))
        if found is None or not found.shown:
            return f"Unknown expert {_quote(expert)}. Experts: {_listed(e.name for e in self.shown_experts)}."
        pipeline = self.skills_by_name.get(normalise_name(skill))
        if pipeline is None or not pipeline.shown:
            return f"Unknown skill {_quote(skill)}. Skills: {_listed(s.name for s in self.shown_skills)}."
        if not self.allows(pipeline, found.name):
            valid = _listed(e.name for e in self.shown_experts if self.allows(pipeline, e.name))
            return f"{found.name} cannot run {pipeline.name}. Experts for it: {valid}."
        return Pair(found.name, pipeline.name)


def parse_registry(raw: Any) -> RegistryConfig:
    """Reads a registry (see `read_registry`) and checks it.

    Raises:
      ConfigError: one line that names the entry, what is wrong and the cure.
    """
    config = read_registry(raw)
    for problem in problems(config):
        raise ConfigError(problem)
    return config


def read_registry(raw: Any) -> RegistryConfig:
    """A mapping with `experts`, `services` and `skills` (tuples of mappings) and the rest, keys and types checked.

    Args:
      raw: a dict or anything with the methods of one, such as an ml_collections ConfigDict.

    Raises:
      ConfigError: one line that names the entry, what is wrong and the cure.
    """
    raw = _mapping(raw, "registry")
    _check_keys(raw, [f.name for f in dataclasses.fields(RegistryConfig)], "registry")
    entries: dict[str, Any] = {
        "experts": tuple(_read_expert(e, w) for e, w in _entries(raw, "experts")),
        "services": tuple(_read(ServiceConfig, s, w) for s, w in _entries(raw, "services")),
        "skills": tuple(_read_skill(s, w) for s, w in _entries(raw, "skills")),
        "limits": _read_limits(raw.get("limits", {})),
    }
    return _read(RegistryConfig, raw | entries, "registry")


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
        yield f'registry.sandbox "{config.sandbox}" is unknown; {_nearest(config.sandbox, SANDBOXES)}'
    for word in config.show:
        if word not in SHOWABLE:
            yield f'registry.show has "{word}"; {_nearest(word, SHOWABLE)}'


def load_implementation(path: str, where: str) -> Any:
    """The class that "package.module:Class" names; `where` opens the error if there is none."""
    module, _, attribute = path.partition(":")
    cure = 'write it as "package.module:Class" and check that it is installed'
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # an import runs foreign code: anything may be raised
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f'{where}: implementation "{path}" does not import ({reason}); {cure}') from error
    if not callable(found):
        raise ConfigError(f'{where}: implementation "{path}" is not a class; {cure}')
    return found


# ---- reading -----------------------------------------------------------------------------------------------

T = TypeVar("T")


def _mapping(raw: Any, where: str) -> dict[str, Any]:
    """A plain dict; ml_collections' ConfigDict is no `Mapping`, so the methods count, not the type."""
    if not hasattr(raw, "keys") or not hasattr(raw, "items"):
        raise ConfigError(f"{where} must be a mapping of settings, found {type(raw).__name__}")
    return {key: _mapping(value, where) if hasattr(value, "keys") else value for key, value in raw.items()}


def _entries(raw: Mapping[str, Any], key: str) -> list[tuple[Any, str]]:
    found = raw.get(key, ())
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ConfigError(f"registry.{key} must be a tuple of mappings, found {type(found).__name__}")
    return [(entry, f"registry.{key}[{i}]") for i, entry in enumerate(found)]


def _read(cls: type[T], raw: Any, where: str) -> T:
    """Builds the dataclass `cls` from a mapping, with its keys and types checked."""
    values = _mapping(raw, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_keys(values, list(fields), where)
    required = dataclasses.MISSING
    for name, field in fields.items():
        if name not in values and field.default is required and field.default_factory is required:
            raise ConfigError(f'{where} lacks "{name}"; add it')
    return cls(**{name: _typed(value, fields[name].type, f"{where}.{name}") for name, value in values.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str and isinstance(value, str) or kind is bool and isinstance(value, bool):
        return value
    if kind is int and number and isinstance(value, int):
        return value
    if kind is float and number and math.isfinite(value) and value >= 0:
        return float(value)
    if kind == tuple[str, ...] and isinstance(value, tuple | list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(value, tuple) and get_origin(kind) is tuple and kind != tuple[str, ...]:
        return value  # stages, or a registry's entries: read before
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else _read(kind, value, where)
    if kind == Mapping[str, str] and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return value
    if kind == Mapping[str, Any] and isinstance(value, dict):
        return value
    word = {str: "a text", bool: "True or False", int: "an integer", float: "a number of at least 0"}.get(
        kind, "a mapping (of texts)" if get_origin(kind) is not tuple else "a tuple of texts"
    )
    raise ConfigError(f"{where} must be {word}, found {value!r:.60}")


def _read_limits(raw: Any) -> LimitsConfig:
    limits = _read(LimitsConfig, raw, "registry.limits")
    for key in ("calls", "tokens"):
        if getattr(limits, key) < 0:
            raise ConfigError(f"registry.limits.{key} must be at least 0 (no limit), found {getattr(limits, key)}")
    return limits


def _read_expert(raw: Any, where: str) -> ExpertConfig:
    values = _mapping(raw, where)
    expert = _read(ExpertConfig, values, where)
    where = f'expert "{expert.name}"'
    if bool(expert.implementation) == bool(expert.endpoints):
        raise ConfigError(
            f"{where} must have either implementation (a class of this process) or endpoints (URLs), and not both"
        )
    others, kind = (_OF_SERVERS, "endpoints") if expert.implementation else (_OF_CLASSES, "implementation")
    for key in others:
        if key in values:
            raise ConfigError(f'{where}: "{key}" is for experts with {kind}; remove it')
    if expert.endpoints:
        _check_served(expert, where)
    return expert


def _check_served(expert: ExpertConfig, where: str) -> None:
    """What an expert behind servers needs."""
    if not expert.model:
        raise ConfigError(f'{where} lacks "model"; add the name that its servers know it by')
    for url in expert.endpoints:
        _check_url(url, where)
    if len(set(expert.endpoints)) < len(expert.endpoints):
        raise ConfigError(f"{where}: an endpoint is there twice; name each once")
    for key in ("max_tokens", "concurrency", "attempt_timeout", "top_p"):
        if getattr(expert, key) <= 0:
            raise ConfigError(f"{where}: {key} must be above 0")
    if expert.key and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", expert.key):
        # Not quoted: it may be the key itself.
        raise ConfigError(f"{where}: key must be the NAME of an environment variable, such as OPENAI_API_KEY")
    for name in OWN_FIELDS:
        if name in expert.options:
            raise ConfigError(f'{where}: options must not set "{name}"; the expert\'s own settings do')
    try:
        json.dumps(dict(expert.options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: options go into each request as JSON, and do not ({error}); correct them"
        ) from error


def _check_url(url: str, where: str) -> None:
    if "@" in url:  # not quoted: what stands before it is a password
        raise ConfigError(f"{where}: an endpoint holds a password; name an environment variable in `key` instead")
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # such as a port that is no number
        good = False
    if not good or parts.query or parts.fragment or any(c.isspace() for c in url):
        raise ConfigError(f'{where}: endpoint "{url}" is no base URL; write it as "http://127.0.0.1:8000/v1"')


def _read_skill(raw: Any, where: str) -> SkillConfig:
    values = _mapping(raw, where)
    stages = values.get("stages", ())
    if not isinstance(stages, tuple | list):
        raise ConfigError(f"{where}.stages must be a tuple of mappings, found {type(stages).__name__}")
    values["stages"] = tuple(_read_stage(stage, f"{where}.stages[{i}]") for i, stage in enumerate(stages))
    values.setdefault("shown", values.get("tier", 1) == 1)
    return _read(SkillConfig, values, where)


def _read_stage(raw: Any, where: str) -> Stage:
    values = _mapping(raw, where)
    kind = values.pop("kind", None)
    if kind not in STAGES:
        valid = ", ".join(f'"{name}"' for name in STAGES)
        raise ConfigError(f"{where}.kind must be one of {valid}, found {kind!r}")
    if isinstance(values.get("images"), str):  # one name may stand alone
        values["images"] = () if values["images"] == NO_IMAGES else (values["images"],)
    return _read(STAGES[kind], values, where)


# ---- checking ----------------------------------------------------------------------------------------------


def _check_keys(raw: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in raw:
        if key not in valid:
            raise ConfigError(f'{where}: unknown key "{key}"; {_nearest(key, valid)}')


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
        yield from _implementation_problems(expert.implementation, where)
    if expert.timeout <= 0:
        yield f"{where}: timeout must be above 0 seconds"
    if expert.frame.kind not in FRAMES:
        yield f'{where}: frame.kind "{expert.frame.kind}" is unknown; {_nearest(expert.frame.kind, FRAMES)}'
    if expert.frame.full <= 0 or expert.frame.multiple <= 0:
        yield f"{where}: frame.full and frame.multiple must be above 0"
    if "speed" in config.show and expert.shown and not expert.typical_seconds:
        yield f'{where}: registry.show has "speed"; set its typical_seconds'


def _service_problems(service: ServiceConfig, config: RegistryConfig) -> Iterator[str]:
    where = f'service "{service.name}"'
    if service.timeout <= 0:
        yield f"{where}: timeout must be above 0 seconds"
    if bool(service.implementation) == bool(service.expert):
        yield f'{where} must have either "implementation" or "expert", and not both'
    elif service.implementation:
        yield from _implementation_problems(service.implementation, where)
    else:
        yield from _served_problems(service, config, where)


def _served_problems(service: ServiceConfig, config: RegistryConfig, where: str) -> Iterator[str]:
    if normalise_name(service.expert) not in config.experts_by_name:
        cure = _nearest(service.expert, [e.name for e in config.experts])
        yield f'{where}: unknown expert "{service.expert}"; {cure}'
    if not service.prompt:
        yield f'{where} has an expert and no "prompt"; write what it is asked'
    for name in placeholders(service.prompt):
        if name != "text":
            yield f"{where}: its prompt has {{{name}}}; only {{text}} is filled in, the text of the stage"
    if service.parse not in PARSERS:
        yield f'{where}: parse "{service.parse}" is unknown; {_nearest(service.parse, PARSERS)}'


def _implementation_problems(path: str, where: str) -> Iterator[str]:
    try:
        load_implementation(path, where)
    except ConfigError as error:
        yield str(error)


def _skill_problems(skill: SkillConfig, config: RegistryConfig) -> Iterator[str]:
    where = f'skill "{skill.name}"'
    if skill.tier not in (1, 2):
        yield f"{where}: tier must be 1 or 2, found {skill.tier}"
    if bool(skill.stages) == bool(skill.children):
        yield f"{where} must have either stages or children, and not both"
    for expert in skill.experts:
        if normalise_name(expert) not in config.experts_by_name:
            cure = f"add it to registry.experts or pick one of: {_listed(e.name for e in config.experts)}"
            yield f'{where} names expert "{expert}" that the registry does not have; {cure}'
    yield from _stages_problems(skill, config)
    yield from _choice_problems(skill, where)
    for child in skill.children:
        known = config.skills_by_name.get(normalise_name(child))
        if known is None:
            yield f'{where}: unknown child "{child}"; {_nearest(child, [s.name for s in config.skills])}'
        elif known.tier != 2:
            yield f'{where}: child "{child}" is of tier {known.tier}; set its tier to 2'


def _choice_problems(skill: SkillConfig, where: str) -> Iterator[str]:
    if skill.choose and not skill.children:
        yield f'{where} has "choose" and no children; name the children or remove it'
    for name in placeholders(skill.choose):
        if name not in (*INPUTS, "children"):
            yield f"{where}: choose has {{{name}}}; {_nearest(name, [*INPUTS, 'children'])}"
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
        cure = _nearest(stage.service, [s.name for s in config.services])
        yield f'{where}: unknown service "{stage.service}"; {cure}'
    if isinstance(stage, AskStage):
        yield from _prompt_problems(stage, where)
    if isinstance(stage, ParseStage):
        if stage.into not in PARSED:
            yield f'{where}: into "{stage.into}" is unknown; {_nearest(stage.into, PARSED)}'
        if stage.text in before and not isinstance(before[stage.text][0], AskStage):
            yield f'{where}: "{stage.text}" is no ask stage; parse what an expert was asked'
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
        yield f"{where}: no earlier stage gives {written}; {_nearest(name, valid)}"
    else:
        given = " and ".join(sorted(k.value for k in held[name]))
        yield f'{where}: "{name}" gives {given}, needed is {kind.value}; {_nearest(name, valid)}'


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


# ---- wording -----------------------------------------------------------------------------------------------


def _nearest(word: str, valid: Iterable[str]) -> str:
    """The cure for a misspelt word: the nearest valid one, else all of them."""
    valid = list(valid)
    by_form = {normalise_name(v): v for v in valid}
    close = difflib.get_close_matches(normalise_name(str(word)), by_form, n=1)
    if close:
        return f'did you mean "{by_form[close[0]]}"?'
    return f"valid: {_listed(valid) or 'none yet'}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _quote(name: str) -> str:
    """A name the policy wrote, short enough for an error observation."""
    shown = " ".join(name.split())
    return f'"{shown[:37]}..."' if len(shown) > 40 else f'"{shown}"'
