"""Checkpoints that transformers wrote come in exactly, on any mesh, and go out as the same tensors."""

import copy
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy import huggingface
from maestro_jax.policy.config import architecture_from_hf, read_config_json
from maestro_jax.policy.huggingface import TensorFiles, counterparts, import_params
from maestro_jax.policy.model import Policy
from tests.policy import reference

PATCH = reference.architecture().vision.patch_shape
MESHES = {
    "one device": (1, 1, 1),
    "data 2, fsdp 2, tensor 2": (2, 2, 2),
    "fsdp 4, tensor 2": (1, 4, 2),
    "fsdp 8": (1, 8, 1),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return reference.reference_model().float()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes, in several shards."""
    directory = tmp_path_factory.mktemp("hf")
    model.save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def load(directory: Path, axes: tuple[int, int, int] = (1, 1, 1), dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    make = lambda: Policy(reference.architecture(), nnx.Rngs(0), dtype)  # noqa: E731
    _, abstract, shardings = param_layout(make, mesh, ShardingRules())
    params = import_params(directory, abstract, shardings, PATCH)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    return {name.removesuffix("/value"): leaf for name, leaf in named_leaves(params).items()}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES.keys())
def test_what_transformers_saved_comes_in_bit_for_bit(model: Any, saved: Path, axes: tuple[int, int, int]) -> None:
    found = load(saved, axes)
    wanted = reference.as_params(reference.weights_of(model))
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), wanted[name], err_msg=name)


def test_the_architecture_is_that_of_its_config_json(saved: Path) -> None:
    assert architecture_from_hf(read_config_json(saved), "config.json") == reference.architecture()


def test_every_byte_is_read_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight devices with an eighth each: together they read a sharded tensor once, not eight times."""
    taken: Counter[str] = Counter()
    read = TensorFiles.read

    def counted(self: TensorFiles, name: str, index: Any) -> np.ndarray:
        part = read(self, name, index)
        taken[name] += part.size
        return part

    monkeypatch.setattr(TensorFiles, "read", counted)
    load(saved, (1, 8, 1))
    for name, tensor in {
        "model.language_model.layers.1.mlp.up_proj.weight": 96 * 48,
        "model.visual.blocks.2.attn.qkv.weight": 96 * 32,
    }.items():
        assert taken[name] == tensor, name


def test_bfloat16_comes_in_as_it_is_and_as_float32(saved: Path, tmp_path: Path) -> None:
    tensors = {}
    for file in saved.glob("*.safetensors"):
        tensors |= {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(file).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    exact, wide = load(tmp_path, dtype=jnp.bfloat16), load(tmp_path)
    name = "language_model/layers/q_proj/kernel"
    wanted = np.stack([tensors["model.language_model.layers.2.self_attn.q_proj.weight"].T])  # behind two taps
    assert exact[name].dtype == jnp.bfloat16 and wide[name].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(exact[name]), wanted)
    np.testing.assert_array_equal(np.asarray(wide[name]), wanted.astype(np.float32))


@pytest.mark.parametrize("seed", range(8))
def test_out_and_in_again_is_the_identity(seed: int) -> None:
    """Random shapes of every kind of parameter: our array → their tensors → any part of our array."""
    rng = np.random.default_rng(seed)
    layers, taps, width, out, side = (int(x) for x in rng.integers(1, 6, 5))
    patch = (3, 2, side, side)
    shapes = {
        "language_model/embed_tokens/embedding": (width * 7, width),
        "language_model/layers/q_proj/kernel": (layers, width, out),
        "language_model/layers/q_norm/scale": (layers, out),
        "language_model/deepstack_layers/0/q_proj/kernel": (width, out),
        "lm_head/embedding": (width * 7, width),
        "visual/blocks/qkv/bias": (layers, 3 * width),
        "visual/patch_embed/kernel": (6 * side * side, width),
        f"visual/deepstack_mergers/{taps}/fc2/kernel": (4 * width, out),
    }
    for name, part in counterparts(shapes, patch).items():
        array = rng.standard_normal(shapes[name]).astype(np.float32)
        tensors = part.to_hf(array)
        assert all(tensor.shape == part.shape for tensor in tensors.values())
        corners = [sorted(int(x) for x in rng.integers(0, size + 1, 2)) for size in array.shape]
        indices = [tuple(slice(None) for _ in array.shape), tuple(slice(a, b) for a, b in corners)]
        for index in [index for index in indices if array[index].size]:
            found = part.from_hf(lambda name, index, tensors=tensors: tensors[name][index], index)
            np.testing.assert_array_equal(found, array[index], err_msg=name)


@st.composite
def small_configs(draw: st.DrawFn) -> reference.Config:
    """Any small architecture: sizes that differ from each other by chance, tied or not, tapped or not."""
    config = copy.deepcopy(reference.CONFIG)
    text, vision = config["text_config"], config["vision_config"]
    head, kv_heads = draw(st.sampled_from([8, 12, 16])), draw(st.integers(1, 2))
    time, height = head // 4, head // 8
    text |= {
        "head_dim": head,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
    }
    text |= {"hidden_size": draw(st.integers(3, 40)), "intermediate_size": draw(st.integers(3, 40))}
    text |= {"num_hidden_layers": draw(st.integers(1, 4)), "vocab_size": draw(st.integers(300, 320))}
    text["rope_parameters"]["mrope_section"] = [head // 2 - time, time - height, height]
    width = 8 * draw(st.integers(1, 3))
    vision |= {"hidden_size": width, "num_heads": 2, "intermediate_size": draw(st.integers(3, 40))}
    vision |= {"depth": draw(st.integers(1, 4)), "patch_size": draw(st.sampled_from([4, 8]))}
    vision |= {"num_position_embeddings": draw(st.integers(2, 5)) ** 2, "out_hidden_size": text["hidden_size"]}
    vision["temporal_patch_size"] = draw(st.integers(1, 2))
    most = min(vision["depth"], text["num_hidden_layers"])
    blocks = st.lists(st.integers(0, vision["depth"] - 1), max_size=most, unique=True)
    vision["deepstack_visual_indexes"] = sorted(draw(blocks))
    return {**config, "tie_word_embeddings": draw(st.booleans())}


@settings(max_examples=15, deadline=None)
@given(small_configs(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_any_architecture_goes_through_bit_for_bit(config: reference.Config, dtype: Any) -> None:
    """transformers' tensors → our sharded parameters → tensors of the same names, shapes and bits."""
    architecture = reference.architecture(config)
    wanted = {
        name: np.asarray(jnp.asarray(tensor).astype(dtype))
        for name, tensor in reference.weights_of(reference.reference_model(config).float()).items()
        if name != "lm_head.weight" or not config["tie_word_embeddings"]
    }
    make = lambda: Policy(architecture, nnx.Rngs(0), dtype)  # noqa: E731
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    _, abstract, shardings = param_layout(make, mesh, ShardingRules())
    with tempfile.TemporaryDirectory() as directory:
        save_file(wanted, f"{directory}/model.safetensors")
        params = import_params(directory, abstract, shardings, architecture.vision.patch_shape)
    ours = {name.removesuffix("/value"): np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    table = counterparts({name: leaf.shape for name, leaf in ours.items()}, architecture.vision.patch_shape)
    found = {name: tensor for ours_name, part in table.items() for name, tensor in part.to_hf(ours[ours_name]).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].tobytes() == tensor.tobytes(), name


def test_every_mistake_is_listed_in_one_error(saved: Path, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    for file in saved.glob("*.safetensors"):
        tensors |= load_file(file)
    del tensors["model.language_model.norm.weight"]
    tensors["model.visual.extra.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]  # tied; some files repeat it
    tensors["model.visual.merger.norm.weight"] = np.zeros(5, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "1 tensors missing: model.language_model.norm.weight" in text
    assert "1 tensors unknown: model.visual.extra.weight" in text
    assert re.search(r"model\.visual\.merger\.norm\.weight is \(5,\), config\.json makes \(32,\)", text)
    assert "Use the config.json that belongs to these weights" in text


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensors missing: .* and \d+ more"):
        load(tmp_path)


def test_a_directory_without_weights_and_damaged_files_say_so(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has neither model.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read .*copy it again"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json is damaged"):
        load(tmp_path)
    names = TensorFiles(saved).names()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))  # an interrupted download
    with pytest.raises(ConfigError, match=r"gone\.safetensors cannot be read"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config_json(tmp_path)


def test_the_table_names_every_tensor_of_the_model(model: Any) -> None:
    shapes = {name: leaf.shape for name, leaf in _policy_shapes().items()}
    names = [name for part in counterparts(shapes, PATCH).values() for name in part.names]
    assert len(names) == len(set(names))
    assert set(names) | huggingface._IGNORED == set(model.state_dict()) | huggingface._IGNORED


def _policy_shapes() -> dict[str, Any]:
    _, state = nnx.split(nnx.eval_shape(lambda: Policy(reference.architecture(), nnx.Rngs(0))), nnx.Param)
    return {name.removesuffix("/value"): leaf for name, leaf in named_leaves(state).items()}
