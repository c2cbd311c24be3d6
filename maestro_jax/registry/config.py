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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_origin

from maestro_jax.errors import ConfigError
from maestro_jax.registry.chat import OWN_FIELDS

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
INPUTS = ("question", "query")  # placeholders that every stage may use
OTHER = "other"  # the template used when no key of `prompts` matches
TASK_IMAGES = "task"
NO_IMAGES = "none"

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
    """A helper of skills: "package.module:Class", built with `options`; fields as in `ExpertConfig`."""

    name: str
    implementation: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = True
    timeout: float = 60.0


@dataclasses.dataclass(frozen=True)
class ServiceStage:
    """Runs a service.

    Attributes:
      output: the name under which later stages find its text (as a placeholder) and its images.
      images: "task", "none" or the output name of an earlier service stage.
      text: template of the text the service gets. Leave it empty where only the images matter: replies
        are cached by images and text, and a query in the text makes every call a new one.
    """

    service: str
    output: str
    images: str = TASK_IMAGES
    text: str = ""

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.text,)

    @property
    def uses(self) -> frozenset[str]:
        """Names of the outputs this stage needs."""
        return frozenset((*_placeholders(self.templates), self.images)) - {*INPUTS, TASK_IMAGES, NO_IMAGES}


@dataclasses.dataclass(frozen=True)
class AskStage:
    """Asks the called expert, either with `prompt` or with the entry of `prompts` that the output `by` selects."""

    output: str
    images: str = TASK_IMAGES
    prompt: str = ""
    by: str = ""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def templates(self) -> tuple[str, ...]:
        return tuple(self.prompts.values()) if self.by else (self.prompt,)


Stage = ServiceStage | AskStage


@dataclasses.dataclass(frozen=True)
class SkillConfig:
    """A pipeline of stages, or a choice between children.

    Attributes:
      tier: 1 (coarse) or 2 (fine, chosen by a parent).
      stages: run in order; the last one's text is the skill's result.
      children: names of tier-2 skills; the one whose `keywords` occur most in query and question runs.
      experts: the only experts that may run it; empty means all.
      shown: whether the policy's prompt lists it and the policy may call it by name; tier 1 unless said.
    """

    name: str
    description: str = ""
    tier: int = 1
    stages: tuple[Stage, ...] = ()
    children: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    shown: bool = True


class Pair(NamedTuple):
    """Canonical names of an expert and a skill that may be called together."""

    expert: str
    skill: str


@dataclasses.dataclass(frozen=True)
class RegistryConfig:
    """Experts, services and skills, checked against each other. Build it with `parse_registry`."""

    experts: tuple[ExpertConfig, ...]
    services: tuple[ServiceConfig, ...]
    skills: tuple[SkillConfig, ...]
    limits: LimitsConfig = LimitsConfig()

    @functools.cached_property
    def experts_by_name(self) -> dict[str, ExpertConfig]:
        return {normalise_name(e.name): e for e in self.experts}

    @functools.cached_property
    def skills_by_name(self) -> dict[str, SkillConfig]:
        return {normalise_name(s.name): s for s in self.skills}

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
        if found is None:
            return f"Unknown expert {_quote(expert)}. Experts: {_listed(e.name for e in self.experts)}."
        pipeline = self.skills_by_name.get(normalise_name(skill))
        if pipeline is None or not pipeline.shown:
            return f"Unknown skill {_quote(skill)}. Skills: {_listed(s.name for s in self.shown_skills)}."
        if not self.allows(pipeline, found.name):
            valid = _listed(e.name for e in self.experts if self.allows(pipeline, e.name))
            return f"{found.name} cannot run {pipeline.name}. Experts for it: {valid}."
        return Pair(found.name, pipeline.name)


def parse_registry(raw: Any) -> RegistryConfig:
    """Checks a mapping with `experts`, `services` and `skills` (tuples of mappings) and, optionally, `limits`.

    Args:
      raw: a dict or anything with the methods of one, such as an ml_collections ConfigDict.

    Raises:
      ConfigError: one line that names the entry, what is wrong and the cure.
    """
    raw = _mapping(raw, "registry")
    _check_keys(raw, [f.name for f in dataclasses.fields(RegistryConfig)], "registry")
    config = RegistryConfig(
        experts=tuple(_read_expert(e, w) for e, w in _entries(raw, "experts")),
        services=tuple(_read(ServiceConfig, s, w) for s, w in _entries(raw, "services")),
        skills=tuple(_read_skill(s, w) for s, w in _entries(raw, "skills")),
        limits=_read_limits(raw.get("limits", {})),
    )
    if not config.experts or not config.shown_skills:
        raise ConfigError("registry needs at least one expert and one shown skill; add them to registry.experts/skills")
    for kind, entries in (("expert", config.experts), ("service", config.services), ("skill", config.skills)):
        _check_names(kind, [entry.name for entry in entries])
    for skill in config.skills:
        _check_skill(skill, config)
    _check_cycles(config)
    parts: list[tuple[str, ExpertConfig | ServiceConfig]] = [("expert", e) for e in config.experts]
    for what, part in parts + [("service", s) for s in config.services]:
        if part.implementation:
            load_implementation(part.implementation, f'{what} "{part.name}"')
        if part.timeout <= 0:
            raise ConfigError(f'{what} "{part.name}": timeout must be above 0 seconds')
    return config


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
    if kind == tuple[Stage, ...]:  # already read by `_read_skill`
        return value
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
    kinds: dict[str, type[ServiceStage] | type[AskStage]] = {"service": ServiceStage, "ask": AskStage}
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise ConfigError(f'{where}.kind must be "service" or "ask", found {kind!r}')
    return _read(kinds[kind], values, where)


