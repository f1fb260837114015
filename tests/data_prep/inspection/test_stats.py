from __future__ import annotations

import base64
import hashlib
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.cli import main
from limoe_dist.config.errors import UserError
from limoe_dist.data.manifest import Manifest, Shard, Source, save_manifest, sha256_of
from tests.support.shards import damaged, picture, write_shards

SCRIPT = "<script>alert('caught')</script>"
HEBREW = "תפוח אדום"
OVERRIDE = "a cat \N{RIGHT-TO-LEFT OVERRIDE}dlrow"


def row(key, image, captions, *, size=(24, 24), concept="", source="web"):
    there = bool(image)
    return {
        "key": key,
        "image": image,
        "captions": captions,
        "concept": concept,
        "width": size[0] if there else 0,
        "height": size[1] if there else 0,
        "sha256": hashlib.sha256(image).hexdigest() if there else "",
        "source": source,
    }


def write(folder, rows, *, batch_rows=2, **manifest):
    folder.mkdir(parents=True, exist_ok=True)
    text = pa.string()
    types = (text, pa.binary(), pa.list_(text), text, pa.int32(), pa.int32(), text, text)
    schema = pa.schema(list(zip(rows[0], types, strict=True)))
    file = folder / "shard-00000.arrow"
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_file(opened, schema) as writer:
        for start in range(0, len(rows), batch_rows):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + batch_rows], schema=schema))
    shard = Shard(file=file.name, rows=len(rows), bytes=file.stat().st_size, sha256=sha256_of(file))
    save_manifest(Manifest(rows=len(rows), shards=(shard,), **manifest), folder / "manifest.json")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    wide = picture(9, size=48)
    rows = [
        row("a", picture(1), ["a red apple", "an apple"], concept="apple"),
        row("b", picture(1), ["a red apple"], concept="<b>bold</b>", source="laion"),
        row("c", wide, [SCRIPT], size=(48, 24)),
        row("d", picture(3), [HEBREW, OVERRIDE, "tab\there\x07"]),
        row("e", b"", ["a text alone"]),
        row("f", picture(4), []),
        row("<i>g</i>", damaged(5), ["long " * 200]),
    ]
    sources = (Source(name="laion", rows=1, license="CC-BY-4.0", attribution='<a href="http://example.com">x</a>'),)
    folder = write(tmp_path_factory.mktemp("packed"), rows, name="fruit & more", sources=sources)
    assert main(["stats", str(folder), "--out", str(folder / "stats")]) == 0
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return json.loads((folder / "stats/stats.json").read_text())


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "stats/stats.html").read_text(encoding="utf-8")


def test_rows_pictures_and_captions_are_counted(figures):
    assert figures["rows"] == {"total": 7, "without_caption": 1, "without_picture": 1}
    pictures, captions = figures["pictures"], figures["captions"]
    assert (pictures["width"]["count"], pictures["width"]["min"], pictures["width"]["max"]) == (6, 24, 48)
    assert (pictures["aspect"]["max"], pictures["shorter_side"]["max"]) == (2.0, 24)
    assert pictures["encoded_bytes"]["min"] == min(len(picture(n)) for n in (1, 3, 4))
    assert captions["total"] == 9
    assert captions["a_row"]["histogram"] == [[1, 2, 4], [2, 3, 1], [3, 4, 1]]
    assert captions["characters"]["max"] == 1000
    assert captions["words"]["max"] == 200  # of the long one


def test_repeated_pictures_captions_words_and_scripts_are_found(figures):
    twice = figures["duplicates"]
    assert (twice["pictures"]["surplus"], twice["pictures"]["groups"], twice["pictures"]["values"]) == (1, 1, 6)
    assert (twice["captions"]["surplus"], twice["captions"]["largest_groups"]) == (1, [2])
    assert figures["captions"]["frequent"]["largest"][0] == {"text": "a red apple", "count": 2}
    words = {one["text"]: one["count"] for one in figures["captions"]["frequent_words"]["largest"]}
    assert (words["long"], words["apple"], words["script"]) == (200, 3, 2)
    assert [(one["script"], one["captions"]) for one in figures["captions"]["scripts"]] == [("Latin", 8), ("Hebrew", 1)]


def test_sources_have_the_manifests_licences(figures):
    assert [(one["name"], one["rows"], one["license"]) for one in figures["sources"]["largest"]] == [
        ("web", 6, "unknown"),
        ("laion", 1, "CC-BY-4.0"),
    ]
    assert {one["text"]: one["count"] for one in figures["concepts"]["largest"]} == {
        "": 5,
        "<b>bold</b>": 1,
        "apple": 1,
    }


