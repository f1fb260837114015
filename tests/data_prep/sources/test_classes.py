from __future__ import annotations

import json
import pickle

import pytest

from data_prep.sources import classes
from data_prep.sources.opening import full_key, open_sources
from limoe_dist.config.errors import UserError

JPG = b"\xff\xd8 picture"


def folders(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPG)
    return root


def rows(text):
    (source,) = open_sources([text])
    return source, [sample for block in source.blocks for sample in source.read(block)]


def test_pictures_of_class_folders_have_the_folders_name_as_concept(tmp_path):
    folders(
        tmp_path / "set",
        [
            "tree_frog/b.JPEG",
            "tree_frog/a.png",
            "owl/images/a.webp",
            "owl/notes.txt",
            "owl/.a.png",
            "top.png",
            "empty/x.md",
        ],
    )
    source, found = rows(f"classes:{tmp_path}/set")
    assert [(full_key(source, row), row.concept, row.captions, row.image) for row in found] == [
        ("set/owl/images/a.webp", "owl", (), JPG),
        ("set/tree_frog/a.png", "tree frog", (), JPG),
        ("set/tree_frog/b.JPEG", "tree frog", (), JPG),
    ]
    assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize(
    "names",
    [
        "n01440764 tench, Tinca tinca\r\n\r\nn01443537\tgoldfish, Carassius auratus\r\n",
        '\ufeff{"n01440764": "tench, Tinca tinca", "n01443537": ["goldfish", "Carassius  auratus"], "n9": "unused"}',
        '{"0": ["n01440764", "tench", "Tinca_tinca"], "1": ["n01443537", "goldfish", "Carassius_auratus"]}',
    ],
)
def test_several_names_of_a_class_are_joined_by_commas(tmp_path, names):
    folders(tmp_path / "set", ["n01440764/a.jpg", "n01443537/a.jpg"])
    (tmp_path / "names").write_bytes(names.encode())
    _, found = rows(f"{tmp_path}/set,names={tmp_path}/names")
    assert [row.concept for row in found] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("a one\nn01440764\n", "line 2: 'n01440764' must be like"),
        ("a one\nb ,\n", "line 2: 'b ,' must be like"),
        ("a one\na two\n", "line 2: a had another name before, 'one'"),
        ("", "holds no names"),
        (b"\xff\xfe", "is not UTF-8"),
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": 3}', "'a' must have a name or a list of names"),
        ('{"a": [3]}', "'a' must have a name or a list of names"),
        ('{"a": []}', "'a' must have a name or a list of names"),
        ("a one\n", "has no name for b and 1 other classes"),
    ],
)
def test_a_names_file_with_broken_lines_is_an_error_that_names_them(tmp_path, names, reason):
    folders(tmp_path / "set", ["a/a.jpg", "b/a.jpg", "c/a.jpg"])
    (tmp_path / "names").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(UserError, match=f"names.*{reason}"):
        rows(f"{tmp_path}/set,names={tmp_path}/names")


def test_links_that_lead_out_are_refused_and_linked_folders_are_an_error(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(JPG)
    root = folders(tmp_path / "set", ["a/good.jpg"])
    (root / "a/link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "a/gone.jpg").symlink_to(tmp_path / "gone.jpg")
    _, found = rows(f"classes:{root}")
    assert [(row.key, row.problem) for row in found] == [
        ("a/gone.jpg", "there is no such file"),
        ("a/good.jpg", ""),
        ("a/link.jpg", "the path leaves the source folder through a symbolic link"),
    ]
    (root / "b").symlink_to(tmp_path)
    with pytest.raises(UserError, match="set/b: is a link to a folder, which is not followed"):
        rows(f"classes:{root}")


def test_names_that_are_not_utf8_are_refused_alone(tmp_path):
    root = folders(tmp_path / "set", ["a/good.jpg"])
    with open(bytes(root) + b"/a/\xff.jpg", "wb") as file:
        file.write(JPG)
    _, found = rows(f"classes:{root}")
    assert [(row.key, bool(row.problem)) for row in found] == [("a/good.jpg", False), ("0//1", True)]
    found[1].place.encode()


def test_folders_without_pictures_are_an_error(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/top.png").write_bytes(JPG)
    with pytest.raises(UserError, match="no folder in it holds pictures"):
        rows(f"classes:{tmp_path}/set")
    with pytest.raises(UserError, match="there is no such folder"):
        rows(f"classes:{tmp_path}/absent")


def test_empty_and_huge_pictures_are_refused(tmp_path, monkeypatch):
    root = folders(tmp_path / "set", ["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    (root / "a/1.jpg").write_bytes(b"")
    (root / "a/2.jpg").write_bytes(b"x" * 101)
    monkeypatch.setattr("data_prep.sources.picture_folder.LARGEST_PICTURE", 100)
    assert [row.problem for row in rows(f"classes:{root}")[1]] == [
        "its picture is empty",
        "is larger than 100 bytes",
        "",
    ]


def test_blocks_stay_within_a_class_and_hold_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(classes, "BLOCK_ROWS", 4)
    root = folders(tmp_path / "set", [f"{one}/{n}.jpg" for one in "ab" for n in range(6)])
    source, found = rows(f"classes:{root}")
    assert [block.rows for block in source.blocks] == [4, 2, 4, 2]
    assert [row.key for row in found] == [f"{one}/{n}.jpg" for one in "ab" for n in range(6)]


def test_the_fingerprint_follows_pictures_and_names(tmp_path):
    root = folders(tmp_path / "set", ["a/a.jpg"])
    names = tmp_path / "names.json"
    marks = set()
    for concept, content in (("one", JPG), ("two", JPG), ("two", JPG * 2)):
        names.write_text(json.dumps({"a": concept}))
        (root / "a/a.jpg").write_bytes(content)
        marks |= {rows(f"classes:{root},names={names}")[0].fingerprint() for _ in range(2)}
    assert len(marks) == 3
