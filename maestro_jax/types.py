"""The nouns of maestro_jax, as plain frozen dataclasses (docs/method.md defines the words).

Everything here lives on the host and holds Python or numpy values only, so that the registry,
the graders and the tests can use it without importing jax. Array bundles that enter compiled
programs are defined beside those programs (`rollout/state.py`, `grpo/update.py`).
"""

import dataclasses
import enum


class Status(enum.IntEnum):
    """How a call (or one request to an expert) ended. The order is part of the exchange's wire format."""

    OK = 0
    # The policy's fault: costs the format term.
    MALFORMED = 1  # the turn held neither a well-formed call nor an answer
    UNKNOWN = 2  # the call named an expert or a skill that the registry does not show
    # The infrastructure's fault: the trajectory is marked and leaves baseline and loss.
    TIMEOUT = 3  # the deadline passed
    UNAVAILABLE = 4  # refused, reset, 5xx, open breaker, crashed specialist
    # Nobody's fault at run time: a wrong set-up, found by `doctor` before a run.
    CONFIG_ERROR = 5

    @property
    def is_infrastructure(self) -> bool:
        return self in (Status.TIMEOUT, Status.UNAVAILABLE, Status.CONFIG_ERROR)


class StopReason(enum.IntEnum):
    """Why a turn ended on the device."""

    NONE = 0  # still decoding
    CALL = 1  # `</search>` completed
    ANSWER = 2  # `</answer>` completed
    END_OF_TURN = 3  # the end-of-turn token was sampled
    BUDGET = 4  # the turn's or the episode's token budget was used up


@dataclasses.dataclass(frozen=True)
class Task:
    """One multimodal question.

    Attributes:
      id: unique and stable within a data set, e.g. "charts/train/000123".
      question: what is asked; untrusted text.
      images: encoded image files (PNG, JPEG or WebP bytes), in the order they are shown.
      answers: accepted gold answers; read by graders only, and told to a judge where one grades (docs/grading.md).
      source: where the task comes from; selects the grader ("charts", "ChartQA", ...). The
        domains of a routing heat map are the sources.
      choices: the options of a multiple-choice question in the order of their letters, without these; the gold answer
        is then a letter, the text of an option, or both.
      kind: what a source's grader tells apart within it, such as "open" and "closed".
      grader: name of its grader; empty takes the one of its source.
    """

    id: str
    question: str
    images: tuple[bytes, ...]
    answers: tuple[str, ...]
    source: str
    choices: tuple[str, ...] = ()
    kind: str = ""
    grader: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
    """A well-formed, resolved call: canonical registry names and the policy's own query.

    Without a skill, which no policy can write, the expert is asked the question as it stands: a judge is.
    """

    expert: str
    skill: str
    query: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a reply cost: tokens (or the specialist's equivalent) and price in US dollars."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.price + other.price,
        )


@dataclasses.dataclass(frozen=True)
class Observation:
    """What came back for a turn: foreign text, not yet neutralised, capped or wrapped.

    Attributes:
      text: the skill's final text, or a short error message.
      status: how the call ended.
      seconds: wall time of the whole skill.
      usage: summed over every expert request of the skill.
    """

    text: str
    status: Status
    seconds: float = 0.0
    usage: Usage = Usage()
