from __future__ import annotations

import csv
import io

import pytest

from data_prep.demo_data.concepts import (
    Concept,
    IconSet,
    NameTable,
    captions_of,
    character_of,
    concepts_from,
    match_set,
    matches_csv,
    normal,
)

APPLE, CAT, CAT_FACE, SPADE, WAVE, FAIR_WAVE = "🍎", "🐈", "🐱", "♠", "👋", "👋🏻"
ANNOTATIONS = {
    APPLE: {"default": ["fruit", "red", "red apple"], "tts": ["red apple"]},
    CAT: {"default": ["pet"], "tts": ["cat"]},
    CAT_FACE: {"default": ["pet"], "tts": ["cat face"]},
    SPADE: {"tts": ["spade suit"]},
    WAVE: {"default": [], "tts": ["waving hand"]},
    FAIR_WAVE: {"default": [], "tts": ["waving hand: light skin tone"]},
}


def icon_set(name, icons, *, aliases=None, characters=None, categories=None):
    return IconSet(name, frozenset(icons), aliases or {}, characters or {}, categories or {})


CODED = icon_set(
    "coded",
    ["red-apple", "cat", "cat-face", "spades", "wave", "wave-light-skin-tone"],
    aliases={"tabby": "cat", "pet": "cat", "pet-head": "cat-face"},
    characters={
        APPLE: "red-apple",
        CAT: "cat",
        CAT_FACE: "cat-face",
        SPADE: "spades",
        WAVE: "wave",
        FAIR_WAVE: "wave-light-skin-tone",
    },
    categories={
        "Food & Drink": ("red-apple",),
        "Animals & Nature": ("cat", "cat-face"),
        "Activities": ("spades",),
        "People & Body": ("wave", "wave-light-skin-tone"),
    },
)


@pytest.fixture(name="concepts")
def _concepts():
    return concepts_from(ANNOTATIONS, CODED)


def test_concepts_have_cldr_names_and_plain_categories_and_no_skin_tones(concepts):
    assert {c: (one.name, one.category) for c, one in concepts.items()} == {
        APPLE: ("red apple", "food drink"),
        CAT: ("cat", "animals nature"),
        CAT_FACE: ("cat face", "animals nature"),
        SPADE: ("spade suit", "activities"),
        WAVE: ("waving hand", "people body"),
    }
    assert concepts[APPLE].keywords == ("fruit", "red")


def test_characters_lose_their_variation_selector():
    assert character_of("2660-fe0f") == SPADE
    assert character_of("1f408-200d-2b1b") == "🐈\u200d⬛"


def test_names_are_compared_without_case_punctuation_and_accents():
    assert normal("Piñata  No.-1") == "pinatano1"
    assert normal("one o\u2019clock") == normal("One_O'Clock")


@pytest.mark.parametrize(
    ("icon", "name", "how"),
    [
        ("RedApple", "red apple", "cldr name"),
        ("spades", "spade suit", "name in another set"),
        ("tabby", "cat", "alias in another set"),
        ("black-spade-suit", "spade suit", "unicode name"),
        ("waving-hand-sign", "waving hand", "unicode name"),
        ("teapot", None, "none"),
    ],
)
def test_an_icon_without_code_point_is_matched_by_name(concepts, icon, name, how):
    (match,) = match_set(icon_set("named", [icon]), concepts, NameTable(concepts, [CODED]), {})
    assert (match.concept and match.concept.name, match.how) == (name, how)


def test_a_name_that_two_concepts_share_matches_neither(concepts):
    other = icon_set("other", ["x"], aliases={"mouser": "x"}, characters={APPLE: "x"})
    again = icon_set("again", ["y"], aliases={"mouser": "y"}, characters={CAT: "y"})
    table = NameTable(concepts, [other, again])
    assert table.find("mouser") == (None, "none")
    assert NameTable(concepts, [other]).find("mouser") == (concepts[APPLE], "alias in another set")


def test_a_set_with_code_points_is_matched_by_them_alone(concepts):
    coded = icon_set("other", ["cat", "kitty"], characters={CAT: "kitty"})
    found = {
        m.icon: (m.concept and m.concept.name, m.how) for m in match_set(coded, concepts, NameTable(concepts, []), {})
    }
    assert found == {"cat": (None, "none"), "kitty": ("cat", "code point")}


def test_an_icons_own_aliases_are_tried_after_its_name(concepts):
    named = icon_set("named", ["feline"], aliases={"cat": "feline"})
    (match,) = match_set(named, concepts, NameTable(concepts, []), {})
    assert (match.concept, match.how) == (concepts[CAT], "cldr name")


def test_the_surest_of_two_icons_gets_the_concept(concepts):
    named = icon_set("named", ["black-spade-suit", "spade-suit"])
    found = {m.icon: m.concept for m in match_set(named, concepts, NameTable(concepts, []), {})}
    assert found == {"black-spade-suit": None, "spade-suit": concepts[SPADE]}


def test_what_is_given_by_hand_goes_before_names(concepts):
    named = icon_set("named", ["cat", "cat-side", "red-apple"])
    by_hand = {"cat": "Cat Face", "cat-side": "cat", "red-apple": None}
    found = {
        m.icon: (m.concept and m.concept.name, m.how)
        for m in match_set(named, concepts, NameTable(concepts, []), by_hand)
    }
    assert found == {"cat": ("cat face", "by hand"), "cat-side": ("cat", "by hand"), "red-apple": (None, "none")}


def test_skin_tone_variants_are_not_listed(concepts):
    icons = [m.icon for m in match_set(CODED, concepts, NameTable(concepts, [CODED]), {})]
    assert icons == ["cat", "cat-face", "red-apple", "spades", "wave"]


def test_the_table_of_matches_can_be_read(concepts):
    matches = match_set(icon_set("named", ["red,apple", "teapot"]), concepts, NameTable(concepts, []), {})
    rows = list(csv.DictReader(io.StringIO(matches_csv(matches))))
    assert [tuple(row.values()) for row in rows] == [
        ("named", "red,apple", "cldr name", "1f34e", "red apple", "food drink"),
        ("named", "teapot", "none", "", "", ""),
    ]


def test_a_picture_has_several_captions_and_none_twice(concepts):
    assert captions_of(concepts[APPLE]) == ["red apple", "an emoji of red apple", "red apple: fruit, red", "fruit, red"]
    assert captions_of(Concept("x", "thing", (), "objects")) == ["thing", "an emoji of thing"]
