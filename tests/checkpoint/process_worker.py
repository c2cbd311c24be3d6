"""One process of two: `python -m tests.checkpoint.process_worker ADDRESS NUMBER DIRECTORY RESULT`.

Restores the newest checkpoint of DIRECTORY over the devices of both, writes as JSON what it found, and saves it again
as the next step.
"""

import json
import sys
from pathlib import Path

import jax

from maestro_jax.checkpoint.fingerprint import fingerprints
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoint.test_store import make_state

COUNT, DEVICES = 2, 2  # processes, and devices of each
SECONDS_TO_MEET = 60


def main(address: str, number: str, directory: str, result: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, COUNT, int(number), initialization_timeout=SECONDS_TO_MEET)
    assert make_mesh(MeshConfig(1, -1, 1)).size == COUNT * DEVICES
    notes: list[str] = []
    store = CheckpointStore(directory, keep=0, note=notes.append)
    restored = store.restore_newest(make_state((1, COUNT * DEVICES, 1), fill=0.0))
    assert restored is not None
    found = {"step": restored.step, "fingerprints": fingerprints(named_leaves(restored.state)), "notes": notes}
    store.save(restored.step + 1, restored.state, restored.run)
    store.close()
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
