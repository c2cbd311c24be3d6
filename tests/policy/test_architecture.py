"""Reading `config.json`: both spellings, and errors that teach."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.policy.config import architecture_from_hf
from tests.policy import reference


def changed(**changes: Any) -> dict[str, Any]:
    """The toy config with dotted keys (section__key) replaced; None removes."""
    config = copy.deepcopy(reference.CONFIG)
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[key] = value
        if value is None:
            del target[key]
    return config


def read_error(config: Mapping[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        architecture_from_hf(config, "model/config.json")
    text = str(caught.value)
    assert "\n" not in text and text.startswith("model/config.json")
    return text


def test_both_spellings_of_rope_read_the_same() -> None:
    old = changed(
        text_config__rope_parameters=None,
        text_config__rope_theta=10000.0,
        text_config__rope_scaling={"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    )
    assert architecture_from_hf(old, "old") == architecture_from_hf(reference.CONFIG, "new")


def test_what_is_read() -> None:
    architecture = architecture_from_hf(reference.CONFIG, "config.json")
    assert architecture.text.mrope_section == (4, 2, 2) and architecture.text.rope_theta == 10000.0
    assert architecture.vision.deepstack_visual_indexes == (1, 2)
    assert (architecture.image_token_id, architecture.tie_word_embeddings) == (290, True)


def test_transformers_writes_what_we_read(hf_model: Any) -> None:
    saved = hf_model.config.to_dict()
    assert architecture_from_hf(saved, "saved") == architecture_from_hf(reference.CONFIG, "ours")


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("text_config", "'text_config'"),
        ("image_token_id", "'image_token_id'"),
        ("text_config__head_dim", "text_config lacks 'head_dim'"),
        ("text_config__rope_parameters", "text_config lacks 'rope_theta'"),
        ("vision_config__num_position_embeddings", "vision_config lacks 'num_position_embeddings'"),
        ("tie_word_embeddings", "'tie_word_embeddings'"),
    ],
)
def test_a_missing_key_is_named(key: str, named: str) -> None:
    text = read_error(changed(**{key: None}))
    assert named in text and "use the config.json of a Qwen3-VL checkpoint" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config__head_dim": 32}, "sums to 8; it must sum to head_dim / 2 = 16"),
        ({"vision_config__out_hidden_size": 64}, "64 differs from the text hidden_size 48; set both"),
        ({"vision_config__deepstack_visual_indexes": [0, 3]}, "must be below the vision depth 3"),
        ({"vision_config__deepstack_visual_indexes": [2, 1]}, "(2, 1) must rise"),
        ({"text_config__num_hidden_layers": 1}, "more DeepStack taps than decoder layers"),
        ({"text_config__rope_parameters__rope_type": "yarn"}, "rope_type is 'yarn'; only 'default' is implemented"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised; use the one in bfloat16"),
    ],
)
def test_a_contradiction_names_its_cure(change: dict[str, Any], named: str) -> None:
    assert named in read_error(changed(**change))
