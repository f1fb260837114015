"""The tower's own promises: parameter counts, masks, evaluation that depends on its own input only."""

from __future__ import annotations

import math

import pytest
import torch

from limoe_dist.config.presets import preset
from limoe_dist.model.moe_layer import EVALUATION, RoutingMode
from limoe_dist.model.tower import build_model, uses_bf16
from limoe_dist.parallel.mesh import Mesh
from tests.support.cases import batch, perturbed_model, small_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(("device", "dtypes"), [("cpu", {"bf16"}), ("cuda", {"bf16", "auto"})])
def test_bf16_is_what_a_gpu_computes_in_unless_asked_otherwise(device: str, dtypes: set[str]) -> None:
    every = ("auto", "bf16", "fp32", "fp64")
    assert {each for each in every if uses_bf16(small_run(each), torch.device(device))} == dtypes


# Totals with E = 32; H/14's are the paper's own (section 3.2): 5.6 B, 675 M a token, routers below 0.5 M.
@pytest.mark.parametrize(
    ("name", "total", "per_token", "router"),
    [
        ("s32", 254.9e6, 35.2e6, 6 * 384 * 32),
        ("s16", 254.1e6, 34.3e6, 6 * 384 * 32),
        ("b32", 991.7e6, 113.4e6, 6 * 768 * 32),
        ("b16", 990.1e6, 111.7e6, 6 * 768 * 32),
        ("l16", 3461.0e6, 338.6e6, 12 * 1024 * 32),
        ("h14", 5553.8e6, 675.5e6, 491_520),
    ],
)
def test_presets_have_the_published_number_of_parameters(
    name: str, total: float, per_token: float, router: int
) -> None:
    run = preset(name)
    sizes = {
        key: p.numel()
        for key, p in build_model(run, mesh=Mesh.single(), device=torch.device("meta")).named_parameters()
    }
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert sum(sizes.values()) == pytest.approx(total, rel=1e-3)
    assert sum(sizes.values()) - experts + experts / 32 == pytest.approx(per_token, rel=2e-3)
    assert sum(size for key, size in sizes.items() if key.endswith("moe.router")) == router


def test_a_dense_twin_has_no_expert_and_the_same_width() -> None:
    model = build_model(preset("tiny-dense"), mesh=Mesh.single(), device=torch.device("meta"))
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "moe" in name]
    assert "blocks.1.mlp.up.weight" in names


def test_masked_padding_changes_nothing_of_a_caption() -> None:
    run = small_run("fp64", pad="masked")
    model = perturbed_model(run, Mesh.single())
    _, tokens, _ = batch(0, torch.float64)
    valid = torch.arange(5).expand(16, 5) < 3
    other = tokens.clone()
    other[:, 3:] = (other[:, 3:] + 17) % 50
    with torch.no_grad():
        first, second = (model(None, ids, valid, mode=EVALUATION).text_BP for ids in (tokens, other))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_padding_that_is_a_token_counts() -> None:
    run = small_run("fp64", pad="token")
    model = perturbed_model(run, Mesh.single())
    _, tokens, _ = batch(0, torch.float64)
    valid = torch.arange(5).expand(16, 5) < 3
    other = tokens.clone()
    other[:, 3:] = (other[:, 3:] + 17) % 50
    with torch.no_grad():
        first, second = (model(None, ids, valid, mode=EVALUATION).text_BP for ids in (tokens, other))
    assert (first - second).abs().max() > 1e-3


def test_masked_padding_never_takes_a_slot() -> None:
    run = small_run("fp64", pad="masked")
    model = perturbed_model(run, Mesh.single())
    images, tokens, valid = batch(0, torch.float64)
    output = model(images, tokens, valid, mode=RoutingMode(training=True, step=1))
    for record in output.records.values():
        assert record.tokens_2.tolist() == [16 * 16, int(valid.sum())]
        assert record.routed_E2.sum(0).tolist() == record.tokens_2.tolist()
        assert (record.kept_E2 <= record.routed_E2).all()


