"""What a stranger's picture becomes, or why it is refused: by both ways to its pixels, check_picture and rgb_pixels."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from data_prep.imaging.decoding import open_picture
from data_prep.imaging.pictures import Caps, check_picture, rgb_pixels
from tests.data_prep import made_pictures
from tests.data_prep.made_pictures import ARITHMETIC_JPEG, GREY_TIFF, animation, photo, png, png_chunk, tiff, zeros
from tests.data_prep.pictures_of import decoded, encoded, noisy

# Of damaged TIFF and EXIF; commands silence it with limit_pillow.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
CAPS = Caps(max_bytes=1_000_000, max_pixels=100_000)
ROWS = (b"\0" + bytes(30)) * 10


def accepted(content: bytes) -> bool:
    """Whether it is a picture; both ways must agree."""
    verdicts = []
    for read in (check_picture, rgb_pixels):
        try:
            read(content, CAPS)
            verdicts.append(True)
        except ValueError:
            verdicts.append(False)
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


def same_pixels(content: bytes) -> np.ndarray:
    """The pixels that rgb_pixels gives, which must be those of the bytes that check_picture keeps."""
    pixels = rgb_pixels(content, CAPS)
    kept = decoded(check_picture(content, CAPS).encoded)
    assert np.array_equal(pixels, kept if kept.ndim == 3 else np.repeat(kept[..., None], 3, axis=2))
    return pixels


# -- what becomes what


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_all_eight_orientations_are_turned_upright(kind, orientation):
    # Corners that tell the eight apart: red top left, green top right, blue bottom left, white bottom right.
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24], corners[16:, 24:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    )
    # How the camera stored it: the inverse of what its number says to do (TIFF 6.0, tag 274).
    stored = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, 1),
        7: corners[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corners, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    pixels = same_pixels(content)
    assert pixels.shape == corners.shape
    assert (
        np.abs(pixels[[4, 4, -4, -4], [4, -4, 4, -4]].astype(int) - corners[[4, 4, -4, -4], [4, -4, 4, -4]]).max() < 9
    )


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0no tiff at all", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"]
)
def test_a_jpeg_with_bad_exif_keeps_its_pixels(exif):
    image = photo(40, 30)
    pixels = same_pixels(encoded(image, "JPEG", exif=exif))
    assert np.array_equal(pixels, decoded(encoded(image, "JPEG")))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(40, 30), "JPEG", exif=exif)
    assert same_pixels(content).shape == (30, 40, 3)
    assert check_picture(content, CAPS).converted


def test_cmyk_and_ycck_are_read_as_adobe_writes_them_with_its_marker_or_without():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # full magenta and yellow: red
    adobe = encoded(cmyk, "JPEG", quality=95)
    marker = adobe.index(b"\xff\xee")
    assert adobe[marker + 4 : marker + 9] == b"Adobe"
    length = 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big")
    ycck = simplejpeg.encode_jpeg(np.ascontiguousarray(255 - np.asarray(cmyk)), 95, "CMYK", "444")
    for content in (adobe, adobe[:marker] + adobe[marker + length :], ycck):
        assert check_picture(content, CAPS).converted
        assert np.abs(same_pixels(content).astype(int) - (255, 0, 0)).max() <= 3


def test_grey_with_alpha_is_laid_on_white():
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (40, 0))
    image.putpixel((1, 0), (40, 255))
    assert same_pixels(encoded(image)).tolist() == [[[255] * 3, [40] * 3]]


def test_the_transparent_shade_of_a_grey_png_of_16_bits_becomes_white():
    values = np.array([[1000, 257 * 7]], np.uint16)
    assert same_pixels(encoded(Image.fromarray(values), transparency=1000))[..., 0].tolist() == [[255, 7]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    pixels = same_pixels(animation(kind))
    assert pixels.shape == (10, 12, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4


def test_of_a_picture_for_both_eyes_only_the_first_is_kept():
    content = animation("MPO")
    kept = check_picture(content, CAPS)
    assert not kept.converted
    assert kept.encoded == content[: len(kept.encoded)]
    assert len(kept.encoded) < len(content) / 2


def test_a_colour_profile_is_ignored_and_not_carried_on():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = noisy(3)
    assert np.array_equal(same_pixels(encoded(image, icc_profile=profile)), np.asarray(image))
    palette = image.quantize(16)
    converted = check_picture(encoded(palette, icc_profile=profile), CAPS)
    assert converted.converted
    assert b"iCCP" not in converted.encoded


def test_a_progressive_jpeg_is_kept_and_an_arithmetic_one_written_anew():
    progressive = encoded(photo(40, 30), "JPEG", progressive=True)
    assert check_picture(progressive, CAPS).encoded == progressive
    arithmetic = check_picture(ARITHMETIC_JPEG, CAPS)
    assert arithmetic.converted
    assert np.abs(same_pixels(ARITHMETIC_JPEG)[:, ::7, 0].astype(int) - (0, 200)).max() <= 3


def test_the_pixels_of_a_jpeg_are_those_of_its_plain_decoding():
    for subsampling in (0, 1, 2):
        content = encoded(photo(61, 43), "JPEG", subsampling=subsampling)
        assert np.array_equal(rgb_pixels(content, CAPS), decoded(content))
    grey = encoded(photo(61, 43).convert("L"), "JPEG")
    assert np.array_equal(rgb_pixels(grey, CAPS)[..., 1], decoded(grey))


@pytest.mark.parametrize(("size", "shape"), [((200, 120), (60, 100, 3)), ((120, 200), (100, 60, 3))])
def test_a_jpeg_may_be_decoded_smaller_but_not_below_the_side_asked_for(size, shape):
    content = encoded(photo(*size), "JPEG")
    assert rgb_pixels(content, CAPS, shorter_side=60).shape == shape
    assert min(rgb_pixels(content, CAPS, shorter_side=61).shape[:2]) >= 61
    assert rgb_pixels(content, CAPS, shorter_side=500).shape == (*size[::-1], 3)
    assert rgb_pixels(encoded(photo(*size)), CAPS, shorter_side=60).shape == (*size[::-1], 3)


# -- what is refused


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "packbits"}),
    ],
)
def test_a_picture_cut_off_anywhere_is_refused(kind, options):
    content = encoded(noisy(4, size=(24, 18)), kind, **options)
    assert accepted(content)
    # The last byte of a GIF ends the file, not the picture; a WebP may lack the byte that makes its length even.
    ends = range(0, len(content) - 1, max(1, len(content) // 60))
    assert [end for end in ends if accepted(content[:end])] == []


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_off_anywhere_and_closed_again_is_refused(progressive):
    content = encoded(noisy(5, size=(40, 30)), "JPEG", progressive=progressive)
    found = [end for end in range(3, len(content) - 2, 5) if accepted(content[:end] + b"\xff\xd9")]
    assert found == []


def test_damage_that_libjpeg_only_warns_of_is_refused():
    content = encoded(photo(64, 48), "JPEG", quality=90)
    scan = content.index(b"\xff\xda") + 14
    damaged = content[:scan] + content[scan + 40 :]
    with Image.open(io.BytesIO(damaged)) as image:
        image.load()  # Pillow shows the grey that is left
    with pytest.raises(ValueError, match="cannot be decoded"):
        check_picture(damaged, CAPS)
    with pytest.raises(ValueError, match="cannot be decoded"):
        rgb_pixels(damaged, CAPS)


def test_damage_of_a_cmyk_jpeg_is_refused_too():
    content = encoded(photo(64, 48).convert("CMYK"), "JPEG", quality=90)
    scan = content.index(b"\xff\xda") + 14
    assert accepted(content)
    assert not accepted(content[:scan] + content[scan + 40 :])


def test_pixels_that_stop_inside_of_a_whole_png_are_refused():
    assert accepted(png(10, 10, zlib.compress(ROWS)))
    assert not accepted(png(10, 10, zlib.compress(ROWS[:62])))


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_what_follows_a_kept_picture_is_cut_off(name):
    content = encoded(photo(20, 20), name)
    for tail in (b"PK\x03\x04 an archive", b"\n", b"<script>alert(1)</script>", content):
        assert check_picture(content + tail, CAPS).encoded == content


def test_of_a_polyglot_only_the_picture_that_it_begins_as_is_left():
    script = encoded(Image.new("P", (20, 20)), "GIF") + b"*/=1;alert(1)//"
    assert b"alert" not in check_picture(script, CAPS).encoded
    assert not accepted(b"PK\x03\x04" + encoded(photo(20, 20), "JPEG"))
    assert not accepted(b"\n" + encoded(photo(20, 20)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_of_32_bits_are_refused(mode):
    with pytest.raises(ValueError, match="32 bits"):
        check_picture(encoded(Image.new(mode, (4, 4), 5), "TIFF"), CAPS)


def test_a_jpeg_inside_of_a_tiff_is_refused():
    with pytest.raises(ValueError, match="JPEG inside of a TIFF"):
        check_picture(encoded(photo(40, 30), "TIFF", compression="jpeg"), CAPS)


@pytest.mark.parametrize(
    "tags",
    [
        GREY_TIFF | {278: 5, 279: 50},  # one strip of five rows, and no other
        {tag: value for tag, value in GREY_TIFF.items() if tag not in (273, 278, 279)}
        | {322: 16, 323: 5, 324: 200, 325: 80},
        GREY_TIFF | {277: 3, 262: 2, 284: 2},  # the plane of red, and no other
    ],
    ids=["strips", "tiles", "planes"],
)
def test_a_tiff_that_lists_a_part_of_its_pixels_is_refused(tags):
    with pytest.raises(ValueError, match="do not cover it"):
        check_picture(tiff(tags, bytes([77]) * 100), CAPS)


def test_directories_of_a_tiff_that_form_a_ring_are_not_followed():
    assert same_pixels(tiff(GREY_TIFF, bytes([77]) * 100, next_directory=8))[0, 0].tolist() == [77] * 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x04\0\0\0WEBP",
        b"II*\0\x08\0\0\0",
        b"BM" + bytes(60),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        tiff(GREY_TIFF | {273: 1 << 31}),
        tiff(GREY_TIFF | {256: 0}),
    ],
)
def test_headers_with_nothing_behind_them_are_refused(content):
    assert not accepted(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_more_pixels_than_the_cap_are_refused_before_any_is_decoded(kind, monkeypatch):
    content = encoded(Image.new("RGB", (400, 300)), kind)
    for decoder in ("PIL.ImageFile.ImageFile.load", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"400 x 300 pixels, more than 100000"):
        open_picture(content, CAPS)


BOMBS = """
import io, sys
from pathlib import Path
from data_prep.imaging.pictures import Caps, check_picture
from tests.data_prep.imaging.test_decoding import bombs
caps = Caps(max_bytes=20_000_000, max_pixels=32_000_000)
def peak_kb():  # ru_maxrss would begin at the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
check_picture(bombs()["harmless"], caps)
before = peak_kb()
for name, content in bombs().items():
    try:
        check_picture(content, caps)
    except ValueError as reason:
        print(f"{name}: {reason}", file=sys.stderr)
