"""The doctor as a function: whether a registry is sound, the data can be used and the experts answer."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.config import Config, completed, parse_config
from maestro_jax.data.mixture import Mixture
from maestro_jax.data.source import TaskSource
from maestro_jax.data.survey import survey
from maestro_jax.errors import ConfigError, DataError, UserError
from maestro_jax.fleet.serving import servers_of
from maestro_jax.fleet.trials import Finding, try_experts
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import open_architecture
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.registry.description.checks import problems
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.description.reading import read_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.rewards.graders import Graders
from maestro_jax.session.policy import fields
from maestro_jax.session.tasks import first_tasks, graded_by, open_held_out, open_training
from maestro_jax.settings import read_config
from maestro_jax.waiting import run_to_end


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
      config: problems that the config alone shows; where there are any, nothing else was looked at.
      findings: of data, implementations and servers, in the order in which they were found.
      told: how many experts, services and skills there are.
    """

    config: Sequence[str]
    findings: Sequence[Finding]
    told: str

    @property
    def problems(self) -> list[str]:
        """One line for each, with its cure; none if all is well."""
        return [*self.config, *(finding.line for finding in self.findings if finding.is_problem)]


def doctor(
    config: Any, *, seconds: float = 60.0, static: bool = False, tell: Callable[[str], None] = lambda line: None
) -> Diagnosis:
    """Looks at config and data, builds what the registry names, and asks every endpoint once.

    Args:
      config: as of `train`.
      seconds: that each request may take; no longer than the expert's attempt_timeout.
      static: looks at the config only; no expert is asked.
      tell: hears every finding as one line, as soon as it is found.

    Raises:
      ConfigError: the registry cannot be read, or something in it cannot be built.
    """
    raw = completed(read_config(config))

    # ---- What the config shows -----------------------------------------------------------------
    registry = read_registry(raw["registry"])
    found = [*problems(registry), *unset_variables(registry, os.environ), *serve_mistakes(registry)]
    if not found:
        found = contradictions(raw)
    for line in found:
        tell(line)
    told = f"{len(registry.experts)} experts, {len(registry.services)} services, {len(registry.skills)} skills"
    tell(f"config: {told}, {counted(found)}")
    if found or static:
        return Diagnosis(found, (), told)

    # ---- What there is to learn from, and who answers ------------------------------------------
    findings: list[Finding] = []

    def add(more: Iterable[Finding]) -> None:
        for finding in more:
            tell(finding.line)
            findings.append(finding)

    add(data_findings(parse_config(raw)))
    run_to_end(build(registry))
    add(Finding(f'expert "{expert.name}": ready', False) for expert in registry.experts if expert.implementation)
    add(run_to_end(try_experts(registry, seconds)))
    return Diagnosis((), findings, told)


def counted(problems_found: Sequence[str]) -> str:
    return f"{len(problems_found)} problem{'' if len(problems_found) == 1 else 's'}"


def unset_variables(registry: RegistryConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Keys that experts need and that the environment does not have."""
    for expert in registry.experts:
        if expert.key and not environment.get(expert.key):
            yield f'expert "{expert.name}": environment variable {expert.key} is not set; export it with the API key'


def serve_mistakes(registry: RegistryConfig) -> list[str]:
    """What `experts up` would refuse: of each expert, and if there is nothing, between them."""
    each = [dataclasses.replace(registry, experts=(expert,)) for expert in registry.experts]
    found = []
    for part in [*each, registry]:
        try:
            servers_of(part)
        except ConfigError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def contradictions(raw: Any) -> list[str]:
    """What is wrong with the rest of the run's config, or between it and the registry: the first of it."""
    try:
        parse_config(raw)
    except ConfigError as error:
        return [str(error)]
    return []


def data_findings(config: Config) -> Iterator[Finding]:
    """What there is to train on and what is held out, and what a run could not use of it."""
    parts: dict[str, Callable[[], TaskSource]] = {}
    graders = Graders(config.graders, config.registry)
    with tempfile.TemporaryDirectory() as kept, Progress(quiet=True) as progress:
        if config.data.kind == "suite":
            yield Finding("data: the suite is built when a run starts", False)
        if config.data.kind != "suite" or config.data.mixture:
            parts["to train on"] = lambda: open_training(config, Path(kept), progress)
        if config.data.kind != "suite":
            most = config.evaluate.tasks
            parts["held out"] = lambda: first_tasks(open_held_out(config, Path(kept), progress), most)
        for what, opening in parts.items():
            try:
                source = opening()
                for part in source.sources if isinstance(source, Mixture) else (source,):
                    rows = survey(part, f"tasks {what}", Path(kept) / "data.json", progress, whole=what == "held out")
                    graders.open(graded_by(graders, part, rows))
                    tasks = "1 task" if len(part) == 1 else f"{len(part):,} tasks"
                    yield Finding(
                        f"data: {tasks} {what}, of {', '.join(dict.fromkeys(one.source for one in rows))}", False
                    )
                    yield from prompt_findings(config, part, [one.row for one in rows])
            except UserError as error:
                yield Finding(f"data: {error}", True)


def prompt_findings(config: Config, source: TaskSource, rows: Iterable[int]) -> Iterator[Finding]:
    """Which of these tasks no prompt can hold.

    Raises:
      ConfigError: tokenizer and policy do not fit together, so that there is no prompt at all.
    """
    policy = config.policy
    directory = policy.tokenizer or policy.init_from
    if not directory:
        return  # a run trains one
    if not (Path(directory) / "tokenizer.json").is_file():
        yield Finding(f"data: no task is made into a prompt, since {directory} has no tokenizer.json here", False)
        return
    system = render_system_prompt(config.registry, config.rollout.max_calls, config.policy.system_prompt)
    architecture = open_architecture(policy.architecture, policy.init_from)
    prompts = Prompts(load_tokens(directory), architecture, system, fields(PromptConfig, policy))
    for row in rows:
        try:
            prompts.batch([source[row]])
        except DataError as error:  # a run skips so many
            yield Finding(f"data: {error}", not config.data.damage_limit)
        except ConfigError as error:
            yield Finding(f"data: {error}", True)


async def build(config: RegistryConfig) -> None:
    """Raises ConfigError if an expert, a service or the sandbox cannot be built."""
    await Registry(config).close()
