"""Says, before a run, whether its registry is sound, its data can be used and its experts answer.

    python -m maestro_jax.doctor --config configs/qwen3_vl_4b.py [--seconds 60] [--static]

One line for each finding, with its cure. First what the config alone shows: unknown names, cycles, missing services,
stages that do not fit together, environment variables that are not set, `serve` commands that `experts up` would
refuse. Then the data is gone through: every task needs an id and a grader, and where the tokenizer is at hand, one of
each source is made into a prompt. Then everything is built, the sandbox too where a skill needs one, and every endpoint
gets one real request with the expert's own settings (`fleet/trials.py`), also those of models behind services. Exit
code 0 if all is well, else 78. `maestro_jax.api.doctor` is the same as a function.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from maestro_jax import command
from maestro_jax.config import complete
from maestro_jax.errors import ConfigError
from maestro_jax.jobs.doctor import counted, doctor

CONFIG = command.config_flag(complete)
SECONDS = flags.DEFINE_float(
    "seconds", 60.0, "How long each request may take; no longer than the expert's attempt_timeout.", lower_bound=0.1
)
STATIC = flags.DEFINE_bool("static", False, "Look at the config only; no expert is asked.")


def main(argv: Sequence[str]) -> None:
    del argv
    raw, file = CONFIG.value, config_flags.get_config_filename(flags.FLAGS["config"])

    def tell(line: str) -> None:
        print(" ".join(line.split()), flush=True)

    if found := doctor(raw, seconds=SECONDS.value, static=STATIC.value, tell=tell).problems:
        raise ConfigError(f"{counted(found)} in {file}; the lines above say what to do about each")


if __name__ == "__main__":
    command.run(main, required=("config",))
