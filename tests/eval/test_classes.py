from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.eval.classes import (
    NO_CLASS,
    canonical,
    check_templates,
    classes_of_concepts,
    read_class_file,
    true_classes,
)


def class_file(folder: Path, text: str) -> Path:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_classes_are_the_sorted_distinct_concepts_and_equal_texts_are_one() -> None:
    concepts = ["tulip", "", "Bear", "tulip", "bear ", "bear"]
    assert classes_of_concepts(concepts, place="here") == [("Bear",), ("tulip",)]


def test_a_comma_in_a_concept_does_not_part_it() -> None:
    assert classes_of_concepts(["bento, box"], place="here") == [("bento, box",)]


def test_a_manifest_without_concepts_has_no_classes() -> None:
    with pytest.raises(UserError, match=r"x\.json: no row has a concept"):
        classes_of_concepts(["", " "], place="x.json")


def test_a_class_file_keeps_its_order_and_parts_names_at_commas(tmp_path: Path) -> None:
    path = class_file(tmp_path, "tulip\nbear, grizzly bear\nbento box\n")
    assert read_class_file(path) == [("tulip",), ("bear", "grizzly bear"), ("bento box",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("tulip\n\nbear\n", 'line 2 is ""'),
        ("tulip\nbear,\n", 'line 2 is "bear,"'),
        ("tulip\nbear\nTulip\n", '"Tulip" is in line 1 and again in line 3'),
        ("tulip, bear\nbear\n", '"bear" is in line 1 and again in line 2'),
        ("bear, Bear\n", '"Bear" is in line 1 and again in line 1'),
        ("tulip\n\n", 'line 2 is ""'),
        ("\n", 'line 1 is ""'),
        (" \t\ntulip\n", "line 1 is"),
        (",\n", 'line 1 is ","'),
        # Equal in prompts, which are canonical: without punctuation and with a blank for "_".
        ("T-shirt\ntulip\nt.shirt\n", '"t.shirt" is in line 1 and again in line 3 (both are "tshirt" in prompts)'),
        (
            "polar_bear, polar bear\n",
            '"polar bear" is in line 1 and again in line 1 (both are "polar bear" in prompts)',
        ),
        ("tulip\n?!\n", 'line 2: "?!" is nothing but punctuation'),
        ("n01440764\ttench\n", "line 1 holds a tab: there are no columns"),
        ("tulip\nbe\x00ar\n", "line 2 holds the control character U+0000"),
        ("tulip\nbear\x0bcub\n", "line 2 holds the control character U+000B"),
    ],
)
def test_a_blank_line_a_blank_name_and_a_name_that_comes_twice_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_class_file(class_file(tmp_path, text))
    assert message in str(caught.value)
    assert "classes.txt" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "tulip\nbear, grizzly bear\n",
        "tulip\nbear, grizzly bear",
        "\ufefftulip\nbear, grizzly bear\n",
        "tulip\r\nbear, grizzly bear\r\n",
        "\ufeff tulip \t\r\nbear ,\tgrizzly bear\t",
    ],
)
def test_byte_order_mark_line_ends_and_blanks_around_names_make_no_difference(tmp_path: Path, content: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content.encode())
    assert read_class_file(path) == [("tulip",), ("bear", "grizzly bear")]


def test_a_line_separator_within_a_name_does_not_part_it(tmp_path: Path) -> None:
    assert read_class_file(class_file(tmp_path, "old\u2028tree\nbear\n")) == [("old\u2028tree",), ("bear",)]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_than_utf_8_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("Bär\n".encode(encoding))
    with pytest.raises(UserError, match=r"classes\.txt: byte \d is not UTF-8"):
        read_class_file(path)


def test_a_folder_is_no_class_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_class_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        ("Pick-up Truck", "", "pickup truck"),
        ("  polar_bear\t cub. ", "", "polar bear cub"),
        ("jack-o'-lantern", "", "jackolantern"),
        ("A close-up photo of a {}.", "{}", "a closeup photo of a {}"),
        ("{a} {}!", "{}", "a {}"),
        ("Bär №1", "", "bär №1"),
    ],
)
def test_canonical_text_is_lower_case_without_punctuation(text: str, keep: str, expected: str) -> None:
    assert canonical(text, keep=keep) == expected


def test_a_class_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        read_class_file(tmp_path / "none.txt")


def test_a_row_belongs_to_the_class_that_has_its_concept_among_its_names() -> None:
    classes = [("tulip",), ("bear", "grizzly bear")]
    concepts = ["Grizzly  Bear", "tulip", "", "bear"]
    assert true_classes(concepts, classes, place="here") == [1, 0, NO_CLASS, 1]


def test_a_concept_outside_the_classes_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        true_classes(["tulip", "bears", "kiwi"], [("tulip",), ("bear",)], place="x.json")
    assert 'x.json: concept "bears" (and 1 more) is in none of the 2 classes; did you mean "bear"?' in str(caught.value)


def test_the_name_of_a_set_is_a_template() -> None:
    check_templates(("clip", "a {}"))


@pytest.mark.parametrize("templates", [(), ("{}", "a photo"), ("CLIP",), ("clip ",)])
def test_templates_need_a_place_for_the_class_name(templates: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"eval\.templates"):
        check_templates(templates)
