"""TRL in a process of its own: episodes of scripted turns with calls, by its trainer's loop and by its async worker.

Runs in the environment of `trl.txt`; source: trl 1.16, `trl/trainer/grpo_trainer.py` (`GRPOTrainer._generate`, which
calls `_tool_call_loop`) and `trl/experimental/async_grpo/async_rollout_worker.py` (`_AsyncRolloutLoop`). No model is
run: the trainer's `_generate_single_turn` returns scripted turns after as many steps as the longest has tokens, the
async worker posts to the scripted endpoint of `benchmarks/expert_server.py` in place of vLLM's.
"""

import asyncio
import importlib.metadata
import queue
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_instruct_2507_chat_template
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop

from benchmarks.expert_server import OBSERVATION, AsyncExpertClient, ExpertClient, Script, as_text
from benchmarks.peers.protocol import serve
from benchmarks.traces import NAME_LENGTH, NAME_MARK, Trace, call_name, task_name, write_turn

_PACKAGES = ("trl", "torch", "transformers", "accelerate", "aiohttp")
_CALL = '\n<tool_call>\n{{"name": "expert", "arguments": {{"call": "{}"}}}}\n</tool_call><|im_end|>'
_ANSWER = " done<|im_end|>"
_TOKENS = 100_000  # no length limits an episode

Outcome = dict[str, float]


class Scripts:
    """The turns of traces in TRL's own form of a call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    def of(self, trace: Trace) -> dict[str, Any]:
        """Arguments of `Script`."""
        turns: dict[str, list[list[int]]] = {}
        for number, group in enumerate(trace.groups):
            for episode in group:
                names = [task_name(number), *map(call_name, episode.calls)]
                endings = [*(_CALL.format(name) for name in names[1:]), _ANSWER]
                for name, ending, tokens in zip(names, endings, episode.turns, strict=True):
                    key = as_text(self.encode(name.removeprefix(NAME_MARK)))
                    turns.setdefault(key, []).append(write_turn(self.encode, ending, tokens))
        return {"opening": self.encode(NAME_MARK), "width": NAME_LENGTH, "turns": turns}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _prompt(group: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{task_name(group)} shows"}]


def _tool(ask: Callable[[str], str]) -> Callable[[str], str]:
    def expert(call: str) -> str:
        """Asks the expert.

        Args:
            call: the name of the call
        """
        return ask(call)

    return expert


def _async_tool(client: AsyncExpertClient) -> Callable[[str], Any]:
    async def expert(call: str) -> str:
        """Asks the expert.

        Args:
            call: the name of the call
        """
        return await client.ask(call)

    return expert


# ---- the trainer's loop --------------------------------------------------------------------------------------


class ToolLoop:
    """`GRPOTrainer._generate` of all episodes in one batch."""

    def __init__(self, scripts: Scripts, tool: Callable[[str], Any], groups: int, members: int):
        self._scripts, self._tool, self._members = scripts, tool, members
        self.trainer = _make_trainer(scripts.tokenizer, tool, groups * members, members)
        self.trainer._generate_single_turn = self._generate
        self._step_seconds = 0.0

    def run(self, trace: Trace, step_seconds: float) -> Outcome:
        self._script, self._step_seconds = Script(**self._scripts.of(trace)), step_seconds
        prompts = [_prompt(group) for group in range(len(trace.groups)) for _ in range(self._members)]
        by_kind: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        by_kind[asyncio.iscoroutinefunction(self._tool)]["expert"] = self._tool
        # `_generate_and_score_completions` sets these from the batch before it generates.
        self.trainer._sync_tool_dicts, self.trainer._async_tool_dicts = ([kind] * len(prompts) for kind in by_kind)
        start = time.perf_counter()
        _, _, tool_mask, completions, *_ = self.trainer._generate(prompts)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(map(sum, tool_mask)), "observations": _observations(completions)}

    def _generate(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        turns = [self._script.next_turn(ids) or [] for ids in prompt_ids]
        time.sleep(max(map(len, turns)) * self._step_seconds)
        return turns, None


def _make_trainer(tokenizer: PreTrainedTokenizerFast, tool: Callable, rows: int, members: int) -> GRPOTrainer:
    """A trainer with the smallest model it takes."""
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=_TOKENS,
    )
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=rows,
        num_generations=members,
        max_completion_length=_TOKENS,
    )
    data = Dataset.from_list([{"prompt": _prompt(0)}] * rows)
    return GRPOTrainer(Qwen3ForCausalLM(shape), _no_reward, config, data, None, tokenizer, tools=[tool])


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _observations(completions: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """How often the expert's own words are in them."""
    return sum(message.get("content") == OBSERVATION for completion in completions for message in completion)


# ---- the async worker ----------------------------------------------------------------------------------------


