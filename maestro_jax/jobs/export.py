"""The export of a run as a function: a checkpoint becomes a Hugging Face model directory."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp

from maestro_jax.checkpoint.params import ParamReader
from maestro_jax.checkpoint.run import find_run
from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import read_json
from maestro_jax.observe.listening import Show, showing
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf, read_config_json
from maestro_jax.policy.hf_export import (
    PROMPT_FILE,
    ShardWriter,
    check_output,
    copy_base,
    write_config_files,
    write_model_card,
)
from maestro_jax.policy.hf_verify import verify_logits, verify_tensors
from maestro_jax.policy.huggingface import counterparts
from maestro_jax.registry.description.prompt import prompt_text
from maestro_jax.settings import flatten


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written model directory, and which policy is in it."""

    output: Path
    workdir: Path
    step: int


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    base: str | Path = "",
    dtype: str = "bfloat16",
    verify: bool = False,
    progress: Show = None,
) -> Exported:
    """Writes a checkpoint of a run as a Hugging Face model directory; all of it or nothing.

    Args:
      checkpoint: a run's work directory, its checkpoints/, or one checkpoint.
      output: must not exist.
      base: Hugging Face directory to copy all files but the weights from; else they are made from the run's config.
      dtype: of the weights, "bfloat16" or "float32".
      verify: reads the result again and compares; with torch, also computes with it.
      progress: as of `train`.

    Raises:
      UserError: something that the user has to change; one line that says what.
    """
    target, origin = Path(output), Path(base) if base else None
    check_output(target)

    with showing(progress) as shown:
        # ---- The run ---------------------------------------------------------------------------
        run = find_run(Path(checkpoint))
        reader = ParamReader(run.checkpoints, run.step)
        architecture = architecture_from_hf(run.architecture, f"{run.workdir}/architecture.json")
        if origin is not None:
            check_base(origin, architecture, dtype)
        table = counterparts(reader.shapes, architecture.vision.patch_shape)

        # ---- Weights, one parameter at a time --------------------------------------------------
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        writer = ShardWriter(partial)
        shown.phase(f"export of step {reader.step}", len(table))
        for done, (name, part) in enumerate(table.items(), start=1):
            for tensor_name, tensor in part.to_hf(reader.read(name)).items():
                writer.add(tensor_name, tensor.astype(jnp.dtype(dtype)))
            shown.tick(done)
        writer.close()

        # ---- What stands around them -----------------------------------------------------------
        if origin is None:
            write_config_files(architecture, run.tokenizer, dtype, run.pixels, partial)
        else:
            copy_base(origin, partial)
        summary = read_json(run.workdir / "summary.json")
        is_of_this = summary is not None and summary["steps"] == reader.step  # else it says how another policy does
        given = run.config["policy"].get("system_prompt", "")  # earlier versions had none
        if given:
            (partial / PROMPT_FILE).write_bytes(prompt_text(given).encode())
        write_model_card(partial, reader.step, flatten(run.config), summary if is_of_this else None, bool(given))

        # ---- Verify, then the real name --------------------------------------------------------
        if verify:
            shown.phase("verify", 2)
            shown.note(verify_tensors(partial, reader, table, dtype))
            shown.tick(1)
            shown.note(verify_logits(partial, architecture))
            shown.tick(2)
        partial.rename(target)
    return Exported(target, run.workdir, reader.step)


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
