"""Encoded pictures to normalised tensors: DALI as a stateless decoder that is told what to do with each picture.

No random operator: all parameters come in as arguments, so that pixels depend on neither batch size nor
threads nor DALI's own state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
        self._pipeline = self._build()

    def decode(self, encoded: Sequence[npt.NDArray[np.uint8]], params: AugmentParams) -> Tensor:
        """(n, 3, size, size) float32 on the device, n <= batch_size: (pixel - image.mean) / image.std.

        Raises DecodeError where any of the pictures cannot be decoded.
        """
        # Also where nothing is cropped: an unreadable header must not reach DALI (see declared_size).
        arguments = self._arguments(params, _short_sides(encoded))
        try:
            (output,) = self._pipeline.run(encoded=list(encoded), **arguments)
        except RuntimeError as error:
            # DALI calls a pipeline that raised no longer valid; a new one takes some milliseconds.
            self._pipeline = self._build()
            if "fn.decoders." not in str(error):
                raise  # no picture's fault
            raise DecodeError(_reason(str(error))) from None
        return self._owned(output, len(encoded))

    def _arguments(self, params: AugmentParams, short_sides: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        arguments: dict[str, npt.NDArray[Any]] = {}
        if self._crops:
            anchor, shape = crop_with_pixels(params.anchor, params.shape, short_sides)
            arguments |= {"anchor": anchor, "shape": shape}
        if self._warps:
            arguments |= {"matrix": params.matrix}
        if self._twists:
            arguments |= {name: getattr(params, name) for name in ("brightness", "contrast", "saturation", "hue")}
        if self._mirrors:
            arguments |= {"mirror": params.mirror}
        return arguments

    def _build(self) -> Pipeline:
        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if gpu else None,
            # The loader's thread is the prefetching; a depth of 1 also is what lets run() take its inputs.
            prefetch_queue_depth=1,
        )
        with pipeline:
            pipeline.set_outputs(self._graph("mixed" if gpu else "cpu"))
        pipeline.build()
        return pipeline

    def _graph(self, device: str) -> Any:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        if self._crops:
            # Of a JPEG only the rows of blocks that the crop needs are decoded: the same pixels as of the whole picture
            # cut afterwards, for less. A picture that is cut off below the crop never gets here: see declared_size.
            pixels: Any = fn.decoders.image_slice(
                encoded,
                _argument("anchor", ndim=1),
                _argument("shape", ndim=1),
                axis_names="HW",
                device=device,
                output_type=DALIImageType.RGB,
            )
        else:
            pixels = fn.decoders.image(encoded, device=device, output_type=DALIImageType.RGB)
        pixels = fn.resize(pixels, size=[self.image.size, self.image.size], antialias=True)
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
        """A copy (`as_array` makes one): DALI writes its next batch into the same memory."""
        if self.device.type != "cuda":
            return torch.from_numpy(output.as_array())
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
