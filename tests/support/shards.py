"""Small folders of shards from generated pictures, for every test that needs data; a fraction of a second each."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import sentencepiece
from PIL import Image

from limoe_dist.data.manifest import Manifest, Shard, Source, Tokenizer, save_manifest

CONCEPTS = (
    "red square",
    "green circle",
    "blue stripe",
    "white moon",
    "black cat",
    "yellow sun",
    "old tree",
    "new boat",
)


def write_shards(
    folder: Path,
    *,
    rows: int = 96,
    shards: int = 2,
    size: int = 24,
    pictures: Mapping[int, bytes] | None = None,
    captions: Mapping[int, Sequence[str]] | None = None,
    vocab_size: int | None = 32,
    concepts: bool = True,
) -> Path:
    """Writes Arrow shards, a tokenizer and manifest.json into `folder`; the manifest's path.

    Row i is "row-i" of concept CONCEPTS[i % 8] with the captions "a {concept}" and "picture of a {concept}".
    pictures, captions: by row, in place of the generated ones. vocab_size: None leaves the tokenizer out.
    concepts: False leaves the column empty, as for captioned photographs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, part in enumerate(np.array_split(np.arange(rows), shards)):
        records = [_record(int(row), size, pictures or {}, captions or {}) for row in part]
        if not concepts:
            records = [record | {"concept": ""} for record in records]
        file = folder / f"shard-{number:05d}.arrow"
        _write_arrow(file, records)
        entries.append(
            Shard(file=file.name, rows=len(part), bytes=file.stat().st_size, sha256=_sha256(file.read_bytes()))
        )
    tokenizer = _write_tokenizer(folder / "tokenizer.model", vocab_size) if vocab_size else None
    manifest = Manifest(
        name="generated",
        rows=rows,
        shards=tuple(entries),
        sources=(Source(name="generated", rows=rows, license="CC0-1.0"),),
        tokenizer=tokenizer,
    )
    save_manifest(manifest, folder / "manifest.json")
    return folder / "manifest.json"


def picture(row: int, *, size: int = 24, format: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded picture: a ramp and a block of noise, in colours of the row's own."""
    colour = np.random.default_rng(row).integers(40, 215, 3)
    ramp = np.add.outer(np.arange(size), 2 * np.arange(size))[..., None] * 80 // (3 * size)
    pixels = np.clip(colour + ramp - 40, 0, 255).astype(np.uint8)
    third = size // 3
    pixels[third : 2 * third, third:] = np.random.default_rng(row).integers(0, 255, (third, size - third, 3))
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, format)
    return encoded.getvalue()


def truncated(row: int, *, format: str = "PNG") -> bytes:
    """The first 60 % of `picture(row)`: its header is whole, its pixels are not."""
    whole = picture(row, format=format)
    return whole[: len(whole) * 6 // 10]


def damaged(row: int) -> bytes:
    """`picture(row)` as a PNG that is whole by its chunks, but whose compressed pixels are not what was written."""
    content = bytearray(picture(row))
    content[content.index(b"IDAT") + 40] ^= 0xFF
    return bytes(content)


def _record(
    row: int, size: int, pictures: Mapping[int, bytes], captions: Mapping[int, Sequence[str]]
) -> dict[str, object]:
    concept = CONCEPTS[row % len(CONCEPTS)]
    image = pictures.get(row, None)
    image = picture(row, size=size) if image is None else image
    return {
        "key": f"row-{row}",
        "image": image,
        "captions": list(captions.get(row, (f"a {concept}", f"picture of a {concept}"))),
        "concept": concept,
        "width": size,
        "height": size,
        "sha256": _sha256(image),
        "source": "generated",
    }


def _write_arrow(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.binary()),
            ("captions", pa.list_(pa.string())),
            ("concept", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sha256", pa.string()),
            ("source", pa.string()),
        ]
    )
    # Batches of 7 rows, so that a shard has several, the last one shorter.
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for first in range(0, len(records), 7):
            writer.write_batch(pa.RecordBatch.from_pylist(list(records[first : first + 7]), schema=schema))


def _write_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    model = _tokenizer_model(vocab_size)
    file.write_bytes(model)
    return Tokenizer(file=file.name, sha256=_sha256(model), vocab_size=vocab_size)


@functools.cache
def _tokenizer_model(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentences = [text for concept in CONCEPTS for text in (f"a {concept}", f"picture of a {concept}")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4),
        model_writer=model,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
