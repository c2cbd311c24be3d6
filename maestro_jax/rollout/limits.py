"""How long turns and episodes get, in the tokens of their run: what `turn_budget` and `room` must hold."""

import dataclasses
from collections.abc import Callable

from maestro_jax.errors import ConfigError
from maestro_jax.policy.tokens import ASSISTANT_HEADER
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.rollout import protocol
from maestro_jax.rollout.exchange import EpisodeConfig, observation_frame

Count = Callable[[str], int]  # tokens of a text


@dataclasses.dataclass(frozen=True)
class Limits:
    """Numbers of tokens.

    Attributes:
      call: of the shortest call that the registry resolves, with a query of one token.
      answer: of the shortest answer, of one token. Both close the thought that the template has opened, if it does.
      text: of the longest text of an observation, filled up.
      frame, last_frame: around an observation; around the one after which no call is left.
    """

    call: int
    answer: int
    text: int
    frame: int
    last_frame: int

    @classmethod
    def of(
        cls, registry: RegistryConfig, episode: EpisodeConfig, count: Count, header: str = ASSISTANT_HEADER
    ) -> "Limits":
        """Those of a registry and a tokenizer; `header` is its template's (`Tokens.header`)."""
        begin = protocol.inside_thought("") if protocol.opens_thought(header) else ""
        calls = [
            f"{begin}{protocol.CALL_OPEN} {expert.name}@@{skill.name}: {protocol.CALL_CLOSE}"
            for expert in registry.shown_experts
            for skill in registry.shown_skills
            if registry.allows(skill, expert.name)
        ]
        multiple = episode.observation_multiple
        return cls(
            call=min(map(count, calls), default=0) + 1,
            answer=count(f"{begin}{protocol.ANSWER_OPEN} {protocol.ANSWER_CLOSE}") + 1,
            text=-(-episode.observation_tokens // multiple) * multiple,
            frame=count(observation_frame("", last=False, header=header)),
            last_frame=count(observation_frame("", last=True, header=header)),
        )

    @property
    def observation(self) -> int:
        """Of the longest one with its frame."""
        return self.text + self.last_frame

    def room(self, episode: EpisodeConfig) -> int:
        """What no episode outgrows, whatever its turns; rounded up, so that pages and rows of kernels come out even."""
        calls = episode.max_calls
        told = calls * self.observation - max(calls - 1, 0) * (self.last_frame - self.frame)
        needed = (calls + 1) * episode.turn_budget + told
        even = 16 if needed <= 128 else 128
        return -(-needed // even) * even


def check_turns(limits: Limits, episode: EpisodeConfig, demonstrated: int) -> None:
    """A turn that is cut by its budget is malformed: where all are, nothing is learned.

    Args:
      demonstrated: tokens of the longest turn that the warm start teaches before a reply; 0 without one.

    Raises:
      ConfigError: a legal turn does not fit.
    """
    least = max(limits.call, limits.answer, demonstrated)
    if episode.turn_budget < least:
        shown = f", the longest call of a demonstration with its thought {demonstrated}" if demonstrated else ""
        raise ConfigError(
            f"config.rollout.turn_budget={episode.turn_budget} cuts turns that are right: in this run's tokens the "
            f"registry's shortest call has {limits.call}, the shortest answer {limits.answer}{shown}; set it to "
            f"{least} or more"
        )


def check_room(limits: Limits, episode: EpisodeConfig) -> str:
    """Checks a room that is given.

    Returns:
      What it cuts; empty where it cuts nothing.

    Raises:
      ConfigError: it does not hold a short call, the longest observation and a short answer.
    """
    if episode.room >= (full := limits.room(episode)):
        return ""
    numbers = (
        f"config.rollout.max_calls={episode.max_calls} calls and an answer of up to turn_budget={episode.turn_budget} "
        f"tokens, with observations of up to {limits.observation} ({limits.text} of text, {limits.last_frame} around "
        f"it), need {full}"
    )
    if episode.room < (least := limits.call + limits.observation + limits.answer):
        raise ConfigError(
            f"config.rollout.room={episode.room} holds no episode with a call: the shortest call has {limits.call} "
            f"tokens, the shortest answer {limits.answer}, which makes {least} with an observation; {numbers}. Set it "
            f"to 0, and it is computed"
        )
    return f"config.rollout.room={episode.room} cuts episodes that are longer: {numbers}; 0 computes it"
