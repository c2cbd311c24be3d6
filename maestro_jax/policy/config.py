"""Settings of the policy, and its architecture, read from (and written to) a Hugging Face `config.json`.

No number of the architecture has a default here: every value comes from the file or from the
run's config, because transformers' own class defaults are not the values of any released model.
Both spellings are read: transformers 4.57 (`rope_theta`, `rope_scaling`) and 5.x (`rope_parameters`).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from maestro_jax.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Precision = Literal["auto", "default", "highest"]
PIXELS_PER_TOKEN = 32 * 32  # patch 16, merged 2 x 2


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy's architecture (the content of a Hugging Face config.json), tokens and prompt limits.

    Attributes:
      init_from: Hugging Face checkpoint directory to start from; empty starts from random weights.
      architecture: the content of a config.json; with `init_from` that directory's is taken instead.
      tokenizer: directory with tokenizer.json; empty takes the one in `init_from`, or trains one of the
        architecture's vocab_size on the tasks.
      system_prompt: file with the system prompt, taken as it is, but for {experts} and {skills} in it, which become the
        registry's lists. Or "text:" and the prompt itself, as a run's config.json has it. Empty: rendered from the
        registry (`registry/description/prompt.py`).
      freeze: what is not trained and has no optimiser state: "vision" (the tower with its mergers), "embeddings"
        (with tied embeddings, the head is the same parameter), both or nothing.
      param_dtype: of the parameters that are trained. "bfloat16" rounds updates to the nearest, so training refuses it
        with usual rates; evaluations take it.
      matmul_precision: how products of fp32 arrays are computed: "default" is what devices are quick at (TF32 on GPUs,
        one pass in bf16 on TPUs), "highest" is fp32 (on TPUs by six passes in bf16). "auto" is "highest" where
        compute_dtype is float32, else "default"; products of bf16 arrays are exact and summed in fp32 either way.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
      attention: how attention of whole sequences is computed (`policy/attention/`): "blocks", "splash" (TPU), or
        "auto", which takes what suits the devices.
      prefix_buckets: static lengths of a task's prompt, in tokens.
      image_buckets: static sizes of an image, in patches.
    """

    init_from: str = ""
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    system_prompt: str = ""
    param_dtype: Dtype = "float32"  # bf16 would round updates of 1e-6 away
    compute_dtype: Dtype = "bfloat16"
    matmul_precision: Precision = "auto"
    freeze: tuple[Literal["vision", "embeddings"], ...] = ()
    remat: bool = True
    attention: Literal["auto", "blocks", "splash", "splash_interpret"] = "auto"
    prefix_buckets: tuple[int, ...] = (512, 1024, 2048, 4096)
    image_buckets: tuple[int, ...] = (1024, 2048, 4096)
    images_per_task: int = 1
    min_pixels: int = 64 * PIXELS_PER_TOKEN
    max_pixels: int = 1024 * PIXELS_PER_TOKEN


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Sections are the rotary frequencies given to time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower; `deepstack_visual_indexes` are the tapped blocks."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """Channels, time, height and width of a patch."""
        return self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size


@dataclasses.dataclass(frozen=True)
class PolicyArchitecture:
    """Decoder, vision tower and the token ids that join them."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The content of a checkpoint directory's `config.json`."""
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); point at a Hugging Face checkpoint directory") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object; use the config.json of a Qwen3-VL checkpoint")
    return values


def open_architecture(written: Mapping[str, Any], directory: str | Path) -> PolicyArchitecture:
    """The architecture of the checkpoint directory a run starts from; without one, what its config spells out."""
    if directory:
        return architecture_from_hf(read_config_json(directory), f"{directory}/config.json")
    return architecture_from_hf(written, "config.policy.architecture")


def architecture_from_hf(config: Mapping[str, Any], where: str) -> PolicyArchitecture:
    """Reads the architecture from a parsed `config.json`.

    Args:
      config: the file's content.
      where: what to call the file in an error.

    Raises:
      ConfigError: a key is missing, or the sections do not fill half a head.
    """
    text = dict(_get(config, "text_config", where))
    _refuse_other_kinds(config, where)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text["mrope_section"] = rope.get("mrope_section", text.get("mrope_section"))
    text_config = _build(TextConfig, text, f"{where}: text_config")
    vision_config = _build(VisionConfig, _get(config, "vision_config", where), f"{where}: vision_config")
    architecture = PolicyArchitecture(
        text=text_config,
        vision=vision_config,
        image_token_id=_get(config, "image_token_id", where),
        vision_start_token_id=_get(config, "vision_start_token_id", where),
        vision_end_token_id=_get(config, "vision_end_token_id", where),
        tie_word_embeddings=bool(_get(config, "tie_word_embeddings", where)),
    )
    _check(architecture, where)
    return architecture


# What the code computes, whatever else a config.json could ask for.
_ONLY = {
    ("text_config", "hidden_act"): "silu",
    ("text_config", "attention_bias"): False,
    ("text_config", "rope_parameters", "rope_type"): "default",
    ("text_config", "rope_parameters", "mrope_interleaved"): True,
    ("text_config", "rope_scaling", "rope_type"): "default",
    ("text_config", "rope_scaling", "mrope_interleaved"): True,
    ("vision_config", "hidden_act"): "gelu_pytorch_tanh",
}


def _refuse_other_kinds(config: Mapping[str, Any], where: str) -> None:
    for path, only in _ONLY.items():
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and value != only:
            raise ConfigError(f"{where}: {'.'.join(path)} is {value!r}; only {only!r} is implemented")
    if config.get("quantization_config"):
        raise ConfigError(f"{where}: the checkpoint is quantised; use the one in bfloat16")


def _get(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{where} lacks {key!r}; use the config.json of a Qwen3-VL checkpoint")
    return config[key]


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    fields = {}
    for field in dataclasses.fields(cls):
        value = _get(values, field.name, where)
        fields[field.name] = tuple(value) if isinstance(value, list | tuple) else value
    return cls(**fields)


def _check(architecture: PolicyArchitecture, where: str) -> None:
    text, vision = architecture.text, architecture.vision
    if sum(text.mrope_section) != text.head_dim // 2:
        raise ConfigError(
            f"{where}: mrope_section {text.mrope_section} sums to {sum(text.mrope_section)}; "
            f"it must sum to head_dim / 2 = {text.head_dim // 2}"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"{where}: vision out_hidden_size {vision.out_hidden_size} differs from the text "
            f"hidden_size {text.hidden_size}; set both to the same width"
        )
    if list(vision.deepstack_visual_indexes) != sorted(set(vision.deepstack_visual_indexes)):
        raise ConfigError(f"{where}: deepstack_visual_indexes {vision.deepstack_visual_indexes} must rise")
    if vision.deepstack_visual_indexes and max(vision.deepstack_visual_indexes) >= vision.depth:
        raise ConfigError(f"{where}: deepstack_visual_indexes must be below the vision depth {vision.depth}")
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        raise ConfigError(f"{where}: more DeepStack taps than decoder layers ({text.num_hidden_layers})")
