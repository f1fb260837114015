"""First values of every parameter: distribution, scale, what they depend on, and independence of each other.

Source of the scales: V-MoE and flax (xavier_uniform kernels of attention and MLPs, MLP biases N(0, 1e-6), router,
patches and projections with variance 1 / fan_in, image positions N(0, 0.02)); big_vision (text positions and, as
flax's Embed, the vocabulary N(0, 1 / sqrt(D)), temperature 0.1).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from limoe_dist.config.schema import Image, Model, Moe, Run, Text, Train
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from tests.draws import reference
from tests.draws.statistics import check_independent, check_normal, check_uniform

CPU = torch.device("cpu")
# No two sizes are equal, so that no fan can stand for another: width D=60 in 5 heads of 12, hidden F=140, embedding
# P=36, patches of 7 x 7 x 3 = 147 numbers, 9 image tokens, 11 text tokens, 230 pieces, 6 experts.
D, HEADS, HIDDEN, P, PATCH, VOCABULARY, E = 60, 5, 140, 36, 7, 230, 6
KINDS = ("moe", "two_towers", "two_routers")


def a_run(kind: str = "moe", *, dtype: str = "fp64", seed: int = 3, depth: int = 4, experts: int = E) -> Run:
    return Run(
        model=Model(
            width=D,
            heads=HEADS,
            mlp_dim=HIDDEN,
            embed_dim=P,
            depth=depth,
            towers="two" if kind == "two_towers" else "one",
        ),
        image=Image(size=21, patch=PATCH),
        text=Text(length=11, vocab_size=VOCABULARY),
        moe=Moe(
            blocks=() if kind == "two_towers" else (1, 3),
            num_experts=experts,
            routers="per_modality" if kind == "two_routers" else "shared",
            min_image_experts=4.0,
            min_text_experts=3.0,
        ),
        train=Train(dtype=dtype, seed=seed),
    )


Parameters = dict[str, torch.nn.Parameter]
_built: dict[str, Parameters] = {}


def parameters(run: Run) -> Parameters:
    key = run.model_dump_json()
    if key not in _built:
        _built[key] = dict(build_model(run, mesh=Mesh.single(), device=CPU).named_parameters())
    return _built[key]


def values(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().double().numpy()


@dataclass(frozen=True)
class Expected:
    kind: Literal["normal", "uniform", "constant"]
    scale: float
    """Standard deviation, bound or value."""
    shape: tuple[int, ...]
    decay: bool = False
    wide: bool = False
    router: bool = False


# xavier_uniform: sqrt(6 / (fan_in + fan_out)).
ATTENTION = 0.2236067977
"""D to D, 60 + 60: sqrt(0.05)."""
MLP = 0.1732050808
"""D to F and back, 60 + 140: sqrt(0.03)."""
BLOCK = r"(text_)?blocks\.\d+\."
TABLE = {
    # 1 / sqrt(147)
    r"image_embed\.weight": Expected("normal", 0.0824786098, (D, 3, PATCH, PATCH), decay=True),
    r"image_embed\.bias": Expected("constant", 0.0, (D,)),
    r"image_embed\.position": Expected("normal", 0.02, (9, D)),
    # 1 / sqrt(60)
    r"text_embed\.table": Expected("normal", 0.1290994449, (VOCABULARY, D)),
    r"text_embed\.position": Expected("normal", 0.1290994449, (11, D)),
    BLOCK + r"norm[12]\.weight": Expected("constant", 1.0, (D,), wide=True),
    BLOCK + r"norm[12]\.bias": Expected("constant", 0.0, (D,), wide=True),
    BLOCK + r"attention\.qkv_weight": Expected("uniform", ATTENTION, (3, HEADS, 12, D), decay=True),
    BLOCK + r"attention\.qkv_bias": Expected("constant", 0.0, (3, HEADS, 12)),
    BLOCK + r"attention\.out\.weight": Expected("uniform", ATTENTION, (D, HEADS, 12), decay=True),
    BLOCK + r"attention\.out\.bias": Expected("constant", 0.0, (D,)),
    BLOCK + r"mlp\.up\.weight": Expected("uniform", MLP, (HIDDEN, D), decay=True),
    BLOCK + r"mlp\.up\.bias": Expected("normal", 1e-6, (HIDDEN,)),
    BLOCK + r"mlp\.down\.weight": Expected("uniform", MLP, (D, HIDDEN), decay=True),
    BLOCK + r"mlp\.down\.bias": Expected("normal", 1e-6, (D,)),
    # 1 / sqrt(60); with a router for each modality the shape begins with 2.
    BLOCK + r"moe\.router": Expected("normal", 0.1290994449, (D, E), decay=True, wide=True, router=True),
    BLOCK + r"moe\.experts\.up_weight": Expected("uniform", MLP, (E, D, HIDDEN), decay=True),
    BLOCK + r"moe\.experts\.up_bias": Expected("normal", 1e-6, (E, HIDDEN)),
    BLOCK + r"moe\.experts\.down_weight": Expected("uniform", MLP, (E, HIDDEN, D), decay=True),
    BLOCK + r"moe\.experts\.down_bias": Expected("normal", 1e-6, (E, D)),
    r"(text_)?norm\.weight": Expected("constant", 1.0, (D,), wide=True),
    r"(text_)?norm\.bias": Expected("constant", 0.0, (D,), wide=True),
    # 1 / sqrt(60)
    r"(image|text)_projection": Expected("normal", 0.1290994449, (D, P), decay=True),
    # log(1 / 0.1)
    r"log_scale": Expected("constant", 2.302585092994046, (), wide=True),
}


def expected_of(name: str) -> Expected:
    found = [expected for pattern, expected in TABLE.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{name} matches {len(found)} patterns"
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_the_shape_decay_and_precision_of_its_row(kind: str) -> None:
    for name, parameter in parameters(a_run(kind)).items():
        expected, placement = expected_of(name), placement_of(parameter)
        shape = (2, *expected.shape) if expected.router and kind == "two_routers" else expected.shape
        assert tuple(parameter.shape) == shape, name
        assert placement.decay == expected.decay, name
        assert placement.wide == expected.wide, name


def test_every_row_of_the_table_is_needed() -> None:
    names = [name for kind in KINDS for name in parameters(a_run(kind))]
    for pattern in TABLE:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    # 4 blocks of one tower; two towers have 2 x 4; the final norms; the same embeddings everywhere.
    assert len([name for name in names if name.endswith("norm1.weight")]) == 4 + 8 + 4
    assert len([name for name in names if name.endswith("moe.router")]) == 2 + 2


def check_values(found: np.ndarray, expected: Expected, what: str) -> None:
    if expected.kind == "constant":
        assert np.allclose(found, expected.scale, rtol=1e-15, atol=0), what
    elif expected.kind == "normal":
        check_normal(found, expected.scale, what)
    else:
        check_uniform(found, -expected.scale, expected.scale, what, tolerance=1e-9)
        # Whatever the number of values: all of these have thousands.
        assert 0.99 * expected.scale < np.abs(found).max() <= expected.scale, what


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_the_distribution_of_its_row(kind: str) -> None:
    for name, parameter in parameters(a_run(kind)).items():
        check_values(values(parameter), expected_of(name), name)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_of_a_row_together_have_its_distribution(kind: str) -> None:
    together: dict[str, list[np.ndarray]] = {pattern: [] for pattern in TABLE}
    for name, parameter in parameters(a_run(kind)).items():
        pattern = next(pattern for pattern in TABLE if re.fullmatch(pattern, name))
        together[pattern].append(values(parameter).ravel())
    for pattern, parts in together.items():
        if parts and TABLE[pattern].kind != "constant":
            check_values(np.concatenate(parts), TABLE[pattern], pattern)


def test_each_expert_head_router_and_matrix_of_attention_has_the_distribution_of_the_whole() -> None:
    for name, parameter in parameters(a_run("two_routers")).items():
        if re.search("experts|router|qkv_weight", name):
            for part, found in enumerate(values(parameter)):
                check_values(found, expected_of(name), f"{name}[{part}]")
        if name.endswith("qkv_weight"):
            for head in range(HEADS):
                check_values(values(parameter)[:, head], expected_of(name), f"{name} head {head}")


@pytest.mark.parametrize(("temperature", "log_scale"), [(0.1, 2.302585093), (0.07, 2.659260037), (2.0, -0.6931471806)])
def test_the_scale_of_the_logits_begins_at_one_over_the_temperature(temperature: float, log_scale: float) -> None:
    run = a_run(depth=1)
    run = run.model_copy(update={"model": run.model.model_copy(update={"init_temperature": temperature})})
    found = values(build_model(run, mesh=Mesh.single(), device=CPU).log_scale)
    assert float(found) == pytest.approx(log_scale, abs=1e-9)


def streams(found: Parameters, length: int) -> dict[str, np.ndarray]:
    """The first numbers of every tensor that is drawn; experts, routers and the matrices of attention each apart."""
    parts: dict[str, np.ndarray] = {}
    for name, parameter in found.items():
        if expected_of(name).kind == "constant":
            continue
        stacked = bool(re.search("experts|qkv_weight", name)) or (parameter.dim() == 3 and name.endswith("router"))
        pieces = values(parameter) if stacked else values(parameter)[None]
        parts |= {f"{name}[{n}]": piece.ravel()[:length] for n, piece in enumerate(pieces) if piece.size >= length}
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_all_names_layers_experts_matrices_and_seeds_are_independent(kind: str) -> None:
    # 360 numbers: those of a router of 60 x 6; 2,000: all kernels.
    for length, seeds in ((360, (3,)), (2000, (3, 4))):
        parts = {
            f"seed {seed} {name}": part
            for seed in seeds
            for name, part in streams(parameters(a_run(kind, seed=seed)), length).items()
        }
        assert len(parts) > (25 if length == 360 else 40)
        check_independent(list(parts.values()), list(parts), lags=(0, 1))


def test_values_within_a_tensor_are_independent_of_their_neighbours() -> None:
    for name, parameter in parameters(a_run()).items():
        if parameter.numel() >= 3000 and expected_of(name).kind != "constant":
            flat = values(parameter).ravel()
            # The next number, the next row, and Box and Muller's other half.
            check_independent(flat[None], [name], lags=(1, 2, parameter.shape[-1], flat.size // 2))


def test_another_seed_changes_every_value_that_is_drawn_and_no_other() -> None:
    first, second = parameters(a_run(seed=3)), parameters(a_run(seed=4))
    for name, parameter in first.items():
        same = values(parameter) == values(second[name])
        assert same.all() if expected_of(name).kind == "constant" else not same.any(), name


def test_values_depend_on_seed_name_and_expert_alone() -> None:
    base = parameters(a_run())
    deeper, wider = parameters(a_run(depth=5)), parameters(a_run(experts=9))
    routers, towers = parameters(a_run("two_routers")), parameters(a_run("two_towers"))
    for name, parameter in base.items():
        assert torch.equal(deeper[name], parameter), name
        if "router" not in name:
            # Of nine experts the first six are what they were.
            assert torch.equal(wider[name][: len(parameter)] if "experts" in name else wider[name], parameter), name
            assert torch.equal(routers[name], parameter), name
        if "moe" not in name:
            assert torch.equal(towers[name], parameter), name


def test_values_are_exactly_those_of_their_key() -> None:
    found = parameters(a_run(seed=2**63 - 1))

    def stream(name: str) -> int:
        return reference.stream_key("init", 2**63 - 1, name)

    name = "blocks.3.moe.experts.down_weight"
    for expert in (0, 5):
        unit = reference.uniform(reference.member_key(stream(name), expert), 20)
        expected = [(2 * u - 1) * MLP for u in unit]
        np.testing.assert_allclose(values(found[name])[expert].ravel()[:20], expected, rtol=1e-8)
    name = "blocks.1.moe.experts.up_bias"
    expected = reference.normal(reference.member_key(stream(name), 4), HIDDEN)
    np.testing.assert_allclose(values(found[name])[4], 1e-6 * np.array(expected), rtol=1e-12)
    name = "blocks.0.attention.qkv_weight"
    expected = [(2 * u - 1) * ATTENTION for u in reference.uniform(stream(name), 3 * D * D)]
    np.testing.assert_allclose(values(found[name]).ravel(), expected, rtol=1e-8)
    for name, scale in (("image_embed.position", 0.02), ("blocks.1.moe.router", 60**-0.5)):
        expected = scale * np.array(reference.normal(stream(name), found[name].numel()))
        np.testing.assert_allclose(values(found[name]).ravel(), expected, rtol=1e-12)


def test_narrower_types_hold_the_same_values_rounded() -> None:
    wide = parameters(a_run())
    for dtype, kind, relative in (("fp32", torch.float32, 2**-22), ("bf16", torch.bfloat16, 2**-8)):
        narrow = parameters(a_run(dtype=dtype))
        for name, parameter in wide.items():
            expected = expected_of(name)
            assert narrow[name].dtype == (torch.float32 if expected.wide else kind), name
            # Of a uniform number the error is a share of the bound: it is 2 u - 1.
            error = np.abs(values(narrow[name]) - values(parameter)).max()
            largest = max(np.abs(values(parameter)).max(), abs(expected.scale), 1e-30)
            assert error <= (2**-22 if expected.wide else relative) * largest, name


def test_scales_of_the_default_model_come_from_its_own_sizes() -> None:
    # S/32: D=384, F=1536, patch 32. Fans of 768, 1920 and 3072.
    run = Run(
        model=Model(depth=2), image=Image(size=64), text=Text(vocab_size=50), moe=Moe(blocks=(1,), num_experts=20)
    )
    inits = {
        name: placement_of(parameter).init
        for name, parameter in build_model(run, mesh=Mesh.single(), device=torch.device("meta")).named_parameters()
    }
    for name, bound in (
        ("blocks.0.attention.qkv_weight", math.sqrt(6 / 768)),
        ("blocks.0.attention.out.weight", math.sqrt(6 / 768)),
        ("blocks.0.mlp.up.weight", math.sqrt(6 / 1920)),
        ("blocks.1.moe.experts.down_weight", math.sqrt(6 / 1920)),
        ("image_embed.weight", 1 / math.sqrt(3072)),
        ("blocks.1.moe.router", 1 / math.sqrt(384)),
    ):
        assert inits[name].scale == pytest.approx(bound, rel=1e-12), name
