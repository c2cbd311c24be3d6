"""Builds the offline suite: tasks of every domain come in, one TFDS ArrayRecord data set goes out.

    python -m maestro_jax.suite.tasks.build --directory DIR --train_per_domain 200 --test_per_domain 50 --seed 0

The data set lies in a folder of its own under DIR, named by a fingerprint of everything that
shapes it, so that a second call finds it and another setting never meets stale tasks. It is
written beside its place and moved there in one step: what is there is complete.
"""

import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags

from maestro_jax import command
from maestro_jax.data.store import beside, write_tasks
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import check_image
from maestro_jax.observe.progress import Progress
from maestro_jax.types import Task

DOMAINS = ("visual_qa", "counting", "geometry", "charts", "reading")
SPLITS = ("train", "test")
# Packages whose version may change a question or a pixel.
PACKAGES = ("easy-vqa", "vega_datasets", "reasoning-gym", "numpy", "pillow", "opencv-python", "opencv-python-headless")

_FINGERPRINT = "fingerprint.json"
_DESCRIPTION = "Multimodal questions of several domains, made from data that ships inside packages."


def build_suite(
    directory: str | os.PathLike[str], train_per_domain: int, test_per_domain: int, seed: int, progress: Progress
) -> Path:
    """Builds the suite unless this very suite is there already.

    Args:
      directory: where suites are kept; one folder each.
      train_per_domain: training tasks of each domain.
      test_per_domain: held-out tasks of each domain.
      seed: of every random choice.
      progress: told about every task.

    Returns:
      The folder of the TFDS data set, for `TfdsSource(folder, "train" | "test")`.

    Raises:
      ConfigError: counts below 1, or a package of the `suite` extra is missing.
      DataError: a domain made a task that breaks the rules.
    """
    counts = {"train": train_per_domain, "test": test_per_domain}
    if min(counts.values()) < 1:
        raise ConfigError(f"a suite needs at least 1 task per domain and split, found {counts}; raise the counts")
    fingerprint = _fingerprint(counts, seed)
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    target = Path(directory) / f"suite-{digest}"
    if (target / _FINGERPRINT).is_file():
        return target
    with beside(target) as building:
        write_tasks(building, "maestro_suite", _DESCRIPTION, _all_tasks(counts, seed, progress))
        (building / _FINGERPRINT).write_text(json.dumps(fingerprint, indent=1, sort_keys=True) + "\n")
        _move(building, target)
    return target


def _fingerprint(counts: dict[str, int], seed: int) -> dict[str, object]:
    """Everything that shapes the suite: arguments, the generators' own code, versions of packages."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "domains": DOMAINS,
        "counts": counts,
        "seed": seed,
        "code": code.hexdigest(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _all_tasks(counts: dict[str, int], seed: int, progress: Progress) -> dict[str, list[Task]]:
    """Tasks of each split, domains taking turns, so that any first part of a split is balanced."""
    progress.phase("suite", total=len(DOMAINS) * sum(counts.values()))
    done = 0
    per_domain: dict[str, list[list[Task]]] = {split: [] for split in SPLITS}
    for domain in DOMAINS:
        make = _generator(domain)
        seen: set[str] = set()
        for split in SPLITS:
            tasks = []
            for task in _checked(make(split, counts[split], seed), domain, split, counts[split], seen):
                tasks.append(task)
                done += 1
                progress.tick(done)
            per_domain[split].append(tasks)
        progress.update(done, {"domain": domain, **counts})
    return {split: [task for turn in zip(*lists, strict=True) for task in turn] for split, lists in per_domain.items()}


def _generator(domain: str) -> Callable[[str, int, int], Iterable[Task]]:
    try:
        return importlib.import_module(f"maestro_jax.suite.tasks.{domain}").tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"suite domain {domain} needs the package {error.name}; install it with `pip install '.[suite]'`"
        ) from error


def _checked(tasks: Iterable[Task], domain: str, split: str, count: int, seen: set[str]) -> Iterator[Task]:
    """Passes a domain's tasks on, holding each to the promises that everything later relies on."""
    number = -1
    for number, task in enumerate(itertools.islice(tasks, count)):
        where = f"suite domain {domain}, {split} task {number}"
        if task.source != domain:
            raise DataError(f"{where}: source is {task.source!r}; a domain's tasks must carry its name")
        if task.id in seen:
            raise DataError(f"{where}: id {task.id} is used twice; ids must be unique")
        if not task.question or not task.answers or not all(task.answers):
            raise DataError(f"{where}: question or answers are empty; correct the domain's generator")
        for position, image in enumerate(task.images):
            check_image(image, f"{where}, images[{position}]")
        seen.add(task.id)
        yield task
    if number + 1 < count:
        raise DataError(
            f"suite domain {domain} has only {number + 1} {split} tasks, {count} are asked for; ask for fewer"
        )


def _move(building: Path, target: Path) -> None:
    try:
        os.rename(building, target)
    except OSError:
        # Another process was faster: the same fingerprint means the same tasks, so its copy serves.
        if not (target / _FINGERPRINT).is_file():
            raise DataError(f"{target} is in the way and is not a suite; delete it and build again") from None


def define_flags() -> None:
    """Flags of the command; not defined on import, since `maestro_jax.train` imports this module and has its own."""
    flags.DEFINE_string("directory", "", "Where suites are kept.")
    flags.DEFINE_integer("train_per_domain", 200, "Training tasks of each domain.", lower_bound=1)
    flags.DEFINE_integer("test_per_domain", 50, "Held-out tasks of each domain.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of every random choice.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    with Progress() as progress:
        path = build_suite(values.directory, values.train_per_domain, values.test_per_domain, values.seed, progress)
    print(path)


if __name__ == "__main__":
    define_flags()
    command.run(main, required=("directory",))
