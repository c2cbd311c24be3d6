"""Exports a checkpoint of a run as a Hugging Face model directory.

    python -m maestro_jax.export --checkpoint runs/quickstart --output exported [--dtype bfloat16] [--verify]

--checkpoint is a run's work directory, its checkpoints/ or one checkpoint in there. With --base the
files around the weights (config.json, tokenizer, preprocessor) are copied from that Hugging Face
directory; without it they are made from the run's config.

The result may be published. Its model card has numbers and names, no paths, addresses or key names; of the registry it
lists names and a hash. What --base brings along is copied as it is. `maestro_jax.api.export` is the same as a function.
"""

from collections.abc import Sequence

from absl import flags

from maestro_jax import command
from maestro_jax.jobs.export import export

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Work directory of a run, its checkpoints/, or one checkpoint.")
OUTPUT = flags.DEFINE_string("output", "", "Directory to write; must not exist.")
BASE = flags.DEFINE_string("base", "", "Hugging Face directory to copy all files but the weights from.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of the exported weights.")
VERIFY = flags.DEFINE_bool("verify", False, "Read the result again and compare; with torch, also compute with it.")


def main(argv: Sequence[str]) -> None:
    del argv
    made = export(
        CHECKPOINT.value, OUTPUT.value, base=BASE.value, dtype=DTYPE.value, verify=VERIFY.value, progress="terminal"
    )
    print(f"step {made.step} of {made.workdir} written to {made.output}")


if __name__ == "__main__":
    command.run(main, required=("checkpoint", "output"))
