from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limoe_dist.config.schema import Image
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.augment import identity_params
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import refusal
from limoe_dist.data.pictures import PictureReader
from tests.support.shards import damaged, write_shards


def test_a_bad_row_fails_its_batch_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=6, shards=1, pictures={2: damaged(2), 4: b""}))
    decoder = Decoder(Image(size=16, patch=8), mode="train", batch_size=6, threads=1, device=torch.device("cpu"))
    calls: list[int] = []
    decode = decoder.decode
    monkeypatch.setattr(
        decoder, "decode", lambda encoded, params: calls.append(len(encoded)) or decode(encoded, params)
    )
    reader, rows = PictureReader(decoder, refusal), [shards.row(i) for i in range(6)]
    first = reader.read(rows, identity_params(6))
    # Row 4 is refused by its header; the other five fail together because of row 2, and are tried alone.
    assert calls == [5, 1, 1, 1, 1, 1]
    second = reader.read(rows, identity_params(6))
    assert calls[6:] == [4]
    assert torch.equal(first.images, second.images)
    assert first.reasons == second.reasons
    assert [reason is None for reason in first.reasons] == [True, True, False, True, False, True]
    assert [bool(image.any()) for image in first.images] == [True, True, False, True, False, True]


def test_a_batch_of_bad_rows_only_is_all_zeros(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=2, shards=1, pictures={0: damaged(0), 1: damaged(1)}))
    decoder = Decoder(Image(size=16, patch=8), mode="train", batch_size=2, threads=1, device=torch.device("cpu"))
    pictures = PictureReader(decoder, refusal).read([shards.row(0), shards.row(1)], identity_params(2))
    assert pictures.images.shape == (2, 3, 16, 16)
    assert not pictures.images.any()
    assert all(reason and reason.startswith("cannot be decoded") for reason in pictures.reasons)
