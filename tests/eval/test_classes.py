from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.eval.classes import (
    NO_CLASS,
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
    ],
)
def test_a_blank_line_a_blank_name_and_a_name_that_comes_twice_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_class_file(class_file(tmp_path, text))
    assert message in str(caught.value)
    assert "classes.txt" in str(caught.value)


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


@pytest.mark.parametrize("templates", [(), ("{}", "a photo")])
def test_templates_need_a_place_for_the_class_name(templates: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"eval\.templates"):
        check_templates(templates)
