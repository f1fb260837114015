from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _pillow_as_it_was(monkeypatch):
    """Packing sets Pillow's limit for the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
