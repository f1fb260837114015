from __future__ import annotations

import pytest

from limoe_dist.data.manifest import manifest_place
from limoe_dist.data.places import join, parent


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("web", "web/manifest.json"),
        ("s3://bucket/web", "s3://bucket/web/manifest.json"),
        ("https://host/web", "https://host/web/manifest.json"),
        ("https://host/web?key=a/b", "https://host/web/manifest.json?key=a/b"),
    ],
)
def test_a_folder_and_its_file_lead_to_each_other(folder: str, file: str) -> None:
    assert join(folder, "manifest.json") == file
    assert parent(file) == folder
    if "://" in folder:
        assert manifest_place(folder) == manifest_place(file) == file
