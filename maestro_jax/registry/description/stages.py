"""The stages that a skill is composed of, as data, and what each gives to those after it.

A stage writes one output under its name. What an output holds has a type (`Kind`), and a stage says which outputs it
needs as what, so that a pipeline is checked before a run and stages that do not need each other run together.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
INPUTS = ("question", "query")  # placeholders that every stage may use
OTHER = "other"  # the template used when no key of `prompts` matches
TASK_IMAGES = "task"
NO_IMAGES = "none"
MOST_ROUNDS = 3  # of repair


class Kind(enum.Enum):
    """What an output holds; the value is how errors call it."""

    TEXT = "text"
    IMAGES = "images"
    BOXES = "boxes"
    PROGRAM = "a program"


Need = tuple[str, Kind]


@dataclasses.dataclass(frozen=True)
class ServiceStage:
    """Runs a service. Gives what the service gives: text, with images or boxes.

    Attributes:
      output: the name under which later stages find what it gives.
      images: "task" and outputs with images, in the order in which they are shown.
      text: template of the text the service gets. Leave it empty where only the images matter: replies
        are cached by images and text, and a query in the text makes every call a new one.
    """

    service: str
    output: str
    images: tuple[str, ...] = (TASK_IMAGES,)
    text: str = ""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*_texts([self.text]), *_pictures(self.images))


@dataclasses.dataclass(frozen=True)
class AskStage:
    """Asks the called expert. Gives text.

    Attributes:
      images: "task" and outputs with images, in the order in which they are shown.
      prompt: template of what is asked, or in its place
      by, prompts: the output (or input) whose text says which of several templates: the one whose key it equals or
        alone contains as words, "other" where there is none.
    """

    output: str
    images: tuple[str, ...] = (TASK_IMAGES,)
    prompt: str = ""
    by: str = ""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def needs(self) -> tuple[Need, ...]:
        by = [f"{{{self.by}}}"] if self.by else []
        return (*_texts([*by, self.prompt, *self.prompts.values()]), *_pictures(self.images))


@dataclasses.dataclass(frozen=True)
class ParseStage:
    """Reads what an expert wrote in an ask stage.

    Attributes:
      text: the ask stage's output.
      into: "boxes", in the expert's own frame and in the pictures it was shown (`boxes.read_boxes`), or "program".
    """

    text: str
    output: str
    into: str

    @property
    def needs(self) -> tuple[Need, ...]:
        return ((self.text, Kind.TEXT),)


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Cuts boxes out of the pictures they were found in. Gives images; none where there are no boxes.

    Attributes:
      margin: added on each side, as a share of the box.
      most: crops at most.
    """

    boxes: str
    output: str
    margin: float = 0.1
    most: int = 4

    @property
    def needs(self) -> tuple[Need, ...]:
        return ((self.boxes, Kind.BOXES),)


@dataclasses.dataclass(frozen=True)
class DrawStage:
    """Draws boxes, numbered, on the pictures they were found in. Gives images."""

    boxes: str
    output: str

    @property
    def needs(self) -> tuple[Need, ...]:
        return ((self.boxes, Kind.BOXES),)


@dataclasses.dataclass(frozen=True)
class RunStage:
    """Runs a program with its tests in the sandbox; while they fail, the expert repairs it. Gives text.

    The text is the last program in a fence and a line that says whether it passed (`sandbox/tested.py`).

    Attributes:
      program, tests: outputs with programs; the tests are assert statements. If none is reached, there is no verdict.
      repair: template of what the expert is asked; besides the usual placeholders, {program} and {error} are the last
        attempt and what became of it.
      rounds: repairs at most.
      images: shown with the repair.
    """

    program: str
    tests: str
    repair: str
    output: str
    rounds: int = MOST_ROUNDS
    images: tuple[str, ...] = (TASK_IMAGES,)

    @property
    def needs(self) -> tuple[Need, ...]:
        asked = [need for need in _texts([self.repair]) if need[0] not in ("program", "error")]
        return ((self.program, Kind.PROGRAM), (self.tests, Kind.PROGRAM), *asked, *_pictures(self.images))


Stage = ServiceStage | AskStage | ParseStage | CropStage | DrawStage | RunStage

STAGES: dict[str, type[Stage]] = {
    "service": ServiceStage,
    "ask": AskStage,
    "parse": ParseStage,
    "crop": CropStage,
    "draw": DrawStage,
    "run": RunStage,
}

PARSED = {"boxes": frozenset({Kind.TEXT, Kind.BOXES}), "program": frozenset({Kind.TEXT, Kind.PROGRAM})}


def gives(stage: Stage, of_service: frozenset[Kind]) -> frozenset[Kind]:
    """What the output of `stage` holds; `of_service` is what the stage's service gives, where it has one."""
    if isinstance(stage, ServiceStage):
        return of_service
    if isinstance(stage, ParseStage):
        return PARSED[stage.into]
    return frozenset({Kind.IMAGES if isinstance(stage, CropStage | DrawStage) else Kind.TEXT})


def uses(stage: Stage) -> frozenset[str]:
    """Names of the outputs that `stage` needs."""
    return frozenset(name for name, _ in stage.needs)


def placeholders(template: str) -> list[str]:
    return PLACEHOLDER.findall(template)


def _texts(templates: Iterable[str]) -> list[Need]:
    names = dict.fromkeys(name for template in templates for name in placeholders(template) if name not in INPUTS)
    return [(name, Kind.TEXT) for name in names]


def _pictures(images: tuple[str, ...]) -> list[Need]:
    return [(name, Kind.IMAGES) for name in images if name != TASK_IMAGES]
