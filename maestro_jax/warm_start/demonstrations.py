"""What a warm start learns from: written episodes, as token ids of which some are a policy's own.

A user's own come from JSONL files in the usual shape of chat data, one episode a line:

    {"messages": [{"role": "user", "content": "How many circles?"},
                  {"role": "assistant", "content": "<search> Tally@@Counting: circles </search>"},
                  {"role": "tool", "content": "There are 3."},
                  {"role": "assistant", "content": "<answer> 3 </answer>"}],
     "images": ["a/1.png"]}

Every turn is held against the grammar and the budgets of the run (`rollout/protocol.py`). Observations pass through the
exchange, so that an episode has the ids that a rollout of it would have. A thought stands in its tags in the content,
or in "reasoning_content"; where the chat template opens thoughts, the opening tag goes into the header of the turn.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from maestro_jax.data.jsonl import JsonLines, read_image
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row, describe
from maestro_jax.data.source import OnDemand
from maestro_jax.errors import DataError, UserError
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster, preemption
from maestro_jax.policy.prompts import Prompts
from maestro_jax.rollout import protocol
from maestro_jax.rollout.exchange import NO_CALLS_LEFT, Exchange
from maestro_jax.types import Observation, Status, StopReason, Task

FIELDS = ("messages", "images")
SOURCE = "demonstrations"  # of tasks that nobody grades
_TURN = "write a thought in think tags or none, then one search call or one answer in its tags, and nothing behind it"
_DATA_URL = ";base64,"


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One written episode: token ids and which of them a policy would have authored."""

    task: Task
    ids: tuple[int, ...]
    authored: tuple[bool, ...]


Written = tuple[tuple[int, ...], tuple[bool, ...]]  # ids, and which of them are the policy's


def as_ids(pieces: Iterable[tuple[Sequence[int], bool]]) -> Written:
    """Ids behind each other, of turns (True) and observations (False)."""
    marked = [(token, by_policy) for piece, by_policy in pieces for token in piece]
    return tuple(token for token, _ in marked), tuple(by_policy for _, by_policy in marked)


class Demonstrations(OnDemand[Demonstration]):
    """A demonstration of each task. Process 0 writes for all; tasks are read whenever a demonstration is asked for.

    Attributes:
      authored: how many tokens of each are the policy's, which is known without reading its task.
      digest: of the rows that they were read from; empty for others than a user's own.
    """

    def __init__(self, tasks: Sequence[Task], write: Callable[[], Iterable[Written]], digest: str = ""):
        told = cluster.from_main(lambda: list(write()))
        written = [(tuple(ids), tuple(own)) for ids, own in told]
        super().__init__(range(len(tasks)), lambda number: Demonstration(tasks[number], *written[number]))
        self.authored = [sum(own) for _, own in written]
        self.digest = digest


# ---- a user's own ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chat:
    """A row as it was read, before it is known whether a policy could have written it.

    Attributes:
      turns: the policy's texts, each with the field it stands in; between two of them is an observation.
      observations: one less.
    """

    task: Task
    turns: tuple[tuple[str, str], ...]
    observations: tuple[tuple[str, str], ...]


def open_demonstrations(
    paths: Sequence[str], image_root: str, exchange: Exchange, prompts: Prompts, progress: Progress
) -> Demonstrations:
    """A user's own demonstrations; all are checked before the first is trained on.

    Args:
      paths: JSONL files.
      image_root: folder that image paths start from; empty allows inline images only.

    Raises:
      DataError: no row, or one that no policy could have written in this run; names file, line, field and cure.
    """
    lines = JsonLines(paths)
    if not len(lines):
        raise DataError(f"{', '.join(paths)} holds no demonstration; write one JSON object a line")
    root = open_root(image_root, "config.warm_start.image_root") if image_root else None
    tasks = OnDemand(range(len(lines)), lambda number: read_chat(*lines.read(number), root).task)

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for text, _, _ in lines.texts():
            found.update(text.strip() + b"\n")
        return found.hexdigest()

    def write() -> Iterable[Written]:
        progress.phase("demonstrations", len(lines))
        for number in range(len(lines)):
            preemption.check()
            row, name = lines.read(number)
            chat = read_chat(row, name, root)
            try:
                prompts.batch([chat.task])
            except UserError as error:  # too long, too many images, or one that cannot be decoded
                raise DataError(f"{row.where}: {error}") from error
            yield write_chat(chat, row, exchange)
            progress.tick(number + 1)

    return Demonstrations(tasks, write, cluster.from_main(digest))


def read_chat(row: Row, name: str, image_root: ImageRoot | None) -> Chat:
    """Who said what, in the order that an episode has.

    Raises:
      DataError: another order, other roles, contents that are no text, images that are none.
    """
    row.refuse_misspelt(FIELDS)
    messages = row.values("messages", list)
    start = 1 if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system" else 0
    said: list[tuple[str, str]] = []
    images: tuple[bytes, ...] = ()
    for number, message in enumerate(messages[start:]):
        field = f"messages[{start + number}]"
        if not isinstance(message, dict):
            raise row.error(field, f'expected {{"role": ..., "content": ...}}, found {describe(message)}; correct it')
        expected = ("assistant",) if number % 2 else ("user", "tool") if number else ("user",)
        if (role := message.get("role")) not in expected:
            shown = repr(role) if role in ("system", "user", "assistant", "tool") else describe(role)
            cure = "a question, then turns of the assistant with one observation between two of them"
            raise row.error(f"{field}.role", f"expected {' or '.join(expected)}, found {shown}; write {cure}")
        if message.get("tool_calls"):
            cure = f"write the call as content: {protocol.CALL_OPEN} Expert@@Skill: query {protocol.CALL_CLOSE}"
            raise row.error(f"{field}.tool_calls", f"are not read; {cure}")
        text, shown_images = _content(row, f"{field}.content", message.get("content"))
        if number % 2 and (thought := message.get("reasoning_content")):
            thought = row.text_of(thought, f"{field}.reasoning_content").strip("\n")
            text = f"{protocol.THINK_OPEN}\n{thought}\n{protocol.THINK_CLOSE}\n\n{text}"
        if number == 0:
            images = _images(row, shown_images, image_root)
        elif shown_images:
            raise row.error(f"{field}.content", "shows an image, which only the question can; remove it")
        said.append((f"{field}.content", text))
    if not said or len(said) % 2:
        raise row.error("messages", "end without a turn of the assistant; add the answer, or remove the row")
    task = Task(name, said[0][1], images, (), SOURCE)
    return Chat(task, tuple(said[1::2]), tuple(said[2::2]))


