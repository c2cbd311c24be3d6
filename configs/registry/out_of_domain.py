"""The paper's registry with the experts and skills that a policy trained without them meets later.

Two more experts, and skills for programs from pictures (HumanEval-V), reading (OCRBench), synthetic diagrams
(VLMsAreBlind) and robots' scenes (ERQA). Three of them choose one of five tier-2 skills by keywords; give them a
`choose` template, and the called expert chooses.
"""

from ml_collections import ConfigDict

from configs.registry import maestro
from configs.registry.maestro import (
    ASKED,
    CAPTION,
    CLOSER,
    DESCRIPTION,
    DETECT,
    DRAW,
    FINISH,
    OBJECTS,
    OCR,
    PER_MILLE,
    WRITING,
    Entry,
    ask,
    zoom,
)


def get_registry() -> ConfigDict:
    return ConfigDict({"experts": experts(), "services": maestro.services(), "skills": skills()})


def experts() -> tuple[Entry, ...]:
    return (
        *maestro.experts(),
        {
            "name": "Qwen3.5-9B",
            "description": "reading, programming, reasoning about space",
            "endpoints": ("http://127.0.0.1:2390/v1",),
            "model": "Qwen3.5-9B",
            "frame": PER_MILLE,
        },
        {
            "name": "Step3-VL-10B",
            "description": "documents, diagrams and robots' scenes",
            "endpoints": ("http://127.0.0.1:2391/v1",),
            "model": "Step3-VL-10B",
        },
    )


def skills() -> tuple[Entry, ...]:
    return (*maestro.skills(), code(), *reading(), *diagrams(), *scenes())


def child(name: str, description: str, keywords: tuple[str, ...], *stages: Entry, several_images: int = 0) -> Entry:
    return {
        "name": name,
        "description": description,
        "tier": 2,
        "keywords": keywords,
        "stages": stages,
        "several_images": several_images,
    }


# ---- programs ----------------------------------------------------------------------------------------------


def code() -> Entry:
    only = "Reply with one block of Python in a fence and nothing else."
    return {
        "name": "Code_Problem_Solver",
        "description": "writes a function that the picture explains and tests it",
        "stages": (
            ask(
                "examples",
                "The picture shows at least one example of what the function below must do. Turn each into an assert "
                f"statement that calls the function with the values you see. {only}",
                ASKED,
            ),
            {"kind": "parse", "text": "examples", "output": "tests", "into": "program"},
            ask(
                "draft",
                "Work out from the picture what the function below must do, and write it, with its signature as it "
                f"stands and everything it imports, without tests. {only}",
                ASKED,
            ),
            {"kind": "parse", "text": "draft", "output": "program", "into": "program"},
            {
                "kind": "run",
                "program": "program",
                "tests": "tests",
                "output": "answer",
                "repair": "This program fails its tests. Look at the picture again: is the idea wrong, or the way it "
                f"is written? Write all of it anew, with the same signature. {only}\nProgram:\n{{program}}\n"
                f"Tests:\n{{tests}}\nWhat happened:\n{{error}}\n{ASKED}",
            },
        ),
    }


# ---- reading -----------------------------------------------------------------------------------------------


def reading() -> tuple[Entry, ...]:
    close = ("task", "crops")
    boxed = ("task", "drawn", "crops")
    return (
        {
            "name": "OCR_Problem_Solver",
            "description": "reads words, formulas, forms, signs and documents",
            # The first of these is taken where no keyword occurs.
            "children": (
                "Scene_Text_QA",
                "Text_Recognition",
                "Formula_Recognition",
                "Key_Information",
                "Document_Chart_QA",
            ),
        },
        child(
            "Text_Recognition",
            "one word or line, letter by letter",
            ("written in the image", "number in the image", "word in the image", "text in the image", "transcribe"),
            OCR,
            *zoom("The line of text, close enough to tell O from 0, I from 1 and S from 5."),
            ask("answer", f"Read the text letter by letter. {CLOSER} {FINISH}", WRITING, ASKED, images=close),
        ),
        child(
            "Formula_Recognition",
            "a formula as LaTeX",
            ("formula", "equation", "expression", "latex", "mathematical"),
            OCR,
            *zoom("The formula with all fraction bars, roots, exponents and indices."),
            ask(
                "answer",
                f"Write the formula as LaTeX. {CLOSER} Take its structure from the picture: what stands above, below, "
                "inside what. The last line holds the LaTeX alone.",
                WRITING,
                ASKED,
                images=close,
            ),
        ),
        child(
            "Key_Information",
            "the value of a field in a form or receipt",
            (
                "total",
                "receipt",
                "invoice",
                "company",
                "address",
                "date",
                "issued",
                "per serving",
                "value for",
                "nutrition",
                "protein",
                "sodium",
                "calories",
                "fat",
            ),
            OCR,
            DETECT,
            DRAW,
            *zoom("The field that is asked for, with its value."),
            ask(
                "answer",
                f"Find the field that is asked for and copy its value, character by character. {CLOSER} {FINISH}",
                WRITING,
                OBJECTS,
                ASKED,
                images=boxed,
            ),
        ),
        child(
            "Scene_Text_QA",
            "writing on things: signs, shirts, shops",
            ("sign", "shirt", "boat", "store", "shop", "street", "bus", "brand", "written on", "name of this"),
            OCR,
            CAPTION,
            DETECT,
            DRAW,
            *zoom("The thing the question names, and the writing on it."),
            ask(
                "answer",
                f"Find the thing that is asked about, then read what is written on it. {CLOSER} {FINISH}",
                WRITING,
                DESCRIPTION,
                OBJECTS,
                ASKED,
                images=boxed,
            ),
        ),
        child(
            "Document_Chart_QA",
            "pages, tables, charts, book covers",
            (
                "chart",
                "table",
                "graph",
                "document",
                "page",
                "calendar",
                "book",
                "author",
                "title",
                "year",
                "percentage",
                "million",
                "population",
                "country",
            ),
            OCR,
            CAPTION,
            *zoom("The heading, cell, axis or legend that decides the answer."),
            ask(
                "answer",
                f"Find the row, column, axis or heading that the question means and read the answer there. {CLOSER} "
                f"{FINISH}",
                WRITING,
                DESCRIPTION,
                ASKED,
                images=close,
            ),
        ),
    )


