"""The main job: trains an orchestrator from a config, start to finish.

    python -m maestro_jax.train --config configs/quickstart.py --workdir DIR [--config.grpo.steps=20 ...]

The same command goes on where an earlier one stopped. DIR receives metrics.jsonl, journal.jsonl,
trained.jsonl, checkpoints, and at the end summary.json, curves.png and routing.png. SIGTERM or SIGINT stops it where
nothing is lost (docs/reliability.md). `maestro_jax.api.train` is the same as a function.
"""

from collections.abc import Sequence

from absl import flags

from maestro_jax import command
from maestro_jax.config import complete

CONFIG = command.config_flag(complete)
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run; an interrupted run there goes on.")
SKIP_DOCTOR = flags.DEFINE_bool("skip_doctor", False, "Start without asking every server once, as doctor does.")
REPLAY = flags.DEFINE_string("replay", "", "A run's journal.jsonl: its calls are answered from there, nobody is asked.")


def main(argv: Sequence[str]) -> None:
    del argv
    from maestro_jax.jobs.train import train
    from maestro_jax.parallel import cluster

    raw = CONFIG.value
    result = train(raw, WORKDIR.value, replay=REPLAY.value, skip_doctor=SKIP_DOCTOR.value, progress="terminal")
    if cluster.is_main():
        print(result.table())
        made = "summary.json, curves.png, routing.png, metrics.jsonl"
        print(f"\nwritten to {result.workdir}: {made}; {result.checkpoints}")


if __name__ == "__main__":
    command.run(main, required=("config", "workdir"))
