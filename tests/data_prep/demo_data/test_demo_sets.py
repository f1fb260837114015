from __future__ import annotations

import pytest

from data_prep.demo_data.demo_sets import EMOJI_SETS, LicenseRefusal, open_license, render, svg_of
from data_prep.demo_data.matched_by_hand import BY_HAND
from tests.data_prep.pictures_of import decoded

SQUARE = '<path fill="#f00" d="M0 0h8v8H0z"/>'
WHITE, RED = [255, 255, 255], [255, 0, 0]


def test_an_icon_is_rendered_with_its_alpha_on_white():
    icons = {"width": 16, "height": 16, "icons": {"square": {"body": SQUARE}}}
    pixels = decoded(render(svg_of(icons, "square"), size=32))
    assert pixels.shape == (32, 32, 3)
    assert pixels[4, 4].tolist() == RED
    assert pixels[4, 20].tolist() == pixels[20, 4].tolist() == pixels[31, 31].tolist() == WHITE


def test_half_transparent_colours_are_mixed_with_white():
    icons = {"width": 8, "height": 8, "icons": {"square": {"body": f'<g opacity=".5">{SQUARE}</g>'}}}
    red, green, blue = decoded(render(svg_of(icons, "square"), size=8))[4, 4].tolist()
    assert red == 255
    assert green == blue
    assert abs(green - 127) <= 1  # the renderer rounds half of 255 either way


def test_an_icon_that_is_not_square_stands_in_the_middle():
    icons = {
        "width": 16,
        "height": 16,
        "icons": {"wide": {"body": '<path fill="#f00" d="M0 0h16v8H0z"/>', "height": 8}},
    }
    pixels = decoded(render(svg_of(icons, "wide"), size=16))
    assert pixels[8, 1].tolist() == pixels[8, 14].tolist() == RED
    assert pixels[1, 8].tolist() == pixels[14, 8].tolist() == WHITE


def test_an_icon_with_an_offset_is_seen_whole():
    icons = {
        "width": 8,
        "height": 8,
        "left": -4,
        "top": 2,
        "icons": {"i": {"body": '<path fill="#f00" d="M-4 2h8v8h-8z"/>'}},
    }
    assert (decoded(render(svg_of(icons, "i"), size=8)) == RED).all()


def test_a_broken_svg_is_an_error():
    with pytest.raises(ValueError, match="root node"):
        render("<svg", size=8)


@pytest.mark.parametrize("spdx", ["Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"])
def test_open_licences_are_taken(spdx):
    assert open_license(spdx, spdx) == open_license(spdx, None) == open_license(None, spdx) == spdx


@pytest.mark.parametrize(
    ("in_info", "in_package", "reason"),
    [
        (None, None, "names no licence"),
        ("", None, "names no licence"),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0", "CC-BY-NC-4.0 is not one of"),
        ("CC-BY-4.0", "UNLICENSED", "two licences: CC-BY-4.0 and UNLICENSED"),
    ],
)
def test_a_licence_that_is_absent_closed_or_in_doubt_is_refused(in_info, in_package, reason):
    with pytest.raises(LicenseRefusal, match=reason):
        open_license(in_info, in_package)


def test_no_set_is_in_both_splits_and_every_version_is_pinned():
    names = [package.name for _, package in EMOJI_SETS]
    assert len(set(names)) == len(names) == 7
    assert [package.name for split, package in EMOJI_SETS if split == "validation"] == ["@iconify-json/fxemoji"]
    assert all(package.version.count(".") == 2 for _, package in EMOJI_SETS)


def test_no_concept_is_given_to_two_icons_of_a_set():
    for given in BY_HAND.values():
        names = [name for name in given.values() if name]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("link", ["/etc/hostname", "../secret.png", "file:///etc/hostname"])
def test_an_svg_that_refers_to_a_file_of_this_machine_is_refused(link):
    picture = f'<image href="{link}" width="8" height="8"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8">{picture}</svg>'
    with pytest.raises(ValueError, match="outside of itself"):
        render(svg, size=8)


def test_an_svg_may_refer_to_its_own_parts():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><defs><rect id="a" width="8" height="8"/></defs>'
        '<use href="#a"/></svg>'
    )
    assert render(svg, size=8)
