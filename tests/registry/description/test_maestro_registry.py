"""The paper's registries over HTTP: every skill makes the calls of its definition, and config alone extends them."""

import asyncio
import dataclasses
import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image

from configs.registry import maestro, out_of_domain
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.sandbox.interface import Limits, Ran, RanStatus
from maestro_jax.types import Call, Observation, Status
from tests.registry.servers import ChatServer, Seen, completion, response

MODELS = {
    "GLM-OCR": "ocr",
    "PR1-Qwen2.5-VL-3B-Detection": "detect",
    "DeepEyes-7B": "zoom",
}
FOUND = '[{"bbox_2d": [10, 20, 60, 90], "label": "cup"}, {"bbox_2d": [100, 20, 160, 90], "label": "cup"}]'


def reply(model: str, prompt: str) -> str:
    """What the model of a script says."""
    if model in ("PR1-Qwen2.5-VL-3B-Detection", "DeepEyes-7B"):
        return FOUND
    if prompt.startswith("Which type of chart"):
        return "<think>not a line</think>Bar."
    return f"{model} says {len(prompt)}"


@dataclasses.dataclass
class Log:
    """Who was asked what, in order; "run" stands for a program in the sandbox."""

    asked: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def add(self, model: str, prompt: str, images: int) -> None:
        role = MODELS.get(model, "caption" if prompt.startswith("Describe this picture") else "ask")
        self.asked.append((role if model != "sandbox" else "run", prompt, images))

    @property
    def roles(self) -> list[str]:
        return [role for role, _, _ in self.asked]


LOG = Log()


