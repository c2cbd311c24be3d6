"""The boundary between ml_collections configs and the program.

A `ConfigDict` from `configs/*.py` comes in, frozen dataclasses go out. Every key must be known and of
the right type; a wrong one gives a line that names it and the nearest right one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from maestro_jax.data.opening import KINDS
from maestro_jax.errors import ConfigError
from maestro_jax.grpo.advantages import NORMALISERS
from maestro_jax.grpo.losses import AGGREGATIONS, KL_ESTIMATORS, SURROGATES
from maestro_jax.grpo.optimizer import MOMENTS, OptimizerConfig
from maestro_jax.grpo.update import FREEZABLE
from maestro_jax.parallel.mesh import MeshConfig
from maestro_jax.policy.attention.interface import BACKENDS
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.rewards.reward import RewardConfig

T = TypeVar("T")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """One source of a mixture.

    Attributes:
      kind, files, split, image_root: as `kind`, `train_files`, `train_split` and `image_root` of `DataConfig`, without
        the suite.
      weight: its share, relative to the others' weights.
    """

    kind: str
    files: tuple[str, ...]
    split: str
    image_root: str
    weight: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tasks come from.

    Attributes:
      kind: "suite" builds the offline suite; "tfds" reads data sets that `maestro_jax.data.prepare` (or anyone) made,
        "verl" parquet files in the verl schema, "jsonl" one JSON object a line (docs/data.md).
      suite_directory: where suites are kept; empty means inside the work directory.
      train_per_domain, test_per_domain: size of the suite.
      train_files, test_files: the files of kinds "verl" and "jsonl", the data sets' directories of kind "tfds".
      train_split, test_split: the splits of kind "tfds", such as "train", "test" or "train[:100]".
      image_root: folder that image paths in the files are resolved under; empty allows inline images only.
      mixture: what training draws from, in shares; empty takes the training tasks of `kind`. Held out are those of
        `kind` in any case.
      damage_limit: damaged rows that may be skipped (each is reported).
    """

    kind: str
    suite_directory: str
    train_per_domain: int
    test_per_domain: int
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    train_split: str
    test_split: str
    image_root: str
    mixture: tuple[MixedConfig, ...]
    damage_limit: int


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy's architecture (the content of a Hugging Face config.json), tokens and prompt limits.

    Attributes:
      init_from: Hugging Face checkpoint directory to start from; empty starts from random weights.
      architecture: the content of a config.json; with `init_from` that directory's is taken instead.
      tokenizer: directory with tokenizer.json; empty takes the one in `init_from`, or trains one of the
        architecture's vocab_size on the tasks.
      freeze: what is not trained and has no optimiser state: "vision" (the tower with its mergers), "embeddings"
        (with tied embeddings, the head is the same parameter), both or nothing.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
      attention: how attention of whole sequences is computed (`policy/attention/`): "xla", "blocks", "splash" (TPU), or
        "auto", which takes what suits the devices.
      prefix_buckets: static lengths of a task's prompt, in tokens.
      image_buckets: static sizes of an image, in patches.
    """

    init_from: str
    architecture: dict[str, Any]
    tokenizer: str
    param_dtype: str
    compute_dtype: str
    freeze: tuple[str, ...]
    remat: bool
    attention: str
    prefix_buckets: tuple[int, ...]
    image_buckets: tuple[int, ...]
    images_per_task: int
    min_pixels: int
    max_pixels: int


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Episodes and decoding; lengths in tokens, times in seconds.

    Attributes:
      max_calls: calls per episode; after them the policy may only answer.
      turn_budget: most tokens of one turn.
      observation_tokens: most tokens of an observation's text.
      observation_multiple: fills the text up with full stops to a multiple of so many tokens (1: not at all), so that
        a quote stands at the same distance from what it quotes; a tiny policy needs that to learn quoting.
      room: most tokens of a member, turns and observations together; 0: what the longest episode needs, computed from
        the settings above and the run's tokens (`rollout/limits.py`). A smaller one cuts longer episodes.
      member_buckets: static member lengths below `room` that the update is compiled for, besides `room` itself.
      lanes: trajectories that decode side by side; 0 gives every trajectory in flight a lane. With fewer, a lane
        whose trajectory waits for an expert goes to another one.
      decode_chunk: tokens between two exchanges with the experts.
      append_rows: lanes that receive an observation per program call; 0: all of them.
      prefill_groups: groups prefilled per program call; 0: all of them.
      parked_tokens: room for keys and values of trajectories without a lane, in the memory of each batch shard.
      parked_on_host: the same in the memory of each host, in bytes. Without any room, lanes are held.
      deadline: seconds an episode may wait for experts, over all its calls.
      ahead: batches of tasks that are under way besides a step's own; 0 is on-policy.
      staleness: a group is trained at most so many updates after its episodes began; at least `ahead`.
      max_marked: the largest share of a step's episodes that may be left out because an expert failed; with more, the
        step waits and they are run again. Also of an evaluation's.
      patience: seconds to wait for experts that are out, before the run stops with exit code 75.
    """

    max_calls: int
    turn_budget: int
    observation_tokens: int
    observation_multiple: int
    room: int
    member_buckets: tuple[int, ...]
    lanes: int
    decode_chunk: int
    append_rows: int
    prefill_groups: int
    parked_tokens: int
    parked_on_host: int
    temperature: float
    deadline: float
    ahead: int
    staleness: int
    max_marked: float = 0.2
    patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """One update per step from `groups` tasks with `group_size` members each.

    Attributes:
      advantage: "std", "none" or "leave_one_out" (`grpo/advantages.py`).
      surrogate: what is clipped, "ppo" (a token's update), "gspo" (a member's) or "cispo" (a token's weight).
      clip_low, clip_high: the ratio's range is 1 - clip_low to 1 + clip_high.
      importance_cap: upper bound of the weights that correct for the sampler (Yao et al. 2025); 0: no weights.
      aggregation: how token losses are averaged, "sequence", "token" or "constant" (by constant_length tokens).
      logprob_chunk: entries of the vocabulary whose logits exist at a time, for all tokens in the loss.
      microbatches: most parts of the groups whose gradients are taken one after the other; the update is the same.
        One microbatch, groups / microbatches, must fit into memory at full length (`grpo/microbatches.py`).
      stream: takes gradients of microbatches while later ones still wait for experts. They are then of consecutive
        tasks, not of groups of like length, so that no result depends on who answers first.
    """

    steps: int
    groups: int
    group_size: int
    advantage: str
    surrogate: str
    clip_low: float
    clip_high: float
    importance_cap: float
    aggregation: str
    constant_length: int
    entropy_weight: float
    kl_weight: float
    kl_estimator: str
    logprob_chunk: int
    microbatches: int
    stream: bool


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised fine-tuning on demonstrations of a weak router (`suite/demonstrations.py`).

    Attributes:
      steps: updates; 0 leaves the warm start out.
      checkpoint_every: steps between its checkpoints.
      claims: source → (expert, skill) that the registry's descriptions point to, right or wrong.
      follow_expert, follow_skill: how often the router follows the description of each; else at random.
      second_call: how often it asks another pair after a reply that gives nothing.
      rehearsal: share of demonstrations whose reply is a random text, to learn quoting from.
      queries: skill → phrases the router writes as query.
      thoughts: source → what the router thinks before its first call: what kind of task it sees.
    """

    steps: int
    checkpoint_every: int
    groups: int
    group_size: int
    claims: dict[str, Any]
    follow_expert: float
    follow_skill: float
    second_call: float
    rehearsal: float
    queries: dict[str, Any]
    thoughts: dict[str, Any]
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation.

    Attributes:
      every: steps between two of them; there is one after the last step.
      tasks: how many; 0: all.
      batch: how many at a time.
      baselines: whether a run also measures the policy before reinforcement, and in the end every pair of expert and
        skill. On many devices leave it out: `maestro_jax.evaluate --baselines` needs fewer.
    """

    every: int
    tasks: int
    batch: int
    baselines: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What becomes of checkpoints (docs/checkpoints.md).

    Attributes:
      every: steps between two of them.
      keep: so many of the newest are kept; 0: all.
      keep_every: those of steps that this divides are kept for good; 0: none.
      directory: where they are, on a file system or an object store ("gs://bucket/run"); empty: WORKDIR/checkpoints.
    """

    every: int
    keep: int
    keep_every: int
    directory: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    seed: int
    data: DataConfig
    policy: PolicyConfig
    registry: RegistryConfig
    rollout: RolloutConfig
    reward: RewardConfig
    grpo: GrpoConfig
    optimizer: OptimizerConfig
    warm_start: WarmStartConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig


def parse_config(raw: Any, trains: bool = True) -> Config:
    """Checks a `ConfigDict` (or any nested mapping) and freezes it.

    Args:
      trains: whether it is to be trained with; else settings that only training uses may contradict each other.

    Raises:
      ConfigError: an unknown or missing key, a wrong type, or settings that contradict each other.
    """
    config = _read(Config, _plain(raw), "config")
    _check(config, trains)
    return config


def _plain(raw: Any) -> Any:
    """ConfigDicts as dicts, all the way down."""
    if hasattr(raw, "items"):
        return {key: _plain(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return tuple(_plain(value) for value in raw)
    return raw


def _read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            cure = f"did you mean {where}.{near[0]}?" if near else f"its keys are {', '.join(hints)}"
            raise ConfigError(f"unknown key {where}.{key}; {cure}")
    optional = {field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}  # type: ignore[arg-type]
    missing = [key for key in hints if key not in values and key not in optional]
    if missing:
        raise ConfigError(f"missing key {where}.{missing[0]}; set it as the shipped configs/quickstart.py does")
    return cls(**{key: _value(hints[key], values[key], f"{where}.{key}") for key in hints if key in values})


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is RegistryConfig:
        return parse_registry(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a group of settings, found {type(value).__name__}")
        return _read(hint, value, where)
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if origin is tuple and isinstance(value, tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    kind = origin if not isinstance(origin, types.GenericAlias) else dict
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {kind.__name__}, found {value!r} ({type(value).__name__})")
    return value


def _check(config: Config, trains: bool) -> None:
    rollout, grpo = config.rollout, config.grpo
    if not config.policy.init_from and not config.policy.architecture:
        raise ConfigError("config.policy.architecture is empty; fill it in, or set config.policy.init_from")
    for key in ("param_dtype", "compute_dtype"):
        if (found := getattr(config.policy, key)) not in DTYPES:
            raise ConfigError(f"config.policy.{key} {found!r} is unknown; use one of {', '.join(DTYPES)}")
    if config.policy.attention not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ConfigError(f"config.policy.attention {config.policy.attention!r} is unknown; use one of {known}")
    for part in config.policy.freeze:
        if part not in FREEZABLE:
            raise ConfigError(f"config.policy.freeze has {part!r}; it may name {', '.join(FREEZABLE)}")
    _check_data(config.data, trains)
    if min(rollout.member_buckets, default=1) < 1:
        raise ConfigError(
            f"config.rollout.member_buckets {rollout.member_buckets} are lengths in tokens; use 1 or more"
        )
    if rollout.room < 0:
        raise ConfigError(f"config.rollout.room={rollout.room} is below 0; set it to 0, and it is computed")
    if rollout.room and rollout.turn_budget >= rollout.room:
        raise ConfigError(f"config.rollout.turn_budget={rollout.turn_budget} must be below room={rollout.room}")
    _check_rollout(rollout)
    if not trains:
        return
    _check_ahead(rollout, grpo)
    _check_grpo(grpo)
    _check_checkpoint(config.checkpoint)
    _check_evaluate(config.evaluate)
    warm_start = config.warm_start
    _check_optimizer("config.optimizer", config.optimizer, "config.grpo.steps", grpo.steps)
    _check_optimizer("config.warm_start.optimizer", warm_start.optimizer, "config.warm_start.steps", warm_start.steps)
    if (between := warm_start.checkpoint_every) < 1:
        raise ConfigError(f"config.warm_start.checkpoint_every={between} is no number of steps; use 1 or more")
    for source, pair in warm_start.claims.items() if warm_start.steps else ():
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        found = config.registry.resolve(*pair) if is_pair else "write (expert, skill)"
        if isinstance(found, str):
            raise ConfigError(f"config.warm_start.claims.{source} {pair!r} is not in the registry: {found}")
    skills = [skill.name for skill in config.registry.skills]
    for skill in warm_start.queries if warm_start.steps else ():
        if skill not in skills:
            near = difflib.get_close_matches(skill, skills, n=1)
            cure = f"did you mean {near[0]}?" if near else f"its skills are {', '.join(skills)}"
            raise ConfigError(f"config.warm_start.queries.{skill} is no skill of the registry; {cure}")


def _check_data(data: DataConfig, trains: bool) -> None:
    if data.kind not in ("suite", *KINDS):
        raise ConfigError(f"config.data.kind {data.kind!r} is unknown; use one of suite, {', '.join(KINDS)}")
    if not trains:
        if data.kind != "suite" and not data.test_files:
            raise ConfigError(
                f'config.data.kind "{data.kind}" needs config.data.test_files; name the files of its tasks'
            )
        return
    if data.kind != "suite" and not ((data.train_files or data.mixture) and data.test_files):
        cure = "name files, or a mixture in place of the first"
        raise ConfigError(
            f'config.data.kind "{data.kind}" needs config.data.train_files and config.data.test_files; {cure}'
        )
    if data.mixture and data.train_files:
        raise ConfigError("config.data.train_files is not read beside config.data.mixture; leave one of them empty")
    for number, part in enumerate(data.mixture):
        where = f"config.data.mixture[{number}]"
        if part.kind not in KINDS:
            raise ConfigError(f"{where}.kind {part.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if not part.files:
            raise ConfigError(f"{where}.files is empty; name the files or directories of its tasks")
        if not 0 < part.weight < float("inf"):
            raise ConfigError(f"{where}.weight={part.weight} draws nothing from it; use a number above 0")


def _check_rollout(rollout: RolloutConfig) -> None:
    for key in ("decode_chunk", "turn_budget"):
        if getattr(rollout, key) < 1:
            raise ConfigError(f"config.rollout.{key}={getattr(rollout, key)} decodes nothing; use 1 or more")
    if not 0 <= rollout.max_marked <= 1:
        raise ConfigError(f"config.rollout.max_marked={rollout.max_marked} is no share; use 0 to 1 (0.2 is usual)")
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
    if rollout.ahead and grpo.stream:
        raise ConfigError(
            "config.grpo.stream takes a step's groups in the order of its tasks, and with config.rollout.ahead a step "
            "has no tasks of its own; set stream=False or ahead=0"
        )


def _check_grpo(grpo: GrpoConfig) -> None:
    if grpo.microbatches < 1 or grpo.groups % grpo.microbatches:
        raise ConfigError(f"config.grpo.microbatches={grpo.microbatches} must divide config.grpo.groups={grpo.groups}")
    if grpo.logprob_chunk < 1:
        cure = "use 1 or more entries of the vocabulary (2048 is usual)"
        raise ConfigError(f"config.grpo.logprob_chunk={grpo.logprob_chunk} leaves no logits to compute; {cure}")
    if grpo.group_size < 2:
        raise ConfigError(f"config.grpo.group_size={grpo.group_size} gives no contrast; use at least 2")
    names = {
        "advantage": NORMALISERS,
        "surrogate": SURROGATES,
        "aggregation": AGGREGATIONS,
        "kl_estimator": KL_ESTIMATORS,
    }
    for key, known in names.items():
        if getattr(grpo, key) not in known:
            raise ConfigError(f"config.grpo.{key} {getattr(grpo, key)!r} is unknown; use one of {', '.join(known)}")
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
    if optimizer.moments not in MOMENTS:
        raise ConfigError(f"{where}.moments {optimizer.moments!r} is unknown; use one of {', '.join(MOMENTS)}")
    decay = optimizer.decay_steps
    if decay and decay <= optimizer.warmup_steps:
        raise ConfigError(f"{where}.decay_steps={decay} must exceed warmup_steps={optimizer.warmup_steps}, or be 0")
    if decay and decay < steps:
        cure = f"set {where}.decay_steps={steps}, or 0 for a constant rate"
        raise ConfigError(f"{where}.decay_steps={decay} ends before {steps_key}={steps}: {cure}")