def _content(row: Row, field: str, content: Any) -> tuple[str, list[Any]]:
    """The text of a message, and an entry for each image that its parts show; None for the next of `images`."""
    if not isinstance(content, list):
        return row.text_of(content, field), []
    texts, shown = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            shown.append(part.get("image"))
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            shown.append(part["image_url"].get("url"))
        else:
            cure = 'write {"type": "text", "text": ...} or {"type": "image"}'
            raise row.error(f"{field}[{number}]", f"is neither a text nor an image; {cure}")
    return row.text_of("".join(texts), field), shown


def _images(row: Row, shown: Sequence[Any], image_root: ImageRoot | None) -> tuple[bytes, ...]:
    """Those of the question, in their order: what its parts hold, else the next of the row's `images`."""
    listed = row.values("images", list) if row.has("images") else []
    places = shown or [None] * len(listed)
    if (wanted := sum(place is None for place in places)) != len(listed):
        raise row.error("images", f"holds {len(listed)}, the question shows {wanted} of them; correct one of the two")
    rest = iter(enumerate(listed))
    found = []
    for number, place in enumerate(places):
        position, entry = next(rest) if place is None else (number, place)
        field = f"images[{position}]" if place is None else f"messages, image {position}"
        found.append(read_image(row, field, _inline(entry), image_root))
    return tuple(found)


def _inline(entry: Any) -> Any:
    """A data URL as base64 bytes; anything else as it is."""
    if isinstance(entry, str) and entry[:5] == "data:" and _DATA_URL in entry[:64]:
        return {"bytes": entry.partition(_DATA_URL)[2]}
    return entry


def write_chat(chat: Chat, row: Row, exchange: Exchange) -> Written:
    """The ids of an episode: turns as a policy writes them, observations as the exchange frames them.

    Raises:
      DataError: a turn that breaks the grammar, a name that the registry does not have, a budget that does not hold.
    """
    tokens, limits = exchange.tokens, exchange.config
    pieces: list[tuple[Sequence[int], bool]] = []
    for number, (field, text) in enumerate(chat.turns):
        if special := next((special for special in tokens.special_texts if special in text), ""):
            raise row.error(field, f"holds the special token {special!r}, which no turn has as text; remove it")
        ids = tokens.encode(protocol.inside_thought(text) if exchange.in_thought else text)
        is_last = number == len(chat.turns) - 1
        parsed = protocol.parse_turn(tokens.decode(ids), StopReason.CALL, exchange.resolver, exchange.in_thought)
        if parsed.kind is protocol.TurnKind.MALFORMED:
            raise row.error(field, f"is no turn: {parsed.error} Correct it, or remove the row")
        if not parsed.well_formed:
            raise row.error(field, f"does not keep the format; {_TURN}")
        if (parsed.kind is protocol.TurnKind.ANSWER) != is_last:
            problem = "ends with a call" if is_last else "answers before the last turn"
            raise row.error(field, f"{problem}; end the episode with its one answer")
        if number >= limits.max_calls and not is_last:
            cure = f"set config.rollout.max_calls={len(chat.turns) - 1}, or remove the row"
            raise row.error(field, f"is call {number + 1} of an episode that may have {limits.max_calls}; {cure}")
        if len(ids) > limits.turn_budget:
            cure = f"set config.rollout.turn_budget={len(ids)} or more, or shorten it"
            raise row.error(field, f"has {len(ids)} tokens, the budget of a turn is {limits.turn_budget}; {cure}")
        pieces.append((ids, True))
        if not is_last:
            field, told = chat.observations[number]
            told = _unframed(told)
            if exchange.cuts(told):
                cure = f"raise config.rollout.observation_tokens={limits.observation_tokens}, or shorten it"
                raise row.error(field, f"has more tokens than an observation may; {cure}")
            is_last_call = number + 1 >= limits.max_calls
            pieces.append((exchange.observation_ids(Observation(told, Status.OK), is_last_call), False))
    if (total := sum(len(ids) for ids, _ in pieces)) > limits.room:
        cure = "set config.rollout.room=0, which is computed, or remove the row"
        raise row.error("messages", f"have {total} tokens, an episode has room for {limits.room}; {cure}")
    return as_ids(pieces)


def _unframed(text: str) -> str:
    """An observation without the tags, and what may follow them, that a rollout writes around it."""
    inside = text.removesuffix(NO_CALLS_LEFT.strip()).rstrip()
    if text.startswith(protocol.OBSERVATION_OPEN) and inside.endswith(protocol.OBSERVATION_CLOSE):
        return inside[len(protocol.OBSERVATION_OPEN) : -len(protocol.OBSERVATION_CLOSE)].strip()
    return text
