"""Router noise and the random order of service: distribution, independence, and what they depend on.

The noise is what a layer adds to logits that are zero. Shapes: G groups, S tokens of a group, E experts.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from limoe_dist.config.schema import Image, Model, Moe, Optim, Run, Text, Train
from limoe_dist.model.moe_layer import MoeLayer, Routes, RoutingMode
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import initialise
from limoe_dist.train.step import Examples, backward
from tests.draws import reference
from tests.draws.statistics import SIGMAS_OF_MANY, check_counts, check_independent, check_normal

CPU = torch.device("cpu")
E, IMAGE_TOKENS, TEXT_TOKENS = 16, 9, 5
WIDTH = 4


def a_layer(block: int = 1, *, experts: int = E, **moe: Any) -> MoeLayer:
    run = Run(
        model=Model(width=WIDTH, heads=1, mlp_dim=3),
        moe=Moe(num_experts=experts, blocks=tuple(range(12)), min_image_experts=1.0, min_text_experts=1.0, **moe),
    )
    layer = MoeLayer(run, block, mesh=Mesh.single()).double()
    initialise(layer, seed=0, mesh=Mesh.single())
    return layer


def a_layout(groups: int, pairs: int = 8) -> TokenLayout:
    """groups of `pairs` pairs: S = 14 * pairs."""
    count = groups * pairs
    return TokenLayout(count, IMAGE_TOKENS, count, TEXT_TOKENS, groups, CPU)


def noise_of(
    layer: MoeLayer, *, seed: int = 3, step: int = 0, first_group: int = 0, groups: int = 4, pairs: int = 8
) -> np.ndarray:
    """(G, S, E): noisy logits minus clean ones, of tokens that are zero."""
    layout = a_layout(groups, pairs)
    x_TD = torch.zeros(groups * layout.group_tokens, WIDTH, dtype=torch.float64)
    mode = RoutingMode(training=True, seed=seed, step=step, first_group=first_group)
    with torch.no_grad():
        clean_GSE, noisy_GSE = layer.logits(x_TD, layout, mode)
    assert (clean_GSE == 0).all()
    return noisy_GSE.numpy()


@pytest.mark.parametrize(("noise_std", "experts"), [(1.0, 16), (0.6, 16), (1.0, 5)])
def test_noise_is_normal_with_the_deviation_of_vmoe(noise_std: float, experts: int) -> None:
    # V-MoE: standard deviation noise_std / E. 10 groups of 50 pairs, 700 tokens, are 112,000 draws with 16 experts.
    noise_GSE = noise_of(a_layer(experts=experts, noise_std=noise_std), groups=10, pairs=50)
    check_normal(noise_GSE, noise_std / experts, "all")
    for expert in range(experts):
        check_normal(noise_GSE[..., expert], noise_std / experts, f"expert {expert}")
    for group in range(10):
        check_normal(noise_GSE[group], noise_std / experts, f"group {group}")


def test_noise_is_exactly_that_of_its_key() -> None:
    # 2 groups of 1 pair: 14 tokens of 3 experts. Numbers of a group run over its tokens, and of a token over experts.
    for seed, step, block, first_group in ((0, 0, 0, 0), (7, 123, 3, 5), (2**63 - 1, 99_999, 11, 2**20)):
        found_GSE = noise_of(
            a_layer(block, experts=3), seed=seed, step=step, first_group=first_group, groups=2, pairs=1
        )
        stream = reference.stream_key("router-noise", seed, step, block)
        for group in range(2):
            expected = reference.normal(reference.member_key(stream, first_group + group), 14 * 3)
            np.testing.assert_allclose(found_GSE[group].ravel(), np.array(expected) / 3, rtol=1e-12, atol=1e-15)


def test_noise_of_experts_and_of_neighbouring_tokens_is_independent() -> None:
    noise_GSE = noise_of(a_layer(), groups=8, pairs=60)
    check_independent(noise_GSE.reshape(-1, E).T, [f"expert {n}" for n in range(E)], lags=(0, 1, 2, 3))
    # Across the whole stream: the next token, pair, and Box and Muller's other half (840 tokens in a group).
    check_independent(noise_GSE.reshape(8, -1), [f"group {n}" for n in range(8)], lags=(0, 1, 14 * E, 70 * E, 420 * E))


def test_noise_of_seeds_steps_blocks_and_groups_is_independent() -> None:
    rows, names = [], []
    for block in (0, 1, 2, 10):
        layer = a_layer(block)
        for seed, step in product((0, 1, 2), (0, 1, 2)):
            noise_GSE = noise_of(layer, seed=seed, step=step, groups=4, pairs=16)
            rows += list(noise_GSE.reshape(4, -1))
            names += [f"seed {seed} step {step} block {block} group {group}" for group in range(4)]
    check_independent(rows, names, lags=(0, 1))


def test_noise_of_a_global_group_is_the_same_wherever_a_rank_begins() -> None:
    layer = a_layer()
    whole = noise_of(layer, groups=8)
    for first, groups in ((0, 1), (5, 3), (5, 1), (7, 1), (2, 4)):
        assert (noise_of(layer, first_group=first, groups=groups) == whole[first : first + groups]).all()


def test_noise_depends_on_seed_step_block_and_group_alone() -> None:
    base = noise_of(a_layer())
    for name, other in (
        ("seed", noise_of(a_layer(), seed=4)),
        ("step", noise_of(a_layer(), step=1)),
        ("block", noise_of(a_layer(2))),
        ("group", noise_of(a_layer(), first_group=4)),
    ):
        assert not (other == base).any(), name
    for change in (
        {"top_k": 2},
        {"capacity_factor": 3.0},
        {"order": "random"},
        {"group_pairs": 4},
        {"aux_weight": 0.5},
        {"load": 1.0},
    ):
        assert (noise_of(a_layer(**change)) == base).all(), change
    assert np.allclose(noise_of(a_layer(noise_std=0.25)), base / 4, rtol=1e-15)


def test_noise_is_added_to_the_logits_whatever_they_are_and_in_any_type() -> None:
    layer, layout = a_layer(), a_layout(4)
    mode = RoutingMode(training=True, seed=3, aux=False)
    x_TD = torch.linspace(-2, 2, 4 * 112 * WIDTH, dtype=torch.float64).view(-1, WIDTH)
    expected_GSE = torch.from_numpy(noise_of(layer))
    with torch.no_grad():
        clean_GSE, noisy_GSE = layer.logits(x_TD, layout, mode)
        torch.testing.assert_close(noisy_GSE - clean_GSE, expected_GSE, rtol=1e-12, atol=1e-14)
        assert clean_GSE.std() > 0.1
        narrow = a_layer().float()
        zeros_TD = torch.zeros(4 * 112, WIDTH, dtype=torch.float32)
        assert (narrow.logits(zeros_TD, layout, mode)[1] - expected_GSE).abs().max() < 1e-7
        assert (narrow.logits(zeros_TD.bfloat16(), layout, mode)[1] - expected_GSE).abs().max() < 1e-7
        # No noise in evaluation, nor where it is switched off.
        for quiet, quiet_mode in ((layer, RoutingMode(training=False, seed=3)), (a_layer(noise_std=0.0), mode)):
            clean_GSE, noisy_GSE = quiet.logits(x_TD, layout, quiet_mode)
            assert torch.equal(clean_GSE, noisy_GSE)


def places_of(
    block: int = 1, *, seed: int = 3, step: int = 0, first_group: int = 0, groups: int = 8, pairs: int = 8, **moe: Any
) -> np.ndarray:
    """(G, S): at which place each token of a group is served with moe.order=random."""
    layer, layout, routes = a_layer(block, order="random", **moe), a_layout(groups, pairs), Routes()
    x_TD = torch.zeros(groups * layout.group_tokens, WIDTH, dtype=torch.float64)
    mode = RoutingMode(training=True, seed=seed, step=step, first_group=first_group, aux=False)
    with torch.no_grad():
        layer(x_TD, layout, mode, routes)
    return routes[block].order_GS.argsort(dim=-1).numpy()


def test_every_token_is_as_likely_at_every_place_of_the_random_order() -> None:
    # 14 tokens, 4,000 groups: each of the 196 cells has 286 of them.
    places_GS = places_of(groups=4000, pairs=1)
    for token in range(14):
        check_counts(np.bincount(places_GS[:, token], minlength=14), f"token {token}")
    # The pair of places of two tokens: 14 * 13 cells that are equally likely.
    for first, second in ((0, 1), (0, 13), (8, 9), (4, 11)):
        pairs = np.bincount(places_GS[:, first] * 14 + places_GS[:, second], minlength=196).reshape(14, 14)
        assert (np.diag(pairs) == 0).all()
        check_counts(pairs[~np.eye(14, dtype=bool)], f"tokens {first} and {second}")
    # Neighbouring groups.
    check_counts(np.bincount(places_GS[:-1, 3] * 14 + places_GS[1:, 3], minlength=196), "neighbouring groups")


def test_random_orders_of_seeds_steps_blocks_and_groups_are_independent_of_each_other_and_of_the_noise() -> None:
    rows, names = [], []
    for block, seed, step in product((1, 2), (0, 1), (0, 1)):
        rows += list(places_of(block, seed=seed, step=step, groups=3, pairs=60).astype(float))
        names += [f"block {block} seed {seed} step {step} group {group}" for group in range(3)]
    noise_GSE = noise_of(a_layer(1), seed=0, step=0, groups=3, pairs=60)
    rows += [noise_GSE[group, :, expert] for group in range(3) for expert in range(E)]
    names += [f"noise of group {group} expert {expert}" for group in range(3) for expert in range(E)]
    # Places without replacement: the correlation of neighbours is -1 / (S - 1), far below the limit.
    check_independent(rows, names, lags=(0, 1))


def test_the_random_order_is_a_function_of_seed_step_block_and_global_group() -> None:
    base = places_of()
    assert (places_of(first_group=5, groups=3) == base[5:]).all()
    for change in ({"top_k": 2}, {"capacity_factor": 3.0}, {"noise_std": 0.0}, {"priority": "sum"}):
        assert (places_of(**change) == base).all(), change
    for other in (places_of(seed=4), places_of(step=1), places_of(2), places_of(first_group=8)):
        # Of 896 tokens in groups of 112, 8 are at the same place by chance, with standard deviation sqrt(8).
        assert (other == base).sum() < 8 + SIGMAS_OF_MANY * math.sqrt(8)


def test_the_random_order_is_exactly_that_of_its_key() -> None:
    for seed, step, block, first_group in ((0, 0, 0, 0), (7, 123, 3, 5)):
        found_GS = places_of(block, seed=seed, step=step, first_group=first_group, groups=2, pairs=1)
        stream = reference.stream_key("random-order", seed, step, block)
        for group in range(2):
            unit = reference.uniform(reference.member_key(stream, first_group + group), 14)
            # The largest number is served first.
            expected = np.argsort(np.argsort(-np.array(unit)))
            assert found_GS[group].tolist() == expected.tolist()


@pytest.mark.parametrize(("microbatch_pairs", "passes"), [(0, [0]), (4, [0, 2, 4, 0, 2, 4])])
def test_a_training_step_gives_routing_its_seed_step_and_global_groups(
    microbatch_pairs: int, passes: list[int]
) -> None:
    run = Run(
        model=Model(width=WIDTH, heads=1, mlp_dim=3, depth=2, embed_dim=4),
        image=Image(size=4, patch=2),
        text=Text(length=3, vocab_size=5),
        moe=Moe(num_experts=2, blocks=(1,), group_pairs=2, min_image_experts=1.0, min_text_experts=1.0),
        optim=Optim(warmup_steps=0),
        train=Train(batch_pairs=12, seed=987, steps=100, microbatch_pairs=microbatch_pairs),
    )
    mesh = Mesh.single()
    model = build_model(run, mesh=mesh, device=CPU)
    modes: list[RoutingMode] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: modes.append(kwargs["mode"]), with_kwargs=True)
    examples = Examples(torch.zeros(12, 3, 4, 4), torch.zeros(12, 3, dtype=torch.int64), None)
    backward(model, make_engine(model, run, mesh), examples, step=31, run=run, mesh=mesh)
    assert [(mode.seed, mode.step, mode.first_group, mode.training) for mode in modes] == [
        (987, 31, first, True) for first in passes
    ]
