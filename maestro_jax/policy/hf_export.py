"""Writes a Hugging Face model directory: weights in shards, config files, tokenizer, model card.

Everything goes into a directory of a temporary name, which takes its real name when it is whole.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from maestro_jax.errors import ConfigError
from maestro_jax.observe.table import gaps, whole_figures
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.tokens import load_tokens

SHARD_BYTES = 2_000_000_000  # below the customary 5 GB, because a shard is held in memory before it is written
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_PUBLIC = re.compile(r"[\w\s.,+()\[\]'\"-]*")
_LISTED = ("registry.experts", "registry.services", "registry.skills")  # their names
# Where a tokenizer was loaded from, as some versions of transformers write it.
_ORIGINS = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
PROMPT_FILE = "system_prompt.txt"  # the prompt that a run's config gave, for whoever drives the policy
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


class ShardWriter:
    """Collects tensors and writes `model.safetensors`, or numbered shards with their index."""

    def __init__(self, directory: Path, limit: int = SHARD_BYTES):
        self.directory = directory
        self.limit = limit
        self._pending: dict[str, np.ndarray] = {}
        self._parts: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes one tensor; writes a shard when the next tensor would make it too large."""
        held = sum(array.nbytes for array in self._pending.values())
        if self._pending and held + tensor.nbytes > self.limit:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor)
        self._total += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, gives the shards their names and writes the index."""
        self._flush()
        count = len(self._parts)
        if count == 1:
            self._part(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for at, names in enumerate(self._parts):
            file = f"model-{at + 1:05d}-of-{count:05d}.safetensors"
            self._part(at).rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._pending:
            part = self._part(len(self._parts))
            save_file(self._pending, part, metadata={"format": "pt"})
            part.chmod(0o644)  # safetensors makes files that only their owner can read
            self._parts.append(list(self._pending))
            self._pending = {}

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}"


def copy_base(base: Path, output: Path) -> None:
    """Copies everything but weights and the model card from a checkpoint directory, byte for byte."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name != "README.md" and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, output / path.name)


def write_config_files(
    architecture: PolicyArchitecture, tokenizer: Path, dtype: str, pixels: tuple[int, int], output: Path
) -> None:
    """Writes what a base would bring along: config.json, generation and preprocessor config, the tokenizer.

    Args:
      tokenizer: directory with the tokenizer's files.
      pixels: least and most pixels of an image.
    """
    for name in _TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, output / name)
    _forget_origins(output / "tokenizer_config.json")
    tokens = load_tokens(tokenizer)
    padding, video = tokens.special_id("<|endoftext|>"), tokens.special_id("<|video_pad|>")
    stop = {"eos_token_id": tokens.end_of_turn, "pad_token_id": tokens.end_of_turn if padding is None else padding}
    files = {
        "config.json": hf_config(architecture, dtype, video),
        "generation_config.json": {**stop, "do_sample": False},
        "preprocessor_config.json": preprocessor_config(architecture, pixels),
    }
    for name, values in files.items():
        (output / name).write_text(json.dumps(values, indent=2) + "\n")


def _forget_origins(path: Path) -> None:
    """Machine paths in a tokenizer's configuration; a file without any stays as it is, byte for byte."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if values.keys() & set(_ORIGINS):
        kept = {key: value for key, value in values.items() if key not in _ORIGINS}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hf_config(architecture: PolicyArchitecture, dtype: str, video_token_id: int | None) -> dict[str, Any]:
    """A `config.json` in both spellings: transformers 4.57 (`rope_scaling`) and 5 (`rope_parameters`)."""
    text, vision = dataclasses.asdict(architecture.text), dataclasses.asdict(architecture.vision)
    theta, sections = text["rope_theta"], text.pop("mrope_section")
    rope = {"rope_type": "default", "mrope_section": list(sections), "mrope_interleaved": True}
    tied = architecture.tie_word_embeddings
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_id": architecture.image_token_id,
        # Without such a token, an id that no token has: id 0 would be taken for a video.
        "video_token_id": text["vocab_size"] if video_token_id is None else video_token_id,
        "vision_start_token_id": architecture.vision_start_token_id,
        "vision_end_token_id": architecture.vision_end_token_id,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **text,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": tied,
            "rope_scaling": rope,
            "rope_parameters": {**rope, "rope_theta": theta},
            "dtype": dtype,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **vision,
            "deepstack_visual_indexes": list(vision["deepstack_visual_indexes"]),
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def preprocessor_config(architecture: PolicyArchitecture, pixels: tuple[int, int]) -> dict[str, Any]:
    vision = architecture.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
    }


def write_model_card(
    output: Path,
    step: int,
    settings: Mapping[str, str],
    summary: Mapping[str, Any] | None,
    has_prompt: bool = False,
) -> None:
    """A README.md with where the weights come from: step, scores where there are any, what of the settings is public.

    Args:
      settings: dotted keys and printed values.
      has_prompt: whether the directory has the system prompt (`PROMPT_FILE`).
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", "# Orchestrator", ""]
    lines += [f"Trained with maestro_jax; checkpoint of step {step}.", ""]
    if has_prompt:
        places = "{experts} and {skills}, where they stand in it, were the lists of the registry"
        lines += [f"It was trained with the system prompt in `{PROMPT_FILE}`; {places}.", ""]
    if summary is not None:
        lines += [f"Accuracy on {summary['held_out_tasks']} held-out tasks after {summary['steps']} steps:", ""]
        lines += ["| routing | accuracy |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in whole_figures(summary).items()]
        lines += [f"\n{gap}." for gap in gaps(summary)]
        lines.append("")
    lines += ["## Settings of the run", "", "```", *public_settings(settings), "```", ""]
    (output / "README.md").write_text("\n".join(lines))


def public_settings(settings: Mapping[str, str]) -> list[str]:
    """Lines for strangers: numbers and names. No paths and addresses; of the registry, names and a hash."""
    registry = {key: value for key, value in settings.items() if key.startswith("registry.")}
    lines = [f"{key} = {value}" for key, value in sorted(settings.items() - registry.items()) if _is_public(key, value)]
    lines += [f"{key} = {registry[key]}" for key in _LISTED if _is_public(key, registry.get(key, "/"))]
    seal = hashlib.sha256(json.dumps(registry, sort_keys=True).encode()).hexdigest()
    return [*lines, f"sha256 of the registry = {seal}"]


def _is_public(key: str, value: str) -> bool:
    """Paths, URLs, hosts with ports and buckets need a character that is not among these."""
    return bool(_PUBLIC.fullmatch(key) and _PUBLIC.fullmatch(value))


def check_output(output: Path) -> None:
    """Refuses to write over something."""
    if output.exists():
        raise ConfigError(f"{output} exists; give --output a new directory")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output.absolute().parent} is no directory; create it, or give another --output")
