"""The plan of a run as a function: its programs compiled for devices that need not exist, against their memory."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from maestro_jax.aot.estimate import estimate_update, gpu_target
from maestro_jax.aot.nearest import changes
from maestro_jax.aot.program import QUICK, Program
from maestro_jax.aot.report import as_json, table, verdict
from maestro_jax.aot.rollouts import Rollouts
from maestro_jax.aot.run import Run, RunSizes
from maestro_jax.aot.topology import Target, present_target, tpu_target
from maestro_jax.aot.updates import update_programs
from maestro_jax.config import Config, completed, parse_config
from maestro_jax.errors import ConfigError
from maestro_jax.observe.listening import Show, showing
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel.mesh import make_mesh
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.tokens import ASSISTANT_HEADER, load_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.rollout.exchange import EpisodeConfig
from maestro_jax.rollout.limits import Limits
from maestro_jax.session.policy import fields, known_architecture
from maestro_jax.session.rollouts import check_batches, sized_episodes
from maestro_jax.settings import read_config

CHARACTERS_A_TOKEN = 4  # of English text in Qwen's vocabulary, roughly


@dataclasses.dataclass(frozen=True)
class Plan:
    """Whether a run fits devices, and how much of them each of its programs needs.

    Attributes:
      programs: compiled or estimated; none where the config cannot run there.
      problem: why there are none; else empty.
      overrides: of the config, with which the update fits: the nearest ones found where it does not as configured.
    """

    target: Target
    programs: Sequence[Program]
    fits: bool
    problem: str
    overrides: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Bytes, operations and seconds a chip."""
        return as_json(self.target, self.programs, self.fits, self.overrides, self.problem)

    def text(self) -> str:
        """Table and verdict for a terminal."""
        lines = [table(self.target, self.programs)]
        if self.problem:
            lines.append(f"cannot run as configured: {self.problem}")
        return "\n".join([*lines, verdict(self.fits, self.target, self.programs, dict(self.overrides))])


def plan(
    config: Any,
    topology: str = "",
    *,
    root_tokens: int = 0,
    update_only: bool = False,
    optimised: bool = False,
    progress: Show = None,
) -> Plan:
    """Compiles the programs of a run for devices and holds them against the devices' memory; nothing runs.

    Args:
      config: as of `train`.
      topology: "v5e:8x8", "v5p:2x2x2", "v6e:4x4", ... compiled with libtpu; "h100:8" by arithmetic; empty: the devices
        at hand.
      root_tokens: of the registry's prompt; 0: counted, or estimated where no tokenizer is at hand.
      update_only: leaves the programs of rollouts out.
      optimised: compiles as a run would, which takes six times as long.
      progress: as of `train`.

    Raises:
      ConfigError: an unknown topology, or a compiler that is not installed.
    """
    raw = ConfigDict(completed(read_config(config)))
    config = parse_config(raw)

    with showing(progress) as shown:
        # ---- What for --------------------------------------------------------------------------
        target = open_target(topology)
        architecture = known_architecture(config)
        prompt = render_system_prompt(config.registry, config.rollout.max_calls, config.policy.system_prompt)
        root, counted = (root_tokens, True) if root_tokens else count_tokens(config, prompt)
        shown.note(f"registry prompt: {root} tokens" + ("" if counted else ", estimated: no tokenizer at hand"))

        # ---- As it is configured ---------------------------------------------------------------
        def attempt(config: Config, everything: bool) -> list[Program] | str:
            return compile_programs(config, architecture, root, target, everything, optimised, shown)

        found = attempt(config, not update_only)
        fits = not isinstance(found, str) and all(program.fits(target.limit) for program in found)

        # ---- The nearest setting that fits -----------------------------------------------------
        overrides = {} if fits else nearest(raw, target, lambda changed: attempt(changed, False), shown)

    if isinstance(found, str):
        return Plan(target, (), False, found, overrides)
    return Plan(target, found, fits, "", overrides)


def open_target(name: str) -> Target:
    if not name:
        return present_target(jax.devices())
    if (gpu := gpu_target(name)) is not None:
        return gpu
    return tpu_target(name)


def count_tokens(config: Config, text: str) -> tuple[int, bool]:
    """Tokens of a text, and whether they were counted rather than estimated."""
    source = config.policy.tokenizer or config.policy.init_from
    if source and Path(source).is_dir():
        return len(load_tokens(source).encode(text)), True
    return len(text) // CHARACTERS_A_TOKEN, False


def compile_programs(
    config: Config,
    architecture: PolicyArchitecture,
    root: int,
    target: Target,
    everything: bool,
    optimised: bool,
    progress: Progress,
) -> list[Program] | str:
    """The programs, or why there are none."""

    def count(text: str) -> int:
        return count_tokens(config, text)[0]

    try:
        source = config.policy.tokenizer or config.policy.init_from
        header = load_tokens(source).header if source and Path(source).is_dir() else ASSISTANT_HEADER
        config = sized_episodes(config, count, progress.note, header=header)
        observation = Limits.of(config.registry, fields(EpisodeConfig, config.rollout), count, header).observation
        sizes = RunSizes.of(config, root, observation)
        if not target.devices:
            return [estimate_update(config, architecture, sizes, target)]
        mesh = make_mesh(config.mesh, list(target.devices))
        check_batches(config, mesh)
        run = Run(config, architecture, sizes, mesh, QUICK if target.is_tpu and not optimised else {})
        rollouts = Rollouts(run)
    except ConfigError as error:
        return str(error)
    jobs = [lambda: update_programs(run, rollouts), *([rollouts.programs] if everything else [])]
    progress.phase(f"compiling for {target.name}", len(jobs))
    found = []
    for done, job in enumerate(jobs, start=1):
        found += job()
        progress.tick(done)
    return found


def nearest(
    raw: ConfigDict, target: Target, attempt: Callable[[Config], list[Program] | str], progress: Progress
) -> dict[str, Any]:
    """The fewest changes, of those that cost least, with which the update fits; empty if none was found."""
    for overrides in changes(raw, max(len(target.devices), target.count)):
        spelled = " ".join(f"{key}={value}" for key, value in overrides.items())
        progress.note(f"trying {spelled}")
        changed = copy.deepcopy(raw)
        changed.update_from_flattened_dict(overrides)
        found = attempt(parse_config(changed))
        if not isinstance(found, str) and all(program.fits(target.limit) for program in found):
            return overrides
    return {}
