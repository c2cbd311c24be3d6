"""Calls of a session: the journal, the registry (or a replay of one), the dispatcher, and what waits for experts."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from maestro_jax.config import Config
from maestro_jax.errors import ConfigError
from maestro_jax.fleet.trials import Finding, try_experts
from maestro_jax.observe.files import write_json
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.replay import Replay, Resumed
from maestro_jax.rollout.outages import OutageConfig, Outages
from maestro_jax.session.policy import fields
from maestro_jax.waiting import run_to_end

TRIAL_SECONDS = 60.0  # for a server to answer its first request


@dataclasses.dataclass(frozen=True)
class Calls:
    """Who answers the calls of a session.

    Attributes:
      registry: None in a replay: nobody is asked.
      answered: the registry or replay, behind what the journal has answered already (`Resumed.recall`).
      dispatcher: takes calls from rollouts.
      outages: waits for experts that are out.
      report_to: the file of `report`.
    """

    journal: Journal
    registry: Registry | None
    answered: Resumed
    dispatcher: Dispatcher
    outages: Outages
    report_to: Path

    def report(self) -> None:
        """Writes what each expert was asked, cost and failed."""
        if self.registry is not None:
            write_json(self.report_to, self.registry.report())


@contextlib.contextmanager
def open_calls(config: Config, directory: Path, progress: Progress, replay: str = "") -> Iterator[Calls]:
    """Opens journal, registry and dispatcher of a directory; closes them in the end.

    Args:
      replay: another run's journal, which answers in the experts' place.

    Raises:
      ConfigError: an expert, a service, the sandbox or the replay cannot be opened.
    """
    with contextlib.ExitStack() as closing:
        journal = Journal(str(cluster.own_path(directory / "journal.jsonl")))
        closing.callback(journal.close)
        registry = None
        if not replay:
            cache = str(cluster.own_path(directory / "expert_cache.jsonl"))
            processes = jax.process_count()
            registry = Registry(config.registry, cache, journal, processes=processes, from_main=cluster.from_main)
        answered = Resumed(registry or Replay(replay, journal), journal)
        dispatcher = Dispatcher(answered, journal)
        closing.callback(dispatcher.close)
        called = [expert.name for expert in config.registry.shown_experts]
        settings = fields(OutageConfig, config.rollout)
        outages = Outages(settings, called, dispatcher.shunned, progress.note, replayed=bool(replay))
        report_to = cluster.own_path(directory / "experts.json")
        yield Calls(journal, registry, answered, dispatcher, outages, report_to)


def try_servers(config: Config, workdir: Path, progress: Progress) -> None:
    """Asks every server once, as `maestro_jax.doctor` does; process 0 asks for all.

    A run that goes on waits for a server that is away (`Outages`). To a new one that is more likely a wrong address.

    Raises:
      ConfigError: a server cannot serve a run as it is set up, or a new run's expert has none that answers.
    """
    if not any(expert.endpoints for expert in config.registry.experts):
        return

    def ask() -> list[Any]:
        found = run_to_end(try_experts(config.registry, TRIAL_SECONDS))
        return [(workdir / "config.json").exists(), [dataclasses.astuple(finding) for finding in found]]

    goes_on, told = cluster.from_main(ask)
    findings = [Finding(*values) for values in told]
    ready = {finding.expert for finding in findings if not finding.is_problem}
    for finding in findings:
        if finding.is_problem and not (finding.is_absence and (goes_on or finding.expert in ready)):
            cure = "`python -m maestro_jax.doctor` tries all of them, --skip_doctor starts all the same"
            raise ConfigError(f"{finding.line} ({cure})")
        if finding.is_problem:
            progress.note(finding.line)