async def scripted(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """All models of a registry behind one loopback server."""
    (message,) = seen.fields["messages"]
    parts = (
        message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
    )
    (prompt,) = (part["text"] for part in parts if part["type"] == "text")
    LOG.add(seen.fields["model"], prompt, len(parts) - 1)
    writer.write(response(completion(reply(seen.fields["model"], prompt))))


class ScriptedSandbox:
    """Programs fail so many times, then pass."""

    name = "scripted"

    def __init__(self, failures: int = 0):
        self.failures = failures

    async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
        LOG.add("sandbox", files["program.py"].decode(), 0)
        self.failures -= 1
        if self.failures < 0:
            return Ran(f"{stdin.decode()} 1\n", "", RanStatus.OK, 0.5)
        return Ran("", "AssertionError", RanStatus.ERROR, 0.5)

    async def close(self) -> None: ...


@pytest.fixture(autouse=True)
def forget() -> None:
    LOG.asked.clear()


def served(raw: Any, url: str = "http://127.0.0.1:9/v1") -> RegistryConfig:
    """The registry with the same server behind every model; nothing is cached, so that calls can be counted."""
    entries = raw.to_dict()
    there = {"endpoints": (url,), "deterministic": False}
    return parse_registry(entries | {"experts": tuple(expert | there for expert in entries["experts"])})


def picture(width: int = 300, height: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()


def call(raw: Any, expert: str, skill: str, query: str = "look", images: int = 1, failures: int = 0) -> Observation:
    async def scenario() -> Observation:
        async with ChatServer(scripted) as server:
            registry = Registry(served(raw, server.url), sandbox=ScriptedSandbox(failures))
            try:
                pictures = tuple(picture(300 + i) for i in range(images))
                return await registry.call(Call(expert, skill, query), "the question", pictures, 30.0)
            finally:
                await registry.close()

    return asyncio.run(scenario())


# Skill (or parent with the query that leads to a child) → roles of the calls, those of a level in any order.
LEVELS = {
    "Geometric_Problem_Solver": (("caption", "ocr", "ask"), ("ask",), ("ask",), ("ask",)),
    "Chart_Problem_Solver": (("ocr",), ("ask",), ("ask",)),
    "Science_Problem_Solver": (("caption", "ocr", "zoom"), ("ask",)),
    "Counting_Problem_Solver": (("detect", "zoom"), ("ask",), ("ask",)),
    "Perception_Problem_Solver": (("zoom",), ("ask",)),
    "Code_Problem_Solver": (("ask", "ask"), ("run",)),
    "Text_Recognition": (("ocr", "zoom"), ("ask",)),
    "Formula_Recognition": (("ocr", "zoom"), ("ask",)),
    "Key_Information": (("ocr", "detect", "zoom"), ("ask",)),
    "Scene_Text_QA": (("ocr", "caption", "detect", "zoom"), ("ask",)),
    "Document_Chart_QA": (("ocr", "caption", "zoom"), ("ask",)),
    "Circle_Contact_Overlap": (("zoom",), ("ask",)),
    "Intersection_Route_Counting": (("zoom",), ("ask",)),
    "Grid_Structure": (("zoom",), ("ask",)),
    "Highlighted_Character": (("ocr", "zoom"), ("ask",)),
    "Shape_Counting": (("zoom",), ("ask",)),
    "Trajectory_Outcome": (("caption",), ("ask",)),
    "Action_Adjustment": (("caption",), ("ask",)),
    "Spatial_Mechanics": (("caption",), ("ask",)),
    "Pointing": (("caption", "ocr"), ("ask",)),
    "Multi_View": (("caption",), ("ask",)),
}
QUERIES = {
    "Text_Recognition": ("OCR_Problem_Solver", "What is written in the image?"),
    "Formula_Recognition": ("OCR_Problem_Solver", "Write the formula in LaTeX."),
    "Key_Information": ("OCR_Problem_Solver", "the total amount of this receipt"),
    "Scene_Text_QA": ("OCR_Problem_Solver", "the number of this ship"),
    "Document_Chart_QA": ("OCR_Problem_Solver", "Who is the author of this book?"),
    "Circle_Contact_Overlap": ("Diagram_Problem_Solver", "Are the two circles overlapping?"),
    "Intersection_Route_Counting": (
        "Diagram_Problem_Solver",
        "How many intersection points have the blue and red lines?",
    ),
    "Grid_Structure": ("Diagram_Problem_Solver", "Count the rows and columns."),
    "Highlighted_Character": ("Diagram_Problem_Solver", "Which letter is being circled?"),
    "Shape_Counting": ("Diagram_Problem_Solver", "How many pentagons are there?"),
    "Trajectory_Outcome": ("Embodied_Scene_QA", "Where does it end if it follows the trajectory?"),
    "Action_Adjustment": ("Embodied_Scene_QA", "How must the gripper rotate to align?"),
    "Spatial_Mechanics": ("Embodied_Scene_QA", "Which cup is closest?"),
    "Pointing": ("Embodied_Scene_QA", "Which labeled dot is on the cup?"),
    "Multi_View": ("Embodied_Scene_QA", "Which dots correspond?"),
}


def test_every_skill_has_its_calls_told() -> None:
    config = served(out_of_domain.get_registry())
    assert {skill.name for skill in config.skills if skill.stages} == set(LEVELS)
    assert {skill.name for skill in config.skills if skill.tier == 2} == set(QUERIES)


@pytest.mark.parametrize("name", LEVELS)
def test_a_skill_makes_the_calls_of_its_definition(name: str) -> None:
    skill, query = QUERIES.get(name, (name, "look"))
    images = 2 if name == "Multi_View" else 1
    observation = call(out_of_domain.get_registry(), "Step3-VL-10B", skill, query, images)
    assert observation.status is Status.OK and observation.text
    made = LOG.roles
    for level in LEVELS[name]:
        level = tuple(role for role in level for _ in range(images if role in ("caption", "ocr") else 1))
        assert Counter(made[: len(level)]) == Counter(level)
        made = made[len(level) :]
    assert not made


@pytest.mark.parametrize(("failures", "asked", "ran"), [(0, 2, 1), (1, 3, 2), (3, 5, 4), (9, 5, 4)])
def test_a_program_is_repaired_three_times_at_most(failures: int, asked: int, ran: int) -> None:
    observation = call(out_of_domain.get_registry(), "Qwen3.5-9B", "Code_Problem_Solver", failures=failures)
    assert (LOG.roles.count("ask"), LOG.roles.count("run")) == (asked, ran)
    assert ("passes" in observation.text) == (failures <= 3)
    assert ("AssertionError" in observation.text) == (failures > 3)  # the last attempt is told as it is


def test_what_a_stage_sees() -> None:
    call(maestro.get_registry(), "Qwen3-VL-8B-Instruct", "Counting_Problem_Solver")
    listing = LOG.asked[-2][1]
    assert "1. cup [" in listing and "2. cup [" in listing
    assert [images for _, _, images in LOG.asked[-2:]] == [4, 4]  # picture, drawn boxes, two crops


def test_the_chart_type_selects_the_rules() -> None:
    call(maestro.get_registry(), "Chart-R1", "Chart_Problem_Solver")
    assert "take its height from the axis" in LOG.asked[-1][1]


def test_models_behind_services_are_not_for_the_policy() -> None:
    config = served(maestro.get_registry())
    prompt = render_system_prompt(config, 4)
    assert [line for line in prompt.splitlines() if "GLM-OCR" in line or "DeepEyes" in line] == []
    assert str(config.resolve("GLM-OCR", "Chart_Problem_Solver")).startswith(
        'Unknown expert "GLM-OCR". Experts: Intern'
    )


def test_the_second_registry_extends_the_first() -> None:
    first, second = (served(module.get_registry()) for module in (maestro, out_of_domain))
    assert second.experts[: len(first.experts)] == first.experts
    assert second.skills[: len(first.skills)] == first.skills and second.services == first.services
    new = [expert.name for expert in second.shown_experts[len(first.shown_experts) :]]
    assert new == ["Qwen3.5-9B", "Step3-VL-10B"]


def test_an_expert_of_six_lines_and_a_skill_of_one_entry_run_by_config_alone() -> None:
    raw = maestro.get_registry()
    raw.experts += (
        {
            "name": "My-Expert",
            "description": "maps",
            "endpoints": ("http://127.0.0.1:8000/v1",),
            "model": "my-model",
        },
    )
    raw.skills += (
        {
            "name": "Map_Problem_Solver",
            "description": "reads a map",
            "stages": (
                maestro.OCR,
                *maestro.zoom(),
                maestro.ask("answer", "Read the map.", maestro.WRITING, maestro.ASKED),
            ),
        },
    )
    raw.skills[-1]["stages"][-1]["images"] = ("task", "crops")
    observation = call(raw, "My-Expert", "Map_Problem_Solver")
    assert observation.text.startswith("my-model says") and sorted(LOG.roles) == ["ask", "ocr", "zoom"]
