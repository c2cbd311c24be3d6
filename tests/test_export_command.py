"""The export command on a run's directory: what transformers loads afterwards, and what it refuses."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import quickstart
from maestro_jax import api
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.config import parse_config
from maestro_jax.errors import EXIT_CONFIG, ConfigError, DataError
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import init_train_state
from maestro_jax.observe.files import write_json
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy import hf_export
from maestro_jax.policy.config import architecture_from_hf, open_architecture, read_config_json
from maestro_jax.policy.hf_export import ShardWriter, hf_config, write_model_card
from maestro_jax.policy.hf_verify import verify_logits
from maestro_jax.policy.huggingface import counterparts
from maestro_jax.policy.model import Policy
from maestro_jax.policy.preprocess import prepare_image
from maestro_jax.policy.tokens import train_tokens
from maestro_jax.session.policy import open_params
from maestro_jax.settings import Settings, read_settings

ROOT = Path(__file__).parents[1]
STEPS = (2, 5)


def small_config() -> Any:
    config = quickstart.get_config()
    text, vision = config.policy.architecture.text_config, config.policy.architecture.vision_config
    text.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=320, num_key_value_heads=1)
    vision.update(depth=2, hidden_size=32, intermediate_size=48, out_hidden_size=64, deepstack_visual_indexes=(1,))
    return config


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's directory, and the parameters of its checkpoints as transformers' tensors."""

    workdir: Path
    tensors: dict[int, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """What a run leaves behind: settings, tokenizer, two checkpoints of different weights, a summary."""
    directory, raw = tmp_path_factory.mktemp("run"), small_config()
    config = parse_config(raw)
    Settings.of(raw).write(directory / "config.json")
    architecture = architecture_from_hf(raw.policy.architecture.to_dict(), "config")
    write_json(directory / "architecture.json", hf_config(architecture, "float32", None))
    write_json(directory / "summary.json", {"held_out_tasks": 7, "steps": 5, "accuracy": {"trained": 0.5}})
    train_tokens(["What is shown? a chart of numbers"] * 9, 290, directory / "tokenizer")
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    store, tensors = CheckpointStore(directory / "checkpoints", keep=2), {}
    architecture = architecture_from_hf(config.policy.architecture, "config")
    for step in STEPS:
        make = functools.partial(lambda seed: Policy(architecture, nnx.Rngs(seed)), step)
        _, params = init_params(make, mesh, ShardingRules())
        tensors[step] = as_hf({name: np.asarray(leaf) for name, leaf in named_leaves(params).items()})
        store.save(step, init_train_state(params, make_optimizer(config.optimizer), (), mesh), {})
    store.close()
    return SavedRun(directory, tensors)


def as_hf(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name.removesuffix("/value"): array for name, array in params.items()}
    table = counterparts({name: array.shape for name, array in arrays.items()}, (3, 2, 16, 16))
    return {name: tensor for ours, part in table.items() for name, tensor in part.to_hf(arrays[ours]).items()}


def export(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "maestro_jax.export", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def exported(run: SavedRun) -> tuple[Path, str]:
    output = run.workdir / "exported"
    result = export(f"--checkpoint={run.workdir}", f"--output={output}", "--dtype=float32", "--verify")
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_the_newest_checkpoint_is_written_bit_for_bit(run: SavedRun, exported: tuple[Path, str]) -> None:
    found = load_file(exported[0] / "model.safetensors")
    wanted = run.tensors[STEPS[-1]]
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


def test_verification_says_what_it_saw(exported: tuple[Path, str]) -> None:
    assert "tensors, bit for bit" in exported[1]
    assert "verified: 16 greedy tokens equal transformers'" in exported[1]


def test_transformers_loads_every_key_and_continues_an_image(exported: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    model, report = Qwen3VLForConditionalGeneration.from_pretrained(exported[0], output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is shown?"}], return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_the_files_around_the_weights(run: SavedRun, exported: tuple[Path, str]) -> None:
    output = exported[0]
    own = architecture_from_hf(small_config().policy.architecture, "config")
    assert architecture_from_hf(read_config_json(output), "config.json") == own
    old = json.loads((output / "config.json").read_text())["text_config"]
    assert (old["rope_theta"], old["rope_scaling"]["mrope_section"]) == (100.0, [12, 10, 10])  # transformers 4.57
    assert (output / "tokenizer.json").read_bytes() == (run.workdir / "tokenizer/tokenizer.json").read_bytes()
    card = (output / "README.md").read_text()
    assert "checkpoint of step 5" in card and "| trained | 0.500 |" in card and "grpo.group_size = 8" in card
    assert not list(run.workdir.glob(".*partial"))


MARKS = (b"alice", b"10.1.2.3", b"gpu7", b"CANARY_KEY", b"canary-4711", b"http:", b"https:", b"/srv", b"/tmp", b"vllm")


def test_an_export_says_nothing_of_machines_addresses_and_keys(run: SavedRun, tmp_path: Path) -> None:
    """It is made to be published. Every byte of every file is looked through."""
    workdir = tmp_path / "alice" / "run"
    shutil.copytree(run.workdir, workdir, ignore=shutil.ignore_patterns("exported*", ".*"))
    told = workdir / "tokenizer/tokenizer_config.json"
    values = json.loads(told.read_text()) if told.is_file() else {}
    told.write_text(json.dumps(values | {"name_or_path": str(workdir), "tokenizer_file": "/home/alice/tokenizer.json"}))
    raw = small_config()
    raw.registry.experts += (
        {
            "name": "Chart-R1",
            "description": "charts",
            "endpoints": ("http://10.1.2.3:8000/v1", "https://gpu7.internal/v1"),
            "model": "/srv/alice/Chart-R1",
            "key": "CANARY_KEY",
            "key_hosts": ("*.gpu7.internal",),
            "serve": ("vllm", "serve", "/srv/alice/Chart-R1", "--port", "{port}"),
        },
    )
    raw.data.update(image_root="/srv/alice/images", suite_directory=str(workdir / "suite"))
    raw.data.train_files = ("/srv/alice/train.jsonl", "gs://alice/train.jsonl")
    raw.policy.tokenizer = str(workdir / "tokenizer")
    with raw.unlocked():
        raw.registry.endpoints_from = "/srv/alice/experts"
    Settings.of(raw).write(workdir / "config.json")
    result = export(f"--checkpoint={workdir}", f"--output={tmp_path}/exported")
    assert result.returncode == 0, result.stderr
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert len(files) > 5
    found = [(path.name, mark) for path in files for mark in MARKS if mark in path.read_bytes()]
    assert found == []
    card = (tmp_path / "exported/README.md").read_text()
    assert "grpo.group_size = 8" in card and "Chart-R1" in card and "Chart_Problem_Solver" in card
    assert "sha256 of the registry" in card and "checkpoint of step 5" in card


def test_transformers_prepares_images_as_the_run_did(exported: tuple[Path, str]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    policy = small_config().policy
    vision = architecture_from_hf(policy.architecture, "config").vision
    pixels = np.random.default_rng(0).integers(0, 256, (300, 170, 3), dtype=np.uint8)  # above the run's limit
    theirs = Qwen2VLImageProcessorPil.from_pretrained(exported[0])([pixels], return_tensors="np")
    ours = prepare_image(pixels, vision, policy.min_pixels, policy.max_pixels)
    np.testing.assert_array_equal(theirs["pixel_values"], ours.patches)


def test_a_new_run_starts_from_it_without_an_architecture_of_its_own(run: SavedRun, exported: tuple[Path, str]) -> None:
    raw = small_config()
    raw.policy.init_from, raw.policy.architecture = str(exported[0]), ConfigDict()
    config = parse_config(raw)
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())
    architecture = open_architecture(config.policy.architecture, config.policy.init_from)
    assert architecture == architecture_from_hf(small_config().policy.architecture, "config")
    _, params = open_params(config, architecture, mesh)
    found = as_hf({name: np.asarray(leaf) for name, leaf in named_leaves(params).items()})
    for name, tensor in run.tensors[STEPS[-1]].items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_one_checkpoint_in_bfloat16_with_the_files_of_a_base(
    run: SavedRun, exported: tuple[Path, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(exported[0], base)
    asked = run.workdir / f"checkpoints/{STEPS[0]}", tmp_path / "out"
    with pytest.raises(ConfigError, match="says float32, which readers would cast to; give --dtype"):
        api.export(*asked, base=base)  # the base is of another type, and its config.json would be copied
    config = base / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    assert api.export(*asked, base=base).step == STEPS[0]
    found, wanted = load_file(tmp_path / "out/model.safetensors"), run.tensors[STEPS[0]]
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, wanted[name].astype(ml_dtypes.bfloat16), err_msg=name)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_untied_head_goes_out_and_computes_the_same(run: SavedRun, tmp_path: Path) -> None:
    values = {**small_config().policy.architecture.to_dict(), "tie_word_embeddings": False}
    architecture = architecture_from_hf(values, "config")
    params = nnx.state(Policy(architecture, nnx.Rngs(1)), nnx.Param)
    arrays = {name.removesuffix("/value"): np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    table = counterparts({name: array.shape for name, array in arrays.items()}, architecture.vision.patch_shape)
    writer = ShardWriter(tmp_path)
    for name, part in table.items():
        for tensor_name, tensor in part.to_hf(arrays[name]).items():
            writer.add(tensor_name, tensor)
    writer.close()
    hf_export.write_config_files(architecture, run.workdir / "tokenizer", "float32", (1024, 10**5), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "16 greedy tokens equal transformers'" in verify_logits(tmp_path, architecture)
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], np.nan)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="logits differ from transformers' by nan"):
        verify_logits(tmp_path, architecture)


def test_mistakes_are_one_line_that_names_the_cure(run: SavedRun, exported: tuple[Path, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((exported[0] / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 7
    (other / "config.json").write_text(json.dumps(values))
    for checkpoint, output, base, says in (
        (run.workdir, exported[0], "", "exists; give --output a new directory"),
        (tmp_path / "no", tmp_path / "a", "", "has no config.json"),
        (run.workdir / "checkpoints/4", tmp_path / "a", "", "no checkpoint 4; it holds: 2, 5"),
        (run.workdir, tmp_path / "a", other, "describes another architecture"),
    ):
        with pytest.raises(ConfigError, match=says):
            api.export(checkpoint, output, base=base)
        assert not (tmp_path / "a").exists()
    result = export(f"--output={tmp_path}/a")
    assert result.returncode == EXIT_CONFIG and result.stderr.count("\n") == 1, result.stderr
    assert "--checkpoint is missing" in result.stderr


def test_shards_have_an_index_and_stay_below_the_limit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, limit=100)
    tensors = {f"t{i}": np.full((i + 1, 5), i, np.float32) for i in range(6)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = {name: load_file(tmp_path / file) for name, file in index["weight_map"].items()}
    assert all((files[name][name] == tensor).all() for name, tensor in tensors.items())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-{i + 1:05d}-of-00005.safetensors" for i in range(5)]
    for path in shards:
        held = load_file(path).values()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= 100
    assert hf_export.SHARD_BYTES <= 5e9 and path.stat().st_mode & 0o044


def test_the_prompt_that_a_run_was_given_is_exported(run: SavedRun, tmp_path: Path) -> None:
    """With its places, as the user wrote it; the card says that it is there and shows none of it."""
    own = tmp_path / "run"
    shutil.copytree(run.workdir, own)
    prompt = "Ask kindly.\r\n{experts}\n{skills}\n"
    settings = read_settings(own / "config.json")
    assert settings is not None
    settings.config["policy"]["system_prompt"] = f"text:{prompt}"
    settings.write(own / "config.json")
    api.export(own, tmp_path / "with", dtype="float32")
    assert (tmp_path / "with/system_prompt.txt").read_bytes() == prompt.encode()
    card = (tmp_path / "with/README.md").read_text()
    assert "the system prompt in `system_prompt.txt`" in card and "kindly" not in card
    api.export(run.workdir, tmp_path / "without", dtype="float32")
    assert not (tmp_path / "without/system_prompt.txt").exists()
    assert "system prompt" not in (tmp_path / "without/README.md").read_text()


def test_the_card_says_what_its_figures_leave_out(tmp_path: Path) -> None:
    accuracy, missing = {"trained": 0.987, "warm_start": 0.321, "random": 0.123}, {"trained": 12, "warm_start": 0}
    summary = {"held_out_tasks": 250, "steps": 5, "accuracy": accuracy, "missing": missing}
    write_model_card(tmp_path, 5, {}, summary)
    card = (tmp_path / "README.md").read_text()
    assert "| warm_start | 0.321 |" in card and "| random | 0.123 |" in card and "0.987" not in card
    assert "trained (after RL): 12 of 250 tasks not answered; accuracy over the others." in card
