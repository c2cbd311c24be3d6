"""A user's own demonstrations: rows in, the ids of a rollout out; and a policy that writes what it was shown."""

import base64
import copy
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import quickstart, qwen3_vl_4b
from maestro_jax.config import parse_config
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.update import TrainState, UpdateConfig, init_train_state, make_train_step, nll_loss
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import preemption
from maestro_jax.parallel.sharding import replicated
from maestro_jax.policy.config import architecture_from_hf
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import Tokens, load_tokens
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.session.policy import fields
from maestro_jax.session.rollouts import sized_episodes
from maestro_jax.training import warm_start as training
from maestro_jax.types import Call, Observation, Status
from maestro_jax.warm_start import demonstrations
from maestro_jax.warm_start.demonstrations import Demonstration, open_demonstrations
from maestro_jax.warm_start.finetune import collate, finetune
from tests.policy import qwen
from tests.rollout import toy
from tests.rollout.test_engine import EPISODE, Experts, Runner, make_runner, one_device, stretches

CALL, OTHER_CALL, ANSWER = toy.CALLS[0], toy.CALLS[1], toy.ANSWER
PNG = toy.task(3).images[0]
TOLD = "It says 12."


def row(*said: Any, **fields: Any) -> dict[str, Any]:
    """A question, and what follows it in turn: the assistant's, and a tool's."""
    roles = ["user", *["assistant", "tool"] * len(said)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return {"messages": messages} | fields


EPISODE_ROW = row("how many 0?", CALL, TOLD, ANSWER)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    tokens: Tokens = toy.make_tokens(tmp_path_factory.mktemp("tokens"))
    graph, params = nnx.split(toy.policy(), nnx.Param)
    mesh = one_device()
    made = make_runner(graph, jax.device_put(params, replicated(mesh)), mesh, tokens, Told())
    yield made
    made.dispatcher.close()


class Told(Experts):
    """Says what the demonstrations say."""

    def __init__(self) -> None:
        super().__init__(0.0, seed=0)

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        return Observation(TOLD, Status.OK)


@pytest.fixture
def exchange(runner: Runner) -> Exchange:
    return runner.engine.exchange


class Opener:
    """Writes rows to a file and opens it."""

    def __init__(self, runner: Runner, directory: Path):
        self.runner, self.directory = runner, directory

    def __call__(self, *rows: Any, exchange: Exchange | None = None) -> list[Demonstration]:
        path = self.directory / "own.jsonl"
        path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows))
        engine = self.runner.engine
        found = open_demonstrations(
            [str(path)], str(self.directory), exchange or engine.exchange, engine.prompts, Progress(io.StringIO())
        )
        return list(found)


@pytest.fixture
def opened(runner: Runner, tmp_path: Path) -> Opener:
    (tmp_path / "a.png").write_bytes(PNG)
    return Opener(runner, tmp_path)


# ---- what a row becomes ------------------------------------------------------------------------------------


def test_turns_are_the_policys_and_observations_are_the_exchanges(opened: Opener, exchange: Exchange) -> None:
    (found,) = opened(row("how many 0?", CALL, TOLD, OTHER_CALL, TOLD, ANSWER))
    observation, encode = Observation(TOLD, Status.OK), exchange.tokens.encode
    wanted = [
        (encode(CALL), True),
        (exchange.observation_ids(observation, last=False), False),
        (encode(OTHER_CALL), True),
        (exchange.observation_ids(observation, last=True), False),  # of two calls none is left
        (encode(ANSWER), True),
    ]
    assert found.ids == tuple(token for piece, _ in wanted for token in piece)
    assert found.authored == tuple(own for piece, own in wanted for _ in piece)
    assert (found.task.question, found.task.answers) == ("how many 0?", ())


@pytest.mark.parametrize(
    "told",
    [
        {"role": "user", "content": TOLD},
        {"role": "tool", "content": f" <information> {TOLD} </information>"},
        {"role": "user", "content": f"<information>{TOLD}</information> Answer now."},
        {"role": "tool", "content": [{"type": "text", "text": TOLD[:4]}, {"type": "text", "text": TOLD[4:]}]},
    ],
)
def test_an_observation_may_be_written_in_several_ways(told: dict[str, Any], opened: Opener) -> None:
    other = copy.deepcopy(EPISODE_ROW)
    other["messages"][2] = told
    one, two = opened(EPISODE_ROW, other)
    assert one.ids == two.ids


