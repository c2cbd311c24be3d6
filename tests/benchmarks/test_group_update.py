"""The benchmark of the group update: what is ours of it, at toy size, and (slow) all of it with its peers."""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from transformers import AutoModelForCausalLM

from benchmarks import group_update
from benchmarks.group_update import TOY, Group, OurPolicy, Step
from benchmarks.pairs import MismatchError
from benchmarks.peers import environment
from benchmarks.peers.worker import Worker, WorkerError
from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress

PAIRS = 2


@pytest.fixture
def flags_and_threads(tmp_path: Path) -> Iterator[None]:
    """The flags of a command line, and torch's threads as they were before."""
    threads = torch.get_num_threads()
    given = {
        "smoke": "true",
        "pairs": str(PAIRS),
        "json": str(tmp_path / "found.json"),
        "peers": str(environment.CACHE),
    }
    with flagsaver.as_parsed(**given):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy() -> OurPolicy:
    return OurPolicy(TOY.architecture, seed=0)


@pytest.fixture(scope="module")
def group(policy: OurPolicy) -> Group:
    group = group_update.random_group(TOY, seed=0)
    return group_update.sampled_earlier(group, group_update.member_logprobs(policy, group), seed=0)


# ---- the program -------------------------------------------------------------------------------------------


def test_sharing_is_timed_against_no_sharing(
    flags_and_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_update, "PEERS", {})
    group_update.main([])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"U2", "H1"}
    assert {"ratio", "ours", "theirs", "device", "command", "flops_ratio", "warm_up_seconds"} <= found["U2"].keys()
    assert len(found["U2"]["pairs"]) == PAIRS


@pytest.mark.slow
def test_every_peer_computes_the_same(flags_and_threads: None, tmp_path: Path) -> None:
    group_update.main([])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"U1", "U1_compact", "U2", "U3", "H1"}
    # The patch takes effect: compact scoring leaves the prompt out.
    scored = [found[name]["peer"]["scored_tokens"] for name in ("U1", "U1_compact")]
    assert scored == [TOY.members * (TOY.prefix + TOY.member - 1), TOY.members * TOY.member]


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("loss", Step(1.0, 2.0001, 3.0)),
        ("grad_norm", Step(1.0, 2.0, 3.001)),
        ("loss", Step(1.0, float("nan"), 3.0)),
        ("grad_norm", Step(1.0, 2.0, float("inf"))),
    ],
)
def test_sides_that_differ_are_refused(what: str, other: Step) -> None:
    with pytest.raises(MismatchError, match=f"U1: our {what} .* nothing was timed"):
        group_update.check("U1", Step(1.0, 2.0, 3.0), other)


# ---- the group ---------------------------------------------------------------------------------------------


def test_without_sharing_every_member_has_the_prompt(policy: OurPolicy, group: Group) -> None:
    one, apart = (group.batch(policy.architecture, shared) for shared in (True, False))
    g, r = TOY.members, TOY.member
    assert one.tokens.shape == (1, g, r) and apart.tokens.shape == (g, 1, r)
    for b in range(g):
        real = apart.prompts.tokens[b][apart.prompts.mask[b]]
        np.testing.assert_array_equal(real, group.prompt[1:])
        np.testing.assert_array_equal(apart.tokens[b, 0], group.members[b])
        np.testing.assert_array_equal(apart.mask[b, 0], group.mask[b])
    assert (~group.mask).sum(axis=1).tolist() == [TOY.observed] * g


def test_the_peers_checkpoint_is_the_policy(policy: OurPolicy, group: Group, tmp_path: Path) -> None:
    """transformers reads all of it, and gives the log-probabilities that ours gives."""
    group_update.write_checkpoint(policy, tmp_path)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()), loaded
    prompt = np.tile(group.prompt, (TOY.members, 1))
    with torch.no_grad():
        logits = model(torch.tensor(np.concatenate([prompt, group.members], axis=1)).long()).logits
    at = torch.log_softmax(logits[:, TOY.prefix - 1 : -1], dim=-1)
    theirs = torch.gather(at, -1, torch.tensor(group.members).long()[..., None])[..., 0].numpy()
    ours = group_update.member_logprobs(policy, group)
    np.testing.assert_allclose(ours, np.where(group.mask, theirs, 0), atol=2e-5)


