"""Says, before there is a machine, whether a run fits it and how long a step would take.

    python -m maestro_jax.plan --config configs/qwen3_vl_4b.py --topology v5e:8x8 [--json plan.json]

Compiles the run's own programs (the update and those of rollouts) for the topology with the TPU compiler and reports, a
chip: memory by kind against the limit, operations, collectives and an estimate of time from the chip's peak rates.
Where the run does not fit, the nearest setting that does. Without --topology it plans for the devices at hand.
GPU topologies (h100:8) are estimated by arithmetic, not compiled. `maestro_jax.api.plan` is the same as a function.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from maestro_jax import command
from maestro_jax.aot.estimate import gpu_target
from maestro_jax.config import complete
from maestro_jax.jobs.plan import plan
from maestro_jax.observe.files import write_json

CONFIG = command.config_flag(complete)
TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:8x8, v5p:2x2x2, v6e:4x4, ..., or h100:8; empty: devices at hand.")
JSON = flags.DEFINE_string("json", "", "File to write the plan to, besides the table.")
ROOT = flags.DEFINE_integer("root_tokens", 0, "Tokens of the registry's prompt; 0: counted, or estimated.")
OPTIMISED = flags.DEFINE_bool("optimised", False, "Compile as a run would, which takes six times as long.")
PROGRAMS = flags.DEFINE_enum("programs", "all", ["all", "update"], "Which programs to compile.")


def main(argv: Sequence[str]) -> None:
    del argv
    raw = CONFIG.value
    if TOPOLOGY.value and gpu_target(TOPOLOGY.value) is None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so no device is needed, or waited for
    found = plan(
        raw,
        TOPOLOGY.value,
        root_tokens=ROOT.value,
        update_only=PROGRAMS.value == "update",
        optimised=OPTIMISED.value,
        progress="terminal",
    )
    print(found.text())
    if JSON.value:
        write_json(Path(JSON.value), found.to_json())


if __name__ == "__main__":
    command.run(main, required=("config",))
