"""The benchmark of rollouts at toy size: what it writes, and that it believes nothing it has not compared."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import flagsaver

from benchmarks import models, pairs, policy, rollout, rollout_decode
from benchmarks.pairs import Figure, MismatchError
from benchmarks.rollout_decode import TOY_PROMPT, TOY_TURNS, Spoken
from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress
from maestro_jax.rollout.programs import Weights

PAIRS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The file that one run of the command writes; torch's threads as they were before."""
    threads, path = torch.get_num_threads(), tmp_path_factory.mktemp("rollout") / "found.json"
    with flagsaver.as_parsed(smoke="true", pairs=str(PAIRS), json=str(path), only="D1,D2,W1,N1", timeline=""):
        rollout.main([])
    yield json.loads(path.read_text())
    torch.set_num_threads(threads)


@pytest.fixture
def two_pairs() -> Iterator[None]:
    with flagsaver.as_parsed(pairs=str(PAIRS), timeline=""):
        yield


# ---- the command -------------------------------------------------------------------------------------------


def test_every_measure_is_written_with_its_machine(found: dict[str, Any]) -> None:
    assert found.keys() == {"D1", "D1_prefill", "D1_decode", "D2", "W1", "N1"}
    for entry in found.values():
        assert {"device", "threads", "versions", "command"} <= entry.keys()
    for name in ("D1", "D1_prefill", "D1_decode", "D2"):
        assert len(found[name]["pairs"]) == PAIRS and all(t > 0 for pair in found[name]["pairs"] for t in pair)
        assert {"ratio", "ours", "theirs", "compile_seconds", "warm_up_seconds"} <= found[name].keys()


def test_a_conversation_is_prefilled_once_on_our_side_and_once_a_turn_on_theirs(found: dict[str, Any]) -> None:
    shape = TOY_TURNS
    told = (shape.turns - 1) * shape.members * shape.observation
    between = shape.turn + shape.observation
    again = sum(shape.prompt + turn * between for turn in range(shape.turns)) * shape.members
    counted = found["D2"]["prefilled_tokens"]
    assert counted == {"ours": shape.prompt + told, "theirs": again, "ratio": again / (shape.prompt + told)}


def test_decoding_reads_the_buffers_that_the_update_wrote(found: dict[str, Any]) -> None:
    entry = found["W1"]
    assert entry["value"] == entry["reach"] == 0 and entry["unit"] == "bytes"
    assert entry["parameters_bytes"] > 4 * TOY_TURNS.text.vocab_size * TOY_TURNS.text.hidden_size
    assert entry["bytes_that_the_update_moved"] == 0


def test_recorded_logprobs_are_those_of_transformers_and_the_trainer(found: dict[str, Any]) -> None:
    entry = found["N1"]
    assert 0 < entry["value"] <= entry["reach"] == 2e-5
    assert entry["value"] == max(entry["largest_gap"].values()) and len(entry["largest_gap"]) == 2
    # The comparison would say little without any of these.
    assert entry["tokens_written"] > 0 < entry["tokens_told"]
    assert set(entry["turns"]) == {rollout_decode.TOY_TASKS.turns} and set(entry["images"]) == {0, 2}


def test_measures_are_taken_by_name(two_pairs: None) -> None:
    known = rollout.measures(smoke=True)
    assert rollout.chosen(known, []) == list(known.values())
    assert rollout.chosen(known, ["N1", "D2"]) == [known["N1"], known["D2"]]
    with pytest.raises(ConfigError, match="--only has 'D3'; use some of D1, D2"):
        rollout.chosen(known, ["N1", "D3"])


def test_a_figure_stands_below_the_table() -> None:
    figure = Figure("bytes of something", 12.0, "bytes", 0, {"leaves": 3})
    lines = pairs.table({"W1": figure}, {"device": "here"})
    assert lines == ["", "W1: 12 bytes (to reach: 0)", "  bytes of something", "  leaves: 3", "", "device: here"]
    assert pairs.entry(figure) == {
        "value": 12.0,
        "unit": "bytes",
        "reach": 0,
        "what": "bytes of something",
        "leaves": 3,
    }


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = models.transformers_model

    def with_a_wrong_weight(ours: models.OurPolicy) -> Any:
        model = copied(ours)
        model.model.language_model.layers[-1].mlp.down_proj.weight.data[:] += 0.5
        return model

    monkeypatch.setattr(models, "transformers_model", with_a_wrong_weight)


def test_a_long_prompt_that_ends_otherwise_is_refused(a_wrong_weight: None, two_pairs: None) -> None:
    with pytest.raises(MismatchError, match="nothing was timed"):
        rollout_decode.run_d1(TOY_PROMPT, Progress())


