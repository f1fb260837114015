from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType
from PIL import Image as Pillow

from limoe_dist.config.schema import Image
from limoe_dist.data.augment import augment_params, identity_params
from limoe_dist.data.dali import DecodeError, Decoder
from limoe_dist.data.resize import resized
from tests.support.shards import damaged, picture, truncated

CPU = torch.device("cpu")
ALL = Image(
    size=16,
    patch=8,
    min_crop_area=0.5,
    flip=0.5,
    rotate_degrees=10.0,
    scale=0.2,
    translate=0.1,
    brightness=0.1,
    contrast=0.2,
    saturation=0.3,
    hue_degrees=20.0,
)
PLAIN = Image(size=24, patch=8, mean=0.0, std=1.0)


def encoded(*rows: int, **options: str) -> list[np.ndarray]:
    return [np.frombuffer(picture(row, **options), dtype=np.uint8) for row in rows]


def pixels_of(row: int, **options: str) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(picture(row, **options))).convert("RGB")).transpose(2, 0, 1)


def decoder(image: Image, *, mode: str = "train", batch_size: int = 8, threads: int = 1) -> Decoder:
    return Decoder(image, mode=mode, batch_size=batch_size, threads=threads, device=CPU)


def test_a_picture_of_the_right_size_comes_back_as_it_is() -> None:
    images = decoder(PLAIN).decode(encoded(0, 1), identity_params(2))
    assert images.dtype == torch.float32
    for i in range(2):
        assert (images[i].numpy() == pixels_of(i)).all()


def test_grey_and_palette_pictures_become_rgb() -> None:
    for mode in ("L", "P"):
        images = decoder(PLAIN).decode(encoded(3, mode=mode), identity_params(1))
        assert (images[0].numpy() == pixels_of(3, mode=mode)).all(), mode


def test_mean_and_std_are_applied() -> None:
    scaled = decoder(PLAIN.model_copy(update={"mean": 255.0, "std": 127.5})).decode(encoded(0), identity_params(1))
    np.testing.assert_allclose(scaled[0].numpy(), (pixels_of(0) - 255.0) / 127.5, atol=1e-6)


def test_pixels_depend_on_neither_batch_size_nor_threads_nor_neighbours() -> None:
    rows, params = range(24), augment_params(np.arange(24), ALL, seed=4)
    whole = decoder(ALL, batch_size=24, threads=1).decode(encoded(*rows), params)
    for batch_size, threads in ((24, 2), (5, 2), (1, 1)):
        small = decoder(ALL, batch_size=batch_size, threads=threads)
        parts = [
            small.decode(encoded(*rows[i : i + batch_size]), params.take(range(i, min(i + batch_size, 24))))
            for i in range(0, 24, batch_size)
        ]
        assert torch.equal(torch.cat(parts), whole), (batch_size, threads)


def test_the_crop_is_the_one_that_was_asked_for() -> None:
    params = identity_params(1)
    # 12 of 24 pixels from row 6 and column 12, at their own size.
    params.anchor[:], params.shape[:] = [6 / 24, 12 / 24], [12 / 24, 12 / 24]
    image = PLAIN.model_copy(update={"size": 12, "min_crop_area": 0.2})
    cropped = decoder(image).decode(encoded(5), params)
    assert (cropped[0].numpy() == pixels_of(5)[:, 6:18, 12:24]).all()


def test_a_shift_moves_the_picture_right_and_fills_with_white() -> None:
    params = identity_params(1)
    # The result at x comes from x - 6: the picture moves 6 pixels to the right.
    params.matrix[0, 0, 2] = -6.0
    shifted = decoder(PLAIN.model_copy(update={"translate": 0.3})).decode(encoded(5), params)[0].numpy()
    assert (shifted[:, :, 6:] == pixels_of(5)[:, :, :18]).all()
    assert (shifted[:, :, :6] == 255).all()


def test_a_flip_mirrors_left_and_right() -> None:
    params = identity_params(2)
    params.mirror[1] = 1
    images = decoder(PLAIN.model_copy(update={"flip": 0.5})).decode(encoded(5, 5), params).numpy()
    assert (images[0] == pixels_of(5)).all()
    assert (images[1] == pixels_of(5)[:, :, ::-1]).all()


def test_brightness_scales_the_pixels() -> None:
    params = identity_params(1)
    params.brightness[:] = 0.5
    dark = decoder(PLAIN.model_copy(update={"brightness": 0.5})).decode(encoded(5), params)[0].numpy()
    # uint8 in, uint8 out: half a level of rounding, and DALI's fixed-point colour matrix another one.
    np.testing.assert_allclose(dark, pixels_of(5) * 0.5, atol=1.01)


