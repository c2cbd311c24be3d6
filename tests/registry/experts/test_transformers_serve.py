"""A server that is not ours: `transformers serve` with a tiny LLaVA answers through the registry, with an image.

Slow: it makes the environment of `benchmarks/peers/serving.txt` (once, 1.2 GB). The weights are random, so what the
model says means nothing; that it is said, and how often, is what is tested.
"""

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.peers import environment
from maestro_jax.fleet.trials import try_experts
from maestro_jax.observe.progress import Progress
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.types import Call, Observation, Status
from tests.policy import qwen

pytestmark = pytest.mark.slow

START_SECONDS = 180.0
IMAGE_SIZE, PATCH = 32, 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2 + 2  # between two marks
CONFIG = {
    "text_config": {
        "model_type": "qwen3",
        "vocab_size": qwen.ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    },
    "image_token_index": qwen.ADDED["<|image_pad|>"],
}


def write_model(directory: Path) -> None:
    """A checkpoint as `transformers serve` takes it. LLaVA's, because Qwen3-VL's processor needs torchvision."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**CONFIG)).save_pretrained(directory)
    qwen.write_checkpoint_tokenizer(directory)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<|image_pad|>",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": size}
    (directory / "processor_config.json").write_text(json.dumps(processor))
    (directory / "preprocessor_config.json").write_text(json.dumps(images))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An expert whose server is up."""
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    requirements = Path(environment.__file__).with_name("serving.txt")
    with Progress(sys.stderr) as progress:
        python = environment.python(requirements, environment.CACHE, progress)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "transformers.cli.transformers", "serve", str(directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = directory / "server.log"
    with log.open("w") as file:
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=quiet, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield {
            "name": "Served",
            "description": "a tiny model",
            "endpoints": (f"http://127.0.0.1:{port}/v1",),
            "model": str(directory),
            "max_tokens": 7,
            "price_completion": 1.0,
        }
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=1.0).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)


def call(expert: dict[str, Any], images: tuple[bytes, ...], times: int = 1) -> tuple[list[Observation], Registry]:
    stage = {"kind": "ask", "output": "answer", "prompt": "{question} {query}"}
    skills = ({"name": "Look", "stages": (stage,)},)
    config = parse_registry({"experts": (expert,), "services": (), "skills": skills})
    registry = Registry(config)

    async def scenario() -> list[Observation]:
        assert not any(trial.is_problem for trial in await try_experts(config, 60.0))
        calls = [registry.call(Call("Served", "Look", "Be brief."), "How many?", images, 60.0) for _ in range(times)]
        found = await asyncio.gather(*calls)
        await registry.close()
        return found

    return asyncio.run(scenario()), registry


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(file, "PNG")
    return file.getvalue()


def test_it_answers_text(served: dict[str, Any]) -> None:
    (found,), _ = call(served, ())
    assert found.status is Status.OK and found.text
    assert found.usage.prompt_tokens > 5 and found.usage.completion_tokens == 7
    assert found.usage.price == pytest.approx(7e-6)


def test_it_sees_images(served: dict[str, Any]) -> None:
    (without,), _ = call(served, ())
    (red,), _ = call(served, (picture("red"),))
    (two,), _ = call(served, (picture("red"), picture("blue")))
    assert {red.status, two.status} == {Status.OK}
    prompts = [found.usage.prompt_tokens for found in (without, red, two)]
    assert [later - before for before, later in zip(prompts, prompts[1:], strict=False)] == [IMAGE_TOKENS] * 2


def test_equal_calls_share_its_reply(served: dict[str, Any]) -> None:
    found, registry = call(served, (picture("red"),), times=8)
    assert len({observation.text for observation in found}) == 1
    report = registry.report()["Served"]
    assert (report["calls"], report["cache_hits"], report["success"]) == (1, 7, 1.0)
