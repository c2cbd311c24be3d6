"""The registry as data: frozen dataclasses of experts, services and skills, and which of them go together.

`reading.py` makes them from a plain mapping, `checks.py` finds what is wrong between the entries.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from maestro_jax.registry.description.boxes import Frame
from maestro_jax.registry.description.names import listed, normalise_name, quote
from maestro_jax.registry.description.stages import Kind, RunStage, Stage
from maestro_jax.types import Usage

# What a chat request consists of; further fields come from an expert's `options`. Not every server takes the latter.
OWN_FIELDS = ("model", "messages", "temperature", "max_tokens", "top_p", "stream")
RENAMED_FIELDS = OWN_FIELDS[2:]
_TOKENS_PER_PRICE = 1_000_000  # prices are per million tokens


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A frozen model: a class of this process (`implementation`) or behind servers (`endpoints`).

    Attributes:
      description: one line shown to the policy: what it is good at.
      options: arguments of the class; of servers, further fields of each request.
      price_prompt, price_completion: US dollars per million tokens.
      deterministic: same request, same reply; such replies are cached, if the temperature is 0 (and sent).

    Of a class:
      implementation: "package.module:Class".
      latency_mean: seconds of extra latency, exponentially distributed, that imitate a remote server.
      latency_seed: changes which requests are slow.
      timeout: seconds a single request may take.
      workers: requests that it gets at a time, each on an instance of its own.
      processes: whether workers are processes instead of threads; one that crashes, or is late, is ended and started
        again.

    Of servers:
      endpoints: base URLs of OpenAI-compatible servers of the same model, such as "http://127.0.0.1:8000/v1".
      model: its name there.
      key: name of the environment variable with the API key; empty sends none.
      key_hosts: where the key may go besides the hosts of `endpoints`, if others publish endpoints (`hosts.py`).
      temperature, max_tokens, top_p: how it decodes.
      rename: what its servers call these fields and "stream"; one whose name is empty is not sent.
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
    workers: int = 1
    processes: bool = False
    endpoints: tuple[str, ...] = ()
    model: str = ""
    key: str = ""
    key_hosts: tuple[str, ...] = ()
    temperature: float = 0.0
    max_tokens: int = 1024
    top_p: float = 1.0
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    concurrency: int = 64
    attempt_timeout: float = 60.0
    serve: tuple[str, ...] = ()
    shown: bool = True
    frame: Frame = Frame()
    typical_seconds: float = 0.0

    @property
    def cacheable(self) -> bool:
        return self.deterministic and self.temperature == 0 and self.rename.get("temperature") != ""

    def priced(self, prompt_tokens: int, completion_tokens: int) -> Usage:
        """The usage of a reply of so many tokens."""
        price = prompt_tokens * self.price_prompt + completion_tokens * self.price_completion
        return Usage(prompt_tokens, completion_tokens, price / _TOKENS_PER_PRICE)


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
    workers: int = 1
    processes: bool = False

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
      endpoints_from: directory where experts on other machines are published (`published.py`); empty: endpoints are as
        they say.
    """

    experts: tuple[ExpertConfig, ...] = ()
    services: tuple[ServiceConfig, ...] = ()
    skills: tuple[SkillConfig, ...] = ()
    limits: LimitsConfig = LimitsConfig()
    show: tuple[str, ...] = ()
    sandbox: str = "auto"
    endpoints_from: str = ""

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
            return f"Unknown expert {quote(expert)}. Experts: {listed(e.name for e in self.shown_experts)}."
        pipeline = self.skills_by_name.get(normalise_name(skill))
        if pipeline is None or not pipeline.shown:
            return f"Unknown skill {quote(skill)}. Skills: {listed(s.name for s in self.shown_skills)}."
        if not self.allows(pipeline, found.name):
            valid = listed(e.name for e in self.shown_experts if self.allows(pipeline, e.name))
            return f"{found.name} cannot run {pipeline.name}. Experts for it: {valid}."
        return Pair(found.name, pipeline.name)
