"""A process that reads its part of a stream: arguments are FILE INDEX COUNT BATCHES STATE RESULT."""

import json
import sys
from pathlib import Path
from typing import Any

from maestro_jax.data.pipeline import Batches
from maestro_jax.data.verl import VerlParquetSource


def read(file: str, index: int, count: int, batches: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Ids of a process's tasks, batch by batch, and its state behind them."""
    source = VerlParquetSource(file)
    stream = iter(Batches(source, 4, seed=11, damage_limit=1, process_index=index, process_count=count))
    if state:
        stream.set_state(state)
    return {"ids": [[task.id for task in next(stream)] for _ in range(batches)], "state": stream.get_state()}


if __name__ == "__main__":
    file, index, count, batches, before, result = sys.argv[1:]
    Path(result).write_text(json.dumps(read(file, int(index), int(count), int(batches), json.loads(before))))
