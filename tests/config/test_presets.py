from __future__ import annotations

import math

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import preset_named
from limoe_dist.config.presets import AUX_WEIGHTS, LOSS_SETS, names, preset, threshold, with_losses
from limoe_dist.config.rules import check

# width, depth, heads, MLP, patch: ViT's sizes (arXiv 2010.11929, table 1; S: DeiT). MoE blocks: every second one, and
# 12 of H/14's 32 (LIMoE, section 3.2). Image tokens: (224 / patch)^2.
PAPER = {
    "s32": (384, 12, 6, 1536, 32, 6, 49),
    "s16": (384, 12, 6, 1536, 16, 6, 196),
    "b32": (768, 12, 12, 3072, 32, 6, 49),
    "b16": (768, 12, 12, 3072, 16, 6, 196),
    "l16": (1024, 24, 16, 4096, 16, 12, 196),
    "h14": (1280, 32, 16, 5120, 14, 12, 256),
}
BASE = ("tiny", "small", *PAPER)
ALL = [f"{name}{twin}" for name in BASE for twin in ("", "-dense", "-two-tower", "-classic")]


def parameters(run):
    """Counted by hand from the settings: weights and biases of a one-tower LIMoE."""
    width, mlp = run.model.width, run.model.mlp_dim
    attention, expert, norms = 4 * width * width + 4 * width, 2 * width * mlp + mlp + width, 4 * width
    towers = 2 if run.model.towers == "two" else 1
    encoder = towers * (run.model.depth * (attention + norms) + 2 * width)
    moe = len(run.moe.blocks)
    experts = (towers * run.model.depth - moe + moe * run.moe.num_experts) * expert
    routers = moe * width * run.moe.num_experts
    image = (3 * run.image.patch**2 + 1) * width + run.image_tokens * width
    text = (run.text.vocab_size + run.text.length) * width
    return encoder + experts + routers + image + text + 2 * width * run.model.embed_dim


def test_the_table_names_every_preset_and_its_twins():
    assert sorted(names()) == sorted(ALL)
    assert all(names().values())


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_vits_sizes(name):
    run = preset(name)
    found = (run.model.width, run.model.depth, run.model.heads, run.model.mlp_dim, run.image.patch)
    assert (*found, len(run.moe.blocks), run.image_tokens) == PAPER[name]
    assert (run.text.length, run.text.vocab_size, run.moe.num_experts, run.moe.top_k) == (16, 32_000, 32, 1)


@pytest.mark.parametrize(
    ("name", "millions"),
    # h14: LIMoE's 5.6 B; its dense twin has the 675 M that the paper counts as active. The others: 32 experts in every
    # second block, counted as h14 is. A second tower of h14 is 32 blocks of 6,558,720 in attention, 13,113,600 in the
    # MLP and 5,120 in norms, and a last norm of 2,560: 629.7 M.
    [("s16", 254.1), ("b16", 990.1), ("l16", 3461), ("h14", 5554), ("h14-dense", 675.0), ("h14-two-tower", 1304.7)],
)
def test_paper_presets_have_the_papers_number_of_parameters(name, millions):
    # The numbers above are rounded to four digits.
    assert parameters(preset(name)) / 1e6 == pytest.approx(millions, rel=2e-4)


def test_every_second_block_is_a_mixture():
    assert preset("b16").moe.blocks == (1, 3, 5, 7, 9, 11)


@pytest.mark.parametrize("name", ["tiny", "small", *PAPER])
def test_a_dense_twin_differs_in_its_blocks_alone(name):
    sparse, dense = preset(name).model_dump(), preset(f"{name}-dense").model_dump()
    assert sparse["moe"].pop("blocks")
    assert dense["moe"].pop("blocks") == ()
    assert (sparse.pop("preset"), dense.pop("preset")) == (name, f"{name}-dense")
    assert sparse == dense