class _Buffer(queue.Queue):
    """Where scored samples go; tells when those of the trace are all there."""

    def __init__(self, groups: int, episodes: int):
        super().__init__()
        self._groups, self._left = groups, episodes
        self.samples: list[Any] = []
        self.complete = asyncio.Event()

    def put_nowait(self, sample: Any) -> None:
        if sample.group_id < self._groups:
            self.samples.append(sample)
            if len(self.samples) == self._left:
                self.complete.set()


class AsyncWorker:
    """`_AsyncRolloutLoop`, which is what the child process of `AsyncRolloutWorker` runs, until all groups are scored.

    It never ends by itself: as episodes end it starts those of more groups. Their prompts have no script, and the
    endpoint holds them.
    """

    def __init__(self, scripts: Scripts, port: int):
        self._scripts, self._port = scripts, port
        self._client = ExpertClient(port)

    def run(self, trace: Trace, step_seconds: float) -> Outcome:
        episodes, groups = len(trace.episodes), len(trace.groups)
        self._client.post("/script", {**self._scripts.of(trace), "step_seconds": step_seconds})
        experts, buffer = AsyncExpertClient(self._port), _Buffer(groups, episodes)
        rollouts = _AsyncRolloutLoop(
            model_name="scripted",
            dataset=Dataset.from_list([{"prompt": _prompt(group)} for group in range(2 * groups)]),
            reward_funcs=[_no_reward],
            processing_class=self._scripts.tokenizer,
            eos_token_ids=[self._scripts.tokenizer.eos_token_id],
            rollout_buffer=buffer,
            model_version_value=types.SimpleNamespace(value=0),
            heartbeat_value=types.SimpleNamespace(value=0.0),
            failed_event=None,
            exception_info_queue=None,
            metrics_queue=queue.Queue(maxsize=4096),
            tools=[_async_tool(experts)],
            num_generations=len(trace.groups[0]),
            max_inflight_tasks=episodes,
            vllm_server_url=f"http://127.0.0.1:{self._port}",
            max_tokens=_TOKENS,
        )
        seconds = rollouts._loop.run_until_complete(self._timed(rollouts, experts, buffer, episodes))
        rollouts._tool_pool.shutdown()
        rollouts._loop.close()
        return {
            "seconds": seconds,
            "tokens": sum(int(sample.completion_mask.sum()) for sample in buffer.samples),
            "observations": _observations([sample.completion for sample in buffer.samples]),
        }

    async def _timed(
        self, rollouts: _AsyncRolloutLoop, experts: AsyncExpertClient, buffer: _Buffer, episodes: int
    ) -> float:
        """As its `_run_loops` does, but with connections that are open before the clock starts."""
        await experts.connect(episodes)
        connector = aiohttp.TCPConnector(limit=rollouts.max_inflight_tasks)
        async with aiohttp.ClientSession(connector=connector) as rollouts.session:
            await asyncio.gather(*(rollouts._post("/served", {}, 60.0) for _ in range(episodes)))
            stop = asyncio.Event()
            start = time.perf_counter()
            loops = [asyncio.create_task(loop(stop)) for loop in (rollouts._generate_loop, rollouts._score_loop)]
            complete = asyncio.create_task(buffer.complete.wait())
            await asyncio.wait([complete, *loops], return_when=asyncio.FIRST_COMPLETED)
            seconds = time.perf_counter() - start
            for task in (complete, *loops):
                task.cancel()
            ended = await asyncio.gather(complete, *loops, return_exceptions=True)
        experts.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error
        return seconds


# ---- commands ------------------------------------------------------------------------------------------------


class Peer:
    """What this process answers to."""

    sides: dict[str, ToolLoop | AsyncWorker]

    def prepare(self, tokenizer: str, port: int, groups: int, members: int) -> dict[str, Any]:
        """Makes all sides: "functions", "coroutines" (the trainer's loop with either kind of tool), "worker".

        Args:
          tokenizer: directory.
          port: of the expert server.
        """
        loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        loaded.chat_template = qwen3_instruct_2507_chat_template
        scripts = Scripts(loaded)
        self.sides = {
            "functions": ToolLoop(scripts, _tool(ExpertClient(port).ask), groups, members),
            "coroutines": ToolLoop(scripts, _async_tool(AsyncExpertClient(port)), groups, members),
            "worker": AsyncWorker(scripts, port),
        }
        return {"versions": {name: importlib.metadata.version(name) for name in _PACKAGES}}

    def run(self, side: str, trace: Mapping[str, Any], step_seconds: float) -> Outcome:
        """One trace; seconds, sampled tokens, observations that were read."""
        return self.sides[side].run(Trace.from_json(trace), step_seconds)


if __name__ == "__main__":
    serve(Peer())
