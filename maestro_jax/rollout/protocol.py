"""The grammar of an episode, in plain Python (no jax).

In: the text of one policy turn and why its decoding stopped. Out: what the turn asks for (a call, an
answer, or nothing valid) and whether it kept the format. Also the other direction: foreign text is made
harmless here before the policy reads it.

    turn   := think? ( call | answer )
    think  := <think> text </think>
    call   := <search> Expert@@Skill: query </search>
    answer := <answer> text </answer>

The templates of some checkpoints open the thought themselves, behind the header of every turn. The turn begins inside
of it and closes it:

    turn   := text </think> ( call | answer )

Only text the policy itself wrote is parsed, and only in the exact spelling on which decoding stops.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Sequence
from typing import Protocol

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import Pair
from maestro_jax.types import Call, Status, StopReason

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<search>", "</search>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
OBSERVATION_OPEN, OBSERVATION_CLOSE = "<information>", "</information>"
TAG_NAMES = ("think", "search", "information", "answer")

_TAG = re.compile(rf"</?(?:{'|'.join(TAG_NAMES)})>")
_LOOSE_TAG = rf"<\s*+(?:/\s*+)?(?:{'|'.join(TAG_NAMES)})\s*+(?:/\s*+)?>"
_SAFE_BRACKETS = str.maketrans({"<": "‹", ">": "›"})

# Error observations carry no tags: they pass the same neutralisation as foreign text.
_NO_ACTION = "Nothing to do: write one search call or one answer in its tags."
_TWO_ACTIONS = "Write exactly one search call or one answer in a turn."
_CUT_OFF = "The turn was too long and was cut off."
_BAD_CALL = "Malformed call: write Expert@@Skill: query between the search tags."


class TurnKind(enum.Enum):
    CALL = "call"  # `call` is set: run it
    ANSWER = "answer"  # `answer` is set: the episode ends
    MALFORMED = "malformed"  # nothing to run; `error` is what the policy reads next


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """What a turn asks for.

    Attributes:
      error: observation text of a malformed turn.
      status: OK, or whose fault it is: MALFORMED, UNKNOWN (names that do not resolve).
      well_formed: one action, resolved names, balanced tags, nothing but whitespace after it.
    """

    kind: TurnKind
    call: Call | None = None
    answer: str | None = None
    error: str = ""
    status: Status = Status.OK
    well_formed: bool = False


class Resolver(Protocol):
    """Whoever knows the names: a `Registry` or a `RegistryConfig`."""

    def resolve(self, expert: str, skill: str) -> Pair | str: ...


def opened_thought(header: str) -> str:
    """The opening tag, with what follows, at the end of a header (`Tokens.header`); empty where it opens no thought."""
    return header[header.rindex(THINK_OPEN) :] if opens_thought(header) else ""


def opens_thought(header: str) -> bool:
    """Whether a turn behind this header begins inside a thought."""
    return header.rstrip().endswith(THINK_OPEN)


def inside_thought(text: str) -> str:
    """A turn, with a thought in its tags or none, as a policy writes it whose header has opened the thought.

    Line ends are those that the published Qwen3-VL Thinking template writes around a thought.
    """
    thought, closed, action = text.partition(THINK_CLOSE)
    if not closed:
        thought, action = "", text
    if (bare := thought.lstrip()).startswith(THINK_OPEN):
        thought = bare.removeprefix(THINK_OPEN)
    return "".join((thought.strip("\n"), f"\n{THINK_CLOSE}\n\n", action.lstrip("\n")))


def parse_turn(text: str, stop: StopReason, registry: Resolver, in_thought: bool = False) -> ParsedTurn:
    """Parses the text of one policy turn, without the prompt, observations or the end-of-turn token.

    Args:
      in_thought: whether its header has opened a thought (`opens_thought`), which the turn has to close.
    """
    tags = list(_TAG.finditer(text))
    actions = [tag for tag in tags if tag[0] in (CALL_OPEN, CALL_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)]
    names = [tag[0] for tag in actions]
    if names not in ([CALL_OPEN, CALL_CLOSE], [ANSWER_OPEN, ANSWER_CLOSE]):
        return _malformed(_action_error(names, stop))
    opening, closing = actions
    body = text[opening.end() : closing.start()].strip()
    shape = [tag[0] for tag in tags]
    thoughts = [[THINK_CLOSE]] if in_thought else [[], [THINK_OPEN, THINK_CLOSE]]
    balanced = any(shape == [*thought, *names] for thought in thoughts)
    well_formed = balanced and not text[closing.end() :].strip()
    if opening[0] == ANSWER_OPEN:
        return ParsedTurn(TurnKind.ANSWER, answer=body, well_formed=well_formed and bool(body))
    return _parse_call(body, well_formed, registry)


def _action_error(names: list[str], stop: StopReason) -> str:
    if stop is StopReason.BUDGET:
        return _CUT_OFF
    return _TWO_ACTIONS if CALL_CLOSE in names or ANSWER_CLOSE in names else _NO_ACTION


def _parse_call(body: str, well_formed: bool, registry: Resolver) -> ParsedTurn:
    expert, marker, rest = body.partition("@@")
    skill, colon, query = rest.partition(":")
    parts = expert.strip(), skill.strip(), query.strip()
    if not marker or not colon or not all(parts):
        return _malformed(_BAD_CALL)
    pair = registry.resolve(parts[0], parts[1])
    if isinstance(pair, str):
        return ParsedTurn(TurnKind.MALFORMED, error=pair, status=Status.UNKNOWN)
    return ParsedTurn(TurnKind.CALL, call=Call(pair.expert, pair.skill, parts[2]), well_formed=well_formed)


def _malformed(error: str) -> ParsedTurn:
    return ParsedTurn(TurnKind.MALFORMED, error=error, status=Status.MALFORMED)


# ---- foreign text ------------------------------------------------------------------------------------------


def neutralise(text: str, special_tokens: Sequence[str]) -> str:
    """Foreign text in which neither our tags nor a special token can be found.

    Their angle brackets are replaced by ‹ and ›; the rest stays readable. Our tags are matched in any case
    and with whitespace inside, special tokens in any case.

    Args:
      special_tokens: what the tokenizer would parse as one id, such as "<|im_end|>".
    """
    pattern = _foreign_pattern(tuple(special_tokens))
    # Special tokens may overlap each other, so one pass need not be enough; each pass uses up brackets.
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0].translate(_SAFE_BRACKETS), text)
    return text


@functools.lru_cache(maxsize=8)
def _foreign_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    for token in special_tokens:
        if "<" not in token and ">" not in token:
            cure = "use a tokenizer whose special tokens look like <|name|>"
            raise ConfigError(f"special token {token!r} has no angle bracket to replace; {cure}")
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join([_LOOSE_TAG, *map(re.escape, longest_first)]), re.IGNORECASE)


def wrap_observation(text: str) -> str:
    """The content of the user turn that carries an observation; `text` is neutralised and capped already."""
    return f"{OBSERVATION_OPEN} {text} {OBSERVATION_CLOSE}"


def cap_ids(ids: Sequence[int], limit: int, marker_ids: Sequence[int]) -> list[int]:
    """At most `limit` token ids: head and tail of a longer list with `marker_ids` between them."""
    if len(ids) <= limit:
        return list(ids)
    kept = limit - len(marker_ids)
    if kept <= 0:  # no room for both: the head says more than the marker
        return list(ids[:limit])
    tail = kept // 2
    return [*ids[: kept - tail], *marker_ids, *ids[len(ids) - tail :]]
