"""The section "Routing" of a report: drawings and tables of the newest analysis-<step>.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from limoe_dist.analysis import routing_plots
from limoe_dist.analysis.examples import cut
from limoe_dist.analysis.patches import data_address_of
from limoe_dist.analysis.routing_record import Analysis, BlockRouting, Coloured, PieceCount, pictures_folder

MOST_WORD_EXPERTS = 8
MOST_SHOWN_PIECES = 6
MOST_SHOWN_PICTURES = 8
MOST_SHOWN_SHEETS = 6
MOST_KEY_CHARACTERS = 120


@dataclass(frozen=True)
class Words:
    expert: int
    text_tokens: int
    of_texts_frac: float | None
    pieces: tuple[PieceCount, ...]


@dataclass(frozen=True)
class Sheet:
    expert: int
    colour: str
    image_tokens: int
    of_images_frac: float | None
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Block:
    number: str
    routing: BlockRouting
    kinds: str
    """How many experts are of which kind, in words."""
    image_shares: Markup | None
    ranks: Markup | None
    words: tuple[Words, ...]
    other_words: int
    """Experts with text tokens that are not listed."""
    sheets: tuple[Sheet, ...]


@dataclass(frozen=True)
class Overlaid:
    caption: str
    row: int
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Section:
    of: Analysis
    blocks: tuple[Block, ...]
    pictures: tuple[Overlaid, ...]
    legend: dict[str, tuple[Coloured, ...]]


def section(path: Path, analysis: Analysis) -> Section:
    """path: of the JSON; the drawings lie beside it. A drawing that is gone is left out."""
    folder = pictures_folder(path)
    pictures = []
    for shown in analysis.pictures.shown[:MOST_SHOWN_PICTURES] if analysis.pictures else ():
        drawn = data_address_of(folder / shown.file)
        if drawn:
            pictures.append(Overlaid(cut(shown.caption or shown.key, MOST_KEY_CHARACTERS), shown.row, *drawn))
    names = sorted(analysis.blocks, key=lambda name: (len(name), name))
    return Section(
        of=analysis,
        blocks=tuple(_block(name, place, analysis, folder) for place, name in enumerate(names)),
        pictures=tuple(pictures),
        legend=analysis.pictures.legend if analysis.pictures and pictures else {},
    )


def _block(name: str, place: int, analysis: Analysis, folder: Path) -> Block:
    routing = analysis.blocks[name]
    # Our own drawings: matplotlib escapes what it writes, and the only names in them are numbers.
    image_shares = (
        Markup(routing_plots.image_shares_svg(routing, number=name, prefix=f"b{place}"))
        if routing_plots.by_image_share(routing)
        else None
    )
    has_ranks = any(m is not None and m.ranks is not None for m in (routing.image, routing.text))
    ranks = Markup(routing_plots.ranks_svg(routing, number=name, prefix=f"r{place}")) if has_ranks else None
    with_text = sorted(
        (expert for expert in routing.experts if expert.pieces),
        key=lambda expert: (-(expert.text_tokens or 0), expert.expert),
    )
    kinds = [
        (sum(expert.kind == kind for expert in routing.experts), kind) for kind in ("image", "text", "mixed", "idle")
    ]
    return Block(
        number=name,
        routing=routing,
        kinds=", ".join(f"{count} {kind}" for count, kind in kinds if count),
        image_shares=image_shares,
        ranks=ranks,
        words=tuple(
            Words(expert.expert, expert.text_tokens or 0, expert.of_texts_frac, expert.pieces[:MOST_SHOWN_PIECES])
            for expert in with_text[:MOST_WORD_EXPERTS]
        ),
        other_words=max(0, len(with_text) - MOST_WORD_EXPERTS),
        sheets=_sheets(name, analysis, folder),
    )


def _sheets(name: str, analysis: Analysis, folder: Path) -> tuple[Sheet, ...]:
    if analysis.pictures is None:
        return ()
    colours = {each.expert: each.colour for each in analysis.pictures.legend.get(name, ())}
    experts = {expert.expert: expert for expert in analysis.blocks[name].experts}
    found = []
    for sheet in analysis.pictures.sheets.get(name, ())[:MOST_SHOWN_SHEETS]:
        drawn = data_address_of(folder / sheet.file)
        if drawn and sheet.expert in experts and sheet.expert in colours:
            of = experts[sheet.expert]
            found.append(Sheet(sheet.expert, colours[sheet.expert], of.image_tokens or 0, of.of_images_frac, *drawn))
    return tuple(found)