def test_a_conversation_that_differs_is_refused(a_wrong_weight: None, two_pairs: None) -> None:
    with pytest.raises(MismatchError, match="D2: member 0 differs .* nothing was timed"):
        rollout_decode.run_d2(TOY_TURNS, Progress())


def test_a_single_other_token_is_found() -> None:
    turns = np.zeros((3, 2, 4), np.int32)
    other = turns.copy()
    other[2, 1, 3] = 1
    with pytest.raises(MismatchError, match="member 1 .* turn 2 at token 3"):
        rollout_decode.check_conversation(Spoken(other, 0), Spoken(turns, 0))


class Scaling:
    """Stands in for an update: parameters times a factor, in new buffers."""

    factor = 1.5

    def __init__(self, ours: models.OurPolicy, batch: object):
        self.params = ours.params

    def __call__(self) -> None:
        self.params = jax.tree.map(lambda leaf: leaf * self.factor, self.params)


def copying(lane_programs: Any) -> Any:
    """Programs whose weights are copies of the parameters."""
    return lambda *args: dataclasses.replace(
        lane_programs(*args), weights=lambda params: Weights.of(jax.tree.map(jnp.copy, params))
    )


def test_copied_and_moved_parameters_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_decode, "OurUpdate", Scaling)
    monkeypatch.setattr(models, "_programs", copying(models._programs))
    figure = rollout_decode.run_w1(TOY_TURNS, Progress())["W1"]
    assert figure.value == figure.details["parameters_bytes"] == figure.details["bytes_that_the_update_moved"] > 0


def test_decoding_with_stale_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_decode, "OurUpdate", Scaling)
    monkeypatch.setattr(Scaling, "factor", 1.0)
    with pytest.raises(MismatchError, match="as before it"):
        rollout_decode.run_w1(TOY_TURNS, Progress())


def test_decoding_otherwise_than_with_a_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_decode, "OurUpdate", Scaling)
    monkeypatch.setattr(rollout_decode, "fresh_copy", lambda leaf: leaf * 1.25)
    with pytest.raises(MismatchError, match="with a copy of them"):
        rollout_decode.run_w1(TOY_TURNS, Progress())


def test_bytes_are_counted_by_address_and_size() -> None:
    assert rollout_decode.bytes_elsewhere([(1, 8), (2, 4)], [(2, 4), (1, 8)]) == 0
    assert rollout_decode.bytes_elsewhere([(1, 8), (2, 4)], [(1, 8), (3, 4)]) == 4
    assert rollout_decode.bytes_elsewhere([(1, 8), (2, 4)], [(1, 16), (2, 4)]) == 16


# ---- the two sides -----------------------------------------------------------------------------------------


def test_a_generation_is_the_first_turn_of_a_conversation() -> None:
    """Members that are told different things say different things, but not before."""
    ours = models.random_policy(models.text_only(TOY_PROMPT.text, tied=False), rollout_decode.SEED)
    prompt = models.random_text(ours.architecture, TOY_PROMPT.prompt, TOY_PROMPT.root, rollout_decode.SEED)
    generated = models.OurGeneration(ours, prompt, TOY_PROMPT.members, TOY_PROMPT.new_tokens, TOY_PROMPT.room)()
    spoken = rollout_decode.OurConversation(ours, prompt, TOY_TURNS)().turns
    np.testing.assert_array_equal(spoken[0], generated.tokens)
    assert (spoken[0][0] == spoken[0][1]).all() and (spoken[1:, 0] != spoken[1:, 1]).any()


def test_text_only_prompts_have_no_image_tokens() -> None:
    architecture = models.text_only(TOY_PROMPT.text, tied=False)
    prompt = models.random_text(architecture, 500, 4, seed=1)
    assert prompt.images == () and prompt.ids.max() < architecture.image_token_id and len(prompt.ids) == 500


def test_gaps_are_those_of_written_tokens() -> None:
    recorded, wrote = np.array([[-1.0, 0.0, -2.0]]), np.array([[True, False, True]])
    gaps = rollout_decode.largest_gaps(recorded, wrote, {"one": recorded + [[0, 9, 0.5]], "other": recorded})
    assert gaps == {"one": 0.5, "other": 0.0}


def test_their_logprobs_follow_the_prompt() -> None:
    """Against a softmax written out, for a policy of both images and text."""
    shape = policy.TOY
    ours = models.OurPolicy(shape.architecture, 0)
    prompt = models.random_prompt(shape.architecture, shape.prompt, shape.root, shape.image, 0)
    model = models.transformers_model(ours)
    whole = models.their_logprobs(model, prompt, 20)
    for end in (21, len(prompt.ids)):
        cut = dataclasses.replace(prompt, ids=prompt.ids[: end - 1])
        logits = models.TheirForward(model, cut)().astype(np.float64)
        chosen = logits[prompt.ids[end - 1]] - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(whole[end - 21], chosen, atol=2e-6)
