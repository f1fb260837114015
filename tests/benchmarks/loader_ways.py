"""One way to feed training, timed in a process of its own: `python -m tests.benchmarks.loader_ways WAY FOLDER SECONDS`.

Prints images a second over SECONDS after a warm-up, all with two workers (threads, or processes where a way has no
threads) and batches of 64. Peers are imported only where they are asked for.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

BATCH, WORKERS, SIZE = 64, 2, 224
MEAN = STD = 127.5
MIN_AREA = 0.08
WARM_UP_BATCHES = 4


def ours(folder: Path, *, manifest: str = "shards/manifest.json") -> Iterator[int]:
    """The whole of it: order, rows, captions, tokens, checks, decode, crop, flip, normalise, batch."""
    import torch

    from limoe_dist.config.presets import preset
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.loader import Loader
    from limoe_dist.data.tokenizer import open_tokenizer

    tiny = preset("tiny")
    still = dict.fromkeys(("rotate_degrees", "scale", "translate", "brightness", "contrast", "saturation"), 0.0)
    image = {"size": SIZE, "patch": 16, "min_crop_area": MIN_AREA, "flip": 0.5, "hue_degrees": 0.0} | still
    run = tiny.model_copy(
        update={
            "data": tiny.data.model_copy(update={"manifest": str(folder / manifest), "threads": WORKERS}),
            "image": tiny.image.model_copy(update=image),
            "train": tiny.train.model_copy(update={"batch_pairs": BATCH, "steps": 10**6}),
            "text": tiny.text.model_copy(update={"vocab_size": 32_000}),
        }
    )
    shards = ShardSet(run.data.manifest)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    with Loader(run, shards, tokenizer, rank=0, world=1, first_step=0, device=torch.device("cpu")) as loader:
        for batch in loader:
            yield len(batch.images)


def cropped(folder: Path, how: str, *, stored: str = "") -> Iterator[Any]:
    """Our crops from pictures that are stored or decoded otherwise, (n, 224, 224, 3) uint8; a trial, not the loader.

    whole: decode all of it, then cut. region: only what the crop needs. ours: that, and the loader's resize in place
    of DALI's. shrunk: libjpeg-turbo decodes at 1/2 or 3/4 where the crop stays larger than the result. raw: uint8
    pixels in the shards, nothing to decode.
    stored: the set of shards that is read; empty: that of the whole pictures, or of the raw ones.
    """
    import numpy as np
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType, DALIImageType

    from limoe_dist.config.schema import Image
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.augment import augment_params
    from limoe_dist.data.resize import resized

    pool = ThreadPoolExecutor(WORKERS)
    shards = ShardSet(folder / (stored or ("raw" if how == "raw" else "whole")) / "manifest.json")
    image = Image(size=SIZE, patch=16, min_crop_area=MIN_AREA)
    encoded_kind = how in ("whole", "region", "ours")
    pipeline = Pipeline(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        picture: Any = fn.external_source(
            name="picture",
            dtype=DALIDataType.UINT8,
            ndim=1 if encoded_kind else 3,
            layout=None if encoded_kind else "HWC",
        )
        anchor, shape = (
            fn.external_source(name=name, dtype=DALIDataType.FLOAT, ndim=1) for name in ("anchor", "shape")
        )
        crop = {"axis_names": "HW"}
        if how in ("region", "ours"):
            picture = fn.decoders.image_slice(picture, anchor, shape, output_type=DALIImageType.RGB, **crop)
        else:
            if how == "whole":
                picture = fn.decoders.image(picture, output_type=DALIImageType.RGB)
            picture = fn.slice(picture, anchor, shape, **crop)
        pipeline.set_outputs(picture if how == "ours" else fn.resize(picture, size=[SIZE, SIZE], antialias=True))
    pipeline.build()
    step = 0
    while True:
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        params = augment_params(positions, image, seed=0)
        rows = [shards.row(int(position) % len(shards)) for position in positions]
        pictures = [_stored(row, how, params.shape[i]) for i, row in enumerate(rows)]
        (output,) = pipeline.run(picture=pictures, anchor=params.anchor, shape=params.shape)
        step += 1
        if how == "ours":
            yield resized([np.asarray(output[i]) for i in range(BATCH)], SIZE, pool)
        else:
            yield output.as_array()


def _stored(row: Any, how: str, shape: Any) -> Any:
    import numpy as np

    if how == "raw":
        return np.frombuffer(row.image, np.uint8)[-row.width * row.height * 3 :].reshape(row.height, row.width, 3)
    if how == "shrunk":
        import simplejpeg

        # The crop, in pixels of the picture, must not become smaller than what is asked for.
        part = min(1.0, SIZE / (min(shape[0] * row.height, shape[1] * row.width) or 1))
        needed = (round(row.height * part), round(row.width * part))
        return simplejpeg.decode_jpeg(row.image, min_height=needed[0], min_width=needed[1], min_factor=1)
    return row.image


def differences(folder: Path) -> dict[str, dict[str, float]]:
    """Of the same crops of the same pictures, against decoding the whole picture: dB, and the largest of 255 levels."""
    import numpy as np

    reference = next(cropped(folder, "whole")).astype(np.float64)
    ways = {
        "ours": next(cropped(folder, "ours")),
        "trial: decode the region": next(cropped(folder, "region")),
        "trial: shrink while decoding": next(cropped(folder, "shrunk")),
        "trial: uint8 pixels in the shards": next(cropped(folder, "raw")),
        "pictures packed at 256": next(cropped(folder, "whole", stored="small-trial")),
    }
    found = {}
    for way, pixels in ways.items():
        error = np.abs(pixels - reference)
        mean = float((error**2).mean())
        psnr = round(10 * np.log10(255**2 / mean), 1) if mean else float("inf")
        found[way] = {"psnr_db": psnr if mean else None, "largest": float(error.max())}
    return found


def dali(folder: Path, *, fused: bool) -> Iterator[int]:
    """A bare pipeline of DALI's own operators, from files: no captions, no order of its own."""
    import torch
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType, DALIImageType

    pipeline = Pipeline(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        encoded, _ = fn.readers.file(file_root=str(folder / "files"), random_shuffle=True, name="files")
        if fused:
            pixels: Any = fn.decoders.image_random_crop(
                encoded, output_type=DALIImageType.RGB, random_area=[MIN_AREA, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            pixels = fn.resize(pixels, size=[SIZE, SIZE], antialias=True)
        else:
            pixels = fn.decoders.image(encoded, output_type=DALIImageType.RGB)
            pixels = fn.random_resized_crop(pixels, size=[SIZE, SIZE], random_area=[MIN_AREA, 1.0], antialias=True)
        pixels = fn.crop_mirror_normalize(
            pixels,
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
            mirror=fn.random.coin_flip(),
            mean=[MEAN] * 3,
            std=[STD] * 3,
        )
        pipeline.set_outputs(pixels)
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        yield len(torch.from_numpy(output.as_array()))


def _pillow(encoded: bytes) -> Any:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip on Pillow pictures, as everybody has them."""
    from PIL import Image
    from torchvision import transforms

    global _transform
    if _transform is None:
        _transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(MIN_AREA, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )
    return _transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


_transform: Any = None


def _torch_loader(data: Any) -> Iterator[int]:
    import torch

    torch.set_num_threads(1)
    for batch in torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=WORKERS):
        yield len(batch[0] if isinstance(batch, list | tuple) else batch)


def webdataset(folder: Path) -> Iterator[int]:
    import webdataset as wds

    tars = sorted(str(tar) for tar in (folder / "tars").glob("*.tar"))
    data = wds.WebDataset(tars, shardshuffle=4, nodesplitter=None, resampled=False).shuffle(256)
    pairs = data.to_tuple("jpg", "txt").map_tuple(_pillow, lambda text: len(text))
    while True:
        yield from _torch_loader(pairs)


def arrow_pillow(folder: Path) -> Iterator[int]:
    """Our shards, read by pyarrow and decoded by Pillow in workers."""
    import pyarrow as pa
    import torch

    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.columns: list[Any] = []
            for file in sorted((folder / "shards").glob("*.arrow")):
                reader = pa.ipc.open_file(pa.memory_map(str(file)))
                self.columns += [reader.get_batch(i).column("image") for i in range(reader.num_record_batches)]
            self.places = [(b, i) for b, column in enumerate(self.columns) for i in range(len(column))]

        def __len__(self) -> int:
            return len(self.places)

        def __getitem__(self, index: int) -> Any:
            batch, place = self.places[index * 7919 % len(self.places)]
            return _pillow(self.columns[batch][place].as_py())

    while True:
        yield from _torch_loader(Rows())


WAYS: dict[str, Callable[[Path], Iterator[int]]] = {
    "ours": ours,
    "ours, pictures packed at 256": lambda folder: ours(folder, manifest="small/manifest.json"),
    "DALI, bare, crop while decoding": lambda folder: dali(folder, fused=True),
    "DALI, bare, crop after decoding": lambda folder: dali(folder, fused=False),
    "webdataset + Pillow": webdataset,
    "Arrow + Pillow": arrow_pillow,
    "trial: decode whole, then cut": lambda folder: map(len, cropped(folder, "whole")),
    "trial: decode the region": lambda folder: map(len, cropped(folder, "region")),
    "trial: shrink while decoding": lambda folder: map(len, cropped(folder, "shrunk")),
    "trial: uint8 pixels in the shards": lambda folder: map(len, cropped(folder, "raw")),
}


def main() -> None:
    way, folder, seconds = WAYS[sys.argv[1]], Path(sys.argv[2]), float(sys.argv[3])
    batches = way(folder)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += next(batches)
    print(images / (time.perf_counter() - began), flush=True)
    # Workers and pipelines need not be taken down in good order for a number that is known.
    os._exit(0)


if __name__ == "__main__":
    main()
