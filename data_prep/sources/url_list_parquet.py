"""Lists in parquet, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.sources.url_columns import BATCH_ROWS, Chosen, Columns, Values, Wanted, carried_values, chosen_columns
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

BATCH_BYTES = 64 << 20
"""Of rows of usual size."""


def _opened(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with places.failures(file):
            # Small reads from a stream: a column of a row group is not held whole.
            return pq.ParquetFile(places.open_binary(file), buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, UnicodeDecodeError) as error:  # of a column's name
        raise UserError(f"{file}: is no parquet file: {error}") from None


def check(file: str, columns: Columns) -> None:
    """Raises UserError where it is no parquet file, or lacks a column."""
    with _opened(file) as opened:
        chosen_columns(file, _plain_names(file, opened.schema_arrow), columns)


def number_of_rows(file: str) -> int:
    with _opened(file) as opened:
        return int(opened.metadata.num_rows)


def _plain_names(file: str, schema: Any) -> list[str]:
    """The columns of text, numbers and truth values; lists and binary values are not carried through."""
    from pyarrow import types

    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    # A dictionary's entries: pandas' categories.
    kinds = ((one.name, one.type.value_type if types.is_dictionary(one.type) else one.type) for one in schema)
    plain = [name for name, kind in kinds if any(check(kind) for check in checks)]
    if len({*plain}) < len(plain):
        raise UserError(f"{file}: a column's name is there twice: {', '.join(plain)}")
    return plain


def batches(file: str, columns: Columns, of_use: Wanted) -> Iterator[tuple[int, list[Values]]]:
    """(rows, their values), in order; no values where they are of no use. Raises UserError where it cannot be read."""
    import pyarrow as pa

    # Around all reads: stores raise of many kinds.
    with places.failures(file), _opened(file) as opened:
        names = _plain_names(file, opened.schema_arrow)
        chosen = chosen_columns(file, names, columns)
        read = [names[chosen.url], *chosen.carried] + ([] if chosen.caption is None else [names[chosen.caption]])
        first = 0
        for group in range(opened.num_row_groups):
            metadata = opened.metadata.row_group(group)
            rows = metadata.num_rows
            if not rows or not of_use(first, first + rows):
                first += rows
                yield rows, []
                continue
            try:
                size = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(metadata.total_byte_size, 1)))
                for batch in opened.iter_batches(size, row_groups=[group], columns=read, use_threads=False):
                    use = of_use(first, first + len(batch))
                    first += len(batch)
                    yield len(batch), _values(batch, names, chosen) if use else []
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: row group {group} cannot be read: {error}") from None


def _values(batch: Any, names: Sequence[str], chosen: Chosen) -> list[Values]:
    def texts(index: int | None) -> list[str]:
        if index is None:
            return [""] * len(batch)
        return ["" if value is None else str(value) for value in _listed(batch.column(names[index]))]

    carried = [_listed(batch.column(name)) for name in chosen.carried]
    kept = [carried_values(chosen.carried, values) for values in zip(*carried, strict=True)] or [{}] * len(batch)
    return list(zip(texts(chosen.url), texts(chosen.caption), kept, strict=True))


def _listed(column: Any) -> list[Any]:
    """Bytes that are no UTF-8 are replaced: one caption in millions must not end the run."""
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        encoded = plain.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in encoded]