def test_some_ratios_are_clipped_and_most_are_not(policy: OurPolicy, group: Group) -> None:
    """Otherwise the comparison of losses would not see one branch of the clip."""
    ratio = np.exp(group_update.member_logprobs(policy, group) - group.old_logprobs)
    clipped = np.clip(ratio, 1 - group_update.CLIP, 1 + group_update.CLIP)
    outside = (ratio - clipped) * group.advantages[:, None] > 0
    assert 0.02 < outside[group.mask].mean() < 0.5


# ---- operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_operations_are_those_of_every_matmul(shared: bool) -> None:
    """Counted one query and key at a time."""
    shape = dataclasses.replace(TOY, prefix=5, member=3, members=2)
    text = shape.text
    rows = [("p", t) for t in range(5)], [("m", t) for t in range(3)]
    tokens = 1 * 5 + 2 * 3 if shared else 2 * 8
    sequence = [*rows[0], *rows[1]]
    pair_count = 0
    for member, (query, key) in itertools.product(range(2), itertools.product(range(8), range(8))):
        computed_before = shared and member == 1 and sequence[query][0] == "p"
        pair_count += key <= query and not computed_before
    wanted = 2 * text.vocab_size * text.hidden_size * 6
    for inner, outer in (
        (text.hidden_size, 64),  # q
        (text.hidden_size, 32),  # k
        (text.hidden_size, 32),  # v
        (64, text.hidden_size),
        (text.hidden_size, text.intermediate_size),
        (text.hidden_size, text.intermediate_size),
        (text.intermediate_size, text.hidden_size),
    ):
        wanted += text.num_hidden_layers * 2 * inner * outer * tokens
    wanted += text.num_hidden_layers * text.num_attention_heads * 2 * 2 * text.head_dim * pair_count
    assert group_update.forward_flops(shape, shared, causal=True) == wanted


def test_sharing_saves_members_times_where_the_prompt_is_all() -> None:
    long = dataclasses.replace(TOY, prefix=100_000, member=4, members=8, observed=1)
    for ratio in group_update.flops_ratios(long).values():
        assert ratio == pytest.approx(8, rel=0.01)


# ---- environments and workers ------------------------------------------------------------------------------


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    path = tmp_path / "peer.txt"
    path.write_text("one==1\n")
    return path


def test_an_environment_is_made_once_and_again_when_its_requirements_change(
    requirements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *_: object) -> None:
        commands.append(command)
        (tmp_path / "cache" / "peer" / "pyvenv.cfg").touch()

    monkeypatch.setattr(environment, "_run", run)
    made = [environment.python(requirements, tmp_path / "cache", Progress()) for _ in range(2)]
    assert made == [tmp_path / "cache" / "peer" / "bin" / "python"] * 2
    assert [command[2] for command in commands] == ["venv", "pip"]
    requirements.write_text("one==2\n")
    environment.python(requirements, tmp_path / "cache", Progress())
    assert len(commands) == 4


def test_a_failed_installation_says_why_and_is_tried_again(
    requirements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "print('Collecting one==1'); print('ERROR: no such version'); exit(1)"]
    real = environment._run
    monkeypatch.setattr(environment, "_run", lambda _, *rest: real(failing, *rest))
    for _ in range(2):
        with pytest.raises(ConfigError, match="peer.txt could not be installed: ERROR: no such version"):
            environment.python(requirements, tmp_path / "cache", Progress())


def test_a_directory_of_something_else_is_not_cleared(requirements: Path, tmp_path: Path) -> None:
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is no virtual environment"):
        environment.python(requirements, tmp_path, Progress())
    assert (tmp_path / "peer" / "thesis.tex").exists()


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(sys.executable, "tests.benchmarks.echo_worker") as worker:
        yield worker


def test_a_worker_answers_whatever_its_libraries_print(worker: Worker) -> None:
    assert worker.call("echo", value={"a": [1, 2.5]}) == {"a": [1, 2.5]}
    assert worker.call("echo", value=None) is None


def test_a_failed_command_brings_its_traceback(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="(?s)echo_worker failed at 'fail'.*no such luck"):
        worker.call("fail")
    assert worker.call("echo", value=1) == 1


def test_a_dead_worker_leaves_its_last_words(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="(?s)ended at 'die'.*last words"):
        worker.call("die")


def test_processor_time_between_commands_is_counted(worker: Worker) -> None:
    worker.call("echo", value=1)
    worker.call("spin")
    quiet = worker.idle_cpu
    while worker.idle_cpu - quiet < 0.05:  # as long as it takes on a busy machine
        worker.call("echo", value=1)
        time.sleep(0.01)
    assert quiet < 0.05
