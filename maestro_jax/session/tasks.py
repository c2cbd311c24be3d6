"""Tasks of a session: opened by the config's names, and all of them checked before anything is computed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from maestro_jax.config import Config
from maestro_jax.data.config import MixedConfig
from maestro_jax.data.mixture import Mixture
from maestro_jax.data.opening import open_source
from maestro_jax.data.source import TaskSource, TaskView, TfdsSource
from maestro_jax.data.survey import Origin, survey
from maestro_jax.errors import ConfigError, UserError
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster
from maestro_jax.rewards.graders import Graders
from maestro_jax.suite.tasks.build import build_suite


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What a run trains on and what it is measured with."""

    train: TaskSource
    held_out: TaskView


def open_tasks(config: Config, directory: Path, progress: Progress) -> Tasks:
    """Training and held-out tasks, all checked. The suite is built on first use.

    Raises:
      ConfigError: as of `check_tasks` and `first_tasks`.
    """
    train = open_training(config, directory, progress)
    held_out = first_tasks(open_held_out(config, directory, progress), config.evaluate.tasks)
    sources = train.sources if isinstance(train, Mixture) else (train,)
    graders = Graders(config.graders, config.registry)
    check_tasks(sources, held_out, graders, directory / "data.json", progress)
    return Tasks(train, held_out)


def open_training(config: Config, workdir: Path, progress: Progress) -> TaskSource:
    data = config.data
    if data.mixture:
        return open_mixture(data.mixture)
    if data.kind != "suite":
        return open_source(data.kind, data.train_files, split=data.train_split, image_root=data.image_root)
    return TfdsSource(open_suite(config, workdir, progress), "train")


def open_held_out(config: Config, workdir: Path, progress: Progress) -> TaskSource:
    data = config.data
    if data.kind != "suite":
        return open_source(data.kind, data.test_files, split=data.test_split, image_root=data.image_root)
    return TfdsSource(open_suite(config, workdir, progress), "test")


def open_suite(config: Config, workdir: Path, progress: Progress) -> str:
    """The directory of the suite, built if it is not there."""
    directory = config.data.suite_directory or workdir / "suite"
    counts = config.data.train_per_domain, config.data.test_per_domain
    return cluster.from_main(lambda: str(build_suite(directory, *counts, config.seed, progress)))


def first_tasks(source: TaskSource, count: int) -> TaskView:
    """The held-out tasks that a run looks at: `config.evaluate.tasks` of them, 0 for all.

    Raises:
      ConfigError: there are not so many.
    """
    if count > len(source):
        raise ConfigError(
            f"config.evaluate.tasks={count}, and the data has {len(source)} held-out tasks; set it to {len(source)} or "
            "less, or to 0 for all"
        )
    return TaskView(source, range(count or len(source)))


def check_tasks(
    sources: Sequence[TaskSource],
    held_out: TaskSource | None,
    graders: Graders,
    kept: Path,
    progress: Progress,
) -> None:
    """That all tasks can be told apart and graded, before anything is computed; process 0 reads for all.

    Args:
      held_out: must be readable as a whole besides, for no row of it may be skipped.
      kept: file of what is known of the data's files already.

    Raises:
      ConfigError: two tasks of a source share an id, nobody can grade one, or one that is held out is damaged.
    """

    def read() -> tuple[list[tuple[str, str]], str]:
        found: set[tuple[str, str]] = set()
        try:
            for number, source in enumerate(sources):
                name = f"data source {number}" if len(sources) > 1 else "tasks"
                found |= graded_by(graders, source, survey(source, name, kept, progress))
            if held_out is not None:
                rows = survey(held_out, "held-out tasks", kept, progress, whole=True)
                found |= graded_by(graders, held_out, rows)
        except UserError as error:
            return [], str(error)
        return sorted(found), ""

    names, problem = cluster.from_main(read)
    if problem:
        raise ConfigError(problem)
    graders.open((source, grader) for source, grader in names)


def graded_by(graders: Graders, source: TaskSource, found: Sequence[Origin]) -> set[tuple[str, str]]:
    """(source, grader) of all tasks; raises ConfigError with the row of one that has no grader."""
    for origin in found:
        try:
            graders.find(origin.source, origin.grader)
        except ConfigError as error:
            raise ConfigError(f"{source.where(origin.row)}: {error}, or correct the row") from None
    return {(origin.source, origin.grader) for origin in found}


def open_mixture(mixed: Sequence[MixedConfig]) -> Mixture:
    opened = [open_source(one.kind, one.files, split=one.split, image_root=one.image_root) for one in mixed]
    return Mixture(opened, [one.weight for one in mixed])
