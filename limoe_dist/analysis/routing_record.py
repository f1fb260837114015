"""analysis-<step>.json: what `limoe analyze` writes and `limoe report` reads. docs/analysis.md explains every key.

A modality that the analysed rows do not have is null everywhere; there is no NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from limoe_dist.analysis.expert_matrix import Kind
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import parse_model, write_atomically

VERSION = 1
RANK_BINS = 20
"""Of the histogram over the place in the order of service."""

Modality = Literal["image", "text"]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Number = Annotated[float, Field(ge=0.0)]
BlockName = Annotated[str, Field(pattern="^[0-9]{1,5}$")]
"""Its number, as JSON has no other keys than strings."""


def _plain(name: str) -> str:
    if name != Path(name).name or name in ("", ".", "..") or not name.endswith((".png", ".jpeg")):
        raise ValueError("must be a plain name of a .png or .jpeg")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Success(_Part):
    requested: Count
    """(token, choice) pairs that asked for a slot."""
    kept: Count
    """Those that got one."""
    success_rate: Share | None
    """kept / requested; null where nobody asked."""


class Ranks(_Part):
    """Places in the order of service: 0 is served first of its group, 1 last."""

    median: Share
    lower_quartile: Share
    upper_quartile: Share
    histogram: Annotated[tuple[Share, ...], Field(min_length=RANK_BINS, max_length=RANK_BINS)]
    """RANK_BINS even bins of 0..1; they sum to 1."""


class ModalityRouting(Success):
    effective_experts: Number | None
    """exp of the entropy of where the modality's requests go; null where there are none."""
    effective_experts_by_gates: Number | None
    """exp of what the global entropy loss sees: the entropy of a group's average gate, mean over groups. Nearly always
    more than effective_experts: gates count that were not the largest."""
    used_experts: Count
    """Experts asked by at least half of an even share of the modality's requests."""
    soft_minimum: Number
    """exp(tau) of the global entropy loss: moe.min_image_experts or moe.min_text_experts."""
    soft_minimum_trained: bool
    """Whether that loss was on (its weight and moe.aux_weight are above 0)."""
    ranks: Ranks | None
    without_padding: Success | None = None
    """Texts, where text.pad=token routes padding like words: the words and the end of text alone."""


class PieceCount(_Part):
    piece: str
    """As SentencePiece has it; "\u2581" begins a word. "<padding>" is what fills up a short text."""
    count: Count
    of_piece_frac: Share
    """Of this piece's processed tokens, the part that this expert has."""
    lift: Number
    """The piece's share among this expert's text tokens / its share among all processed text tokens of the block."""


class ExpertRouting(_Part):
    expert: Count
    image_tokens: Count | None
    text_tokens: Count | None
    """Processed by this expert."""
    image_frac: Share | None
    """Image tokens / all tokens that it processed: the blog's percentage. Null where it has none, or one modality
    is absent."""
    of_images_frac: Share | None
    of_texts_frac: Share | None
    """Of the modality's processed tokens of the block."""
    kind: Kind
    pieces: tuple[PieceCount, ...] = ()


class BlockRouting(_Part):
    image: ModalityRouting | None
    text: ModalityRouting | None
    experts: tuple[ExpertRouting, ...]


class Coloured(_Part):
    expert: Count
    colour: str = Field(pattern="^#[0-9a-f]{6}$")


class ShownPicture(_Part):
    row: Count
    key: str
    caption: str
    file: str
    experts: dict[BlockName, tuple[int, ...]]
    """By block: the first choice of each patch, row by row; -1 where it got no slot."""

    _file = field_validator("file")(_plain)


class PatchSheet(_Part):
    expert: Count
    file: str
    patches: tuple[tuple[Count, Count], ...]
    """(row, patch) of each, in the order of the sheet."""

    _file = field_validator("file")(_plain)


class Pictures(_Part):
    side: Annotated[int, Field(ge=1)]
    """Patches along a side."""
    blocks: tuple[BlockName, ...]
    """Those that are drawn."""
    legend: dict[BlockName, tuple[Coloured, ...]]
    shown: tuple[ShownPicture, ...]
    sheets: dict[BlockName, tuple[PatchSheet, ...]]


class Analysis(_Part):
    format: Literal["limoe-analysis"] = "limoe-analysis"
    version: int = VERSION
    run: str
    preset: str
    step: Count
    data: str
    modalities: tuple[Modality, ...]
    rows: Count
    """Rows that were routed."""
    rows_of: Count
    """Rows of the manifest."""
    bad_rows: Count
    """Drawn, but undecodable or without what the others have."""
    left_over_rows: Count
    """Good, but too few for one more routing group."""
    groups: Count
    group_pairs: Count
    num_experts: Count
    top_k: Count
    capacity: Count
    """Slots of an expert in a group."""
    capacity_factor: Number
    order: str
    blocks: dict[BlockName, BlockRouting]
    pictures: Pictures | None = None


def save_analysis(analysis: Analysis, path: Path) -> None:
    write_atomically(path, analysis.model_dump_json(indent=1) + "\n")


def newest_analysis(folder: Path, *, warn: Callable[[str], None]) -> tuple[Path, Analysis] | None:
    """That of the latest step; None where there is none. What cannot be read is told to `warn` and passed over."""
    files = [path for path in folder.glob("analysis-*.json") if path.stem.rpartition("-")[2].isdecimal()]
    for path in sorted(files, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True):
        try:
            analysis = parse_model(Analysis, path)
        except UserError as error:
            warn(f"{str(error).splitlines()[0]}: limoe analyze makes it again")
            continue
        if analysis.version == VERSION:
            return path, analysis
        warn(f"{path}: version={analysis.version}, but this version reads {VERSION}: limoe analyze makes it again")
    return None


def pictures_folder(path: Path) -> Path:
    """Where the drawings of an analysis lie: beside it, called as it is without the ending."""
    return path.with_suffix("")
