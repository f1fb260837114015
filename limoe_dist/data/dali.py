"""Encoded pictures to normalised tensors: DALI as a stateless decoder that is told what to do with each picture.

No random operator: all parameters come in as arguments, so that pixels depend on neither batch size nor
threads nor DALI's own state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType
from torch import Tensor

from limoe_dist.config.schema import Image
from limoe_dist.data.augment import AugmentParams, crop_with_pixels, has_affine, has_colour
from limoe_dist.data.header import declared_size
from limoe_dist.data.resize import resized

Arguments = dict[str, npt.NDArray[Any]]

WHITE = 255.0
"""Fills what a turn or a shift uncovers."""


class DecodeError(Exception):
    """DALI refused at least one picture of the batch; it does not say which."""


class Decoder:
    """Decodes up to `batch_size` pictures a call on `threads` threads of the CPU, or on `device` where that is a GPU.

    mode: "train" applies all parameters; "evaluation" only resizes.
    Greyscale and palettes become RGB. An alpha channel is dropped: pack lays transparent pictures on white.
    """

    def __init__(
        self, image: Image, *, mode: Literal["train", "evaluation"], batch_size: int, threads: int, device: torch.device
    ) -> None:
        self.image, self.batch_size, self.threads, self.device = image, batch_size, threads, device
        self._crops = mode == "train" and image.min_crop_area < 1.0
        self._mirrors = mode == "train" and image.flip > 0.0
        self._warps = mode == "train" and has_affine(image)
        self._twists = mode == "train" and has_colour(image)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="limoe-resize")
        self._build()

    def decode(self, encoded: Sequence[npt.NDArray[np.uint8]], params: AugmentParams) -> Tensor:
        """(n, 3, size, size) float32 on the device, n <= batch_size: (pixel - image.mean) / image.std.

        Raises DecodeError where any of the pictures cannot be decoded.
        """
        # Also where nothing is cropped: an unreadable header must not reach DALI (see declared_size).
        region, after = self._arguments(params, _short_sides(encoded))
        try:
            if self._finish is None:
                (output,) = self._decode.run(encoded=list(encoded), **region, **after)
            else:
                (decoded,) = self._decode.run(encoded=list(encoded), **region)
                pictures = [np.asarray(decoded[i]) for i in range(len(encoded))]
                (output,) = self._finish.run(pixels=resized(pictures, self.image.size, self._pool), **after)
        except RuntimeError as error:
            # DALI calls a pipeline that raised no longer valid; a new one takes some milliseconds.
            self._build()
            if "fn.decoders." not in str(error):
                raise  # no picture's fault
            raise DecodeError(_reason(str(error))) from None
        return self._owned(output, len(encoded))

    def _arguments(self, params: AugmentParams, short_sides: npt.NDArray[np.int64]) -> tuple[Arguments, Arguments]:
        """What the decoder is told, and what those after it are."""
        region: Arguments = {}
        after: Arguments = {}
        if self._crops:
            anchor, shape = crop_with_pixels(params.anchor, params.shape, short_sides)
            region |= {"anchor": anchor, "shape": shape}
        if self._warps:
            after |= {"matrix": params.matrix}
        if self._twists:
            after |= {name: getattr(params, name) for name in ("brightness", "contrast", "saturation", "hue")}
        if self._mirrors:
            after |= {"mirror": params.mirror}
        return region, after

    def _build(self) -> None:
        """On a GPU one pipeline. On a CPU two, and between them a resize that is faster than DALI's: see resize.py."""
        gpu = self.device.type == "cuda"
        self._decode, self._finish = self._pipeline(), None if gpu else self._pipeline()
        with self._decode:
            pixels = self._decoded("mixed" if gpu else "cpu")
            if gpu:
                size = [self.image.size, self.image.size]
                pixels = self._finished(fn.resize(pixels, size=size, antialias=True))
            self._decode.set_outputs(pixels)
        self._decode.build()
        if self._finish is not None:
            with self._finish:
                pixels = fn.external_source(name="pixels", dtype=DALIDataType.UINT8, ndim=3, layout="HWC")
                self._finish.set_outputs(self._finished(pixels))
            self._finish.build()

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            # The loader's thread is the prefetching; a depth of 1 also is what lets run() take its inputs.
            prefetch_queue_depth=1,
        )

    def _decoded(self, device: str) -> Any:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        rgb: dict[str, Any] = {"device": device, "output_type": DALIImageType.RGB}
        region = (_argument("anchor", ndim=1), _argument("shape", ndim=1)) if self._crops else None
        if region and device == "cpu":
            # Of a JPEG only the rows of blocks that the crop needs are decoded: the same pixels as of the whole picture
            # cut afterwards, for less. A picture that is cut off below the crop never gets here: see declared_size.
            return fn.decoders.image_slice(encoded, *region, axis_names="HW", **rgb)
        pixels: Any = fn.decoders.image(encoded, **rgb)
        # The JPEG engine of a GPU decodes whole pictures; a decoder of regions would leave it idle.
        return fn.slice(pixels, *region, axis_names="HW") if region else pixels

    def _finished(self, pixels: Any) -> Any:
        if self._warps:
            pixels = fn.warp_affine(pixels, matrix=_argument("matrix", ndim=2), fill_value=WHITE)
        if self._twists:
            factors = {name: _argument(name) for name in ("brightness", "contrast", "saturation", "hue")}
            pixels = fn.color_twist(pixels, **factors)
        return fn.crop_mirror_normalize(
            pixels,
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
            mirror=_argument("mirror", dtype=DALIDataType.INT32) if self._mirrors else 0,
            mean=[self.image.mean] * 3,
            std=[self.image.std] * 3,
        )

    def _owned(self, output: Any, num: int) -> Tensor:
        """On a CPU without a copy: DALI's executor gives every batch memory of its own, until the tensor is gone."""
        if self.device.type != "cuda":
            return torch.from_dlpack(output.as_tensor())
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images = torch.empty((num, 3, self.image.size, self.image.size), dtype=torch.float32, device=self.device)
        feed_ndarray(output.as_tensor(), images, cuda_stream=torch.cuda.current_stream(self.device))
        return images


def _short_sides(encoded: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int64]:
    try:
        return np.array([min(declared_size(picture)) for picture in encoded], dtype=np.int64)
    except ValueError as error:
        raise DecodeError(str(error)) from None


def _argument(name: str, *, ndim: int = 0, dtype: Any = DALIDataType.FLOAT) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _reason(text: str) -> str:
    """DALI's message without its tracebacks: the lines after "encountered:"."""
    found = re.search(r"encountered:\s*(.+?)\s*(?:Current pipeline|$)", text, re.DOTALL)
    message = " ".join((found.group(1) if found else text).split())[:200]
    return "damaged pixels" if message.startswith("Failed to decode sample") else message
