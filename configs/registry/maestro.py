"""The registry of the paper (arXiv 2605.22177): its experts and services, and the skills it trains with.

Every model is served by you, one OpenAI-compatible server each, on the ports that the authors' skills expect; other
hosts and keys are a matter of `endpoints` and `key`. `python -m maestro_jax.doctor` says what is missing. Prices are
left at 0: what a server of your own costs is yours to write in. Templates are our wording.
"""

from typing import Any

from ml_collections import ConfigDict

Entry = dict[str, Any]

ASKED = "Question: {question}\nLook for: {query}"
FINISH = "End with one line that holds the answer alone, in the form the question asks for."
PLACES = "Numbers in brackets are left, top, right, bottom in thousandths of the picture's width and height."
CLOSER = "Where further pictures follow the first, they are enlarged parts of it."

# Box coordinates, by the family a model was trained from (registry/description/boxes.py).
PER_MILLE = {"kind": "relative", "full": 1000.0}
QWEN_2_5_PIXELS = {"kind": "resized", "multiple": 28, "min_pixels": 3136, "max_pixels": 12_845_056}


def get_registry() -> ConfigDict:
    return ConfigDict({"experts": experts(), "services": services(), "skills": skills()})


# ---- experts and services ----------------------------------------------------------------------------------


def experts() -> tuple[Entry, ...]:
    return (
        {
            "name": "Intern-S1-mini",
            "description": "natural science: biology, chemistry, physics, earth science",
            "endpoints": ("http://127.0.0.1:2368/v1",),
            "model": "Intern-S1-mini",
            "frame": PER_MILLE,
        },
        {
            "name": "GLM-4.6V-Flash",
            "description": "mathematics and fine visual detail",
            "endpoints": ("http://127.0.0.1:2376/v1",),
            "model": "GLM-4.6V-Flash",
            "frame": PER_MILLE,
        },
        {
            "name": "Qwen3-VL-8B-Instruct",
            "description": "finding and counting objects; general questions about pictures",
            "endpoints": ("http://127.0.0.1:2362/v1",),
            "model": "qwen3-VL-8B-Instruct",
            "frame": PER_MILLE,
        },
        {
            "name": "Chart-R1",
            "description": "charts: reading values and computing with them",
            "endpoints": ("http://127.0.0.1:2364/v1",),
            "model": "Chart-R1",
            "frame": QWEN_2_5_PIXELS,
        },
        {
            "name": "medgemma-1.5-4b-it",
            "description": "medicine: scans, X-rays, tissue, clinical knowledge",
            "endpoints": ("http://127.0.0.1:2369/v1",),
            "model": "medgemma-1.5-4b-it",
        },
        behind_a_service("GLM-OCR", 2388),
        behind_a_service("PR1-Qwen2.5-VL-3B-Detection", 2389, QWEN_2_5_PIXELS),
        behind_a_service("DeepEyes-7B", 2370, QWEN_2_5_PIXELS),
    )


def behind_a_service(model: str, port: int, frame: Entry | None = None) -> Entry:
    """A model that the policy cannot call: a service asks it."""
    return {
        "name": model,
        "description": "helps skills",
        "endpoints": (f"http://127.0.0.1:{port}/v1",),
        "model": model,
        "shown": False,
        "frame": frame or {},
    }


def services() -> tuple[Entry, ...]:
    return (
        {"name": "ocr", "expert": "GLM-OCR", "prompt": "Text Recognition:"},  # the words that GLM-OCR was trained with
        {
            "name": "caption",
            "expert": "Qwen3-VL-8B-Instruct",  # the authors asked a hosted model
            "prompt": "Describe this picture in full: what kind of picture it is, what is in it and where, how the "
            "parts relate, and all writing, numbers and symbols. Do not guess and do not interpret.",
        },
        {
            "name": "detect",
            "expert": "PR1-Qwen2.5-VL-3B-Detection",
            "prompt": "Find every object in this picture that can be told apart from its neighbours. Write a JSON list "
            'with one {"bbox_2d": [left, top, right, bottom], "label": "what it is"} for each, and nothing else.',
            "parse": "boxes",
        },
        {
            "name": "zoom",
            "expert": "DeepEyes-7B",
            "prompt": "{text}\nWhich part of this picture has to be seen closer to answer that? Write JSON and nothing "
            'else: {"bbox_2d": [left, top, right, bottom], "label": "what it shows"} for the one part, a list of these '
            "where it takes several, or [] where the whole picture shows enough.",
            "parse": "boxes",
        },
    )


# ---- what skills are made of -------------------------------------------------------------------------------


def ask(output: str, *lines: str, images: tuple[str, ...] = ("task",)) -> Entry:
    return {"kind": "ask", "output": output, "images": images, "prompt": "\n".join(lines)}


def run(service: str, output: str, text: str = "") -> Entry:
    return {"kind": "service", "service": service, "output": output, "text": text}


