"""Checkpoints that are made byte by byte: what no save writes, under checksums that are right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from limoe_dist.checkpoint.catalog import checkpoint_folder
from limoe_dist.checkpoint.manifest import CheckpointManifest, File, encode
from limoe_dist.parallel.placement import Shard
from tests.support.checkpoints import a_state

RANK_0, RANK_1 = "rank-00000.safetensors", "rank-00001.safetensors"
NAME = "model/w"


def whole(tensor: Tensor) -> Shard:
    """A tensor that one process holds and writes."""
    return Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim(), writes=True)


def mixed(number: int = 0) -> dict[str, Shard]:
    """Tensors of every kind, narrow ones first and of odd lengths; each number is its own, and `number`'s."""
    kinds = [
        ("model/bf16", torch.bfloat16, (5,)),
        ("model/fp32", torch.float32, (3, 5)),
        ("model/scalar", torch.float32, ()),
        ("adamw/exp_avg/fp64", torch.float64, (3, 1, 7)),
        ("adamw/count/int64", torch.int64, (3,)),
    ]
    shards, first = {}, 100 * number
    for name, dtype, shape in kinds:
        tensor = torch.zeros(shape, dtype=dtype)
        shards[name] = whole(tensor.copy_(torch.arange(first, first + tensor.numel()).view(shape)))
        first += tensor.numel()
    return shards


def content(header: bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    """A file in the form of safetensors, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Sequence[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def parts(places: object) -> dict[str, object]:
    """The entry of a header that says where boxes belong: NAME: [logical shape, start], ..."""
    return {"__metadata__": {"limoe": json.dumps(places)}}


def box(values: Sequence[float], *, of: Sequence[int], start: Sequence[int], name: str = NAME) -> bytes:
    """A rank's file with one vector of float32, which it says belongs at `start` of a logical tensor."""
    data = torch.tensor(values).numpy().tobytes()
    return content(parts({name: [of, start]}) | {name: entry([len(values)], 0, len(data))}, data)


def entry_of(file: Path) -> File:
    """The manifest's entry of a file as it is."""
    data = file.read_bytes()
    return File(name=file.name, bytes=len(data), xxh3=xxhash.xxh3_128(data).hexdigest())


def plant(run_dir: Path, files: Mapping[str, bytes], *, step: int = 3) -> Path:
    """A checkpoint of these files and a true state.json, with a manifest that is right for them."""
    folder = checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    state = a_state(step).model_dump_json().encode()
    for name, data in ({"state.json": state} | dict(files)).items():
        (folder / name).write_bytes(data)
    seal(folder, step)
    return folder


def seal(folder: Path, step: int) -> None:
    """Writes a manifest that is right for the files that are there."""
    entries = [entry_of(file) for file in sorted(folder.iterdir())]
    (folder / "manifest.json").write_bytes(encode(CheckpointManifest(step=step, files=tuple(entries))))


def signed(fields: Mapping[str, object], *, files: str = "") -> bytes:
    """A manifest of any fields, under the checksum that it should have; files: JSON in the place of theirs."""
    blank = "0" * 32
    text = json.dumps({"xxh3": blank} | dict(fields) | ({"files": None} if files else {}))
    text = text.replace('"files": null', f'"files": {files}')
    return text.replace(blank, xxhash.xxh3_128(text.encode()).hexdigest(), 1).encode()
