"""Says, before a slice is asked for, whether a run's mesh and batches divide over it.

    python -m maestro_jax.slice_check --config configs/qwen3_vl_4b.py --accelerator v5litepod-64 [--config.KEY=VALUE]

Arithmetic on shapes: no device is touched, no weights are read. One line and exit code 0 if all is well, one line
with the cure and 78 if not. Whether it fits into memory, `maestro_jax.plan` says.
"""

from collections.abc import Sequence

import jax
from absl import flags

from maestro_jax import command
from maestro_jax.aot.fit import fit
from maestro_jax.aot.slices import parse_accelerator
from maestro_jax.config import complete, parse_config

CONFIG = command.config_flag(complete)
ACCELERATOR = flags.DEFINE_string("accelerator", "", "v5litepod-64, v5p-128, v6e-256, h100x8x2, ...")


def main(argv: Sequence[str]) -> None:
    del argv
    config = parse_config(CONFIG.value)
    found = parse_accelerator(ACCELERATOR.value)
    jax.config.update("jax_platforms", "cpu")  # shapes only: devices there may be are left alone
    print(fit(config, found))


if __name__ == "__main__":
    command.run(main, required=("config", "accelerator"))
