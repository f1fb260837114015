"""Lists in parquet, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.sources.url_columns import BATCH_ROWS, Chosen, Columns, Values, Wanted, carried_values, chosen_columns
from limoe_dist.config.errors import UserError
from limoe_dist.data import places


def _opened(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Small reads from a stream: a column of a row group is not held whole.
        return pq.ParquetFile(places.open_binary(file), buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: is no parquet file: {error}") from None


def check(file: str, columns: Columns) -> None:
    """Raises UserError where it is no parquet file, or lacks a column."""
    with _opened(file) as opened:
        chosen_columns(file, _plain_names(opened.schema_arrow), columns)


def number_of_rows(file: str) -> int:
    with _opened(file) as opened:
        return int(opened.metadata.num_rows)


def _plain_names(schema: Any) -> list[str]:
    """The columns of text, numbers and truth values; lists and binary values are not carried through."""
    from pyarrow import types

    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    plain = [one.name for one in schema if any(check(one.type) for check in checks)]
    if len({*plain}) < len(plain):
        raise UserError(f"a column's name is there twice: {', '.join(plain)}")
    return plain


def batches(file: str, columns: Columns, of_use: Wanted) -> Iterator[tuple[int, list[Values]]]:
    """(rows, their values), in order; no values where they are of no use. Raises UserError where it cannot be read."""
    import pyarrow as pa

    with _opened(file) as opened:
        names = _plain_names(opened.schema_arrow)
        chosen = chosen_columns(file, names, columns)
        read = [names[chosen.url], *chosen.carried] + ([] if chosen.caption is None else [names[chosen.caption]])
        first = 0
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if not rows or not of_use(first, first + rows):
                first += rows
                yield rows, []
                continue
            try:
                for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=read, use_threads=False):
                    use = of_use(first, first + len(batch))
                    first += len(batch)
                    yield len(batch), _values(batch, names, chosen) if use else []
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: row group {group} cannot be read: {error}") from None


def _values(batch: Any, names: Sequence[str], chosen: Chosen) -> list[Values]:
    def texts(index: int | None) -> list[str]:
        if index is None:
            return [""] * len(batch)
        return ["" if value is None else str(value) for value in batch.column(names[index]).to_pylist()]

    carried = [batch.column(name).to_pylist() for name in chosen.carried]
    kept = [carried_values(chosen.carried, values) for values in zip(*carried, strict=True)] or [{}] * len(batch)
    return list(zip(texts(chosen.url), texts(chosen.caption), kept, strict=True))
