"""`limoe prep fetch-demo`: emoji of six makers to train on, those of a seventh to validate, and photographs if asked.

OUT/train, OUT/validation and OUT/photos are folder sources for `limoe prep pack`; OUT/matches.csv says which icon was
taken for which concept, OUT/near_duplicates.csv which training pictures were dropped,
OUT/emoji.json and OUT/photos.json what was made, from what.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.demo_data import demo_sets, npm, stamps
from data_prep.demo_data.concepts import (
    OBJECT_CATEGORIES,
    Concept,
    Match,
    NameTable,
    captions_of,
    concepts_from,
    match_set,
    matches_csv,
)
from data_prep.demo_data.demo_sets import EmojiSet, LicenseRefusal, Split
from data_prep.demo_data.folder_writer import Picture, SourceNote, prepare_folder, write_bytes, write_source
from data_prep.demo_data.matched_by_hand import BY_HAND
from data_prep.demo_data.near_duplicates import without_near_duplicates
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically

LAYOUT_VERSION = 1
"""Raised when the same settings begin to give other files."""

Task = Literal["objects", "all"]
SMALLEST_SIDE, LARGEST_SIDE = 16, 1024


@dataclass(frozen=True)
class SetReport:
    split: str
    name: str
    version: str
    license: str
    attribution: str
    pictures: int
    concepts: int
    dropped: int = 0
    """Pictures left out: in training because validation holds the same, photographs because they are broken."""

    def note(self) -> SourceNote:
        return SourceNote(self.name, self.version, self.license, self.attribution)


def fetch_demo(out: Path, *, photos: bool, size: int, photo_size: int, task: Task, console: Console) -> None:
    """Makes what is not there yet and prints what there is.

    Raises UserError where a download fails, where no training or no validation set may be used, or for wrong sizes.
    """
    for name, value in (("size", size), ("photo-size", photo_size)):
        if not SMALLEST_SIDE <= value <= LARGEST_SIDE:
            raise UserError(f"--{name}={value}: a picture's side must be {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
    started = time.monotonic()
    emoji_settings = {
        "layout": LAYOUT_VERSION,
        "size": size,
        "task": task,
        "packages": [f"{p.name}@{p.version}" for _, p in demo_sets.EMOJI_SETS]
        + [f"{demo_sets.NAMES.name}@{demo_sets.NAMES.version}"],
    }
    emoji = _once(out, "emoji", emoji_settings, lambda: _make_emoji(out, size=size, task=task, console=console))
    _show(emoji, console)
    if photos:
        settings = {"layout": LAYOUT_VERSION, "size": photo_size}
        taken = _once(out, "photos", settings, lambda: _make_photos(out, size=photo_size, console=console))
        _show(taken, console)
    _say(console, f"{out}: ready in {time.monotonic() - started:.1f} s")


@dataclass(frozen=True)
class Made:
    reports: tuple[SetReport, ...]
    lines: tuple[str, ...]


FOLDERS = {"emoji": ("train", "validation"), "photos": ("photos",)}


def _once(out: Path, part: str, settings: dict[str, Any], make: Callable[[], Made]) -> Made:
    """What `make` returns, kept in OUT/PART.json: made again for other settings or where a picture is lost."""
    record = out / f"{part}.json"
    if record.is_file():
        try:
            old = json.loads(record.read_text(encoding="utf-8"))
            if old["settings"] == settings and all(_whole(out / folder, n) for folder, n in old["pictures"].items()):
                return Made(tuple(SetReport(**report) for report in old["reports"]), tuple(old["lines"]))
        except (ValueError, KeyError, TypeError):
            pass  # not a record of ours, or cut off: make it again
        record.unlink()
    # A folder is a source once it has captions: until it is whole again it must not pass for one.
    for folder in FOLDERS[part]:
        (out / folder / "captions.jsonl").unlink(missing_ok=True)
    made = make()
    pictures: dict[str, int] = {}
    for report in made.reports:
        pictures[report.split] = pictures.get(report.split, 0) + report.pictures
    content = {
        "settings": settings,
        "pictures": pictures,
        "reports": [asdict(report) for report in made.reports],
        "lines": made.lines,
    }
    write_atomically(record, json.dumps(content, indent=2) + "\n")
    return made


def _whole(folder: Path, pictures: int) -> bool:
    """Does the captions file name that many pictures, and are they all there?"""
    captions = folder / "captions.jsonl"
    if not captions.is_file() or not (folder / "sources.json").is_file():
        return False
    with captions.open(encoding="utf-8") as lines:
        named = [json.loads(line)["image"] for line in lines]
    return len(named) == pictures and all((folder / image).is_file() for image in named)


def _make_emoji(out: Path, *, size: int, task: Task, console: Console) -> Made:
    lines: list[str] = []
    downloads = out / "downloads"
    clock = time.monotonic()
    npm.fetch([*(package for _, package in demo_sets.EMOJI_SETS), demo_sets.NAMES], downloads)
    _say(console, f"npm packages: {time.monotonic() - clock:.1f} s")

    sets, refused = _open_sets(downloads)
    lines += refused
    concepts = _concepts(downloads, [emoji_set for _, emoji_set in sets])
    wanted = {c.name for c in concepts.values() if task == "all" or c.category in OBJECT_CATEGORIES}
    names = NameTable(concepts, [emoji_set.names for _, emoji_set in sets])
    matches = {emoji_set.name: _matches(emoji_set, concepts, names) for _, emoji_set in sets}
    write_atomically(out / "matches.csv", matches_csv(match for found in matches.values() for match in found))

    clock = time.monotonic()
    pictures: dict[Split, list[Picture]] = {"train": [], "validation": []}
    for split, emoji_set in sets:
        chosen = [m for m in matches[emoji_set.name] if m.concept and m.concept.name in wanted]
        pictures[split] += _rendered(out / split, emoji_set, chosen, size, console)
    _say(console, f"rendering: {time.monotonic() - clock:.1f} s")

    clock = time.monotonic()
    kept, dropped, said = without_near_duplicates(out, pictures["train"], pictures["validation"])
    lines += said
    for picture in dropped:
        (out / "train" / picture.image).unlink()
    _say(console, f"perceptual-hash check: {time.monotonic() - clock:.1f} s")

    reports = [
        _report(split, emoji_set, kept if split == "train" else pictures[split], dropped) for split, emoji_set in sets
    ]
    for split, shown in (("train", kept), ("validation", pictures["validation"])):
        write_source(out / split, shown, [report.note() for report in reports if report.split == split])
    everything = len({picture.concept for picture in kept})
    lines.append(
        f"{len(kept)} training pictures of {everything} concepts, {len(pictures['validation'])} validation pictures; "
        f"names from {demo_sets.NAMES.name} {demo_sets.NAMES.version} ({demo_sets.NAMES_LICENSE})"
    )
    return Made(tuple(reports), tuple(lines))


def _open_sets(downloads: Path) -> tuple[list[tuple[Split, EmojiSet]], list[str]]:
    """The sets with a clear open licence, and a line for each refused one."""
    sets: list[tuple[Split, EmojiSet]] = []
    refused = []
    for split, package in demo_sets.EMOJI_SETS:
        try:
            sets.append((split, demo_sets.read_set(package, downloads / package.tarball)))
        except LicenseRefusal as reason:
            refused.append(f"not used: {package.name} {package.version}: {reason}")
    for split in ("train", "validation"):
        if not any(one == split for one, _ in sets):
            raise UserError(f"no {split} set is left: " + "; ".join(refused))
    if not any(emoji_set.name == demo_sets.CATEGORIES_FROM for _, emoji_set in sets):
        raise UserError(
            f"the categories come from the set {demo_sets.CATEGORIES_FROM}, which may not be used: {refused}"
        )
    return sets, refused


def _concepts(downloads: Path, sets: Iterable[EmojiSet]) -> dict[str, Concept]:
    tarball = downloads / demo_sets.NAMES.tarball
    license_id = (npm.read_json(tarball, "package.json") or {}).get("license")
    if license_id != demo_sets.NAMES_LICENSE:
        raise UserError(f"{tarball}: its licence is {license_id}, not {demo_sets.NAMES_LICENSE}: names are not used")
    content = npm.read_json(tarball, "annotations/en/annotations.json")
    if not content:
        raise UserError(f"{tarball}: holds no English annotations: delete it and run again")
    categories_of = next(one.names for one in sets if one.name == demo_sets.CATEGORIES_FROM)
    return concepts_from(content["annotations"]["annotations"], categories_of)


def _matches(emoji_set: EmojiSet, concepts: dict[str, Concept], names: NameTable) -> list[Match]:
    return match_set(emoji_set.names, concepts, names, BY_HAND.get(emoji_set.name, {}))


def _rendered(
    split_folder: Path, emoji_set: EmojiSet, chosen: Sequence[Match], size: int, console: Console
) -> list[Picture]:
    """Renders what is not there yet, and removes pictures of icons that are no longer chosen."""
    folder = split_folder / emoji_set.name
    prepare_folder(folder, {"version": emoji_set.package.version, "size": size, "layout": LAYOUT_VERSION})
    shown = track(chosen, emoji_set.name, console=console, transient=True, disable=not console.is_terminal)
    pictures = [_picture(emoji_set, match, folder, size) for match in shown]
    for stray in {path.name for path in folder.iterdir()} - {Path(picture.image).name for picture in pictures}:
        (folder / stray).unlink()
    return pictures


def _picture(emoji_set: EmojiSet, match: Match, folder: Path, size: int) -> Picture:
    """Renders the icon where its picture is not there yet."""
    assert match.concept is not None
    path = folder / f"{match.icon}.png"
    if not path.is_file():
        try:
            write_bytes(path, demo_sets.render(demo_sets.svg_of(emoji_set.icons, match.icon), size=size))
        except ValueError as error:
            raise UserError(f"{emoji_set.package.name}: the icon {match.icon} cannot be rendered: {error}") from None
    captions = tuple(captions_of(match.concept))
    return Picture(f"{emoji_set.name}/{path.name}", captions, match.concept.name, emoji_set.name)


def _report(split: Split, emoji_set: EmojiSet, pictures: Sequence[Picture], dropped: Sequence[Picture]) -> SetReport:
    own = [picture for picture in pictures if picture.source == emoji_set.name]
    return SetReport(
        split=split,
        name=emoji_set.name,
        version=emoji_set.package.version,
        license=emoji_set.license,
        attribution=emoji_set.attribution,
        pictures=len(own),
        concepts=len({picture.concept for picture in own}),
        dropped=sum(picture.source == emoji_set.name for picture in dropped),
    )


def _make_photos(out: Path, *, size: int, console: Console) -> Made:
    clock = time.monotonic()
    deb = stamps.fetch_package(out / "downloads")
    _say(console, f"{stamps.PACKAGE}: {time.monotonic() - clock:.1f} s")
    package = stamps.read_package(deb)
    folder = out / "photos"
    prepare_folder(folder / "stamps", {"version": package.version, "size": size, "layout": LAYOUT_VERSION})
    pictures, lines = [], []
    for stamp in track(package.stamps, "photos", console=console, transient=True, disable=not console.is_terminal):
        path = folder / "stamps" / f"{stamp.name}.png"
        try:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, stamps.render_stamp(stamp, size=size))
        except (ValueError, OSError) as error:
            lines.append(f"not used: {stamp.name}: {error}")
            continue
        pictures.append(Picture(path.relative_to(folder).as_posix(), (stamp.caption,), "", "stamps"))
    report = SetReport(
        "photos", "stamps", package.version, package.license, package.attribution, len(pictures), 0, len(lines)
    )
    write_source(folder, pictures, [report.note()])
    return Made((report,), tuple(lines))


def _show(made: Made, console: Console) -> None:
    console.print(_table(made.reports))
    for line in made.lines:
        _say(console, line)


def _say(console: Console, line: str) -> None:
    """A line as it is: not wrapped, so that a log can be searched."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(reports: Iterable[SetReport]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("folder", "set", "version", "licence", "pictures", "concepts", "dropped"):
        table.add_column(
            column, justify="right" if column in ("pictures", "concepts", "dropped") else "left", overflow="fold"
        )
    for one in reports:
        numbers = (str(one.pictures), str(one.concepts), str(one.dropped))
        table.add_row(one.split, one.name, one.version, one.license, *numbers)
    return table