def test_evaluation_ignores_every_augmentation() -> None:
    size = ALL.model_copy(update={"size": 24, "mean": 0.0, "std": 1.0})
    params = augment_params(np.arange(1), size, seed=0)
    assert (decoder(size, mode="evaluation").decode(encoded(5), params)[0].numpy() == pixels_of(5)).all()
    assert (decoder(size, mode="train").decode(encoded(5), params)[0].numpy() != pixels_of(5)).any()


def test_a_bad_picture_raises_and_the_next_batch_is_as_ever() -> None:
    plain = decoder(PLAIN)
    before = plain.decode(encoded(0, 1), identity_params(2))
    for bad in (damaged(2), truncated(2), truncated(2, format="JPEG"), b"no picture"):
        with pytest.raises(DecodeError, match=r"^(damaged|neither PNG)"):
            plain.decode([*encoded(0), np.frombuffer(bad, dtype=np.uint8)], identity_params(2))
        assert torch.equal(plain.decode(encoded(0, 1), identity_params(2)), before)


def test_a_failure_that_is_no_picture_s_fault_is_not_blamed_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = decoder(PLAIN)

    def out_of_memory(**inputs: object) -> None:
        raise RuntimeError("Error in GPU operator `nvidia.dali.fn.resize`: out of memory")

    monkeypatch.setattr(plain._decode, "run", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        plain.decode(encoded(0), identity_params(1))


def test_the_smallest_pictures_survive_the_smallest_crops() -> None:
    image = PLAIN.model_copy(update={"min_crop_area": 0.0, "size": 8})
    params = augment_params(np.arange(256), image, seed=0)
    for width, height in ((1, 1), (2, 1), (3, 5), (40, 2)):
        Pillow.new("RGB", (width, height), (77, 77, 77)).save(content := io.BytesIO(), "PNG")
        picture_bytes = np.frombuffer(content.getvalue(), dtype=np.uint8)
        assert (decoder(image, batch_size=256).decode([picture_bytes] * 256, params) == 77).all(), (width, height)


def test_a_broken_picture_is_bad_whatever_part_of_it_is_asked_for() -> None:
    whole = picture(3, size=200, format="JPEG")
    content = np.frombuffer(whole[: len(whole) * 7 // 10], dtype=np.uint8)
    params = identity_params(1)
    # The upper left corner, long before the break.
    params.shape[:] = 0.2
    with pytest.raises(DecodeError, match="damaged or truncated: a JPEG without its end"):
        decoder(PLAIN.model_copy(update={"min_crop_area": 0.04})).decode([content], params)


KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"format": "JPEG", "subsampling": 2},
    "4:4:4": {"format": "JPEG", "subsampling": 0},
    "4:2:2": {"format": "JPEG", "subsampling": 1},
    "progressive": {"format": "JPEG", "progressive": True},
    "turned": {"format": "JPEG", "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    "PNG": {"format": "PNG"},
    "WebP": {"format": "WEBP"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_decoded_alone_has_the_pixels_of_the_whole(kind: str) -> None:
    chance = np.random.default_rng(3)
    coarse = Pillow.fromarray(chance.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    coarse.resize((133, 91), Pillow.Resampling.BICUBIC).save(content := io.BytesIO(), **KINDS[kind])
    image = PLAIN.model_copy(update={"min_crop_area": 0.05, "size": 16})
    params = augment_params(np.arange(24), image, seed=1)
    pictures = [np.frombuffer(content.getvalue(), dtype=np.uint8)] * 24
    found = decoder(image, batch_size=24).decode(pictures, params)

    pipeline = Pipeline(batch_size=24, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded, anchor, shape = (
            fn.external_source(name=name, dtype=dtype, ndim=1)
            for name, dtype in (("e", DALIDataType.UINT8), ("a", DALIDataType.FLOAT), ("s", DALIDataType.FLOAT))
        )
        whole = fn.decoders.image(encoded, output_type=DALIImageType.RGB)
        pipeline.set_outputs(fn.slice(whole, anchor, shape, axis_names="HW"))
    pipeline.build()
    (output,) = pipeline.run(e=pictures, a=params.anchor, s=params.shape)
    with ThreadPoolExecutor(1) as pool:
        expected = resized([np.asarray(output[i]) for i in range(24)], 16, pool).transpose(0, 3, 1, 2)
    assert np.abs(found.numpy() * image.std + image.mean - expected).max() < 1e-3


def test_a_batch_is_not_overwritten_by_the_next() -> None:
    plain = decoder(PLAIN)
    first = plain.decode(encoded(0, 1), identity_params(2))
    kept = first.clone()
    plain.decode(encoded(7, 8), identity_params(2))
    plain.decode(encoded(9, 10), identity_params(2))
    assert torch.equal(first, kept)