print((peak_kb() - before) // 1024)
"""


def bombs() -> dict[str, bytes]:
    """Small files whose insides inflate to a gigabyte, or that declare as much."""
    gigabyte, good = zeros(1024), zlib.compress(ROWS)
    gif = encoded(Image.new("P", (10, 10)), "GIF")
    frame = gif.index(b"\x2c")
    canvas = bytearray(animation("WEBP"))
    at = canvas.index(b"VP8X") + 12
    canvas[at : at + 6] = b"\xfe\x3f\0\xfe\x3f\0"
    deflated = GREY_TIFF | {259: 8, 279: len(gigabyte)}
    tiles = {tag: value for tag, value in GREY_TIFF.items() if tag not in (273, 278, 279)} | {259: 8, 324: 200, 325: 99}
    return {
        "harmless": png(10, 10, good),
        "PNG, data": png(10, 10, gigabyte),
        "PNG, profile": png(10, 10, good, before=png_chunk(b"iCCP", b"x\0\0" + gigabyte)),
        "PNG, text": png(10, 10, good, before=png_chunk(b"zTXt", b"x\0\0" + gigabyte)),
        "PNG, international text": png(10, 10, good, before=png_chunk(b"iTXt", b"x\0\1\0\0\0" + gigabyte)),
        "PNG, many chunks": png(10, 10, good, before=png_chunk(b"abCd", b"") * 100_000),
        "PNG, declared": png(60_000, 60_000, gigabyte),
        "GIF, frames": gif[:-1] + gif[frame:-1] * 100_000 + b";",
        "GIF, comments": gif[:frame] + b"\x21\xfe\x01a\0" * 400_000 + gif[frame:],
        "GIF, canvas": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "WebP, canvas": bytes(canvas),
        "TIFF, strip": tiff(deflated, gigabyte),
        "TIFF, tile": tiff(tiles | {322: 20_000, 323: 20_000}, bytes(100)),
        "TIFF, tile beyond 31 bits": tiff(tiles | {322: 0x7FFFFFF0, 323: 0x7FFFFFF0}, bytes(100)),
        "TIFF, count": tiff(GREY_TIFF, bytes(100))[:76] + b"\xff\xff\xff\x3f" + tiff(GREY_TIFF, bytes(100))[80:],
        "JPEG, segments": encoded(photo(16, 16), "JPEG")[:2] + b"\xff\xfe\0\2" * 1_000_000,
    }


def test_bombs_do_not_take_memory():
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused = [line.partition(":")[0] for line in done.stderr.splitlines() if ":" in line]
    expected = [name for name in bombs() if name not in ("harmless", "GIF, frames", "TIFF, strip")]
    assert [name for name in expected if name not in refused] == []
    # Megabytes: the largest file and a few copies of its parts.
    assert int(done.stdout) < 40, done.stdout


def test_made_pictures_are_what_their_names_say():
    assert len(zlib.decompressobj().decompress(made_pictures.zeros(3))) == 3 << 20
    assert accepted(tiff(GREY_TIFF, bytes(100)))
