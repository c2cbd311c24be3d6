"""Rows of users' files: untrusted fields in, checked values out. An error names file, row, field and the cure."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from maestro_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
      fields: name → value, as the file has it.
      where: what errors call it, e.g. "train.jsonl line 3".
      number: how many rows are before it.
    """

    fields: Mapping[str, Any]
    where: str
    number: int

    def error(self, field: str, problem: str) -> DataError:
        """An error that names the row and the field; `problem` ends with the cure."""
        return DataError(f"{self.where}, field {field}: {problem}")

    def has(self, field: str) -> bool:
        return self.fields.get(field) is not None

    def text(self, field: str) -> str:
        """A text that is not empty, without the space around it."""
        return self.text_of(self.fields.get(field), field)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; none of them empty."""
        return tuple(
            self.text_of(value, f"{field}[{position}]") for position, value in enumerate(self.values(field, list))
        )

    def scalars(self, field: str) -> tuple[str, ...]:
        """A text, a number, or a list of them, each as a text: accepted answers."""
        value = self.fields.get(field)
        values = value if isinstance(value, list) else [value]
        texts = tuple(str(item).strip() for item in values if _is_scalar(item))
        if not texts or len(texts) != len(values) or not all(texts):
            raise self.error(
                field,
                f"expected a text, a number or a list of them, found {describe(value)}; fill it or remove the row",
            )
        return texts

    def integer(self, field: str) -> int:
        value = self.fields.get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(field, f"expected a whole number, found {describe(value)}; correct it or remove the row")
        return value

    def values(self, field: str, kind: type) -> Any:
        """The value, which must be of that type."""
        value = self.fields.get(field)
        if not isinstance(value, kind):
            raise self.error(
                field, f"expected a {kind.__name__}, found {describe(value)}; correct it or remove the row"
            )
        return value

    def picture(self, field: str) -> bytes:
        """An image as Hugging Face stores it in parquet: {bytes, path}."""
        return self._picture(self.fields.get(field), field)

    def pictures(self, field: str) -> tuple[bytes, ...]:
        """A list of them; the gaps that some exports leave are passed over."""
        entries = self.values(field, list)
        return tuple(
            self._picture(entry, f"{field}[{position}]") for position, entry in enumerate(entries) if entry is not None
        )

    def refuse_misspelt(self, known: Collection[str]) -> None:
        """Raises where a field has nearly, but not quite, the name of a known one. Other fields are the user's own."""
        for field in self.fields:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.85)
            if near and field not in known:
                raise self.error(field, f"unknown, did you mean {near[0]}? Correct or rename it")

    def text_of(self, value: Any, field: str) -> str:
        """`value`, which stands somewhere in the row, as `text` gives that of a field."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"expected a text, found {describe(value)}; fill it or remove the row")
        if not _is_unicode(value):
            raise self.error(
                field, "holds half of a surrogate pair, which is no character; correct it or remove the row"
            )
        return value.strip()

    def _picture(self, entry: Any, field: str) -> bytes:
        if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
            return entry["bytes"]
        raise self.error(field, "holds no image bytes; download the file with its images or remove the row")


def describe(value: Any) -> str:
    """What a wrong value is, without its content (it may be long or binary)."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict, str, bytes)) and not value:
        return f"an empty {type(value).__name__}"
    return f"a {type(value).__name__}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool) and _is_unicode(str(value))


def _is_unicode(text: str) -> bool:
    """Whether it can be written to a file."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
