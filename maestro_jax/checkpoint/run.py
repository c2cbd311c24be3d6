"""A run of `maestro_jax.train` on disk, for commands that use what it has trained."""

import dataclasses
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import read_json
from maestro_jax.settings import read_settings


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run on disk."""

    workdir: Path
    checkpoints: str  # a local directory, or one of an object store
    step: int | None  # None: the newest
    config: dict[str, Any]  # its settings, nested
    architecture: dict[str, Any]  # the content of a config.json

    def value(self, key: str) -> Any:
        """A setting, as the config had it."""
        found: Any = self.config
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                raise ConfigError(f"{self.workdir}/config.json lacks {key}; use the version that made the run")
            found = found[part]
        return found

    @property
    def tokenizer(self) -> Path:
        """The directory of its tokenizer."""
        given = self.value("policy.tokenizer") or self.value("policy.init_from")
        return Path(given) if given else self.workdir / "tokenizer"

    @property
    def pixels(self) -> tuple[int, int]:
        """Least and most pixels of an image."""
        return self.value("policy.min_pixels"), self.value("policy.max_pixels")


def has_begun(workdir: Path) -> bool:
    """Whether a run there has made what later starts take over: checkpoints, figures, or metrics of training."""
    made = ("baselines.json", "before.json", "before_sampled.json", "metrics.jsonl")
    saved = (path for name in ("warm_start", "checkpoints") for path in (workdir / name).glob("*"))
    return any((workdir / name).is_file() for name in made) or any(path.name.isdigit() for path in saved)


def find_run(path: Path) -> Run:
    """The run that `path` means: a work directory, its checkpoints/ or one checkpoint in there.

    Where its checkpoints are elsewhere (config.checkpoint.directory), checkpoints/ stands for that place.
    """
    step = None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        step, path = int(path.name), path.parent
    workdir = path.parent if path.name == "checkpoints" else path
    settings, architecture = read_settings(workdir / "config.json"), read_json(workdir / "architecture.json")
    if settings is None or architecture is None:
        lacks = "config.json" if settings is None else "architecture.json"
        raise ConfigError(
            f"{workdir} has no {lacks}, so it is no run's work directory; give --checkpoint the "
            "--workdir of a run of maestro_jax.train"
        )
    run = Run(workdir, str(workdir / "checkpoints"), step, settings.config, architecture)
    elsewhere = run.value("checkpoint.directory")
    return dataclasses.replace(run, checkpoints=elsewhere) if elsewhere else run