def test_in_evaluation_an_embedding_depends_on_its_own_input_only() -> None:
    run = small_run("fp64")
    model = perturbed_model(run, Mesh.single())
    images, tokens, valid = batch(0, torch.float64)
    with torch.no_grad():
        together = model(images, tokens, valid)
        picture = model(images[3:4], None)
        caption = model(None, tokens[9:10], valid[9:10])
    torch.testing.assert_close(together.image_BP[3:4], picture.image_BP, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.text_BP[9:10], caption.text_BP, rtol=0, atol=1e-12)
    for record in together.records.values():
        assert torch.equal(record.kept_E2, record.routed_E2)


def test_noise_belongs_to_the_step_and_the_group() -> None:
    run = small_run("fp64")
    model = perturbed_model(run, Mesh.single())
    images, tokens, valid = batch(0, torch.float64)

    def loads(step: int, first_group: int) -> torch.Tensor:
        mode = RoutingMode(training=True, seed=1, step=step, first_group=first_group)
        return model(images, tokens, valid, mode=mode).records[1].losses["load"]

    assert loads(4, 0) == loads(4, 0)
    assert loads(4, 0) != loads(5, 0)
    assert loads(4, 0) != loads(4, 8)


def test_pairs_that_do_not_fill_groups_are_refused_in_training() -> None:
    model = perturbed_model(small_run("fp64"), Mesh.single())
    images, tokens, valid = batch(0, torch.float64)
    with pytest.raises(ValueError, match="group_pairs=2"):
        model(images[:3], tokens[:3], valid[:3], mode=RoutingMode(training=True))


def test_a_modality_that_is_absent_has_no_losses_and_others_are_finite() -> None:
    model = perturbed_model(small_run("fp64"), Mesh.single())
    images, tokens, valid = batch(0, torch.float64)
    for output, absent in (
        (model(images, None, mode=RoutingMode(training=True)), "text"),
        (model(None, tokens, valid, mode=RoutingMode(training=True)), "image"),
    ):
        for record in output.records.values():
            assert f"local_{absent}" not in record.losses
            assert all(torch.isfinite(loss) for loss in record.losses.values())


def test_initial_values_are_the_same_in_every_layout_and_differ_between_experts() -> None:
    run = small_run("fp32")
    first = dict(build_model(run, mesh=Mesh.single(), device=CPU).named_parameters())
    again = dict(build_model(run, mesh=Mesh.single(), device=CPU).named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    up = first["blocks.1.moe.experts.up_weight"]
    assert not torch.equal(up[0], up[1])
    assert not torch.equal(up, first["blocks.3.moe.experts.up_weight"])
    # Glorot: uniform in +-sqrt(6 / (32 + 64)) = +-0.25, so the standard deviation is 0.25 / sqrt(3) = 0.144.
    assert up.abs().max() <= 0.25
    assert up.detach().std().item() == pytest.approx(0.144, rel=0.02)


@pytest.mark.parametrize("towers", ["one", "two"])
def test_the_temperature_begins_as_the_settings_say(towers: str) -> None:
    run = small_run("fp64")
    model = run.model.model_copy(update={"towers": towers, "init_temperature": 0.5})
    moe = run.moe.model_copy(update={"blocks": ()}) if towers == "two" else run.moe
    built = build_model(run.model_copy(update={"model": model, "moe": moe}), mesh=Mesh.single(), device=CPU)
    assert built.log_scale.item() == pytest.approx(math.log(2), abs=1e-15)
    assert built.scale.item() == pytest.approx(2, abs=1e-15)


@pytest.mark.parametrize("towers", ["one", "two"])
def test_a_model_without_experts_trains_on_any_number_of_pairs(towers: str) -> None:
    run = small_run("fp64")
    dense = run.model_copy(
        update={
            "model": run.model.model_copy(update={"towers": towers}),
            "moe": run.moe.model_copy(update={"blocks": ()}),
        }
    )
    images, tokens, valid = (whole[:3] for whole in batch(0, torch.float64))
    model = perturbed_model(dense, Mesh.single())
    found = model(images, tokens, valid, mode=RoutingMode(training=True, seed=0, step=0, first_group=0))
    assert found.image_BP.shape == found.text_BP.shape == (3, dense.model.embed_dim)
