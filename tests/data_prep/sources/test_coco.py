from __future__ import annotations

import json
import pickle

import pytest

from data_prep.sources.opening import full_key, open_sources
from data_prep.sources.picture_folder import PictureFolder
from limoe_dist.config.errors import UserError

JPG = b"\xff\xd8 picture"


def coco(folder, images, captions, pictures=("a.jpg",)):
    """captions: (image id, caption) pairs. Returns the text that opens it."""
    (folder / "train").mkdir(parents=True)
    for name in pictures:
        (folder / "train" / name).write_bytes(JPG)
    annotations = [{"id": n, "image_id": image, "caption": caption} for n, (image, caption) in enumerate(captions)]
    document = {
        "images": [{"id": number, "file_name": name} for number, name in images],
        "annotations": annotations,
    }
    (folder / "captions.json").write_text(json.dumps(document))
    return f"coco:{folder}/captions.json,images={folder}/train,name=coco"


@pytest.mark.parametrize("name", ["../a.jpg", "%2e%2e/a.jpg", "b/%2E./../a.jpg", "/a.jpg", "file:///a.jpg"])
def test_a_name_does_not_lead_out_of_a_web_servers_folder(name):
    with pytest.raises(ValueError, match="leaves the source folder"):
        PictureFolder("https://nobody.example/pictures").read(name)


def rows(text):
    (source,) = open_sources([text])
    return source, [sample for block in source.blocks for sample in source.read(block)]


def test_all_captions_of_an_image_are_one_row(tmp_path):
    text = coco(
        tmp_path,
        [(7, "a.jpg"), (3, "b.jpg"), (5, "c.jpg")],
        [(3, "an  owl"), (7, "one"), (7, "two\n"), (3, "a bird"), (7, "one")],
        ["a.jpg", "b.jpg", "c.jpg"],
    )
    source, found = rows(text)
    assert [(full_key(source, row), row.captions, row.problem) for row in found] == [
        ("coco/a", ("one", "two"), ""),
        ("coco/b", ("an owl", "a bird"), ""),
        ("coco/c", (), ""),
    ]
    assert {row.image for row in found} == {JPG}
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_json_with_images_needs_no_kind_and_one_without_is_told_what_it_lacks(tmp_path):
    text = coco(tmp_path, [(1, "a.jpg")], [])
    assert len(rows(text.removeprefix("coco:"))[1]) == 1
    with pytest.raises(UserError, match="add ,images=FOLDER"):
        rows(f"{tmp_path}/captions.json")
    with pytest.raises(UserError, match="add ,images=FOLDER"):
        rows(f"coco:{tmp_path}/captions.json")
    with pytest.raises(UserError, match=r"images=.*absent: there is no such folder"):
        rows(f"{tmp_path}/captions.json,images={tmp_path}/absent")


def test_no_picture_is_read_outside_the_folder(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(JPG)
    (tmp_path / "x").mkdir()
    names = ["../../outside.jpg", str(tmp_path / "outside.jpg"), "link.jpg", "absent.jpg", "a.jpg\0", "up/outside.jpg"]
    text = coco(tmp_path / "x", list(enumerate(names)), [(0, "x")])
    (tmp_path / "x/train/link.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "x/train/up").symlink_to(tmp_path)
    _, found = rows(text)
    reasons = ["leaves the source", "leaves the source", "through a symbolic link", "no such file", "cannot be printed"]
    assert all(reason in row.problem for row, reason in zip(found, [*reasons, "symbolic link"], strict=True))
    assert [row.image for row in found] == [b""] * 6
    assert [row.key for row in found[:2]] == ["/0", "/1"]


def test_names_that_give_one_key_keep_their_suffix_and_the_same_name_twice_is_refused(tmp_path):
    images = [(1, "a.jpg"), (2, "a.png"), (3, "a.png"), (4, "./a.jpg")]
    _, found = rows(coco(tmp_path, images, [(4, "x")], ["a.jpg", "a.png"]))
    assert [row.key for row in found] == ["a", "a.png", "/2", "a.jpg"]
    assert found[2].problem == "its file_name is that of an earlier image"


def test_an_empty_caption_is_refused_and_one_beside_others_is_left_out(tmp_path):
    _, found = rows(coco(tmp_path, [(1, "a.jpg"), (2, "b.jpg")], [(1, " "), (2, ""), (2, "owl")], ["a.jpg", "b.jpg"]))
    assert [(row.captions, row.problem) for row in found] == [(("",), "has an empty caption"), (("owl",), "")]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", '"images" must be a list of objects'),
        ('{"images": {}}', '"images" must be a list of objects'),
        ('{"images": [3]}', '"images" must be a list of objects'),
        ('{"images": [{"id": 1}]}', r'images\[0\]: must have "id" and "file_name"'),
        ('{"images": [{"id": [], "file_name": "a"}]}', r'images\[0\]: must have "id" and "file_name"'),
        ('{"images": [{"id": 1, "file_name": "a"}]}', '"annotations" must be a list'),
        ('{"images": [], "annotations": []}', "has no rows"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "1 ids of images are there twice",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
            r'annotations\[0\]: has no "caption": are these the boxes',
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
            r"annotations\[0\]: image_id=2 is none of the images",
        ),
    ],
)
def test_a_file_that_is_none_of_cocos_is_an_error_that_names_the_place(tmp_path, document, reason):
    text = coco(tmp_path, [], [])
    (tmp_path / "captions.json").write_text(document)
    with pytest.raises(UserError, match=rf"captions\.json: {reason}"):
        rows(text)


def test_the_fingerprint_follows_captions_and_pictures(tmp_path):
    text = coco(tmp_path, [(1, "a.jpg"), (2, "absent.jpg")], [])
    before = rows(text)[0].fingerprint()
    assert rows(text)[0].fingerprint() == before
    (tmp_path / "train/a.jpg").write_bytes(JPG * 2)
    after = rows(text)[0].fingerprint()
    assert after != before
    (tmp_path / "train/absent.jpg").write_bytes(JPG)
    assert rows(text)[0].fingerprint() not in (before, after)
