"""Small files in the layouts that the benchmarks are published in (where that is seen: the converters' docstrings)."""

import base64
import csv
import io
import json
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from maestro_jax.data.benchmarks.tfrecord import masked_crc

Path = pathlib.Path
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file that no other number has."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (number % 256, number // 256, 99)).save(buffer, kind)
    return buffer.getvalue()


def stored(number: int) -> dict:
    """An image as Hugging Face stores it in parquet."""
    return {"bytes": picture(number), "path": f"{number}.png"}


def parquet(path: Path, rows: Sequence[Mapping[str, Any]], **types: pa.DataType) -> None:
    """`types` are those of columns that cannot be told from the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])
    arrays = [pa.array([row[name] for row in rows], types.get(name)) for name in names]
    pq.write_table(pa.table(arrays, names=names), path, row_group_size=2)


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)


# ---- one function a layout: folder → splits with their numbers of tasks --------------------------------------


def chartqa_parquet(folder: Path) -> dict[str, int]:
    for split, first in {"train": 0, "val": 10, "test": 20}.items():
        rows = [
            {"image": stored(n), "query": f"How much is {n}?", "label": [str(n)], "human_or_machine": n % 2}
            for n in range(first, first + 4)
        ]
        for part in range(2):
            parquet(
                folder / f"data/{split}-0000{part}-of-00002-abc.parquet", rows[2 * part : 2 * part + 2], image=IMAGE
            )
    return {"train": 4, "validation": 4, "test": 4}


def chartqa_official(folder: Path) -> dict[str, int]:
    for split, first in {"train": 0, "val": 10, "test": 20}.items():
        for kind, shift in {"human": 0, "augmented": 2}.items():
            numbers = range(first + shift, first + shift + 2)
            entries = [{"imgname": f"{n}.png", "query": f"How much is {n}?", "label": f"{n}.5"} for n in numbers]
            put(folder / "ChartQA Dataset" / split / f"{split}_{kind}.json", entries)
            for n in numbers:
                put(folder / "ChartQA Dataset" / split / f"png/{n}.png", picture(n))
    return {"train": 4, "validation": 4, "test": 4}


def geometry3k_parquet(folder: Path) -> dict[str, int]:
    for split, first in {"train": 0, "validation": 10, "test": 20}.items():
        rows = [
            {"images": [stored(n)], "problem": f"<image>Find x{n}.", "answer": rf"{n} \sqrt {{2}}"}
            for n in range(first, first + 3)
        ]
        parquet(folder / f"data/{split}-00000-of-00001.parquet", rows, images=pa.list_(IMAGE))
    return {"train": 3, "validation": 3, "test": 3}


def geometry3k_official(folder: Path) -> dict[str, int]:
    for split, first in {"train": 0, "val": 2101, "test": 2401}.items():
        for n in range(first, first + 2):
            choices = [str(n), f"{n}.5", r"2 \sqrt 3", "12"]
            problem = {"problem_text": f"Find m \\angle {n}.", "choices": choices, "answer": "C", "id": n}
            put(folder / split / str(n) / "data.json", problem)
            put(folder / split / str(n) / "img_diagram.png", picture(n))
    return {"train": 2, "validation": 2, "test": 2}


def microvqa(folder: Path, split: str = "test") -> dict[str, int]:
    rows = [
        {
            "key_question": n,
            "question": f"What did treatment {n} do?",
            "images_list": [stored(n), stored(n + 100)][: 1 + n % 2],
            "choices": ["nothing", "growth", "decay", "fission", "fusion"],
            "correct_index": n % 5,
            "task_str": "perception",
        }
        for n in range(3)
    ]
    parquet(folder / f"data/{split}-00000-of-00001.parquet", rows, images_list=pa.list_(IMAGE))
    return {"test": 3}


def msearth(folder: Path) -> dict[str, int]:
    caption, options = "(A) Map. (B) Height.", "A. rain\nB. snow\nC. hail\nD. fog"
    rows = [
        {
            "query": f"<image>\nCaption:\n{caption}\nQuestion:\nWhat falls in region {n}?\nOptions:\n{options}",
            "response": response,
            "image": stored(n),
            "question_id": str(n),
        }
        for n, response in enumerate(["B. snow", "A", "C. hail"])
    ]
    parquet(folder / "data/train-00000-of-00001.parquet", rows, image=IMAGE)
    return {"test": 3}


def slake(folder: Path) -> dict[str, int]:
    put(folder / "imgs/xmlab1/source.jpg", picture(1, "JPEG"))
    for first, split in enumerate(("train", "validation", "test")):
        entries = [
            {
                "img_id": 1,
                "img_name": "xmlab1/source.jpg",
                "question": f"{split} {n}: is the lung healthy?" if n else f"{split}: 肺健康吗？",
                "answer": "No" if n % 2 else "Left Lung",
                "q_lang": "en" if n else "zh",
                "answer_type": "CLOSED" if n % 2 else "OPEN",
                "qid": 1000 * first + n,
            }
            for n in range(4)
        ]
        put(folder / f"{split}.json", entries)
    return {"train": 3, "validation": 3, "test": 3}


def tallyqa(folder: Path) -> dict[str, int]:
    images = ["VG_100K_2/2410408.jpg", "train2014/COCO_train2014_000000000009.jpg"]
    for n, name in enumerate(images):
        put(folder / name, picture(n, "JPEG"))
    for split, first in {"train": 0, "test": 100}.items():
        entries = [
            {
                "answer": n % 16,
                "data_source": "amt",
                "image": images[n % 2],
                "image_id": 92410408,
                "issimple": n % 3 == 0,
                "question": f"How many headlights does bus {n} have?",
                "question_id": 30095774 + n,
            }
            for n in range(first, first + 4)
        ]
        put(folder / f"{split}.json", entries)
    return {"train": 4, "test": 4}


def _hrbench_rows() -> list[dict[str, Any]]:
    return [
        {
            "index": n,
            "question": 'What is written on the "shop" sign?',
            "answer": "ABCD"[n],
            "category": "single" if n < 2 else "cross",
            "A": "one",
            "B": "two, or\tthree",
            "C": "4",
            "D": "five",
            "cycle_category": f"cycle_{n}",
            "image": base64.b64encode(picture(n, "JPEG")).decode(),
        }
        for n in range(4)
    ]


def hrbench_parquet(folder: Path, resolution: str = "4k") -> dict[str, int]:
    parquet(folder / f"hr_bench_{resolution}.parquet", _hrbench_rows())
    return {"test": 4}


def hrbench_tsv(folder: Path) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = _hrbench_rows()
    with open(folder / "hr_bench_8k.tsv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return {"test": 4}


def vstar(folder: Path) -> dict[str, int]:
    lines = []
    for n, category in enumerate(("direct_attributes", "direct_attributes", "relative_position")):
        image = f"{category}/sa_{n}.jpg"
        put(folder / image, picture(n, "JPEG"))
        options = ["(A) rubber", "(B) cotton", "(C) kevlar", "(D) leather"][: 4 if n < 2 else 2]
        instruction = "Answer with the option's letter from the given choices directly."
        text = "\n".join([f"What is the material of glove {n}?", *options, instruction])
        lines.append({"image": image, "text": text, "category": category, "label": "BAB"[n], "question_id": n})
    put(folder / "test_questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {"test": 3}


def _mathvision_rows() -> list[dict[str, Any]]:
    common = {"solution": None, "level": 2, "subject": "counting"}
    return [
        {"id": "1", "question": "How many?\n<image1>", "options": [], "answer": "60"} | common,
        {"id": "2", "question": "Which?\n<image1>", "options": [*"ABCDE"], "answer": "C"} | common,
        {"id": "5", "question": "When?\n<image1>", "options": ["red", "1", "2", "3", "4"], "answer": "A"} | common,
    ]


def mathvision_parquet(folder: Path) -> dict[str, int]:
    rows = [
        row | {"image": f"images/{row['id']}.jpg", "decoded_image": stored(int(row["id"]))}
        for row in _mathvision_rows()
    ]
    types = {"decoded_image": IMAGE, "options": pa.list_(pa.string()), "solution": pa.string()}
    parquet(folder / "data/test-00000-of-00001-3532b8d3f1b4047a.parquet", rows, **types)
    parquet(folder / "data/testmini-00000-of-00001-f8ff70fcb2f29b1d.parquet", rows[:2], **types)
    return {"test": 3, "testmini": 2}


def mathvision_official(folder: Path) -> dict[str, int]:
    rows = [row | {"image": f"images/{row['id']}.jpg"} for row in _mathvision_rows()]
    for row in rows:
        put(folder / row["image"], picture(int(row["id"]), "JPEG"))
    put(folder / "data/test.jsonl", "\n".join(json.dumps(row) for row in rows))
    put(folder / "data/testmini.jsonl", "\n".join(json.dumps(row) for row in rows[:2]))
    return {"test": 3, "testmini": 2}


ERQA = [
    (
        "If the gripper follows the line, what happens? Choices: A. It opens. B. It closes. C. It turns. D. Nothing. "
        "Please answer directly with only the letter of the correct option and nothing else.",
        [0],
        "Trajectory Reasoning",
        "B",
    ),
    (
        "First view:  Second view:  Same? Choices: A. Yes. B. No. C. Perhaps. D. Never.",
        [12, 26],
        "Multi-view Reasoning",
        "A",
    ),
    ("Which of the marked points?", [0, 0], "Pointing", "D"),
]


def erqa_parquet(folder: Path) -> dict[str, int]:
    rows = [
        {
            "question_id": f"ERQA_{n}",
            "question": question,
            "question_type": kind,
            "images": [stored(10 * n + i) for i in range(len(indices))],
            "visual_indices": indices,
            "answer": answer,
        }
        for n, (question, indices, kind, answer) in enumerate(ERQA)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows, images=pa.list_(IMAGE))
    return {"test": 3}


def erqa_tfrecord(folder: Path) -> dict[str, int]:
    records = []
    for n, (question, indices, kind, answer) in enumerate(ERQA):
        images = [picture(10 * n + i, "JPEG") for i in range(len(indices))]
        records.append(
            example(
                {
                    "answer": [answer.encode()],
                    "image/encoded": images,
                    "question": [question.encode()],
                    "question_type": [kind.encode()],
                    "visual_indices": indices,
                }
            )
        )
    put(folder / "data/erqa.tfrecord", b"".join(framed(record) for record in records))
    return {"test": 3}


def ocrbench_parquet(folder: Path) -> dict[str, int]:
    rows = [
        {
            "dataset": name,
            "question": f"what is written in {n}?",
            "question_type": kind,
            "answer": answers,
            "image": stored(n),
        }
        for n, (name, kind, answers) in enumerate(OCRBENCH)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows, image=IMAGE)
    return {"test": 3}


def ocrbench_official(folder: Path) -> dict[str, int]:
    entries = []
    for n, (name, kind, answers) in enumerate(OCRBENCH):
        put(folder / f"OCRBench_Images/{name}/test/{n}.png", picture(n))
        answer = answers if len(answers) > 1 else answers[0]
        image = f"{name}/test/{n}.png"
        entries.append(
            {"dataset_name": name, "id": 7, "image_path": image, "question": f"{n}?", "answers": answer, "type": kind}
        )
    put(folder / "OCRBench/OCRBench/OCRBench.json", entries)
    return {"test": 3}


OCRBENCH = [
    ("IIIT5K", "Regular Text Recognition", ["CENTRE"]),
    ("docVQA", "Doc-oriented VQA", ["4 pm", "16:00"]),
    ("HME100k", "Handwritten Mathematical Expression Recognition", [r"\frac { 1 } { 2 }"]),
]


def vlmsareblind(folder: Path) -> dict[str, int]:
    rows = [
        {"task": task, "image": stored(n), "prompt": prompt, "groundtruth": truth, "metadata": "{}"}
        for n, (task, prompt, truth) in enumerate(
            [
                ("Touching Circles", "Are the two circles touching each other? Answer with Yes/No.", "Yes"),
                ("Counting Grid - Blank Grids", "Count rows and columns, as (5,6).", "5,7"),
            ]
        )
    ]
    parquet(folder / "data/valid-00000-of-00001.parquet", rows, image=IMAGE)
    return {"test": 2}


def humaneval_v(folder: Path) -> dict[str, int]:
    rows = [
        {
            "qid": f"q{n}",
            "ground_truth_solution": "def solution(x):\n    return x + 1",
            "test_script": "def test():\n    assert solution(1) == 2\n\ntest()",
            "function_signature": 'def solution(x: int) -> int:\n    """As in the diagram."""\n',
            "diagram": stored(n),
            "task_type": "Calculation",
        }
        for n in range(2)
    ]
    parquet(folder / "data/test-00000-of-00001.parquet", rows, diagram=IMAGE)
    return {"test": 2}


LAYOUTS: dict[str, tuple[str, Callable[[Path], dict[str, int]]]] = {
    "chartqa from parquet": ("chartqa", chartqa_parquet),
    "chartqa, official": ("chartqa", chartqa_official),
    "geometry3k from parquet": ("geometry3k", geometry3k_parquet),
    "geometry3k, official": ("geometry3k", geometry3k_official),
    "microvqa": ("microvqa", microvqa),
    "microvqa, split train": ("microvqa", lambda folder: microvqa(folder, "train")),
    "msearthmcq": ("msearthmcq", msearth),
    "slake": ("slake", slake),
    "tallyqa": ("tallyqa", tallyqa),
    "hrbench_4k from parquet": ("hrbench_4k", hrbench_parquet),
    "hrbench_8k from parquet": ("hrbench_8k", lambda folder: hrbench_parquet(folder, "8k")),
    "hrbench_8k from tsv": ("hrbench_8k", hrbench_tsv),
    "vstar": ("vstar", vstar),
    "mathvision from parquet": ("mathvision", mathvision_parquet),
    "mathvision, official": ("mathvision", mathvision_official),
    "erqa from parquet": ("erqa", erqa_parquet),
    "erqa, official": ("erqa", erqa_tfrecord),
    "ocrbench from parquet": ("ocrbench", ocrbench_parquet),
    "ocrbench, official": ("ocrbench", ocrbench_official),
    "vlmsareblind": ("vlmsareblind", vlmsareblind),
    "humaneval_v": ("humaneval_v", humaneval_v),
}


# ---- TFRecord ------------------------------------------------------------------------------------------------


def example(features: Mapping[str, Sequence[bytes] | Sequence[int]]) -> bytes:
    """A serialised tf.train.Example."""
    message = tf_example_pb2.Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        kind = feature.int64_list if values and isinstance(values[0], int) else feature.bytes_list
        kind.value.extend(values)
    return message.SerializeToString()


def framed(data: bytes) -> bytes:
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))
