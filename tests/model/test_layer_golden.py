"""The MoE layer, by its settings, against the golden routing cases: k of 1, 2 and 3, both orders, noise as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Image, Model, Moe, Run, Text, Train
from limoe_dist.model import moe_layer
from limoe_dist.model.moe_layer import MoeLayer, Route, Routes, RoutingMode
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Mesh
from tests.golden.load import ROUTING_CASES, routing_case

Pairs = dict[str, tuple[Tensor, Tensor]]
NAMES = {
    "importance": "vmoe_importance_loss",
    "load": "vmoe_load_loss",
    "z": "ref_z_loss",
    "local_image": "ref_local_ent_img",
    "local_text": "ref_local_ent_txt",
    "global_image": "ref_global_ent_thr_img",
    "global_text": "ref_global_ent_thr_txt",
    "mutual_information": "ref_neg_mi_em",
}
# A layer's tokens stand images first; one case mixes them, and then first come is another order.
FIRST_COME_CASES = [name for name, setup in ROUTING_CASES.items() if setup["kind"] != "interleaved"]


@dataclass(frozen=True)
class Passed:
    place_S: Tensor
    """Where the layer's tokens stand in the golden case."""
    gates_SE: Tensor
    """Those that the layer routed by."""
    losses: dict[str, Tensor]
    route: Route


def layer_of(name: str, *, order: Literal["priority", "images_first"], noise_std: float) -> MoeLayer:
    """As wide as it has experts, with the identity for a router: its input is the logits."""
    setup, case = ROUTING_CASES[name], routing_case(name)
    experts, k, tokens = setup["E"], setup["k"], setup["n_img"] + setup["n_txt"]
    run = Run(
        model=Model(width=experts, depth=1, heads=1, mlp_dim=4, embed_dim=4),
        image=Image(size=4, patch=4),
        text=Text(length=1, vocab_size=2, pad="token"),
        moe=Moe(
            blocks=(0,),
            num_experts=experts,
            top_k=k,
            group_pairs=1,
            capacity_factor=setup["capacity"] * experts / (tokens * k),
            capacity_multiple=1,
            order=order,
            noise_std=noise_std,
            min_image_experts=math.exp(case["tau_img"].item()),
            min_text_experts=math.exp(case["tau_txt"].item()),
        ),
        train=Train(dtype="fp64"),
    )
    layer = build_model(run, mesh=Mesh.single(), device=torch.device("cpu")).blocks[0].moe
    with torch.no_grad():
        layer.router.copy_(torch.eye(experts))
    return layer


@torch.no_grad()
def passed(name: str, *, order: Literal["priority", "images_first"] = "priority", noise_std: float = 0.0) -> Passed:
    """A training pass of one group; with noise, the noise is the golden case's."""
    case, setup = routing_case(name), ROUTING_CASES[name]
    place_S = case["modality"].argsort(stable=True)
    layout = TokenLayout(
        images=setup["n_img"],
        image_tokens=1,
        texts=setup["n_txt"],
        text_tokens=1,
        groups=1,
        device=torch.device("cpu"),
    )
    layer, mode, routes = layer_of(name, order=order, noise_std=noise_std), RoutingMode(training=True), Routes()
    # The layer asks for standard normal numbers and scales them by 1 / E.
    unit_noise = case["noise"][place_S] * setup["E"]
    with patch.object(moe_layer.counter_rng, "normal", lambda *_, **__: unit_noise[None]):
        x_SD = case["logits"][place_S]
        _, noisy_GSE = layer.logits(x_SD, layout, mode)
        _, record = layer(x_SD, layout, mode, routes)
    return Passed(place_S, noisy_GSE[0].softmax(-1), record.losses, routes[0])


def decided(name: str, tag: Literal["bpr", "fifo"]) -> Pairs:
    """Ours beside vmoe's, by their name in the golden file."""
    case, found = routing_case(name), passed(name, order="priority" if tag == "bpr" else "images_first")
    ours = {"expert_index": found.route.expert_GSK[0], "kept": found.route.kept_GSK[0]}
    return {key: (value, case[f"vmoe_{tag}_{key}"][found.place_S]) for key, value in ours.items()}


def noisy(name: str) -> Pairs:
    """Ours beside the reference's, with noise: the gates, and every loss by its name in the layer."""
    case, found = routing_case(name), passed(name, noise_std=1.0)
    losses = {key: (value, case[NAMES[key]]) for key, value in found.losses.items()}
    return {"gates_noisy": (found.gates_SE, case["gates_noisy"][found.place_S]), **losses}


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_the_layer_serves_by_priority_whom_vmoe_serves(name: str) -> None:
    for key, (ours, theirs) in decided(name, "bpr").items():
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", FIRST_COME_CASES)
def test_the_layer_serves_first_come_whom_vmoe_serves(name: str) -> None:
    for key, (ours, theirs) in decided(name, "fifo").items():
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_noise_given_as_numbers_leads_to_the_gates_and_losses_of_the_reference(name: str) -> None:
    # Noise moves the gates and the load loss; the other losses see clean logits.
    found = noisy(name)
    texts = ROUTING_CASES[name]["n_txt"]
    assert found.keys() == {
        "gates_noisy",
        *(key for key in NAMES if texts or ("text" not in key and "mutual" not in key)),
    }
    # float64; z-losses reach 30, so relative too.
    for key, pair in found.items():
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_experts_are_chosen_by_noisy_gates(name: str) -> None:
    case, found = routing_case(name), passed(name, noise_std=1.0)
    theirs_SE = case["gates_noisy"][found.place_S].argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.route.expert_GSK[0], theirs_SE[:, : ROUTING_CASES[name]["k"]])
