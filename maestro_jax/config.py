"""The boundary between ml_collections configs and the program.

A `ConfigDict` from `configs/*.py` comes in, frozen dataclasses go out. Each room has the settings that it reads, with
their defaults, in its `config.py`. Every key must be known and of the right type; a wrong one gives a line that names
it and the nearest right one.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from maestro_jax.checkpoint.config import CheckpointConfig
from maestro_jax.data.config import DataConfig
from maestro_jax.data.listed import is_plugin
from maestro_jax.data.opening import KINDS
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.config import EvaluateConfig
from maestro_jax.grpo.config import GrpoConfig, OptimizerConfig
from maestro_jax.mapping import read
from maestro_jax.observe.config import TrackersConfig
from maestro_jax.parallel.config import MeshConfig
from maestro_jax.plugins import load
from maestro_jax.policy.config import PolicyConfig
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.prompt import inline_prompt, render_system_prompt
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.rewards.graders import Graders
from maestro_jax.rewards.reward import RewardConfig, Scorer
from maestro_jax.rollout.config import RolloutConfig
from maestro_jax.warm_start.config import WarmStartConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is made of.

    Attributes:
      graders: of the user's: name, or source of tasks → who grades (docs/grading.md).
    """

    seed: int = 0
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    registry: RegistryConfig = RegistryConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GrpoConfig = GrpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    trackers: TrackersConfig = TrackersConfig()
    graders: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def base_config() -> ConfigDict:
    """All settings at their defaults: what a config file starts from, to say what differs.

    It is locked: a misspelt setting is an error in the line that sets it. Mappings with keys of a user's own, such as
    `policy.architecture`, are open.
    """
    config = ConfigDict(dataclasses.asdict(Config())).lock()
    _open_empty(config)
    return config


def _open_empty(config: ConfigDict) -> None:
    for value in config.values():
        if isinstance(value, ConfigDict):
            if value:
                _open_empty(value)
            else:
                value.unlock()


def complete(raw: ConfigDict) -> ConfigDict:
    """Adds the default of every setting that `raw` leaves out, in place; what it has stays as it is.

    So every setting can be changed by --config.KEY=VALUE, in files that do not start from `base_config`, too, and in a
    run's config.json of an earlier version.
    """
    _add(raw, base_config())
    return raw


def completed(raw: Any) -> dict[str, Any]:
    """A `ConfigDict` or nested mapping as a new dict, with the default of every setting that it leaves out.

    A prompt that is given as a file stands there as a text (`inlined`).

    Raises:
      ConfigError: it is no mapping, has a name that no setting may have, or names a prompt that cannot be read.
    """
    if not hasattr(raw, "items"):
        raise ConfigError(f"a config is a ConfigDict, a mapping or a path, found {type(raw).__name__}")
    try:
        return inlined(complete(ConfigDict(raw.to_dict() if isinstance(raw, ConfigDict) else dict(raw))).to_dict())
    except ValueError as error:  # ml_collections, on names with dots
        raise ConfigError(f"the config cannot be read ({error}); leave dots out of names of settings") from error


