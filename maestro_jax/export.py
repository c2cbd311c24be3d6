"""Exports a checkpoint of a run as a Hugging Face model directory.

    python -m maestro_jax.export --checkpoint runs/quickstart --output exported [--dtype bfloat16] [--verify]

--checkpoint is a run's work directory, its checkpoints/ or one checkpoint in there. With --base the
files around the weights (config.json, tokenizer, preprocessor) are copied from that Hugging Face
directory; without it they are made from the run's config.

The result may be published. Its model card has numbers and names, no paths, addresses or key names; of the registry it
lists names and a hash. What --base brings along is copied as it is.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from maestro_jax import command
from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.checkpoint.run import find_run
from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import read_json
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf, read_config_json
from maestro_jax.policy.hf_export import (
    ShardWriter,
    check_output,
    copy_base,
    write_config_files,
    write_model_card,
)
from maestro_jax.policy.hf_verify import verify_logits, verify_tensors
from maestro_jax.policy.huggingface import counterparts
from maestro_jax.settings import flatten

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Work directory of a run, its checkpoints/, or one checkpoint.")
OUTPUT = flags.DEFINE_string("output", "", "Directory to write; must not exist.")
BASE = flags.DEFINE_string("base", "", "Hugging Face directory to copy all files but the weights from.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of the exported weights.")
VERIFY = flags.DEFINE_bool("verify", False, "Read the result again and compare; with torch, also compute with it.")


def main(argv: Sequence[str]) -> None:
    del argv
    output, base = Path(OUTPUT.value), Path(BASE.value) if BASE.value else None
    check_output(output)

    with Progress() as progress:
        # ---- The run ---------------------------------------------------------------------------
        run = find_run(Path(CHECKPOINT.value))
        reader = ParamReader(run.checkpoints, run.step)
        architecture = architecture_from_hf(run.architecture, f"{run.workdir}/architecture.json")
        if base is not None:
            check_base(base, architecture, DTYPE.value)
        table = counterparts(reader.shapes, architecture.vision.patch_shape)

        # ---- Weights, one parameter at a time --------------------------------------------------
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        writer = ShardWriter(partial)
        progress.phase(f"export of step {reader.step}", len(table))
        for done, (name, part) in enumerate(table.items(), start=1):
            for tensor_name, tensor in part.to_hf(reader.read(name)).items():
                writer.add(tensor_name, tensor.astype(jnp.dtype(DTYPE.value)))
            progress.tick(done)
        writer.close()

        # ---- What stands around them -----------------------------------------------------------
        if base is None:
            write_config_files(architecture, run.tokenizer, DTYPE.value, run.pixels, partial)
        else:
            copy_base(base, partial)
        summary = read_json(run.workdir / "summary.json")
        is_of_this = summary is not None and summary["steps"] == reader.step  # else it says how another policy does
        write_model_card(partial, reader.step, flatten(run.config), summary if is_of_this else None)

        # ---- Verify, then the real name --------------------------------------------------------
        if VERIFY.value:
            progress.phase("verify", 2)
            progress.note(verify_tensors(partial, reader, table, DTYPE.value))
            progress.tick(1)
            progress.note(verify_logits(partial, architecture))
            progress.tick(2)
        partial.rename(output)
    print(f"step {reader.step} of {run.workdir} written to {output}")


def check_base(base: Path, architecture: PolicyArchitecture, dtype: str) -> None:
    """Refuses a base whose files describe another architecture or another type of weights."""
    values = read_config_json(base)
    if architecture_from_hf(values, f"{base}/config.json") != architecture:
        raise ConfigError(f"{base}/config.json describes another architecture than this run's; give its own --base")
    text = values["text_config"]
    said = next((part[key] for part in (values, text) for key in ("dtype", "torch_dtype") if part.get(key)), dtype)
    if said != dtype:
        raise ConfigError(
            f"{base}/config.json says {said}, which readers would cast to; give --dtype={said} or no --base"
        )


if __name__ == "__main__":
    command.run(main, required=("checkpoint", "output"))
