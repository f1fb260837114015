"""The emoji sets of the demo: which npm packages, under which licence, and how an icon becomes a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.demo_data.concepts import IconSet, character_of
from data_prep.demo_data.npm import Package, read_json
from limoe_dist.config.errors import UserError

ICON_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LINK = re.compile(r"""href\s*=\s*["']\s*([^"']*)""")

Split = Literal["train", "validation"]

EMOJI_SETS: tuple[tuple[Split, Package], ...] = (
    ("train", Package("@iconify-json/twemoji", "1.2.5")),
    ("train", Package("@iconify-json/openmoji", "1.2.29")),
    ("train", Package("@iconify-json/noto", "1.2.9")),
    ("train", Package("@iconify-json/noto-v1", "1.2.5")),
    ("train", Package("@iconify-json/emojione", "1.2.3")),
    ("train", Package("@iconify-json/emojione-v1", "1.2.3")),
    ("validation", Package("@iconify-json/fxemoji", "1.2.2")),
)
NAMES = Package("cldr-annotations-full", "48.2.0")
NAMES_LICENSE = "Unicode-3.0"
CATEGORIES_FROM = "noto"

# Licences that allow pictures to be changed and passed on, as long as their makers are named.
OPEN_PICTURES = ("Apache-2.0", "MIT", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0")


@dataclass(frozen=True)
class EmojiSet:
    name: str
    package: Package
    license: str
    """SPDX identifier, one of OPEN_PICTURES."""
    attribution: str
    names: IconSet
    icons: Mapping[str, Any]
    """The package's icons.json."""


class LicenseRefusal(Exception):
    """Why a set may not be used."""


def read_set(package: Package, tarball: Path) -> EmojiSet:
    """Raises LicenseRefusal where the package names no open licence, UserError where it is no iconify set."""
    parts = {
        member: read_json(tarball, f"{member}.json") for member in ("icons", "info", "package", "chars", "metadata")
    }
    info, icons, metadata = parts["info"] or {}, parts["icons"], parts["metadata"] or {}
    license_id = open_license((info.get("license") or {}).get("spdx"), (parts["package"] or {}).get("license"))
    if not icons or not icons.get("icons"):
        raise UserError(f"{tarball}: holds no icons.json with icons: delete it and run again")
    author = info.get("author") or {}
    shown = {name for name, icon in icons["icons"].items() if not icon.get("hidden")}
    if strange := [name for name in shown if not ICON_NAME.fullmatch(name)]:
        # Names become file names.
        raise UserError(f'{package.name}: the icon name "{strange[0][:60]}" is not made of letters, digits and "-"')
    names = IconSet(
        name=package.name.rpartition("/")[2],
        icons=frozenset(shown),
        aliases={alias: value["parent"] for alias, value in icons.get("aliases", {}).items()},
        characters={character_of(points): icon for points, icon in (parts["chars"] or {}).items() if icon in shown},
        categories={category: tuple(members) for category, members in metadata.get("categories", {}).items()},
    )
    attribution = f"{author.get('name', 'unknown author')}, {author.get('url', '')}, npm {package.name}"
    return EmojiSet(names.name, package, license_id, attribution, names, icons)


def open_license(in_info: str | None, in_package: str | None) -> str:
    """The licence that both files of a package name. Raises LicenseRefusal where it is absent, in doubt or closed."""
    named = {name for name in (in_info, in_package) if name}
    if not named:
        raise LicenseRefusal("it names no licence")
    if len(named) > 1:
        raise LicenseRefusal(f"its files name two licences: {in_info} and {in_package}")
    license_id = named.pop()
    if license_id not in OPEN_PICTURES:
        raise LicenseRefusal(f"its licence {license_id} is not one of {', '.join(OPEN_PICTURES)}")
    return license_id


def svg_of(icons: Mapping[str, Any], icon: str) -> str:
    """A square SVG document with the icon in its middle."""
    entry = icons["icons"][icon]

    def extent(key: str, fallback: float) -> float:
        return float(entry.get(key, icons.get(key, fallback)))

    width, height = extent("width", 16), extent("height", 16)
    side = max(width, height)
    left, top = extent("left", 0) - (side - width) / 2, extent("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side:g}" height="{side:g}" viewBox="{left:g} {top:g} {side:g} {side:g}">{entry["body"]}</svg>'
    )


def render(svg: str, *, size: int) -> bytes:
    """An RGB PNG of size x size pixels, transparency laid on white. Raises ValueError where the SVG is not valid."""
    return flat_png(rasterize(svg, width=size, height=size))


def rasterize(svg: str, *, width: int, height: int | None = None) -> Any:
    """An RGBA Pillow image; without a height, that of the SVG's proportions. Raises ValueError for a bad SVG."""
    import resvg_py
    from PIL import Image

    # A picture of strangers must not read this machine's files: what it shows is in it.
    for link in LINK.findall(svg):
        if not link.startswith(("#", "data:")):
            raise ValueError(f'refers to "{link[:60]}", outside of itself')
    encoded = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=width,
        height=height,
        dpi=96,  # the binding's own 0 turns sizes in points into nothing
        skip_system_fonts=True,  # listing a machine's fonts costs 50 times what a picture does, and no icon holds text
    )
    with Image.open(io.BytesIO(bytes(encoded))) as image:
        return image.convert("RGBA")


def flat_png(image: Any) -> bytes:
    """PNG bytes of a Pillow image, its alpha laid on white."""
    from PIL import Image

    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    file = io.BytesIO()
    flat.save(file, "PNG")
    return file.getvalue()
