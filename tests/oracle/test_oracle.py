"""The oracle against numbers of Google's vmoe code, and its gradients against central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from limoe_dist.config.schema import Image, Model, Moe, Optim, Run, Text, Train
from tests.golden.load import ROUTING_CASES, arrays, routing_case
from tests.model.test_tower_golden import NAMES, values
from tests.oracle import losses, optimizer, routing
from tests.oracle.step import Batch, Trainer, aux_loss, forward
from tests.oracle.tower import softmax


def tiny(blocks: tuple[int, ...]) -> Run:
    """The one-tower LIMoE of the golden files."""
    return Run(
        model=Model(width=32, depth=4, heads=4, mlp_dim=64, embed_dim=24),
        image=Image(size=16, patch=4),
        text=Text(length=5, vocab_size=50, pad="token"),
        moe=Moe(
            blocks=blocks,
            num_experts=8,
            group_pairs=6,
            capacity_factor=1.0,
            noise_std=0.0,
            min_image_experts=0.95 * 8,
            min_text_experts=0.75 * 8,
        ),
        train=Train(batch_pairs=6, dtype="fp64"),
    )


# The golden values are float32 results of float32 programs.
@pytest.mark.parametrize(("case", "blocks"), [("k1_g1", (1, 3)), ("dense", ())])
def test_a_whole_step_has_googles_embeddings_losses_and_gradients(case: str, blocks: tuple[int, ...]) -> None:
    golden = {key.removeprefix(f"{case}/"): value for key, value in arrays(f"limoe_tiny_{case}").items()}
    weights = {name: np.asarray(v.numpy(), dtype=float) for name, v in values(case, "params", blocks).items()}
    images = np.asarray(golden["images"], dtype=float).transpose(0, 3, 1, 2)
    batch = Batch(images, golden["tokens"].astype(int), np.ones_like(golden["tokens"], dtype=bool))
    result = Trainer(tiny(blocks), weights).step(batch)
    np.testing.assert_allclose(result.forward.image_BP, golden["zi"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(result.forward.text_BP, golden["zt"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(result.contrastive, golden["contrastive"], rtol=2e-6)
    np.testing.assert_allclose(result.contrastive + result.aux, golden["total"], rtol=2e-6)
    for number, block in enumerate(blocks):
        for name, theirs in NAMES.items():
            found = result.forward.blocks[block].losses[name]
            np.testing.assert_allclose(found, golden[f"aux{number}/{theirs}"], rtol=5e-6, atol=1e-6)
    gradients = values(case, "grads", blocks)
    assert set(gradients) == set(result.gradients)
    for name, theirs in gradients.items():
        error = np.abs(result.gradients[name] - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_a_group_is_routed_as_google_does(name: str) -> None:
    about, case = ROUTING_CASES[name], {key: value.numpy() for key, value in routing_case(name).items()}
    gates, experts, is_text = case["gates"], about["E"], case["modality"] == 1
    moe = Moe(num_experts=experts, top_k=about["k"])
    for order, tag in (("priority", "bpr"), ("images_first", "fifo")):
        moe = moe.model_copy(update={"order": order})
        everyone = np.ones(len(gates), dtype=bool)
        found = routing.decide(moe, gates, np.ones_like(gates, dtype=bool), is_text, None, everyone, about["capacity"])
        assert np.array_equal(found.expert_SK, case[f"vmoe_{tag}_expert_index"])
        assert np.array_equal(found.kept_SK, case[f"vmoe_{tag}_kept"])
    if about["cf"] is not None and about["ceil_or_round"] == "ceil":
        assert routing.capacity(len(gates), moe, about["cf"]) == about["capacity"]


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_the_losses_of_a_group_are_googles_and_the_papers(name: str) -> None:
    about, case = ROUTING_CASES[name], {key: value.numpy() for key, value in routing_case(name).items()}
    logits, experts, is_text = case["logits"], about["E"], case["modality"] == 1
    noisy = logits + case["noise"]
    found = {
        "vmoe_importance_loss": losses.importance(logits),
        "vmoe_load_loss": losses.load(logits, noisy, about["k"], 1 / experts),
        "ref_z_loss": losses.z(logits),
    }
    for short, part in (("img", logits[~is_text]), ("txt", logits[is_text])):
        if len(part):
            found[f"ref_local_ent_{short}"] = losses.local_entropy(part, 1, "plain")
            found[f"ref_global_ent_{short}"] = -losses.entropy(softmax(part).mean(0))
            found[f"ref_global_ent_thr_{short}"] = losses.global_entropy(part, float(case[f"tau_{short}"]))
    if is_text.any():
        both = logits[~is_text], logits[is_text]
        found["ref_neg_mi_em"] = losses.mutual_information(*both, "tokens")
        found["ref_neg_mi_em_uniform"] = losses.mutual_information(*both, "uniform")
    for key, value in found.items():
        np.testing.assert_allclose(value, case[key], rtol=1e-12, atol=1e-13, err_msg=key)


def test_six_adafactor_steps_are_googles() -> None:
    golden = arrays("optimizer")
    optim = Optim(name="adafactor", min_factored_dim=32, weight_decay=0.1)
    weights = {key.removeprefix("p0/"): np.asarray(v, float) for key, v in golden.items() if key.startswith("p0/")}
    # Its names are flax's: stacks of experts and kernels get the names by which the oracle knows them.
    ours = {name: name.replace("Moe", "x.experts.").replace("kernel", "up_weight") for name in weights}
    rule = optimizer.Adafactor(optim, {ours[name]: weight for name, weight in weights.items()})
    # big_vision_rsqrt, peak 1e-2, warm-up 2, timescale 10, a line from the rate at step 4 to 0 at step 6.
    falling = [1e-2 / (1 + (step - 2) / 10) ** 0.5 for step in (2, 3, 4)]
    rates = [0.0, 0.5e-2, *falling[:2], falling[2], falling[2] / 2]
    for step, rate in enumerate(rates):
        gradients = {name: np.asarray(golden[f"g{step}/{name}"], float) for name in weights}
        gradients = optimizer.clipped(gradients, optimizer.global_norm(gradients), 1.0)
        for name in weights:
            weights[name] = rule.update(ours[name], weights[name], gradients[name], rate, step)
            np.testing.assert_allclose(weights[name], golden[f"adafactor/p{step + 1}/{name}"], rtol=1e-6, atol=1e-6)


def test_two_adamw_steps_by_hand() -> None:
    optim = Optim(beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.1)
    rule = optimizer.AdamW(optim, {"router": np.zeros(1)})
    # First: both moments are unbiased to the gradient and its square: the step is rate * (1 + decay * weight).
    first = rule.update("router", np.array([2.0]), np.array([4.0]), 0.1, 0)
    np.testing.assert_allclose(first, 2 - 0.1 * (1 + 0.1 * 2), rtol=1e-8)
    # Second, gradient 0: first moment 1 / (1 - 1/4) = 4/3, second 3 / (1 - 9/16) = 48/7.
    second = rule.update("router", first, np.array([0.0]), 0.1, 1)
    np.testing.assert_allclose(second, first - 0.1 * (0.1 * first + (4 / 3) / (48 / 7) ** 0.5), rtol=1e-8)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    run = tiny((1, 3))
    moe = {"load": 1.0, "local_image": 1.0, "mutual_information": 1.0, "noise_std": 1.0, "top_k": 2, "group_pairs": 3}
    run = run.model_copy(update={"moe": run.moe.model_copy(update=moe | {"local_form": "merged"})})
    weights: dict[str, Any] = {
        name: np.asarray(v.numpy(), dtype=float) for name, v in values("k1_g1", "params", (1, 3)).items()
    }
    random = np.random.default_rng(0)
    images, tokens = random.normal(size=(6, 3, 16, 16)), random.integers(0, 50, (6, 5))
    batch = Batch(images, tokens, np.ones((6, 5), dtype=bool))
    noise = {block: random.normal(size=(2, 3 * 21, 8)) for block in (1, 3)}
    gradients = Trainer(run, weights).step(batch, noise=noise).gradients

    def loss(name: str, place: int, move: float) -> float:
        changed = np.array(weights[name], order="C")
        changed.reshape(-1)[place] += move
        passed = forward(run, weights | {name: changed}, batch, training=True, noise=noise)
        scale = np.exp(changed if name == "log_scale" else weights["log_scale"])
        contrastive = losses.contrastive(passed.image_BP, passed.text_BP, scale)
        return float(contrastive + aux_loss(run, passed.blocks, 2))

    for name, gradient in gradients.items():
        place = int(np.abs(gradient).argmax())
        slope = (loss(name, place, 1e-5) - loss(name, place, -1e-5)) / 2e-5
        # A central difference is exact to the square of its width, 1e-10, and to rounding over its width, 1e-11.
        np.testing.assert_allclose(np.asarray(gradient).reshape(-1)[place], slope, rtol=1e-6, atol=1e-8, err_msg=name)
