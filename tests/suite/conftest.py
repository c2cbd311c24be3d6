"""A small registry, a weak router and experts that answer at once, in any order."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from maestro_jax.grpo.config import OptimizerConfig
from maestro_jax.policy.tokens import Tokens, train_tokens
from maestro_jax.registry.description.config import ExpertConfig, RegistryConfig, SkillConfig
from maestro_jax.rollout.exchange import observation_frames
from maestro_jax.suite.demonstrations import WeakRouter
from maestro_jax.types import Call, Observation, Status, Task
from maestro_jax.warm_start.config import WarmStartConfig


@pytest.fixture(scope="session")
def registry() -> RegistryConfig:
    experts = tuple(ExpertConfig(name, "", "package:Class") for name in ("Chart-Lens", "Tally", "Glyph-Reader", "Sym"))
    skills = [SkillConfig(name) for name in ("Chart_Solver", "Counting_Solver")]
    return RegistryConfig(experts, (), (*skills, SkillConfig("Hidden_Child", tier=2, shown=False)))


@pytest.fixture(scope="session")
def make_router(registry: RegistryConfig) -> Callable[..., WeakRouter]:
    def make(**changes: Any) -> WeakRouter:
        settings: dict[str, Any] = {
            "steps": 1,
            "checkpoint_every": 1,
            "groups": 2,
            "group_size": 2,
            "claims": {"charts": ("Chart-Lens", "Chart_Solver")},
            "follow_expert": 0.4,
            "follow_skill": 0.7,
            "second_call": 0.0,
            "rehearsal": 0.0,
            "queries": {"Chart_Solver": ("read the chart", "check the axis")},
            "thoughts": {},
            "optimizer": OptimizerConfig(1e-3, 1, 0, 0.9, 0.95, 1e-8, 0.0, 1.0),
        }
        return WeakRouter(registry, WarmStartConfig(**(settings | changes)))

    return make


@pytest.fixture(scope="session")
def tokens(make_router: Callable[..., WeakRouter], tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    texts = [*make_router().texts(), *observation_frames()] * 10
    return train_tokens(texts, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    sources = ("charts", "counting")
    return [Task(f"t/{i}", f"question {i}?", (), (f"gold{i}",), sources[i % 2]) for i in range(12)]


class InstantExperts:
    """Stands for the dispatcher: `reply` answers every call; with `backwards` the last one comes in first.

    Some experts may fail with a status.
    """

    def __init__(
        self,
        reply: Callable[[Call, str], str],
        backwards: bool = False,
        failing: Sequence[str] = (),
        status: Status = Status.UNAVAILABLE,
    ):
        self.failing, self.status = failing, status
        self.reply = reply
        self.backwards = backwards
        self.calls: list[tuple[Call, str]] = []
        self.ready: list[tuple[int, Observation]] = []

    def submit(self, ticket: int, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> None:
        self.calls.append((call, question))
        status = self.status if call.expert in self.failing else Status.OK
        self.ready.append((ticket, Observation(self.reply(call, question), status)))

    def void(self, askers: Sequence[str]) -> None:
        """There is no journal."""

    def check(self) -> None:
        """No call ends with an error of the user's."""

    def wait(self, timeout: float) -> bool:
        return bool(self.ready)

    def collect(self) -> list[tuple[int, Observation]]:
        """One at a time, as slow experts would come in."""
        return [self.ready.pop(-1 if self.backwards else 0)]


@pytest.fixture(scope="session")
def instant_experts() -> type[InstantExperts]:
    return InstantExperts
