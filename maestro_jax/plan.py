"""Says, before there is a machine, whether a run fits it and how long a step would take.

    python -m maestro_jax.plan --config configs/qwen3_vl_4b.py --topology v5e:8x8 [--json plan.json]

Compiles the run's own programs (the update and those of rollouts) for the topology with the TPU compiler and reports, a
chip: memory by kind against the limit, operations, collectives and an estimate of time from the chip's peak rates.
Where the run does not fit, the nearest setting that does. Without --topology it plans for the devices at hand.
GPU topologies (h100:8) are estimated by arithmetic, not compiled.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from maestro_jax import command
from maestro_jax.aot.estimate import estimate_update, gpu_target
from maestro_jax.aot.nearest import changes
from maestro_jax.aot.program import QUICK, Program
from maestro_jax.aot.report import as_json, table, verdict
from maestro_jax.aot.rollouts import Rollouts
from maestro_jax.aot.run import Run, Sizes
from maestro_jax.aot.topology import Target, present_target, tpu_target
from maestro_jax.aot.updates import update_programs
from maestro_jax.config import Config, parse_config
from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import write_json
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel.mesh import make_mesh
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.rollout.exchange import EpisodeConfig
from maestro_jax.rollout.limits import Limits
from maestro_jax.session import check_batches, fields, known_architecture, sized_episodes

CONFIG = command.config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:8x8, v5p:2x2x2, v6e:4x4, ..., or h100:8; empty: devices at hand.")
JSON = flags.DEFINE_string("json", "", "File to write the plan to, besides the table.")
ROOT = flags.DEFINE_integer("root_tokens", 0, "Tokens of the registry's prompt; 0: counted, or estimated.")
OPTIMISED = flags.DEFINE_bool("optimised", False, "Compile as a run would, which takes six times as long.")
PROGRAMS = flags.DEFINE_enum("programs", "all", ["all", "update"], "Which programs to compile.")

CHARACTERS_A_TOKEN = 4  # of English text in Qwen's vocabulary, roughly


def main(argv: Sequence[str]) -> None:
    del argv
    raw = command.load_config(CONFIG)
    config = parse_config(raw)

    with Progress() as progress:
        # ---- What for --------------------------------------------------------------------------
        target = open_target(TOPOLOGY.value)
        architecture = known_architecture(config)
        root, counted = root_tokens(config)
        progress.note(f"registry prompt: {root} tokens" + ("" if counted else ", estimated: no tokenizer at hand"))

        # ---- As it is configured ---------------------------------------------------------------
        def attempt(config: Config, everything: bool) -> list[Program] | str:
            return compile_programs(config, architecture, root, target, everything, progress)

        found = attempt(config, PROGRAMS.value == "all")
        fits = not isinstance(found, str) and all(program.fits(target.limit) for program in found)

        # ---- The nearest setting that fits -----------------------------------------------------
        overrides = {} if fits else nearest(raw, target, lambda changed: attempt(changed, False), progress)

    programs = [] if isinstance(found, str) else found
    plan = as_json(target, programs, fits, overrides, "" if programs else str(found))
    print(table(target, programs))
    if isinstance(found, str):
        print(f"cannot run as configured: {found}")
    print(verdict(fits, target, programs, overrides))
    if JSON.value:
        write_json(Path(JSON.value), plan)


def open_target(name: str) -> Target:
    if not name:
        return present_target(jax.devices())
    if (gpu := gpu_target(name)) is not None:
        return gpu
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no device is needed, or waited for
    return tpu_target(name)


def root_tokens(config: Config) -> tuple[int, bool]:
    """Tokens of the registry's prompt, and whether they were counted or given rather than estimated."""
    if ROOT.value:
        return ROOT.value, True
    return count_tokens(config, render_system_prompt(config.registry, config.rollout.max_calls))


def count_tokens(config: Config, text: str) -> tuple[int, bool]:
    """Tokens of a text, and whether they were counted rather than estimated."""
    source = config.policy.tokenizer or config.policy.init_from
    if source and Path(source).is_dir():
        return len(load_tokens(source).encode(text)), True
    return len(text) // CHARACTERS_A_TOKEN, False


def compile_programs(
    config: Config, architecture: PolicyArchitecture, root: int, target: Target, everything: bool, progress: Progress
) -> list[Program] | str:
    """The programs, or why there are none."""

    def count(text: str) -> int:
        return count_tokens(config, text)[0]

    try:
        config = sized_episodes(config, count, progress.note)
        observation = Limits.of(config.registry, fields(EpisodeConfig, config.rollout), count).observation
        sizes = Sizes.of(config, root, observation)
        if not target.devices:
            return [estimate_update(config, architecture, sizes, target)]
        mesh = make_mesh(config.mesh, list(target.devices))
        check_batches(config, mesh)
        run = Run(config, architecture, sizes, mesh, QUICK if target.is_tpu and not OPTIMISED.value else {})
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


if __name__ == "__main__":
    command.run(main, required=("config",))
