"""Which columns of a parquet file hold picture, captions and the rest: checked by type before a row is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data_prep.sources.columns import CAPTION_NAMES, CONCEPT_NAMES, IMAGE_NAMES, Columns
from limoe_dist.config.errors import UserError, nearest


@dataclass(frozen=True)
class Fields:
    """Names of columns; empty: there is none."""

    image: str
    struct: bool
    """Whether the picture is in the field `bytes` of that column, as Hugging Face's datasets write it."""
    caption: str
    key: str
    concept: str
    classes: tuple[str, ...]
    """Names of the numbers in the column `concept`, where it holds numbers."""
    scores: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """What is read of the file. Of a struct its bytes alone: its path is a stranger's and is never looked at."""
        image = f"{self.image}.bytes" if self.struct else self.image
        return [name for name in dict.fromkeys((image, self.caption, self.key, self.concept, *self.scores)) if name]


def fields_of(schema: Any, columns: Columns, place: str) -> Fields:
    """The columns that `columns` name, or that have one of the usual names.

    schema: an Arrow schema. Raises UserError where there are no pictures, or a column has another type.
    """
    import pyarrow as pa

    def text(kind: Any) -> bool:
        kind = _stored(kind)
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def number(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))

    def texts(kind: Any) -> bool:
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return text(kind) or (listed and text(kind.value_type))

    image, struct = _image(schema, columns, place)
    caption = _named(schema, columns.caption, CAPTION_NAMES, place, "--caption-column")
    if caption:
        _require(schema, caption, texts, "a text or a list of texts", place)
    key = _named(schema, columns.key, (), place, "--key-column")
    if key:
        _require(schema, key, lambda kind: text(kind) or pa.types.is_integer(kind), "a text or a whole number", place)
    concept = _named(schema, columns.concept, CONCEPT_NAMES, place, "--concept-column")
    classes: tuple[str, ...] = ()
    if concept and pa.types.is_integer(schema.field(concept).type):
        classes = _class_names(schema, concept, place)
    elif concept:
        _require(schema, concept, text, "a text, or a number whose names the file tells", place)
    for name in columns.scores:
        _named(schema, name, (), place, "score column")
        _require(schema, name, number, "a number", place)
    return Fields(image, struct, caption, key, concept, classes, columns.scores)


def _image(schema: Any, columns: Columns, place: str) -> tuple[str, bool]:
    """(column, whether it is a struct with the field bytes)."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        kind = _stored(kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    image = _named(schema, columns.image, IMAGE_NAMES, place, "--image-column")
    if not image:
        raise UserError(
            f"{place}: no column with pictures ({', '.join(IMAGE_NAMES)}) among {_names(schema)}: name it with "
            "--image-column; a list of addresses is fetched with `limoe prep download --list`"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type):
        return image, True
    if not binary(kind):
        raise UserError(
            f'{place}: column "{image}" is {str(kind)[:80]}; pictures are binary, or a struct with binary "bytes"; a '
            "list of addresses is fetched with `limoe prep download --list`"
        )
    return image, False


def _stored(kind: Any) -> Any:
    """The type of a dictionary's entries (pandas' categories), or the type itself."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _named(schema: Any, wanted: str, usual: tuple[str, ...], place: str, what: str) -> str:
    """The column `wanted`, or the first of the usual names that is there; a name that comes twice is none."""
    if wanted:
        if schema.get_field_index(wanted) < 0:
            raise UserError(
                f"{place}: {what}={wanted}: no such column, or two of them{nearest(wanted, schema.names)} "
                f"(columns: {_names(schema)})"
            )
        return wanted
    return next((name for name in usual if schema.get_field_index(name) >= 0), "")


def _require(schema: Any, name: str, allowed: Any, what: str, place: str) -> None:
    kind = schema.field(name).type
    if not allowed(kind):
        raise UserError(
            f'{place}: column "{name}" is {str(kind)[:80]}, not {what}: name another, as with --caption-column'
        )


def _class_names(schema: Any, column: str, place: str) -> tuple[str, ...]:
    """Hugging Face's datasets keep the names of class numbers in the file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{place}: column "{column}" holds numbers, and the file does not tell their names: '
            "name a column of texts with --concept-column"
        )
    return tuple(" ".join(name.replace("_", " ").split()) for name in names)


def _names(schema: Any) -> str:
    return ", ".join(schema.names[:30])