def test_strangers_text_stays_text_on_the_page(html):
    for text in (SCRIPT, "<b>bold</b>", "<i>g</i>", '<a href="http://example.com">', "fruit & more"):
        assert text not in html
    assert "&lt;script&gt;alert(&#39;caught&#39;)&lt;/script&gt;" in html
    assert "<script" not in html


def test_the_page_fetches_nothing(html):
    assert "default-src 'none'; img-src data:" in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert not re.search(r"url\(|@import", html)


def test_right_to_left_text_is_isolated_and_control_characters_are_gone(html):
    assert f'<bdi dir="auto">{HEBREW}</bdi>' in html
    assert f'<bdi dir="auto">{OVERRIDE}</bdi>' in html
    assert "\x07" not in html
    assert '<bdi dir="auto">tab here </bdi>' in html


def test_the_contact_sheet_has_new_small_pictures_and_says_what_cannot_be_shown(html):
    shown = [base64.b64decode(text) for text in re.findall(r'src="data:image/jpeg;base64,([^"]*)"', html)]
    assert len(shown) == 5
    for content in shown:
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 192
    assert html.count("cannot be shown") == 1
    assert html.count("text alone</span>") == 1
    assert ("long " * 200) not in html


def test_a_sample_of_rows_is_the_same_by_seed(folder, tmp_path):
    def keys(seed):
        assert main(["stats", str(folder), "--out", str(tmp_path), "--sample", "3", "--seed", str(seed)]) == 0
        return re.findall(r'<p class="note"><bdi>([^<]*)</bdi></p>', (tmp_path / "stats.html").read_text())

    assert len(keys(0)) == 3
    assert keys(0) == keys(0)
    assert any(keys(seed) != keys(0) for seed in (1, 2, 3))


def test_figures_do_not_depend_on_how_rows_lie_in_batches_and_shards(tmp_path):
    rows = [row(str(n), picture(n % 5), [f"caption {n % 3} of many", "x" * n]) for n in range(30)]
    one = write(tmp_path / "one", rows, batch_rows=30)
    several = [write(tmp_path / f"p{n}", rows[n : n + 7], batch_rows=3) for n in range(0, 30, 7)]
    found = []
    for sets in ([one], several):
        assert main(["stats", *map(str, sets), "--out", str(tmp_path / "out"), "--sample", "0"]) == 0
        found.append(json.loads((tmp_path / "out/stats.json").read_text()))
        found[-1].pop("sets")
    assert found[0] == found[1]


def test_a_vocabulary_and_a_dedup_result_are_told(tmp_path, capsys):
    file = write_shards(tmp_path, rows=8, shards=1, captions={0: ["\N{SNOWMAN} snow"], 1: ["red square " * 30]})
    pq.write_table(pa.table({"key": ["a", "b", "c"], "reason": ["near", "exact", "near"]}), tmp_path / "drop.parquet")
    out = tmp_path / "out"
    assert main(["stats", str(file), "--out", str(out), "--dedup", str(tmp_path / "drop.parquet")]) == 0
    figures = json.loads((out / "stats.json").read_text())
    assert figures["duplicates"]["near"]["of_reason"] == {"near": 2, "exact": 1}
    assert figures["tokens"]["captions"] == 14
    assert figures["tokens"]["captions_with_unknown_share"] >= 1 / 14
    assert figures["tokens"]["cut_share_by_length"]["64"] == pytest.approx(1 / 14)
    assert "keys that dedup drops" in capsys.readouterr().out
    assert "lists 3 keys to drop" in (out / "stats.html").read_text()


def test_pictures_alone_have_a_page_too(tmp_path):
    folder = write(tmp_path, [row("a", picture(1), [])])
    assert main(["stats", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "No row has a caption." in (tmp_path / "out/stats.html").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "SHARDS: name at least one"),
        (["SET", "--sample", "3000"], "--sample=3000: must be between 0 and 2000"),
        (["SET", "--out", "SET/manifest.json"], "is a file: name a folder"),
        (["SET", "--dedup", "SET/manifest.json"], "is no list that `limoe prep dedup` wrote"),
        (["SET", "--dedup", "absent.parquet"], "absent.parquet: there is no such file"),
    ],
)
def test_wrong_options_are_named(options, reason, folder):
    with pytest.raises(UserError, match=reason):
        main(["stats", *(option.replace("SET", str(folder)) for option in options)])


def test_a_damaged_shard_is_one_line(folder, tmp_path):
    broken = write(tmp_path, [row("a", picture(1), ["x"])])
    file = broken / "shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"shard-00000.arrow: cannot be read as a shard"):
        main(["stats", str(broken)])
