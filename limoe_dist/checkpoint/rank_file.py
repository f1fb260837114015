"""The file of one rank: boxes of logical tensors as safetensors, and in its header where each box begins.

    8 bytes   length of the header
    header    {"__metadata__": {"limoe": {NAME: [logical shape, start], ...}}, NAME: {dtype, shape, data_offsets}, ...}
    tensors   one behind the other, wide types first
Format: https://github.com/huggingface/safetensors. Any reader of safetensors opens it.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from limoe_dist.checkpoint.contents import KEY, SUFFIX
from limoe_dist.checkpoint.manifest import BLOCK
from limoe_dist.parallel.placement import Shard

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}{SUFFIX}"


class HostCopy:
    """Memory of the host that is laid out as the file of this rank: filled by a copy, then written as it is.

    It is made once and filled for every save, so that training waits for a copy into warm memory alone. Beside a GPU
    the memory is pinned.
    """

    def __init__(self, shards: dict[str, Shard]) -> None:
        mine = {name: shard for name, shard in shards.items() if shard.writes}
        self._device = next((shard.tensor.device for shard in mine.values()), torch.device("cpu"))
        wide_first = sorted(mine.items(), key=lambda item: -item[1].tensor.dtype.itemsize)
        header = encode_header(wide_first)
        total = len(header) + sum(shard.tensor.nbytes for _, shard in wide_first)
        # Written once, so that the first save finds warm memory too.
        self._memory = torch.empty(total, dtype=torch.uint8).fill_(0)
        if self._device.type == "cuda":
            _pin(self._memory, self)
        self._memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._places: dict[str, Tensor] = {}
        begin = len(header)
        for name, shard in wide_first:
            end = begin + shard.tensor.nbytes
            self._places[name] = self._memory[begin:end].view(shard.tensor.dtype).view(shard.tensor.shape)
            begin = end

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    @torch.no_grad()
    def fill(self, shards: dict[str, Shard]) -> None:
        """Copies the tensors of now. `shards`: of the names, shapes and types that this was made for."""
        for name, place in self._places.items():
            place.copy_(shards[name].tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def blocks(self) -> Iterator[memoryview]:
        """The content of the file, in order."""
        content = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        for begin in range(0, len(content), BLOCK):
            yield content[begin : begin + BLOCK]


def _pin(memory: Tensor, owner: object) -> None:
    """Pins memory until its owner goes. torch's own pinned memory is rounded up to the next power of two."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())


def encode_header(shards: list[tuple[str, Shard]]) -> bytes:
    """Length and header, padded so that every tensor begins at a multiple of its own numbers' bytes.

    shards: wide types first. Only shapes, types and starts are looked at: tensors may be on meta.
    """
    parts = json.dumps({name: (shard.shape, shard.start) for name, shard in shards}, separators=(",", ":"))
    entries: dict[str, object] = {"__metadata__": {KEY: parts}}
    begin = 0
    for name, shard in shards:
        tensor = shard.tensor
        end = begin + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
