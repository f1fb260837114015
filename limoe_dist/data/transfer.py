"""How a batch that a thread prepared reaches the device of the training step; on a CPU nothing is to be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@contextmanager
def copies_finished(device: torch.device) -> Iterator[None]:
    """Work inside runs beside the training step, on a stream of its own, and has ended when the block is left."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def on_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device; from pinned memory where that is a GPU. Shares memory on a CPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def use_on_current_stream(*tensors: Tensor) -> None:
    """Tells CUDA's allocator that these, made on another stream, are read on this one: else it reuses them too soon."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
