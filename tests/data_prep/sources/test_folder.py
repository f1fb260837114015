from __future__ import annotations

import json

import pytest

from data_prep.sources.folder import License, Row, image_file, read_folder
from limoe_dist.config.errors import UserError


def test_json_lines_and_csv_give_the_same_rows(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/captions.jsonl").write_text(
        '{"image": "x.png", "captions": ["one", "two"], "concept": "thing", "source": "s"}\n\n'
        '{"image": "y.png", "captions": ["a, b"], "source": "s"}\n'
    )
    (tmp_path / "b/captions.csv").write_text(
        'image,captions,concept,source\nx.png,"[""one"", ""two""]",thing,s\ny.png,"[""a, b""]",,s\n'
    )
    rows = [
        [(r.image, r.captions, r.concept, r.source) for r in read_folder(tmp_path / name).rows] for name in ("a", "b")
    ]
    assert rows[0] == [("x.png", ("one", "two"), "thing", "s"), ("y.png", ("a, b",), "", "s")]
    assert rows[1] == rows[0]


def test_rows_of_one_image_are_joined_without_repeating_a_caption(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\nx.png,one\ny.png,other\nx.png,two\nx.png,one\n")
    assert [(r.image, r.captions) for r in read_folder(tmp_path).rows] == [
        ("x.png", ("one", "two")),
        ("y.png", ("other",)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"image": "x.png", "concept": "owl"}\n{"caption": "a text"}\n{"captions": ["a text"]}\n',
        '{"image": "x.png", "concept": "owl", "captions": [], "id": 1}\n'
        '{"image": null, "caption": "a text", "id": 2}\n{"image": null, "captions": ["a text"], "id": 3}\n',
    ],
)
def test_a_row_may_be_a_picture_alone_or_a_text_alone_and_texts_are_not_joined(tmp_path, text):
    (tmp_path / "captions.jsonl").write_text(text)
    rows = [(row.image, row.captions, row.concept) for row in read_folder(tmp_path).rows]
    assert rows == [("x.png", (), "owl"), ("", ("a text",), ""), ("", ("a text",), "")]


def test_an_empty_cell_of_a_csv_is_a_missing_half(tmp_path):
    (tmp_path / "captions.csv").write_text('image,captions,id\nx.png,,1\n,"[""a text""]",2\n')
    assert [(row.image, row.captions) for row in read_folder(tmp_path).rows] == [("x.png", ()), ("", ("a text",))]


def test_a_csv_may_have_both_columns_of_which_each_row_fills_one(tmp_path):
    (tmp_path / "captions.csv").write_text('image,caption,captions\nx.png,an owl,\ny.png,,"[""a fox""]"\nz.png,,\n')
    assert [row.captions for row in read_folder(tmp_path).rows] == [("an owl",), ("a fox",), ()]
    (tmp_path / "captions.csv").write_text("image,caption\nx.png,\n")
    assert read_folder(tmp_path).rows[0].captions == ()


def test_a_picture_alone_and_a_caption_of_it_in_another_line_are_a_pair(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image": "x.png"}\n{"image": "x.png", "caption": "an owl"}\n')
    assert [(row.image, row.captions) for row in read_folder(tmp_path).rows] == [("x.png", ("an owl",))]


def test_a_row_without_a_source_has_the_name_of_the_folder(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds/captions.jsonl").write_text('{"image": "x.png", "caption": "an owl"}\n')
    assert read_folder(tmp_path / "birds").rows[0].source == "birds"


def test_a_captions_file_may_be_named_itself(tmp_path):
    (tmp_path / "mine.csv").write_text("image,caption\nx.png,one\n")
    assert read_folder(tmp_path / "mine.csv").path == tmp_path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"image": 3, "caption": "x"}', '"image" must be a path'),
        ('{"image": "", "caption": "x"}', '"image" must be a path'),
        ('{"concept": "owl"}', "has neither a picture nor a caption"),
        ('{"image": null, "captions": []}', "has neither a picture nor a caption"),
        ('{"img": "x.png", "caption": "x"}', 'has no "image", but "img"; did you mean "image"?'),
        ('{"image": "x.png", "text": "an owl"}', 'has no "caption" and "captions", but "text"'),
        ('{"image": "x.png", "text": "an owl"}', 'says "captions": []'),
        ('{"image": "x.png", "caption": "a", "captions": ["b"]}', 'needs either "caption" or "captions"'),
        ('{"image": "x.png", "captions": "a"}', "must be a list of texts"),
        ('{"image": "x.png", "captions": [1]}', "must be a list of texts"),
        ('{"image": "x.png", "caption": null}', "must be a list of texts"),
        ('{"image": "x.png", "caption": "a", "concept": 3}', '"concept" and "source" must be texts'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    (tmp_path / "captions.jsonl").write_text('{"image": "ok.png", "caption": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"captions\.jsonl, line 2: ") as caught:
        read_folder(tmp_path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,caption\nx.png,a\ny.png,b,c\n", "line 3: has not as many cells"),
        ("image,caption\nx.png\n", "line 2: has not as many cells"),
        ("picture,caption\nx.png,a\n", 'line 2: has no "image", but "picture"'),
        ("image,text\nx.png,a\n", 'line 2: has no "caption" and "captions", but "text"'),
        ('image,captions\n,"[]"\n', "line 2: has neither a picture nor a caption"),
        ("image,captions\nx.png,a red apple\n", "line 2: captions='a red apple' must be a JSON list"),
        ('image,caption\nx.png,"open\n', "is not CSV"),
        ("image,caption\n", "has no rows"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, text, reason):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    assert reason in str(caught.value)


def test_a_folder_needs_one_captions_file(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        read_folder(tmp_path)
    for name in ("captions.jsonl", "captions.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds captions\.jsonl and captions\.csv"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "absent")


def test_captions_that_are_no_utf8_are_an_error(tmp_path):
    (tmp_path / "captions.jsonl").write_bytes(b'{"image": "x.png", "caption": "\xff"}\n')
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(tmp_path)


def test_licences_come_from_sources_json(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\nx.png,one\n")
    note = {"name": "s", "license": "MIT", "attribution": "somebody", "version": "1"}
    (tmp_path / "sources.json").write_text(json.dumps([note]))
    assert read_folder(tmp_path).licenses == {"s": License("MIT", "somebody")}
    (tmp_path / "sources.json").write_text('{"s": "MIT"}')
    with pytest.raises(UserError, match=r"sources\.json: must be a list"):
        read_folder(tmp_path)


def row(folder, image):
    return Row(folder, image, ("x",), "", "s", 1)


def test_no_path_leaves_the_folder(tmp_path):
    (tmp_path / "outside.png").write_bytes(b"x")
    folder = tmp_path / "inside"
    (folder / "sub").mkdir(parents=True)
    (folder / "here.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "good.png").symlink_to(folder / "here.png")

    assert image_file(row(folder, "here.png")) == (folder / "here.png").resolve()
    assert image_file(row(folder, "good.png")) == (folder / "here.png").resolve()
    for image in ("../outside.png", "sub/../../outside.png", "sub/../here.png", str(tmp_path / "outside.png"), "a\0b"):
        with pytest.raises(ValueError, match="leaves the source folder: it must be relative"):
            image_file(row(folder, image))
    for image in ("link.png", "up/outside.png"):
        with pytest.raises(ValueError, match="through a symbolic link"):
            image_file(row(folder, image))
    with pytest.raises(ValueError, match="no such file"):
        image_file(row(folder, "absent.png"))
    with pytest.raises(ValueError, match="is not a file"):
        image_file(row(folder, "sub"))
