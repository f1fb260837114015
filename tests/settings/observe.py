"""What a run's settings decide, by class of result, each class from inputs of its own.

A setting that moves the initial weights must not show in the gradient: the forward pass, the gradient and the update
are observed with weights, pixels and gradients that are given. Only a change of shapes shows in all of them.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from limoe_dist.config.schema import Run
from limoe_dist.data.augment import augment_params, caption_index, identity_params
from limoe_dist.data.dali import Decoder
from limoe_dist.data.manifest import load_manifest
from limoe_dist.data.mixture import Mixture, entries_of, orders_of
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.model.moe_layer import EVALUATION, Routes
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, backward
from tests.support.shards import picture

CPU = torch.device("cpu")
POSITIONS = np.arange(7, 7 + 160)
PICTURES = 6
CAPTIONS = ("old tree", "a new boat and a white moon", "black cat")
Observed = dict[str, dict[str, np.ndarray]]
"""Arrays by class of result and name."""


def observe(run: Run) -> Observed:
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    found = {"initial values": {name: _array(value) for name, value in model.state_dict().items()}}
    return found | _step(model, run) | _update(run) | {"rate": _rate(run)} | _data(run)


def differing(one: Observed, other: Observed) -> set[str]:
    """Classes of results that differ by more than the order of sums does."""
    return {kind for kind in one if not _same(one[kind], other[kind])}


def _same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and one[name].dtype == other[name].dtype
        and np.allclose(one[name], other[name], rtol=1e-9, atol=1e-11)
        for name in one
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _given(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that belong to a name and a shape."""
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape))


@torch.no_grad()
def _fill(model: Limoe) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(_given(name, tuple(parameter.shape)) * (1.0 if name.endswith("router") else 0.2))


def _examples(run: Run) -> Examples:
    pairs, length = run.train.batch_pairs, run.text.length
    images = _given("images", (pairs, 3, run.image.size, run.image.size))
    tokens = torch.from_numpy(np.random.default_rng(1).permutation(pairs * length).reshape(pairs, length) % 40)
    valid = torch.arange(length) < 1 + torch.arange(pairs)[:, None] % length
    return Examples(images, tokens, valid)


def _step(model: Limoe, run: Run) -> Observed:
    """Both forward passes, the losses and the gradient of a training step; and the way in which they were computed."""
    _fill(model)
    examples, engine = _examples(run), make_engine(model, run, Mesh.single())
    routes: list[Routes] = [
        {} for _ in range(run.train.batch_pairs // (run.train.microbatch_pairs or run.train.batch_pairs))
    ]
    passes: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = backward(model, engine, examples, step=3, run=run, mesh=Mesh.single(), routes=routes)
    gradient = {name: _array(shard.tensor) for name, shard in engine.gradients().items()}
    auxiliary = {
        f"{block}/{name}": _array(loss)
        for block, record in losses.records.items()
        for name, loss in record.losses.items()
    }
    served = {
        f"{block} {name}": np.concatenate([_array(getattr(part[block], name)) for part in routes])
        for block in losses.records
        for name in ("expert_GSK", "kept_GSK", "order_GS")
    }
    logits = (run.train.batch_pairs,) * 2
    way = {
        "tokens of each pass": np.array(passes),
        "tensors saved": np.array(len(saved)),
        "all logits at once": np.array(logits in saved),
        "buckets": np.array(len(engine.buckets)),
        "sums are float64": np.array(engine.masters[0].dtype == torch.float64),
    }
    images = examples.images
    assert images is not None
    with torch.no_grad():
        evaluated = model(images.to(model.log_scale.dtype), examples.tokens, examples.valid, mode=EVALUATION)
    return {
        "served in training": served,
        "auxiliary losses": auxiliary,
        "loss": {"contrastive": _array(losses.contrastive), "aux": _array(losses.aux)},
        "gradient": gradient,
        "evaluation": {"image": _array(evaluated.image_BP), "text": _array(evaluated.text_BP)},
        "way": way,
    }


def _update(run: Run) -> Observed:
    """The weights after two updates with given gradients at a given rate."""
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    _fill(model)
    engine = make_engine(model, run, Mesh.single())
    for step in range(2):
        given = [(p, _given(f"{name} {step}", tuple(p.shape)).to(p.dtype)) for name, p in model.named_parameters()]
        engine.backward(torch.stack([(p * gradient).sum() for p, gradient in given]).sum(), last=True)
        engine.step(0.01)
    return {"update": {name: _array(p) for name, p in model.named_parameters()}}


def _rate(run: Run) -> dict[str, np.ndarray]:
    steps = range(run.train.steps)
    return {"rate": np.array([learning_rate(step, optim=run.optim, steps=run.train.steps) for step in steps])}


def _data(run: Run) -> Observed:
    """Rows of positions; pixels and captions of given rows at positions."""
    entries = entries_of(run.data)
    manifests = [load_manifest(Path(entry.path)) for entry in entries]
    drawn = Mixture([entry.weight for entry in entries]).at(
        POSITIONS, orders_of(run.data, manifests, seed=run.train.seed)
    )
    content = [np.frombuffer(picture(row), dtype=np.uint8) for row in range(PICTURES)]
    params = augment_params(np.arange(PICTURES), run.image, seed=run.train.seed)
    pixels = {
        mode: _array(Decoder(run.image, mode=mode, batch_size=PICTURES, threads=1, device=CPU).decode(content, chosen))
        for mode, chosen in (("train", params), ("evaluation", identity_params(PICTURES)))
    }
    draws = augment_params(POSITIONS, run.image, seed=run.train.seed).caption
    tokenizer = open_tokenizer(run, manifests[0], Path(entries[0].path).parent)
    encoded = tokenizer(list(CAPTIONS))
    return {
        "rows": {"sources": drawn.sources, "rows": drawn.rows},
        "training pixels": {"pixels": pixels["train"]},
        "evaluation pixels": {"pixels": pixels["evaluation"]},
        "caption choice": {"of 5": np.array([caption_index(draw, 5) for draw in draws])},
        "tokens": {"tokens": encoded.tokens, "valid": encoded.valid},
    }
