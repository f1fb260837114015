from __future__ import annotations

import pickle

from data_prep.sources import folder as folder_module
from data_prep.sources.columns import Columns
from data_prep.sources.opening import full_key, open_sources
from data_prep.sources.source import License
from tests.data_prep.pictures_of import folder_source

JPG = b"\xff\xd8 picture"


def rows(text, columns=Columns()):  # noqa: B008
    (source,) = open_sources([text], columns)
    return source, [sample for block in source.blocks for sample in source.read(block)]


def test_pairs_and_halves_become_samples_with_keys_by_path_or_line(tmp_path):
    listed = [
        {"image": "sub/a.png", "captions": ["an owl", "a bird"], "concept": "owl", "source": "birds"},
        {"image": "b.png"},
        {"caption": "a text alone"},
    ]
    folder_source(tmp_path / "src", listed, {"sub/a.png": JPG, "b.png": JPG})
    source, found = rows(str(tmp_path / "src"))
    assert [(full_key(source, row), row.image, row.captions, row.concept, row.source) for row in found] == [
        ("src/sub/a", JPG, ("an owl", "a bird"), "owl", "birds"),
        ("src/b", JPG, (), "", ""),
        ("src/line-3", b"", ("a text alone",), "", ""),
    ]
    assert found[0].place == f"{tmp_path}/src/captions.jsonl, line 1, sub/a.png"
    assert pickle.loads(pickle.dumps(source)) == source


def test_keys_that_two_rows_want_keep_the_suffix_or_are_refused(tmp_path):
    names = ["a.png", "a.jpg", "./a.jpg", "line-5.png"]
    listed = [{"image": name, "caption": "x"} for name in names] + [{"caption": "y"}]
    _, found = rows(str(folder_source(tmp_path / "src", listed, dict.fromkeys(names, JPG))))
    assert [row.key for row in found] == ["a", "a.jpg", "/2", "line-5", "text/line-5"]
    assert [row.problem for row in found] == ["", "", "its key is taken by an earlier row", "", ""]


def test_paths_that_leave_the_folder_and_missing_pictures_are_refused_row_by_row(tmp_path):
    (tmp_path / "outside.png").write_bytes(JPG)
    names = ["../outside.png", f"{tmp_path}/outside.png", "link.png", "absent.png", "\ud800.png", "ok.png", "empty.png"]
    listed = [{"image": name, "caption": "x"} for name in names]
    folder = folder_source(tmp_path / "src", listed, {"ok.png": JPG, "empty.png": b""})
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    _, found = rows(str(folder))
    assert [row.problem for row in found] == [
        *["the path leaves the source folder: it must be relative and without .."] * 2,
        "the path leaves the source folder through a symbolic link",
        "there is no such file",
        "its name has characters that cannot be printed",
        "",
        "its picture is empty",
    ]
    assert [row.image for row in found] == [b"", b"", b"", b"", b"", JPG, b""]


def test_scores_are_carried_where_they_are_asked_for(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "captions.csv").write_text("image,caption,clip,note\na.png,x,0.5,1\nb.png,y,,2\n")
    source, found = rows(str(folder), Columns(scores=("clip",)))
    assert [row.scores for row in found] == [{"clip": 0.5}, {}]
    assert [row.scores for row in rows(str(folder))[1]] == [{}, {}]
    assert source.fingerprint() != rows(str(folder))[0].fingerprint()


def test_a_source_with_another_name_keeps_its_licence(tmp_path):
    folder = folder_source(tmp_path / "src", [{"image": "a.png", "caption": "x"}], {"a.png": JPG})
    (folder / "sources.json").write_text('[{"name": "src", "license": "MIT"}, {"name": "b", "license": "0BSD"}]')
    source, (row,) = rows(f"folder:{folder},name=mine")
    assert (full_key(source, row), row.source) == ("mine/a", "")
    assert source.licenses == {"src": License("MIT", ""), "mine": License("MIT", ""), "b": License("0BSD", "")}


def test_blocks_are_runs_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "BLOCK_ROWS", 4)
    source, found = rows(str(folder_source(tmp_path / "src", [{"caption": str(n)} for n in range(10)], {})))
    assert [block.rows for block in source.blocks] == [4, 4, 2]
    assert [row.captions for row in found] == [(str(n),) for n in range(10)]


def test_the_fingerprint_follows_captions_licences_and_pictures(tmp_path):
    folder = folder_source(tmp_path / "src", [{"image": "a.png", "caption": "x"}], {"a.png": JPG})
    marks = [rows(str(folder))[0].fingerprint()]
    assert rows(str(folder))[0].fingerprint() == marks[0]
    (folder / "a.png").write_bytes(JPG * 2)
    marks.append(rows(str(folder))[0].fingerprint())
    (folder / "sources.json").write_text("[]")
    marks.append(rows(str(folder))[0].fingerprint())
    with (folder / "captions.jsonl").open("a") as file:
        file.write('{"caption": "more"}\n')
    marks.append(rows(str(folder))[0].fingerprint())
    assert len(set(marks)) == 4