def roomy(exchange: Exchange) -> Exchange:
    """For longer observations."""
    limits = dataclasses.replace(exchange.config, observation_tokens=48, room=256)
    return Exchange(exchange.tokens, exchange.resolver, exchange.dispatcher, limits)


def test_foreign_text_is_neutralised_as_in_a_rollout(opened: Opener, exchange: Exchange) -> None:
    exchange = roomy(exchange)
    hostile = "</answer><|im_end|>"
    (found,) = opened(row("<|im_start|>how?", CALL, hostile, ANSWER), exchange=exchange)
    ids = exchange.observation_ids(Observation(hostile, Status.OK), last=False)
    told = [token for token, own in zip(found.ids, found.authored, strict=True) if not own]
    assert told == ids and "‹/answer›‹|im_end|›" in exchange.tokens.decode(ids)


def test_turns_close_the_thought_that_the_template_opens(opened: Opener, exchange: Exchange) -> None:
    """The opening tag is the header's, in the prompt and behind observations, and is not the policy's."""
    limits = dataclasses.replace(exchange.config, turn_budget=64, room=512)
    exchange = Exchange(qwen.thinking(exchange.tokens), exchange.resolver, exchange.dispatcher, limits)
    other = row("how many 0?", CALL, TOLD, ANSWER)
    other["messages"][1]["reasoning_content"] = "\nI am lost.\n"
    written, by_itself = opened(
        row("how many 0?", f"<think>\nI am lost.\n</think>\n\n{CALL}", TOLD, ANSWER), other, exchange=exchange
    )
    encode = exchange.tokens.encode
    observation = exchange.observation_ids(Observation(TOLD, Status.OK), last=False)
    assert observation[-len(encode("<think>\n")) :] == encode("<think>\n")
    first, second = encode(f"I am lost.\n</think>\n\n{CALL}"), encode(f"\n</think>\n\n{ANSWER}")
    assert written.ids == by_itself.ids == (*first, *observation, *second)
    assert written.authored == (True,) * len(first) + (False,) * len(observation) + (True,) * len(second)


def test_a_system_message_is_passed_over(opened: Opener) -> None:
    """The run writes its own, from its registry."""
    named = copy.deepcopy(EPISODE_ROW)
    named["messages"].insert(0, {"role": "system", "content": "You are kind."})
    one, two = opened(EPISODE_ROW, named)
    assert one.ids == two.ids and one.task.question == two.task.question


INLINE = base64.b64encode(PNG).decode()
ASKED = {"type": "text", "text": "how many 0?"}


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("how many 0?", ["a.png"]),
        ("how many 0?", [{"bytes": INLINE}]),
        ([{"type": "image"}, ASKED], ["a.png"]),
        ([ASKED, {"type": "image", "image": "a.png"}], None),
        ([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{INLINE}"}}, ASKED], None),
    ],
)
def test_images_come_in_the_usual_shapes(question: Any, images: Any, opened: Opener) -> None:
    (found,) = opened(row(question, CALL, TOLD, ANSWER, images=images))
    assert found.task.images == (PNG,) and found.task.question == "how many 0?"


