"""The quickstart's registry: five in-process experts, five tier-1 skills, four services.

The experts are real and narrow. Their descriptions are what their makers would write: some claim
more than the expert can do, and the policy has to find out.
"""

from ml_collections import ConfigDict

SPECIALISTS = "maestro_jax.suite.specialists"
# How every stage hands over the question; the specialists read prompts line by line.
ASK = "Question: {question}\nFocus: {query}"


def get_registry() -> ConfigDict:
    return ConfigDict({"experts": experts(), "services": services(), "skills": skills()})


def experts() -> tuple[dict, ...]:
    """Three of these five lines over-claim (Chart-Lens, Tally, Sym-Solver); see docs/quickstart.md."""
    return (
        expert("Glyph-Reader", "reads any text: words, receipts, forms", "ocr:GlyphReader", 0.2),
        expert("Chart-Lens", "figures: their angles and lengths", "charts:ChartLens", 0.3),
        expert("Shape-Sight", "names shapes and colours", "shapes:ShapeSight", 0.1),
        expert("Tally", "bars, lines and slices at a glance", "tally:Tally", 0.1),
        expert("Sym-Solver", "numbers: how many, how much", "symbolic:SymSolver", 0.1),
    )


def expert(name: str, description: str, implementation: str, price: float) -> dict:
    """`price` is in US dollars per million tokens, either way."""
    return {
        "name": name,
        "description": description,
        "implementation": f"{SPECIALISTS}.{implementation}",
        "price_prompt": price,
        "price_completion": 4 * price,
    }


def services() -> tuple[dict, ...]:
    return (
        {"name": "ocr", "implementation": f"{SPECIALISTS}.ocr:OcrService"},
        {"name": "zoom", "implementation": f"{SPECIALISTS}.services:ZoomService"},
        {"name": "detect", "implementation": f"{SPECIALISTS}.services:DetectService"},
        {"name": "caption", "implementation": f"{SPECIALISTS}.services:CaptionService"},
    )


def skills() -> tuple[dict, ...]:
    return (
        {
            "name": "Perception_Problem_Solver",
            "description": "zooms in, then asks",
            "stages": (
                {"kind": "service", "service": "zoom", "output": "crop"},
                {
                    "kind": "ask",
                    "output": "answer",
                    "images": "crop",
                    "prompt": f"The picture is an enlarged crop of what stands out. Answer in one word.\n{ASK}",
                },
            ),
        },
        {
            "name": "Chart_Problem_Solver",
            "description": "finds the type of chart, asks by its rules",
            "stages": (
                {"kind": "service", "service": "ocr", "output": "ocr"},
                {
                    "kind": "ask",
                    "output": "type",
                    "prompt": f"What type of chart is this: bar, line, pie or other?\n{ASK}",
                },
                {"kind": "ask", "output": "answer", "by": "type", "prompts": chart_prompts()},
            ),
        },
        {
            "name": "OCR_Problem_Solver",
            "description": "reads text or one field of a form",
            "children": ("Text_Recognition", "Key_Information"),
        },
        {
            "name": "Text_Recognition",
            "tier": 2,
            "shown": False,
            "keywords": ("word", "sign", "say", "letters"),
            "stages": (
                {
                    "kind": "ask",
                    "output": "answer",
                    "prompt": f"Read the text in the picture. Answer with it alone.\n{ASK}",
                },
            ),
        },
        {
            "name": "Key_Information",
            "tier": 2,
            "shown": False,
            "keywords": ("total", "cost", "price", "field", "form", "receipt", "charge"),
            "stages": (
                {"kind": "ask", "output": "answer", "prompt": f"Find the value that belongs to the asked key.\n{ASK}"},
            ),
        },
        {
            "name": "Counting_Problem_Solver",
            "description": "draws boxes around objects, then counts",
            "stages": (
                {"kind": "service", "service": "detect", "output": "objects"},
                {
                    "kind": "ask",
                    "output": "answer",
                    "images": "objects",
                    "prompt": "Boxes mark what was detected; check the list against the picture. "
                    f"Answer with a number.\nObjects:\n{{objects}}\n{ASK}",
                },
            ),
        },
        {
            "name": "Geometric_Problem_Solver",
            "description": "reads the labels of a figure, then solves",
            "stages": (
                {"kind": "service", "service": "caption", "output": "caption"},
                {"kind": "service", "service": "ocr", "output": "ocr"},
                {
                    "kind": "ask",
                    "output": "answer",
                    "prompt": "Solve from the figure's labels. Answer with the value only.\n"
                    f"Text in the image:\n{{ocr}}\nCaption: {{caption}}\n{ASK}",
                },
            ),
        },
    )


def chart_prompts() -> dict[str, str]:
    """Tier-1 chart rules by type; an image that is no chart gets no reading of its labels."""
    labels = "Text in the image:\n{ocr}\n"
    return {
        "bar": f"Compare the height of the bars with the axis. Answer with a name or a number.\n{labels}{ASK}",
        "line": f"Follow the line from left to right against the axis. Answer briefly.\n{labels}{ASK}",
        "pie": f"Compare the slices; labels give their share. Answer with a name or a number.\n{labels}{ASK}",
        "other": f"This may not be a chart. Answer from what is drawn.\n{ASK}",
    }
