"""A checkpoint that thinks, with the published rendering and a prompt of its own: trained, evaluated, exported.

Its weights are random, but for a preference for two words of its vocabulary, which are whole turns: a thought that is
closed with a call behind it, or with an answer. So most episodes are balanced without any training.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict
from tokenizers import AddedToken

from maestro_jax import api
from maestro_jax.config import base_config
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.policy.tokens import load_tokens, train_tokens
from maestro_jax.registry.description.interface import Message
from maestro_jax.rollout.exchange import observation_frames
from maestro_jax.types import Task
from tests.policy import qwen, reference
from tests.rollout import episodes

# In the manner of the published one: the names of the registry, the form of a call.
PROMPT = """
You plan. Models: [tally]. Skills: [Counting].
Write <search> Model-Name@@Skill-Name: query </search>, as in <search> Tally@@Counting: circles </search>
"""
WORDS = ("so\n</think>\n\n<search> Tally@@Counting: circles</search>", "so\n</think>\n\n<answer> 3 </answer>")


class Tally:
    def answer(self, messages: Sequence[Message]) -> str:
        return "3"


def open_tasks(paths: Sequence[str], split: str, image_root: str) -> list[Task]:
    return [Task(f"{split}/{number}", f"how many {number}?", (), ("3",), "counts") for number in range(8)]


def share(task: Task, answer: str) -> float:
    return float(answer.strip() in task.answers)


def write_checkpoint(directory: Path) -> None:
    """A Hugging Face directory as published: config.json, weights, tokenizer with its chat template."""
    import torch

    texts = [PROMPT, "how many 0 1 2 3 4 5 6 7 8 9?", *observation_frames("<|im_start|>assistant\n<think>\n")] * 20
    tokenizer: Any = train_tokens(texts, episodes.VOCABULARY - 16, directory).tokenizer
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokenizer.chat_template = qwen.THINKING_TEMPLATE
    tokenizer.save_pretrained(str(directory))
    model = reference.reference_model(episodes.model_config()).float()
    tokens = load_tokens(directory)
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 0] = 20
        model.lm_head.weight[:, 0] = 0
        for word in WORDS:
            (token,) = tokens.encode(word)
            model.lm_head.weight[token, 1:] *= 0.3
            model.lm_head.weight[token, 0] = 8
    model.save_pretrained(str(directory))


def small(checkpoint: Path, prompt: Path) -> ConfigDict:
    config = base_config()
    config.data.update(kind=f"{__name__}:open_tasks")
    config.graders = {"counts": f"{__name__}:share"}
    config.policy.update(init_from=str(checkpoint), system_prompt=str(prompt), compute_dtype="float32", remat=False)
    config.policy.update(prefix_buckets=(64,), image_buckets=(12,), min_pixels=32 * 32, max_pixels=32 * 96)
    config.registry = {
        "experts": ({"name": "Tally", "description": "counts", "implementation": f"{__name__}:Tally"},),
        "skills": ({"name": "Counting", "stages": ({"kind": "ask", "output": "answer", "prompt": "{question}"},)},),
    }
    config.rollout.update(max_calls=1, turn_budget=32, observation_tokens=8, member_buckets=())
    config.grpo.update(steps=3, groups=8, group_size=2, logprob_chunk=32)
    config.evaluate.update(batch=8, every=3, baselines=False)
    config.checkpoint.every = 3
    return config


@pytest.mark.slow
def test_a_checkpoint_that_thinks_is_trained_evaluated_and_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "prompt.txt").write_text(PROMPT)
    result = api.train(small(tmp_path / "checkpoint", tmp_path / "prompt.txt"), tmp_path / "run")
    rows = [row for row in read_metrics(result.workdir / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]

    # The run has the prompt; what becomes of its file does not matter.
    (tmp_path / "prompt.txt").unlink()
    for name, overrides in (("kept", {}), ("dropped", {"rollout.earlier_thoughts": "drop"})):
        api.evaluate(tmp_path / name, checkpoint=result.workdir, overrides=overrides, samples=4)
        found = map(json.loads, (tmp_path / name / "episodes.jsonl").read_text().splitlines())
        whole = [episode for episode in found if episode.get("executed_calls") == 1 and episode["answer"] == "3"]
        assert len(whole) > 4 and all(episode["kept_format"] and not episode["malformed"] for episode in whole)

    exported = api.export(result.workdir, tmp_path / "exported", dtype="float32", verify=True).output
    assert (exported / "system_prompt.txt").read_text() == PROMPT
    assert "system_prompt.txt" in (exported / "README.md").read_text()
    assert load_tokens(exported).header == "<|im_start|>assistant\n<think>\n"