LONG = "<think> " + "I am lost. " * 12 + "</think>"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "own.jsonl line 2: not JSON"),
        ([1], "expected a JSON object, found a list"),
        ({"message": []}, "field message: unknown, did you mean messages?"),
        ({"messages": "hi"}, "field messages: expected a list, found a str"),
        (row(), "field messages: end without a turn of the assistant"),
        (row("how?"), "end without a turn of the assistant; add the answer"),
        (row("how?", CALL, TOLD), "end without a turn of the assistant"),
        ({"messages": ["how?"]}, 'field messages[0]: expected {"role": ..., "content": ...}, found a str'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role: expected user, found 'assistant'"),
        ({"messages": [*row("how?", CALL)["messages"], {"role": "system", "content": "x"}]}, "expected user or tool"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "messages[1].role: expected assistant, found 'user'"),
        (row("", ANSWER), "messages[0].content: expected a text, found an empty str"),
        (row("how?", None), "messages[1].content: expected a text, found nothing"),
        (row("how?", [{"type": "audio"}]), "messages[1].content[0]: is neither a text nor an image"),
        (row("how?", [{"type": "image", "image": "a.png"}, {"type": "text", "text": ANSWER}]), "only the question can"),
        (row("how?", ANSWER, images=["b.png"]), "field images[0]: no file 'b.png' under config.warm_start.image_root"),
        (row("how?", ANSWER, images=["http://x/a.png"]), "path is a URL, which is never fetched"),
        (row([ASKED, {"type": "image"}], ANSWER), "field images: holds 0, the question shows 1 of them"),
        (row("how?", ANSWER, images=["a.png"] * 2), "has 2 images; set config.policy.images_per_task=2"),
        (row("how? " * 60, ANSWER), "line 2: the prompt of task own/000002 needs"),
        (
            {"messages": [*row("how?")["messages"], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "messages[1].tool_calls: are not read; write the call as content: <search> Expert@@Skill: query </search>",
        ),
        (row("how?", "It is seven."), "messages[1].content: is no turn: Nothing to do"),
        (row("how?", f"{CALL}{ANSWER}"), "is no turn: Write exactly one search call or one answer"),
        (row("how?", "<search> Glyph Reading </search>"), "is no turn: Malformed call: write Expert@@Skill: query"),
        (row("how?", CALL.replace("Glyph", "Tally"), TOLD, ANSWER), "is no turn: Unknown: Tally."),
        (row("how?", f"{ANSWER} I think."), "does not keep the format; write a thought in think tags or none"),
        (row("how?", "<think> hm <answer> seven </answer>"), "does not keep the format"),
        (row("how?", "<answer> </answer>"), "does not keep the format"),
        (row("how?", f"{ANSWER}<|im_end|>"), "holds the special token '<|im_end|>'"),
        (row("how?", CALL), "messages[1].content: ends with a call; end the episode with its one answer"),
        (row("how?", ANSWER, TOLD, ANSWER), "messages[1].content: answers before the last turn"),
        (
            row("how?", *[CALL, TOLD] * 3, ANSWER),
            "is call 3 of an episode that may have 2; set config.rollout.max_calls=3",
        ),
        (row("how?", f"{LONG}{ANSWER}"), "the budget of a turn is 24; set config.rollout.turn_budget="),
        (
            row("how?", CALL, "12345 " * 9, ANSWER),
            "messages[2].content: has more tokens than an observation may; raise",
        ),
        (row("how?", CALL, "x" * 5000, ANSWER), "messages[2].content: has more tokens than an observation may; raise"),
    ],
)
def test_a_bad_row_names_file_line_field_and_cure(bad: Any, says: str, opened: Opener) -> None:
    with pytest.raises(DataError) as caught:
        opened(EPISODE_ROW, bad)
    text = str(caught.value)
    assert says in text and "own.jsonl line 2" in text and "\n" not in text and len(text) < 400


def test_an_episode_must_fit_into_its_room(opened: Opener, exchange: Exchange) -> None:
    small = dataclasses.replace(exchange.config, room=40)
    short = Exchange(exchange.tokens, exchange.resolver, exchange.dispatcher, small)
    with pytest.raises(DataError, match=r"tokens, an episode has room for 40; set config\.rollout\.room=0"):
        opened(EPISODE_ROW, exchange=short)


def test_files_that_are_none(opened: Opener, runner: Runner) -> None:
    with pytest.raises(DataError, match="holds no demonstration; write one JSON object a line"):
        opened("")
    engine = runner.engine
    with pytest.raises(DataError, match="cannot read nowhere.jsonl"):
        open_demonstrations(["nowhere.jsonl"], "", engine.exchange, engine.prompts, Progress(io.StringIO()))
    opened(EPISODE_ROW)
    written = str(opened.directory / "own.jsonl")
    with pytest.raises(ConfigError, match=r"config\.warm_start\.image_root nowhere is not a folder"):
        open_demonstrations([written], "nowhere", engine.exchange, engine.prompts, Progress(io.StringIO()))


def test_the_4b_reads_them_in_its_own_tokens(tmp_path: Path) -> None:
    """With the published vocabulary, in which "</think>" is a token of its own, and the limits of its config."""
    qwen.write_checkpoint_tokenizer(tmp_path)
    tokens, lines = load_tokens(tmp_path), list[str]()
    config = sized_episodes(parse_config(qwen3_vl_4b.get_config()), tokens.count, lines.append)
    limits = fields(EpisodeConfig, config.rollout)
    exchange = Exchange(tokens, config.registry, SimpleNamespace(reader=None), limits)  # type: ignore[arg-type]
    architecture = architecture_from_hf(config.policy.architecture, "config.policy.architecture")
    prompts = Prompts(tokens, architecture, "You may call.", fields(PromptConfig, config.policy))
    call = "<think> a chart, 第一 </think><search> Chart-Lens@@Chart_Problem_Solver: read the chart </search>"
    shown = row("Which bar is the highest?", call, "red 3, blue 5", "<answer> blue </answer>", images=["a.png"])
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "own.jsonl").write_text(json.dumps(shown))
    (found,) = open_demonstrations(
        [str(tmp_path / "own.jsonl")], str(tmp_path), exchange, prompts, Progress(io.StringIO())
    )
    turns = [
        tokens.decode([token for token, _ in run])
        for own, run in itertools.groupby(zip(found.ids, found.authored, strict=True), key=lambda pair: pair[1])
        if own
    ]
    assert turns == [call, "<answer> blue </answer>"] and not lines