@pytest.mark.parametrize("name", BASE)
def test_a_two_tower_twin_differs_from_the_dense_one_in_its_towers_alone(name):
    one, two = preset(f"{name}-dense").model_dump(), preset(f"{name}-two-tower").model_dump()
    assert (one["model"].pop("towers"), two["model"].pop("towers")) == ("one", "two")
    assert (one.pop("preset"), two.pop("preset")) == (f"{name}-dense", f"{name}-two-tower")
    assert one == two


@pytest.mark.parametrize("name", BASE)
def test_a_classic_twin_differs_in_its_losses_alone(name):
    limoe, classic = preset(name).model_dump(), preset(f"{name}-classic").model_dump()
    weights = {loss: classic["moe"].pop(loss) for loss in AUX_WEIGHTS}
    assert {loss: weight for loss, weight in weights.items() if weight} == {"importance": 1, "load": 1}
    for loss in AUX_WEIGHTS:
        limoe["moe"].pop(loss)
    assert (limoe.pop("preset"), classic.pop("preset")) == (name, f"{name}-classic")
    assert limoe == classic


@pytest.mark.parametrize("name", BASE)
def test_the_papers_losses_are_what_a_preset_has(name):
    run = preset(name)
    assert {loss for loss in AUX_WEIGHTS if getattr(run.moe, loss)} == set(LOSS_SETS["limoe"])
    assert with_losses(run, "limoe") == run
    # Back from the classic losses: with the preset's own weights, such as tiny's of the z-loss.
    assert with_losses(preset(f"{name}-classic"), "limoe").moe == run.moe


def test_a_named_set_keeps_the_weights_that_a_run_has_and_drops_the_others():
    run = preset("tiny")
    run = run.model_copy(
        update={"preset": "", "moe": run.moe.model_copy(update={"importance": 0.5, "mutual_information": 2})}
    )
    moe = with_losses(run, "classic").moe
    assert (moe.importance, moe.load, moe.z, moe.mutual_information) == (0.5, 1, 0, 0)
    assert moe.aux_weight == run.moe.aux_weight


@pytest.mark.parametrize("name", ALL)
def test_every_preset_obeys_the_rules(name):
    # tiny and small for two and four CPU ranks; the others for one node and for eight.
    for world in (1, 2, 4) if name.startswith(("tiny", "small")) else (1, 8, 64):
        check(preset(name), world=world)


def test_the_paper_presets_fit_experts_in_a_node():
    run = preset("h14")
    check(run.model_copy(update={"parallel": run.parallel.model_copy(update={"ep": 8})}), world=64)


@pytest.mark.parametrize("name", ["tiny", "b16"])
def test_thresholds_ask_for_no_more_experts_than_there_are(name):
    moe = preset(name).moe
    for wanted in (moe.min_image_experts, moe.min_text_experts):
        assert 0 < threshold(wanted) < math.log(moe.num_experts)


def test_the_threshold_is_the_logarithm():
    assert threshold(9) == pytest.approx(2.197225, abs=1e-6)


def test_the_small_presets_weigh_five_losses_at_0_04_and_the_z_loss_at_0_001():
    # aux_weight * mean of 5, summed over 2 blocks = 0.04 * each loss averaged over the blocks: aux_weight / 5 * 2.
    moe = preset("tiny").moe
    assert len(moe.blocks) == 2
    assert moe.aux_weight / 5 * 2 == pytest.approx(0.04)
    assert moe.aux_weight / 5 * 2 * moe.z == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("mistake", "near"),
    [("b-16", "b16"), ("h14_dense", "h14-dense"), ("tinny", "tiny"), ("s32-twotower", "s32-two-tower")],
)
def test_an_unknown_preset_offers_the_nearest(mistake, near):
    with pytest.raises(
        UserError, match=rf'unknown preset "{mistake}"; did you mean "{near}"\? \(presets: tiny, small,'
    ):
        preset_named(mistake)


def test_a_name_like_none_offers_the_list_alone():
    with pytest.raises(UserError, match=r'unknown preset "qqqqqq" \(presets: tiny') as caught:
        preset_named("qqqqqq")
    assert "h14; each also with -dense, -two-tower, -classic)" in str(caught.value)