OCR = run("ocr", "ocr")
CAPTION = run("caption", "caption")
DETECT = run("detect", "objects")
DRAW = {"kind": "draw", "boxes": "objects", "output": "drawn"}
WRITING = "Writing found in the picture (it may be misread):\n{ocr}"
DESCRIPTION = "A description by another model (it may be wrong):\n{caption}"
OBJECTS = (
    f"Objects found by a detector, numbered as in the picture with boxes (some may be missing):\n{{objects}}\n{PLACES}"
)


def zoom(focus: str = "") -> tuple[Entry, Entry]:
    """Crops of what the question is about; their output is "crops"."""
    return (
        run("zoom", "regions", f"{ASKED}\n{focus}".rstrip()),
        {"kind": "crop", "boxes": "regions", "output": "crops"},
    )


# ---- skills ------------------------------------------------------------------------------------------------


def skills() -> tuple[Entry, ...]:
    return (geometry(), charts(), science(), counting(), perception())


def geometry() -> Entry:
    facts = "What is drawn in the figure:\n{facts}"
    setting = "The problem, as agreed on from all sources:\n{setting}"
    return {
        "name": "Geometric_Problem_Solver",
        "description": "geometry: collects a figure's facts, solves, checks",
        "stages": (
            CAPTION,
            OCR,
            ask(
                "facts",
                "List what this figure shows, without solving anything: points and their labels; segments, rays and "
                "lines with their ends; circles and arcs with centre and radius; given lengths and angles; marks of "
                "equality; what is parallel, perpendicular or tangent; what lies on what.",
                ASKED,
            ),
            ask(
                "setting",
                "Three readings of one figure follow. Where they differ, look at the figure and decide, trusting the "
                "listed facts first. Write down the problem as you then understand it: what is given, what is sought.",
                facts,
                DESCRIPTION,
                WRITING,
                ASKED,
            ),
            ask("solution", "Solve the problem step by step and name each theorem you use.", setting, facts, ASKED),
            ask(
                "answer",
                "Check this solution against the figure: is each step right, do units fit, is the size plausible, does "
                f"a second way give the same? Correct what is wrong. {FINISH}",
                setting,
                "Solution:\n{solution}",
                ASKED,
            ),
        ),
    }


def charts() -> Entry:
    rules = {
        "bar": "Match each bar with its label and the legend, then take its height from the axis; mind stacked and "
        "grouped bars and where the axis begins.",
        "line": "Follow each line by colour and mark, read its points against both axes, tell a trend from a value.",
        "pie": "Match slices with labels or legend; written shares come first, angles second; all shares make 100 %.",
        "other": "Say what the axes, marks and colours stand for before you read a value off.",
    }
    return {
        "name": "Chart_Problem_Solver",
        "description": "charts: finds out the type, answers by its rules",
        "stages": (
            OCR,
            ask("type", "Which type of chart is this? Reply with one word: bar, line, pie or other.", WRITING, ASKED),
            {
                "kind": "ask",
                "output": "answer",
                "by": "type",
                "prompts": {
                    kind: f"Answer the question about this chart. {rule} Compute only with values that you have read. "
                    f"{FINISH}\n{WRITING}\n{ASKED}"
                    for kind, rule in rules.items()
                },
            },
        ),
    }


def science() -> Entry:
    return {
        "name": "Science_Problem_Solver",
        "description": "science and medicine: description, writing and a closer look",
        "stages": (
            CAPTION,
            OCR,
            *zoom("Scientific detail: labels, scales, marked structures, curves."),
            ask(
                "answer",
                f"Answer the question from the pictures and from what you know of the field. {CLOSER} Say what the "
                "pictures show, then reason; of several choices, say why the others are wrong. "
                f"{FINISH}",
                DESCRIPTION,
                WRITING,
                ASKED,
                images=("task", "crops"),
            ),
        ),
    }


def counting() -> Entry:
    shown = ("task", "drawn", "crops")
    order = "First comes the picture, then the same with numbered boxes, then enlarged parts where there are any."
    return {
        "name": "Counting_Problem_Solver",
        "description": "counting: detects, lists with places, counts again",
        "stages": (
            DETECT,
            DRAW,
            *zoom("Every place where it is easy to miscount: small, crowded or half hidden objects."),
            ask(
                "listed",
                f"List every object that the question asks for, with its place. {order} Go through the picture part by "
                "part, up to its edges; half hidden ones count; the boxes are a hint, the picture decides.",
                OBJECTS,
                ASKED,
                images=shown,
            ),
            ask(
                "answer",
                f"Count once more. {order} Compare this list with the picture: is one listed twice, is one missing, "
                f"does one not belong? Then answer. {FINISH}",
                "List:\n{listed}",
                OBJECTS,
                ASKED,
                images=shown,
            ),
        ),
    }


def perception() -> Entry:
    return {
        "name": "Perception_Problem_Solver",
        "description": "small details: zooms in, then answers",
        "stages": (
            *zoom(),
            ask(
                "answer",
                f"Answer the question from what you see. {CLOSER} Find what it is about, then judge colour, kind, "
                f"place or relation there and nowhere else. {FINISH}",
                ASKED,
                images=("task", "crops"),
            ),
        ),
    }
