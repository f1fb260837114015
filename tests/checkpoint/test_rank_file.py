"""A rank's file has the tensors of the moment of the copy, aligned, and opens as plain safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from limoe_dist.checkpoint.contents import Part, read_header
from limoe_dist.checkpoint.rank_file import HostCopy, file_name
from limoe_dist.parallel.placement import Shard
from tests.checkpoint.planted import mixed


def written(copy: HostCopy, path: Path) -> Path:
    path.write_bytes(b"".join(copy.blocks()))
    return path


def filled(copy: HostCopy, shards: dict[str, Shard]) -> HostCopy:
    copy.fill(shards)
    return copy


def test_tensors_of_all_types_are_aligned_and_open_as_plain_safetensors(tmp_path: Path) -> None:
    shards = mixed()
    copy = filled(HostCopy(shards), shards)
    path = written(copy, tmp_path / file_name(0))
    assert path.stat().st_size == copy.num_bytes
    plain = load_file(path)
    assert plain.keys() == shards.keys()
    for name, tensor in plain.items():
        assert tensor.dtype == shards[name].tensor.dtype
        assert torch.equal(tensor, shards[name].tensor), name

    assert {name: (part.shape, part.start, part.size) for name, part in read_header(path)} == {
        name: (shard.shape, shard.start, shard.shape) for name, shard in shards.items()
    }
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, shard in shards.items():
        begin, end = header[name]["data_offsets"]
        assert (8 + length + begin) % shard.tensor.dtype.itemsize == 0, name
        assert end - begin == shard.tensor.nbytes


def test_boxes_that_others_write_and_strides_are_left_out(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    shards = {
        "model/turned": Shard(matrix.T, (8, 3), (4, 0), writes=True),
        "model/other": Shard(matrix, (3, 4), (0, 0), writes=False),
        "model/empty": Shard(torch.empty(0, 4), (3, 4), (3, 0), writes=False),
    }
    path = written(filled(HostCopy(shards), shards), tmp_path / "f.safetensors")
    assert dict(read_header(path)) == {"model/turned": Part(path, (8, 3), (4, 0), (4, 3), "F32")}
    assert torch.equal(load_file(path)["model/turned"], matrix.T)


def test_a_rank_that_has_nothing_to_write_writes_a_file_without_tensors(tmp_path: Path) -> None:
    path = written(HostCopy({}), tmp_path / "f.safetensors")
    assert load_file(path) == {}
    assert dict(read_header(path)) == {}


def test_the_copy_keeps_its_values_and_its_memory(tmp_path: Path) -> None:
    shards = mixed(number=1)
    copy = filled(HostCopy(shards), shards)
    before = written(copy, tmp_path / "before.safetensors")
    address = np.frombuffer(next(copy.blocks()), np.uint8).ctypes.data
    for shard in shards.values():
        shard.tensor.add_(1)
    # Training went on: the copy did not.
    assert written(copy, tmp_path / "same.safetensors").read_bytes() == before.read_bytes()
    # The next save may hand in other tensors of the same names: DeepSpeed's are copies.
    copy.fill({name: Shard(s.tensor.clone(), s.shape, s.start, s.writes) for name, s in shards.items()})
    assert np.frombuffer(next(copy.blocks()), np.uint8).ctypes.data == address
    after = load_file(written(copy, tmp_path / "after.safetensors"))
    old = load_file(before)
    for name, shard in shards.items():
        assert torch.equal(after[name], shard.tensor), name
        assert torch.equal(old[name] + 1, shard.tensor), name
