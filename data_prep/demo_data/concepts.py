"""Which picture of an emoji set shows which concept: by code point, or by name where a set has no code points.

A concept is an emoji character with its CLDR short name ("red apple"). Names are compared without case, spaces and
punctuation, first those that are most surely right; a name that two concepts share on one level matches neither.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

OBJECT_CATEGORIES = ("animals nature", "food drink", "activities", "travel places", "objects")
SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
VARIATION_SELECTOR = "\ufe0f"

How = Literal[
    "by hand", "code point", "cldr name", "name in another set", "alias in another set", "unicode name", "none"
]
LEVELS: tuple[How, ...] = ("cldr name", "name in another set", "alias in another set", "unicode name")


@dataclass(frozen=True)
class Concept:
    character: str
    name: str
    """CLDR short name."""
    keywords: tuple[str, ...]
    category: str
    """Lower case, without punctuation: one of OBJECT_CATEGORIES, or "smileys emotion" and the like."""


@dataclass(frozen=True)
class IconSet:
    """What an @iconify-json package holds, as far as names go."""

    name: str
    icons: frozenset[str]
    aliases: Mapping[str, str]
    """Alias to icon."""
    characters: Mapping[str, str]
    """Character, without variation selectors, to icon; empty for sets without code points."""
    categories: Mapping[str, tuple[str, ...]]
    """Category to icons."""


@dataclass(frozen=True)
class Match:
    set_name: str
    icon: str
    concept: Concept | None
    how: How


def character_of(code_points: str) -> str:
    """ "1f408-200d-2b1b" to the character, without variation selectors."""
    return "".join(chr(int(part, 16)) for part in code_points.split("-")).replace(VARIATION_SELECTOR, "")


def normal(name: str) -> str:
    """Letters and digits only, lower case, accents dropped: "Pile-of Poo" is "pileofpoo", "piñata" is "pinata"."""
    return "".join(c for c in unicodedata.normalize("NFKD", name).lower() if c.isalnum())


def concepts_from(annotations: Mapping[str, Any], categories_of: IconSet) -> dict[str, Concept]:
    """All concepts by character: named by CLDR's annotations, with a category from one set that has code points.

    Skin-tone variants are left out.
    """
    category_of = {icon: _plain(category) for category, icons in categories_of.categories.items() for icon in icons}
    found = {}
    for character, icon in sorted(categories_of.characters.items()):
        note = annotations.get(character)
        if note is None or icon not in category_of or SKIN_TONES & set(character):
            continue
        name = note["tts"][0]
        keywords = tuple(word for word in note.get("default", ()) if word != name)
        found[character] = Concept(character, name, keywords, category_of[icon])
    return found


def _plain(category: str) -> str:
    return " ".join(category.lower().replace("&", " ").split())


class NameTable:
    """From a normalised name to its concept, level by level."""

    def __init__(self, concepts: Mapping[str, Concept], sets: Iterable[IconSet]) -> None:
        levels: dict[How, dict[str, set[str]]] = {level: defaultdict(set) for level in LEVELS}
        for character, concept in concepts.items():
            levels["cldr name"][normal(concept.name)].add(character)
            if len(character) == 1:
                levels["unicode name"][normal(unicodedata.name(character, ""))].add(character)
        for icon_set in sets:
            character_of_icon = {icon: c for c, icon in icon_set.characters.items() if c in concepts}
            for icon, character in character_of_icon.items():
                levels["name in another set"][normal(icon)].add(character)
            for alias, icon in icon_set.aliases.items():
                if icon in character_of_icon:
                    levels["alias in another set"][normal(alias)].add(character_of_icon[icon])
        self._levels = levels
        self._concepts = concepts

    def find(self, name: str) -> tuple[Concept | None, How]:
        for level in LEVELS:
            characters = self._levels[level].get(normal(name), set())
            if len(characters) == 1:
                return self._concepts[next(iter(characters))], level
        return None, "none"


def match_set(
    icon_set: IconSet, concepts: Mapping[str, Concept], names: NameTable, by_hand: Mapping[str, str | None]
) -> list[Match]:
    """One match for every icon that is no skin-tone variant, sorted by icon; at most one icon for a concept.

    A set with code points is matched by them alone. Else `by_hand` (icon to concept name, or None for no concept)
    decides, then the icon's own name is tried, then its aliases; of two icons for one concept the surer level wins,
    then the first by name, and the other is listed as unmatched. Raises KeyError for a name by hand that is no concept.
    """
    found: dict[str, tuple[Concept | None, How]] = {}
    if icon_set.characters:
        by_icon = {icon: concepts.get(character) for character, icon in sorted(icon_set.characters.items())}
        for icon in icon_set.icons:
            concept = by_icon.get(icon)
            found[icon] = (concept, "code point" if concept else "none")
    else:
        aliases = defaultdict(list)
        for alias, icon in icon_set.aliases.items():
            aliases[icon].append(alias)
        by_name = {normal(concept.name): concept for concept in concepts.values()}
        for icon in icon_set.icons:
            if icon in by_hand:
                given = by_hand[icon]
                found[icon] = (by_name[normal(given)], "by hand") if given else (None, "none")
                continue
            tries = [names.find(name) for name in [icon, *sorted(aliases[icon])]]
            found[icon] = next((hit for hit in tries if hit[0]), (None, "none"))
    return _one_icon_a_concept(icon_set.name, found)


def _one_icon_a_concept(set_name: str, found: Mapping[str, tuple[Concept | None, How]]) -> list[Match]:
    order: tuple[How, ...] = ("by hand", "code point", *LEVELS)
    best: dict[str, str] = {}
    for icon in sorted(icon for icon, (concept, _) in found.items() if concept):
        concept, how = found[icon]
        assert concept is not None
        holder = best.get(concept.character)
        if holder is None or order.index(how) < order.index(found[holder][1]):
            best[concept.character] = icon
    matches = []
    for icon in sorted(found):
        concept, how = found[icon]
        if concept and best[concept.character] != icon:
            concept, how = None, "none"
        if "skin-tone" not in icon:
            matches.append(Match(set_name, icon, concept, how))
    return matches


def matches_csv(matches: Iterable[Match]) -> str:
    """The table of matches, to be read and checked: set, icon, how, code points, concept, category."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("set", "icon", "how", "code_points", "concept", "category"))
    for match in matches:
        concept = match.concept
        points = "-".join(f"{ord(c):x}" for c in concept.character) if concept else ""
        names = (concept.name, concept.category) if concept else ("", "")
        writer.writerow((match.set_name, match.icon, match.how, points, *names))
    return text.getvalue()


def captions_of(concept: Concept) -> list[str]:
    """The name, "an emoji of NAME", the name with its first keywords, and the keywords alone; no caption twice."""
    listed = ", ".join(concept.keywords[:6])
    captions = [concept.name, f"an emoji of {concept.name}"]
    if listed:
        captions += [f"{concept.name}: {', '.join(concept.keywords[:3])}", listed]
    return list(dict.fromkeys(captions))