def inlined(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with the prompt itself in place of its file's name: what a run is bound to, and goes on with."""
    policy = raw.get("policy")
    if not isinstance(policy, Mapping) or not isinstance(given := policy.get("system_prompt"), str):
        return dict(raw)
    return {**raw, "policy": {**policy, "system_prompt": inline_prompt(given)}}


def _add(raw: ConfigDict, defaults: ConfigDict) -> None:
    with raw.unlocked(), raw.ignore_type():
        for key, default in defaults.items():
            if key not in raw:
                raw[key] = default
            elif isinstance(default, ConfigDict) and isinstance(raw[key], ConfigDict):
                _add(raw[key], default)
            elif isinstance(default, float) and type(raw[key]) is int:
                raw[key] = float(raw[key])  # else a flag could not set it to a fraction


def parse_config(raw: Any, trains: bool = True) -> Config:
    """Checks a `ConfigDict` (or any nested mapping) and freezes it; what it leaves out has its default.

    Args:
      trains: whether it is to be trained with; else settings that only training uses may contradict each other.

    Raises:
      ConfigError: an unknown key, a wrong type, or settings that contradict each other.
    """
    config = read(Config, raw, "config", {RegistryConfig: lambda value, where: parse_registry(value)})
    _check(config, trains)
    return config


def _check(config: Config, trains: bool) -> None:
    rollout, grpo = config.rollout, config.grpo
    if not config.policy.init_from and not config.policy.architecture:
        raise ConfigError("config.policy.architecture is empty; fill it in, or set config.policy.init_from")
    if config.policy.matmul_precision == "highest" and config.policy.compute_dtype != "float32":
        raise ConfigError(
            f'config.policy.matmul_precision="highest" is of products in float32, and config.policy.compute_dtype is '
            f'"{config.policy.compute_dtype}"; set compute_dtype="float32", or matmul_precision="auto"'
        )
    _check_data(config.data, trains)
    Scorer(config.reward, Graders(config.graders, config.registry))  # what they name is there
    if min(rollout.member_buckets, default=1) < 1:
        raise ConfigError(
            f"config.rollout.member_buckets {rollout.member_buckets} are lengths in tokens; use 1 or more"
        )
    if rollout.room < 0:
        raise ConfigError(f"config.rollout.room={rollout.room} is below 0; set it to 0, and it is computed")
    if rollout.room and rollout.turn_budget >= rollout.room:
        raise ConfigError(f"config.rollout.turn_budget={rollout.turn_budget} must be below room={rollout.room}")
    _check_rollout(rollout)
    render_system_prompt(config.registry, rollout.max_calls, config.policy.system_prompt)  # its names are known
    if not trains:
        return
    if rollout.earlier_thoughts != "keep":
        raise ConfigError(
            f'config.rollout.earlier_thoughts="{rollout.earlier_thoughts}" gives every turn another history, and '
            'training computes an episode in one pass; set it to "keep", and to "drop" for an evaluation only'
        )
    _check_ahead(rollout, grpo)
    _check_grpo(grpo)
    _check_checkpoint(config.checkpoint)
    _check_evaluate(config.evaluate)
    warm_start = config.warm_start
    _check_optimizer("config.optimizer", config.optimizer, "config.grpo.steps", grpo.steps)
    _check_optimizer("config.warm_start.optimizer", warm_start.optimizer, "config.warm_start.steps", warm_start.steps)
    _check_rounding("config.optimizer", config.optimizer, config.policy.param_dtype, grpo.steps)
    _check_rounding("config.warm_start.optimizer", warm_start.optimizer, config.policy.param_dtype, warm_start.steps)
    if (between := warm_start.checkpoint_every) < 1:
        raise ConfigError(f"config.warm_start.checkpoint_every={between} is no number of steps; use 1 or more")
    if warm_start.demonstrations and not warm_start.steps:
        raise ConfigError(
            "config.warm_start.demonstrations are not read with config.warm_start.steps=0; set steps, or name no file"
        )
    has_router = warm_start.steps and not warm_start.demonstrations
    for source, pair in warm_start.claims.items() if has_router else ():
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        found = config.registry.resolve(*pair) if is_pair else "write (expert, skill)"
        if isinstance(found, str):
            raise ConfigError(f"config.warm_start.claims.{source} {pair!r} is not in the registry: {found}")
    skills = [skill.name for skill in config.registry.skills]
    for skill in warm_start.queries if has_router else ():
        if skill not in skills:
            near = difflib.get_close_matches(skill, skills, n=1)
            cure = f"did you mean {near[0]}?" if near else f"its skills are {', '.join(skills)}"
            raise ConfigError(f"config.warm_start.queries.{skill} is no skill of the registry; {cure}")


def _check_data(data: DataConfig, trains: bool) -> None:
    if is_plugin(data.kind):
        load(data.kind, "config.data.kind")
    elif data.kind not in ("suite", *KINDS):
        cure = f'use one of suite, {", ".join(KINDS)}, or "package.module:name"'
        raise ConfigError(f"config.data.kind {data.kind!r} is unknown; {cure}")
    needs_files = data.kind in KINDS  # a function of the user's may know its tasks by the split
    if not trains:
        if needs_files and not data.test_files:
            raise ConfigError(
                f'config.data.kind "{data.kind}" needs config.data.test_files; name the files of its tasks'
            )
        return
    if needs_files and not ((data.train_files or data.mixture) and data.test_files):
        cure = "name files, or a mixture in place of the first"
        raise ConfigError(
            f'config.data.kind "{data.kind}" needs config.data.train_files and config.data.test_files; {cure}'
        )
    if data.mixture and data.train_files:
        raise ConfigError("config.data.train_files is not read beside config.data.mixture; leave one of them empty")
    for number, part in enumerate(data.mixture):
        where = f"config.data.mixture[{number}]"
        if is_plugin(part.kind):
            load(part.kind, f"{where}.kind")
        elif part.kind not in KINDS:
            raise ConfigError(f"{where}.kind {part.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if part.kind in KINDS and not part.files:
            raise ConfigError(f"{where}.files is empty; name the files or directories of its tasks")
        if not 0 < part.weight < float("inf"):
            raise ConfigError(f"{where}.weight={part.weight} draws nothing from it; use a number above 0")


def _check_rollout(rollout: RolloutConfig) -> None:
    for key in ("decode_chunk", "turn_budget"):
        if getattr(rollout, key) < 1:
            raise ConfigError(f"config.rollout.{key}={getattr(rollout, key)} decodes nothing; use 1 or more")
    if not 0 <= rollout.max_marked <= 1:
        raise ConfigError(f"config.rollout.max_marked={rollout.max_marked} is no share; use 0 to 1 (0.2 is usual)")
    if not 0 < rollout.temperature < float("inf"):
        raise ConfigError(
            f"config.rollout.temperature={rollout.temperature} divides the logits; use a number above 0 (1.0 is usual; "
            "evaluations take the likeliest token whatever it is)"
        )
    if rollout.patience < 0:
        raise ConfigError(f"config.rollout.patience={rollout.patience} is below 0; use seconds (600 is usual)")


def _check_ahead(rollout: RolloutConfig, grpo: GrpoConfig) -> None:
    if rollout.ahead < 0 or rollout.staleness < rollout.ahead:
        raise ConfigError(
            f"config.rollout.staleness={rollout.staleness} must be at least config.rollout.ahead={rollout.ahead}: "
            "tasks that begin ahead of their step end under a later policy"
        )
    if rollout.ahead and not grpo.importance_cap:
        raise ConfigError(
            f"config.rollout.ahead={rollout.ahead} trains on episodes of older policies; set "
            "config.grpo.importance_cap=2.0 to correct for them, or ahead=0"
        )
    if rollout.ahead and grpo.refill:
        raise ConfigError(
            "config.grpo.refill replaces groups of a step's tasks, and with config.rollout.ahead a step has no tasks "
            "of its own; set refill=0 or ahead=0"
        )
    if rollout.ahead and grpo.stream:
        raise ConfigError(
            "config.grpo.stream takes a step's groups in the order of its tasks, and with config.rollout.ahead a step "
            "has no tasks of its own; set stream=False or ahead=0"
        )


def _check_grpo(grpo: GrpoConfig) -> None:
    if grpo.microbatches < 1 or grpo.groups % grpo.microbatches:
        raise ConfigError(f"config.grpo.microbatches={grpo.microbatches} must divide config.grpo.groups={grpo.groups}")
    if grpo.refill < 0:
        raise ConfigError(f"config.grpo.refill={grpo.refill} is below 0; use 1 or more, or 0 to replace no group")
    if grpo.refill and grpo.stream:
        raise ConfigError(
            "config.grpo.stream trains on a step's groups before it is known which of them config.grpo.refill "
            "replaces; set stream=False or refill=0"
        )
    if grpo.logprob_chunk < 1:
        cure = "use 1 or more entries of the vocabulary (2048 is usual)"
        raise ConfigError(f"config.grpo.logprob_chunk={grpo.logprob_chunk} leaves no logits to compute; {cure}")
    if grpo.group_size < 2:
        raise ConfigError(f"config.grpo.group_size={grpo.group_size} gives no contrast; use at least 2")
    for key in ("clip_low", "clip_high"):
        if getattr(grpo, key) < 0:
            found = getattr(grpo, key)
            raise ConfigError(f"config.grpo.{key}={found} puts 1 outside the ratio's range; use 0 or more")
    if grpo.importance_cap and grpo.importance_cap < 1:
        raise ConfigError(
            f"config.grpo.importance_cap={grpo.importance_cap} would shrink the updates of fresh tokens too; "
            "use 1 or more (2 is usual), or 0 for no importance weights"
        )
    if grpo.aggregation == "constant" and grpo.constant_length < 1:
        cure = "use 1 or more, as config.rollout.room"
        raise ConfigError(
            f'config.grpo.aggregation "constant" divides by constant_length={grpo.constant_length}; {cure}'
        )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    if checkpoint.every < 1:
        raise ConfigError(f"config.checkpoint.every={checkpoint.every} saves nothing on the way; use 1 or more steps")
    for key in ("keep", "keep_every"):
        if getattr(checkpoint, key) < 0:
            cure = "use 1 or more, or 0 to keep all" if key == "keep" else "use 1 or more steps, or 0 for none"
            raise ConfigError(f"config.checkpoint.{key}={getattr(checkpoint, key)} is below 0; {cure}")
    if checkpoint.keep_every % checkpoint.every:
        raise ConfigError(
            f"config.checkpoint.keep_every={checkpoint.keep_every} is no multiple of config.checkpoint.every="
            f"{checkpoint.every}, so most of those steps are never saved; set it to a multiple"
        )


def _check_evaluate(evaluate: EvaluateConfig) -> None:
    for key, least in (("every", 1), ("batch", 1), ("tasks", 0)):
        if getattr(evaluate, key) < least:
            raise ConfigError(f"config.evaluate.{key}={getattr(evaluate, key)} is too small; use {least} or more")


def _check_optimizer(where: str, optimizer: OptimizerConfig, steps_key: str, steps: int) -> None:
    """A rate that has fallen to 0 teaches nothing: the schedule must last as long as the steps."""
    if optimizer.max_skipped < 1:
        raise ConfigError(f"{where}.max_skipped={optimizer.max_skipped} skips no update; use 1 or more (3 is usual)")
    if not optimizer.eps > 0:
        raise ConfigError(f"{where}.eps={optimizer.eps} divides 0 by 0 where there is no gradient; use 1e-8")
    decay = optimizer.decay_steps
    if decay and decay <= optimizer.warmup_steps:
        raise ConfigError(f"{where}.decay_steps={decay} must exceed warmup_steps={optimizer.warmup_steps}, or be 0")
    if decay and decay < steps:
        cure = f"set {where}.decay_steps={steps}, or 0 for a constant rate"
        raise ConfigError(f"{where}.decay_steps={decay} ends before {steps_key}={steps}: {cure}")


# Half of what bfloat16 has between 1 and its next number. Adam moves a parameter by about the rate or less, and scales
# of norms are about 1.
_SMALLEST_BFLOAT16_RATE = 2.0**-8


def _check_rounding(where: str, optimizer: OptimizerConfig, param_dtype: str, steps: int) -> None:
    """Parameters in bfloat16 are rounded to the nearest, so that updates smaller than half a last place are lost."""
    if steps and param_dtype == "bfloat16" and optimizer.learning_rate < _SMALLEST_BFLOAT16_RATE:
        raise ConfigError(
            f'config.policy.param_dtype "bfloat16" rounds updates of {where}.learning_rate={optimizer.learning_rate:g} '
            f"away: a parameter of 1 changes from {_SMALLEST_BFLOAT16_RATE:g} on, one of 0.02 from 6e-5; set "
            'param_dtype="float32", the policy still computes in config.policy.compute_dtype'
        )