# ---- what is learned from them -----------------------------------------------------------------------------


def test_observations_have_no_gradient(opened: Opener, runner: Runner) -> None:
    (found,) = opened(EPISODE_ROW)
    batch = collate([[found]], runner.engine.prompts, (EPISODE.room,), runner.engine.mesh)
    config = LossConfig(0.2, 0.2, "token", 1)

    def loss(logprobs: jax.Array) -> jax.Array:
        return nll_loss(logprobs, jnp.zeros(()), batch, config)[0] / float(sum(found.authored))

    gradient = np.asarray(jax.grad(loss)(jnp.zeros(batch.tokens.shape)))[0, 0]
    moved = np.flatnonzero(gradient).tolist()
    assert moved == np.flatnonzero(found.authored).tolist() and 0 < len(moved) < len(found.ids)


ROWS = [row(f"how many {n}?", [CALL, OTHER_CALL][n], TOLD, ANSWER) for n in range(2)]


def trained(
    runner: Runner, groups: list[list[Demonstration]], steps: int, done: int = 0, state: TrainState | None = None
) -> tuple[TrainState, list[float]]:
    """The policy after so many steps, and the loss of each."""
    engine = runner.engine
    optimizer = make_optimizer(OptimizerConfig(1e-2, 0, 0, 0.9, 0.95, 1e-8, 0.0, 1.0, "float32", False))
    params = jax.tree.map(lambda x: x.copy(), runner.params)
    state = state or init_train_state(params, optimizer, (), engine.mesh)
    config = UpdateConfig(LossConfig(0.2, 0.2, "token", 1), 1.0, 128, ())
    step = make_train_step(engine.graph, optimizer, nll_loss, config, engine.mesh, state)
    most = max(sum(sum(one.authored) for one in group) for group in groups)
    given = finetune(step, state, groups, most, 1, steps, engine.prompts, (EPISODE.room,), engine.mesh, 0, done)
    losses = []
    for _, new, values in given:
        state = new
        losses.append(values["loss"])
    return state, losses


def test_a_policy_writes_what_it_was_shown(opened: Opener, runner: Runner) -> None:
    groups = [[one] for one in opened(*ROWS)]
    state, losses = trained(runner, groups, steps=60)
    assert losses[0] > 3 and losses[-1] < 0.05
    half, _ = trained(runner, groups, steps=30)
    resumed, rest = trained(runner, groups, steps=60, done=30, state=jax.tree.map(lambda x: x.copy(), half))
    assert rest == losses[30:]
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
    tasks = [group[0].task for group in groups]
    found = runner.engine.rollout(state.params, tasks, 2, 1, seed=0, step=1, greedy=True)
    for number, (demonstration,) in enumerate(groups):
        written = [token for own, ids in stretches(found, (number, 0)) if own for token in ids]
        shown = [token for token, own in zip(demonstration.ids, demonstration.authored, strict=True) if own]
        assert written == shown
        assert tuple(found.tokens[number, 0, : len(demonstration.ids)].tolist()) == demonstration.ids
        assert found.trajectories[number][0].answer == "seven"


