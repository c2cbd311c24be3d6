"""Rows and files in verl's parquet schema, as the published data has them."""

import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        (
            "extra_info",
            pa.struct(
                [
                    ("answer", pa.list_(pa.string())),
                    ("index", pa.int64()),
                    ("question", pa.string()),
                    ("split", pa.string()),
                ]
            ),
        ),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("reward_model", pa.struct([("ground_truth", pa.list_(pa.string())), ("style", pa.string())])),
    ]
)


def row(number: int, png: bytes, **changes: object) -> dict:
    """A sound row with one image; `changes` replaces whole columns."""
    return {
        "data_source": "chartqa",
        "prompt": [
            {"role": "system", "content": "Route."},
            {"role": "user", "content": f"<image>From the prompt {number}?"},
        ],
        "ability": "fact-reasoning",
        "extra_info": {"answer": ["x"], "index": number, "question": f"<image>Question {number}?", "split": "train"},
        "images": [{"bytes": png, "path": f"data/{number}.png"}],
        "reward_model": {"style": "rule", "ground_truth": [f"answer {number}"]},
    } | changes


def write_rows(path: pathlib.Path, rows: Sequence[dict], schema: pa.Schema = SCHEMA) -> pathlib.Path:
    """Writes a parquet file; row groups are small, so that a few rows already fill several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=3)
    return path
