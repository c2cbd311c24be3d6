"""Which of the held-out tasks an evaluation takes: known before the first one is put, so that they can be counted."""

import collections
from collections.abc import Callable, Sequence

from maestro_jax.data.source import TaskSource, TaskView
from maestro_jax.errors import ConfigError


def select(source: TaskSource, benchmarks: Sequence[str], most: int, note: Callable[[str], None]) -> TaskSource:
    """The tasks of the named benchmarks, at most `most` of each (0: all), in their order.

    Args:
      benchmarks: sources of tasks, in any case; all if there are none.
      note: hears which of them have no task.

    Raises:
      ConfigError: none of them has.
    """
    if not benchmarks and not most:
        return source
    wanted, met, rows = {name.strip().casefold() for name in benchmarks}, collections.Counter[str](), []
    for row, label in enumerate(source.labels()):
        if label is None:
            rows.append(row)  # whoever reads it says what is wrong with it
            continue
        name = label.source.casefold()
        met[name] += 1
        if (not wanted or name in wanted) and (not most or met[name] <= most):
            rows.append(row)
    missing = [name for name in benchmarks if name.strip().casefold() not in met]
    if benchmarks and len(missing) == len(benchmarks):
        raise ConfigError(f"--benchmarks={','.join(missing)}: the data has no such tasks; see its `source` fields")
    for name in missing:
        note(f"--benchmarks={name}: the data has no such tasks")
    return TaskView(source, rows)