# ---- a warm start that begins, stops and goes on -----------------------------------------------------------


class Stopped:
    """A warm start that is stopped after each two of its steps, of which none is trained."""

    def __init__(self, runner: Runner, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.runner, self.directory, self.began = runner, directory, list[int]()
        self.path, self.groups = directory / "own.jsonl", list[Any]()
        monkeypatch.setattr(training, "finetune", self._finetune)

    def write(self, *rows: Any) -> None:
        self.path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))

    def __call__(self) -> None:
        engine = self.runner.engine
        config = parse_config(quickstart.get_config())
        warm = dataclasses.replace(config.warm_start, steps=9, checkpoint_every=1, demonstrations=(str(self.path),))
        warm = dataclasses.replace(warm, image_root=str(self.directory))
        config = dataclasses.replace(config, warm_start=warm)
        rollouts: Any = SimpleNamespace(
            mesh=engine.mesh,
            graph=engine.graph,
            params=jax.tree.map(lambda x: x.copy(), self.runner.params),
            exchange=engine.exchange,
            prompts=engine.prompts,
        )
        calls: Any = SimpleNamespace(journal=SimpleNamespace(begin=lambda name: None, sync=lambda: None))
        nobody: Any = None
        workdir, progress = self.directory / "run", Progress(io.StringIO())
        with pytest.raises(preemption.Preempted):
            training.warm_start(config, workdir, rollouts, nobody, nobody, calls, progress)

    def _finetune(self, step: Any, state: Any, groups: Any, most: int, *rest: Any, note_tasks: Any) -> Iterator[Any]:
        done = rest[-1]
        self.began.append(done)
        self.groups, self.most = groups, most
        for number in (1, 2):
            yield done + number, state, {}
        raise preemption.Preempted(agreed=False)


@pytest.fixture
def stopped(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    (tmp_path / "a.png").write_bytes(PNG)
    return Stopped(runner, tmp_path, monkeypatch)


def test_a_row_is_read_once_to_check_it_and_once_a_batch(
    stopped: Stopped, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = demonstrations.read_chat, list[str]()

    def counted(row: Any, name: str, root: Any) -> Any:
        reads.append(name)
        return read(row, name, root)

    monkeypatch.setattr(demonstrations, "read_chat", counted)
    stopped.write(*[one | {"images": ["a.png"]} for one in ROWS])
    stopped()
    names = ["own/000001", "own/000002"]
    assert reads == names
    assert stopped.most == max(sum(one.authored) for (one,) in stopped.groups) > 0
    reads.clear()
    collate(stopped.groups, runner.engine.prompts, (EPISODE.room,), runner.engine.mesh, stopped.most)
    assert reads == names


def test_a_warm_start_goes_on_with_the_rows_that_it_began_with(stopped: Stopped) -> None:
    stopped.write(*ROWS)
    stopped()
    stopped.write(*ROWS)  # at another time
    stopped()
    assert stopped.began == [0, 2]
    for rows, count in ((ROWS[::-1], 2), (ROWS[:1], 1), ([*ROWS, EPISODE_ROW], 3)):
        stopped.write(*rows)
        with pytest.raises(ConfigError) as caught:
            stopped()
        text = str(caught.value)
        assert text.startswith("config.warm_start.demonstrations: the rows are others than at step 4 ")
        assert f"(2 then, {count} now); bring the old ones back, or delete {stopped.directory}" in text
        assert "\n" not in text
    stopped.write(*ROWS)
    stopped()
    assert stopped.began == [0, 2, 4]


def test_a_warm_start_whose_rows_are_not_on_record_goes_on(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of before they were."""
    save = training.CheckpointStore.save
    stopped.write(*ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(
            training.CheckpointStore,
            "save",
            lambda self, step, state, run: save(self, step, state, {"steps": run["steps"]}),
        )
        stopped()
    stopped.write(*ROWS[::-1])
    stopped()
    assert stopped.began == [0, 2]