# ---- checking ----------------------------------------------------------------------------------------------


def _check_keys(raw: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in raw:
        if key not in valid:
            raise ConfigError(f'{where}: unknown key "{key}"; {_nearest(key, valid)}')


def _check_names(kind: str, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or _FORBIDDEN_IN_NAMES.search(name):
            raise ConfigError(f'{kind} name "{name}" is empty or holds "@@", ":", "<", ">" or a line break; rename it')
        form = normalise_name(name)
        if form in seen:
            same = 'case, "-", "_" and " " do not count'
            raise ConfigError(f'{kind} "{name}" has the same name as "{seen[form]}" ({same}); rename one')
        seen[form] = name


def _check_skill(skill: SkillConfig, config: RegistryConfig) -> None:
    where = f'skill "{skill.name}"'
    if skill.tier not in (1, 2):
        raise ConfigError(f"{where}: tier must be 1 or 2, found {skill.tier}")
    if bool(skill.stages) == bool(skill.children):
        raise ConfigError(f"{where} must have either stages or children, and not both")
    for expert in skill.experts:
        if normalise_name(expert) not in config.experts_by_name:
            raise ConfigError(
                f'{where} names expert "{expert}" that the registry does not have; '
                f"add it to registry.experts or pick one of: {_listed(e.name for e in config.experts)}"
            )
    _check_stages(skill, config)
    for child in skill.children:
        known = config.skills_by_name.get(normalise_name(child))
        if known is None:
            raise ConfigError(f'{where}: unknown child "{child}"; {_nearest(child, [s.name for s in config.skills])}')
        if known.tier != 2:
            raise ConfigError(f'{where}: child "{child}" is of tier {known.tier}; set its tier to 2')


def _check_stages(skill: SkillConfig, config: RegistryConfig) -> None:
    services = {normalise_name(s.name): s.name for s in config.services}
    produced: list[str] = []  # outputs of the stages so far
    pictured: list[str] = [TASK_IMAGES, NO_IMAGES]  # what `images` may name so far
    for i, stage in enumerate(skill.stages):
        where = f'skill "{skill.name}" stage {i + 1} ("{stage.output}")'
        if isinstance(stage, ServiceStage) and normalise_name(stage.service) not in services:
            cure = _nearest(stage.service, services.values())
            raise ConfigError(f'{where}: unknown service "{stage.service}"; {cure}')
        if isinstance(stage, AskStage):
            _check_prompts(stage, produced, where)
        for name in _placeholders(stage.templates):
            if name not in (*INPUTS, *produced):
                raise ConfigError(f"{where}: no earlier stage gives {{{name}}}; {_nearest(name, [*INPUTS, *produced])}")
        if stage.images not in pictured:
            cure = _nearest(stage.images, pictured)
            raise ConfigError(f'{where}: images "{stage.images}" is no earlier service; {cure}')
        if stage.output in (*INPUTS, *pictured, *produced) or not PLACEHOLDER.fullmatch(f"{{{stage.output}}}"):
            raise ConfigError(f"{where}: the output name is taken or no identifier; choose another")
        produced.append(stage.output)
        if isinstance(stage, ServiceStage):
            pictured.append(stage.output)


def _check_prompts(stage: AskStage, produced: list[str], where: str) -> None:
    if bool(stage.prompt) == bool(stage.by) or bool(stage.by) != bool(stage.prompts):
        raise ConfigError(f'{where} must have either "prompt", or "by" with "prompts"')
    if stage.by and stage.by not in produced:
        raise ConfigError(f'{where}: by "{stage.by}" is no earlier output; {_nearest(stage.by, produced)}')
    if stage.by and OTHER not in stage.prompts:
        raise ConfigError(f'{where}: prompts lack "{OTHER}", used when no key matches; add it')


def _check_cycles(config: RegistryConfig) -> None:
    def walk(skill: SkillConfig, path: tuple[str, ...]) -> None:
        if skill.name in path:
            loop = " -> ".join((*path[path.index(skill.name) :], skill.name))
            raise ConfigError(f'skill "{skill.name}": children form a cycle {loop}; remove one of them')
        for child in skill.children:
            walk(config.skills_by_name[normalise_name(child)], (*path, skill.name))

    for skill in config.skills:
        walk(skill, ())


# ---- wording -----------------------------------------------------------------------------------------------


def _placeholders(templates: Iterable[str]) -> list[str]:
    return [name for template in templates for name in PLACEHOLDER.findall(template)]


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