# ---- diagrams ----------------------------------------------------------------------------------------------


def diagrams() -> tuple[Entry, ...]:
    def looked_at(name: str, description: str, keywords: tuple[str, ...], focus: str, rule: str) -> Entry:
        answer = ask("answer", f"{rule} {CLOSER} {FINISH}", ASKED, images=("task", "crops"))
        return child(name, description, keywords, *zoom(focus), answer)

    return (
        {
            "name": "Diagram_Problem_Solver",
            "description": "drawn circles, lines, grids and letters",
            "children": (
                "Shape_Counting",
                "Circle_Contact_Overlap",
                "Intersection_Route_Counting",
                "Grid_Structure",
                "Highlighted_Character",
            ),
        },
        looked_at(
            "Circle_Contact_Overlap",
            "whether two circles touch or overlap",
            ("overlap", "overlapping", "touching", "two circles"),
            "The narrowest place between the two circles.",
            "Judge the edges of both circles: apart (ground shows between them), touching (the edges meet), or "
            "overlapping (they share an area).",
        ),
        looked_at(
            "Intersection_Route_Counting",
            "how often lines cross, how many routes join two stations",
            (
                "intersection",
                "intersect",
                "cross",
                "lines",
                "path",
                "paths",
                "route",
                "routes",
                "single-color",
                "go from",
            ),
            "Where lines come together, or the two named stations with the lines between them.",
            "For crossings, go along one line and count where the other truly meets it. For routes, start at one "
            "station, follow one colour to the other station, and count those that arrive.",
        ),
        looked_at(
            "Grid_Structure",
            "rows and columns of a grid or table",
            ("rows", "columns", "row", "column", "grid", "cells", "table"),
            "The upper left corner of the grid, with its border and first dividing lines.",
            "Count the spaces between horizontal lines for rows and between vertical lines for columns, not the lines.",
        ),
        child(
            "Highlighted_Character",
            "the letter inside a circle or oval",
            ("letter", "character", "circled", "highlighted", "oval"),
            OCR,
            *zoom("The oval and the letter in it."),
            ask(
                "answer",
                f"Spell the word, find where the oval stands, and name the letter in it. {CLOSER} {FINISH}",
                WRITING,
                ASKED,
                images=("task", "crops"),
            ),
        ),
        looked_at(
            "Shape_Counting",
            "how many circles, squares or pentagons",
            ("how many circles", "circles", "pentagons", "squares", "shapes", "nested", "count"),
            "The part where shapes lie close together or within each other.",
            "Count whole outlines from the outside in and from left to right; overlapping and nested ones count each.",
        ),
    )


# ---- robots' scenes ----------------------------------------------------------------------------------------


def scenes() -> tuple[Entry, ...]:
    def described(
        name: str, description: str, keywords: tuple[str, ...], rule: str, *more: Entry, several_images: int = 0
    ) -> Entry:
        writing = [WRITING] if more else []
        answer = ask("answer", f"{rule} {FINISH}", DESCRIPTION, *writing, ASKED)
        return child(name, description, keywords, CAPTION, *more, answer, several_images=several_images)

    return (
        {
            "name": "Embodied_Scene_QA",
            "description": "robots' scenes: movements, places, several views",
            "children": (
                "Spatial_Mechanics",
                "Trajectory_Outcome",
                "Action_Adjustment",
                "Pointing",
                "Multi_View",
            ),
        },
        described(
            "Trajectory_Outcome",
            "where a drawn movement leads",
            ("trajectory", "path", "follow", "arrow", "trace", "move along", "line"),
            "Name what moves, follow the drawn way from start to end, and say what is then the case.",
        ),
        described(
            "Action_Adjustment",
            "which movement is needed next",
            (
                "adjust",
                "align",
                "correct",
                "rotate",
                "clockwise",
                "counterclockwise",
                "gripper",
                "end effector",
                "insert",
                "move left",
                "move right",
                "move up",
                "move down",
                "next action",
            ),
            "Compare where gripper and target are with where they have to be, and name the smallest movement that "
            "brings them there, seen from the camera unless another view is named.",
        ),
        described(
            "Spatial_Mechanics",
            "places of things, and how parts move",
            (
                "left",
                "right",
                "front",
                "behind",
                "between",
                "inside",
                "closest",
                "nearest",
                "farthest",
                "hinge",
                "handle",
                "drawer",
                "knob",
                "open",
                "closed",
            ),
            "Fix the point of view first, then judge place, distance and order; for parts, say where they are fastened "
            "and how they can turn or slide.",
        ),
        described(
            "Pointing",
            "which marked point or part is meant",
            (
                "point",
                "points",
                "dot",
                "marker",
                "label",
                "labeled",
                "coordinate",
                "corner",
                "edge",
                "pixel",
                "which part",
            ),
            "Find every mark with its letter or number, say what each one lies on, and only then choose.",
            OCR,
        ),
        described(
            "Multi_View",
            "the same scene in several pictures",
            ("first image", "second image", "image 1", "image 2", "views", "view", "correspond", "same", "which image"),
            "Say what each picture shows, find what the pictures have in common, and carry the answer from one to the "
            "other.",
            several_images=2,
        ),
    )
