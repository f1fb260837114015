from __future__ import annotations

import pytest

from data_prep.imaging import jpeg
from data_prep.imaging.transform import Transform, transformed
from tests.data_prep.made_pictures import ARITHMETIC_JPEG, frames, photo
from tests.data_prep.pictures_of import encoded

BASELINE = encoded(photo(64, 48), "JPEG")
PROGRESSIVE = encoded(photo(64, 48), "JPEG", progressive=True)


def with_segment(content: bytes, segment: bytes, times: int = 1) -> bytes:
    return content[:2] + segment * times + content[2:]


def test_a_layout_tells_kind_size_scans_and_end():
    found = jpeg.layout(BASELINE)
    assert (found.frame, found.width, found.height, found.components, found.scans) == (0xC0, 64, 48, 3, 1)
    assert found.end == len(BASELINE)
    found = jpeg.layout(PROGRESSIVE)
    assert (found.frame, found.scans > 5, found.end) == (0xC2, True, len(PROGRESSIVE))
    assert jpeg.layout(ARITHMETIC_JPEG).frame in jpeg.ARITHMETIC


def test_components_of_one_number_count_each():
    """Encoders exist that number none of them, and every decoder takes such a picture for one in colours."""
    content = bytearray(BASELINE)
    frame, scan = frames(BASELINE, 0xC0)[0], frames(BASELINE, 0xDA)[0]
    for component in range(3):
        content[frame + 10 + 3 * component] = content[scan + 5 + 2 * component] = 0
    assert jpeg.layout(bytes(content)).components == 3
    smaller = transformed(bytes(content), Transform(size=24)).encoded
    assert smaller == transformed(BASELINE, Transform(size=24)).encoded


def test_the_end_is_before_what_follows_it():
    assert jpeg.layout(BASELINE + b"PK\x03\x04 an archive").end == len(BASELINE)
    assert jpeg.layout(BASELINE + BASELINE).end == len(BASELINE)


def test_a_thumbnail_inside_of_a_segment_is_not_the_end():
    thumbnail = encoded(photo(16, 16), "JPEG")
    content = with_segment(BASELINE, b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail)
    assert jpeg.layout(content).end == len(content)


@pytest.mark.parametrize("content", [BASELINE, PROGRESSIVE], ids=["baseline", "progressive"])
def test_no_truncated_jpeg_is_whole(content):
    for end in range(3, len(content)):
        with pytest.raises(ValueError, match=r"cut off|missing"):
            jpeg.layout(content[:end])


def test_a_progressive_jpeg_without_its_last_scan_is_not_whole_even_with_an_end_marker():
    last_scan = PROGRESSIVE.rindex(b"\xff\xda")
    last_tables = PROGRESSIVE.rindex(b"\xff\xc4", 0, last_scan)
    with pytest.raises(ValueError, match="scans are missing"):
        jpeg.layout(PROGRESSIVE[:last_tables] + b"\xff\xd9")


def test_a_component_without_a_scan_is_missing():
    scan = frames(BASELINE, 0xDA)[0]
    grey_scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # of component 1 alone
    with pytest.raises(ValueError, match="scans are missing"):
        jpeg.layout(BASELINE[:scan] + grey_scan + BASELINE[scan + 14 :])


def test_many_scans_and_many_segments_are_refused():
    scan = frames(BASELINE, 0xDA)[0]
    with pytest.raises(ValueError, match="more than 100 scans"):
        jpeg.layout(BASELINE[:-2] + BASELINE[scan : scan + 20] * 100 + b"\xff\xd9")
    with pytest.raises(ValueError, match="more than 10000 segments"):
        jpeg.layout(with_segment(BASELINE, b"\xff\xfe\x00\x02", 10_000))
    assert jpeg.layout(with_segment(BASELINE, b"\xff\xfe\x00\x02", 9_000)).scans == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((1, 0xC3), "lossless or hierarchical"),
        ((1, 0xC5), "lossless or hierarchical"),
        ((4, 12), "12 bits"),
        ((9, 200), "frame header is damaged"),
        ((3, 1), "cut off|damaged"),
    ],
)
def test_other_kinds_and_damaged_frames_are_refused(change, reason):
    content = bytearray(BASELINE)
    content[frames(BASELINE, 0xC0)[0] + change[0]] = change[1]
    with pytest.raises(ValueError, match=reason):
        jpeg.layout(bytes(content))


def test_a_frame_without_height_a_second_frame_and_stray_bytes_are_refused():
    frame = frames(BASELINE, 0xC0)[0]
    flat = bytearray(BASELINE)
    flat[frame + 5 : frame + 7] = b"\0\0"
    with pytest.raises(ValueError, match="no frame header with a width and a height"):
        jpeg.layout(bytes(flat))
    with pytest.raises(ValueError, match="two frame headers"):
        jpeg.layout(BASELINE[:frame] + BASELINE[frame : frame + 19] + BASELINE[frame:])
    with pytest.raises(ValueError, match="stray bytes"):
        jpeg.layout(BASELINE[:frame] + b"<script>" + BASELINE[frame:])
    with pytest.raises(ValueError, match="second JPEG"):
        jpeg.layout(BASELINE[:frame] + BASELINE)
