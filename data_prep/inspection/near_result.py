"""What `limoe prep dedup` found, from its list of keys to drop, for a summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from limoe_dist.config.errors import UserError
from limoe_dist.data import places

_MOST_REASONS = 20


@dataclass
class NearResult:
    place: str
    keys: int = 0
    of_reason: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {"list": self.place, "rows": self.keys, "of_reason": dict(self.of_reason.most_common(_MOST_REASONS))}


def read_near(place: str) -> NearResult:
    """Counts a drop.parquet by reason, a row group's part in memory at a time. Raises UserError where it is none."""
    result = NearResult(place)
    with places.open_binary(place) as file, places.failures(place):
        try:
            for batch in pq.ParquetFile(file).iter_batches(columns=["reason"]):
                result.keys += batch.num_rows
                for one in batch.column("reason").value_counts().to_pylist():
                    result.of_reason[str(one["values"])] += one["counts"]
        except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
            raise UserError(
                f"--dedup {place}: is no list that `limoe prep dedup` wrote ({' '.join(str(error).split())[:200]}): "
                "give its drop.parquet"
            ) from None
    return result
