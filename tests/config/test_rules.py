from __future__ import annotations

import pytest

from limoe_dist.config.presets import preset
from limoe_dist.config.rules import ConfigError, check, divisors, fit_microbatches
from tests.config.settings import changed

# Changes to `tiny` (width 96, 4 heads, depth 4, MLP 384, 8 experts in blocks 1 and 3, groups of 32 pairs, batch 128,
# 1200 steps, pictures of 48 with patch 12), the number of ranks, and what must be said about them.
BROKEN = {
    "heads must divide width": (
        {"model.heads": 5},
        None,
        "model.heads=5 must divide model.width=96: use 1, 2, 3, 4, 6, 8, 12, 16, 24, 32 or 48",
    ),
    "the patch must divide the picture": (
        {"image.patch": 13},
        None,
        "image.patch=13 must divide image.size=48: use image.size=39",
    ),
    "a patch larger than the picture": (
        {"image.patch": 50},
        None,
        "image.patch=50 must divide image.size=48: use image.size=50",
    ),
    "a template without a place for the class": (
        {"eval.templates": ("{}", "a picture")},
        None,
        'eval.templates: "a picture" must hold {} where the class name goes, or be the name of a set: clip',
    ),
    "a block that does not exist": (
        {"moe.blocks": (1, 4)},
        None,
        "moe.blocks=(1, 4): block 4 does not exist; blocks are numbered 0 to 3 (model.depth=4)",
    ),
    "blocks out of order": (
        {"moe.blocks": (3, 1)},
        None,
        "moe.blocks=(3, 1) must rise, each block once: use (1, 3)",
    ),
    "a block twice": (
        {"moe.blocks": (1, 1, 3)},
        None,
        "moe.blocks=(1, 1, 3) must rise, each block once: use (1, 3)",
    ),
    "more choices than experts": (
        {"moe.top_k": 9},
        None,
        "moe.top_k=9 must not exceed moe.num_experts=8: use 1 to 8",
    ),
    "an image threshold above the number of experts": (
        {"moe.min_image_experts": 8.5},
        None,
        "moe.min_image_experts=8.5 can never be met with moe.num_experts=8: the threshold log(8.5) = 2.14 nats is not "
        "within 0 and log(8) = 2.08: use 1 to 8",
    ),
    "a text threshold above the number of experts": (
        {"moe.min_text_experts": 9},
        None,
        "moe.min_text_experts=9 can never be met with moe.num_experts=8: the threshold log(9) = 2.20 nats is not "
        "within 0 and log(8) = 2.08: use 1 to 8",
    ),
    "a threshold above a pool's experts": (
        {"moe.image_experts": 6, "moe.min_text_experts": 3.0},
        None,
        "moe.min_text_experts=3 can never be met with moe.num_experts=8, moe.image_experts=6: the threshold log(3) "
        "= 1.10 nats is not within 0 and log(2) = 0.69: use 1 to 2",
    ),
    "a pool that takes all experts": (
        {"moe.image_experts": 8, "moe.global_text": 0.0},
        None,
        "moe.image_experts=8 leaves texts no expert of moe.num_experts=8: use 1 to 7, or 0 for experts that serve both",
    ),
    "more choices than a pool has": (
        {"moe.image_experts": 7, "moe.top_k": 2, "moe.global_text": 0.0},
        None,
        "moe.top_k=2 must not exceed the smaller pool of experts, 1: use 1 to 1",
    ),
    "less than a slot for an expert": (
        {"moe.capacity_factor": 0.001},
        None,
        "moe.capacity_factor=0.001 leaves an expert less than one slot: a group has 1024 tokens (moe.group_pairs=32) "
        "for moe.num_experts=8: use at least 0.00781",
    ),
    "a capacity in evaluation that nothing asks for": (
        {"moe.eval_capacity_factor": 2.0},
        None,
        "moe.eval_capacity_factor=2 needs moe.eval_capacity=paper: with full, nothing is dropped in evaluation",
    ),
    "two towers with experts": (
        {"model.towers": "two"},
        None,
        "model.towers=two has no mixture of experts, but moe.blocks=(1, 3): use moe.blocks=() or towers=one",
    ),
    "pruned experts of one block alone": (
        {"moe.kept_experts": ("0 1",)},
        None,
        "moe.kept_experts has 1 entries for the 2 blocks of moe.blocks=(1, 3): give one for each, "
        "as `limoe prune` does",
    ),
    "pruned experts that do not exist": (
        {"moe.kept_experts": ("0 1", "7 8")},
        None,
        'moe.kept_experts: "7 8" must be rising numbers of experts, 0 to 7, as "0 4 7"',
    ),
    "pruned experts on several ranks": (
        {"moe.kept_experts": ("0 1", "2 3"), "parallel.ep": 2},
        2,
        "parallel.ep=2 cannot share experts that were pruned (moe.kept_experts): use parallel.ep=1",
    ),
    "fewer experts left than a token chooses": (
        {"moe.kept_experts": ("0 1", "2"), "moe.top_k": 2},
        None,
        'moe.kept_experts: "2" has fewer experts than moe.top_k=2: keep more',
    ),
    "a load loss without noise": (
        {"moe.load": 1.0, "moe.noise_std": 0.0},
        None,
        "moe.load=1 needs router noise: set moe.noise_std above 0 (the paper's is 1)",
    ),
    "a schedule longer than the run": (
        {"train.steps": 500},
        None,
        "optim.warmup_steps=100 and optim.cooldown_steps=600 must fit into train.steps=500: "
        "use at most 50 and 250, or more steps",
    ),
    "tp must divide the ranks": (
        {"parallel.tp": 4},
        2,
        "parallel.tp=4 must divide the number of ranks, 2: use 1 or 2, or another number of ranks",
    ),
    "ep must divide the ranks": (
        {"parallel.ep": 4},
        2,
        "parallel.ep=4 must divide the number of ranks, 2: use 1 or 2, or another number of ranks",
    ),
    "ep must divide the experts": (
        {"parallel.ep": 4, "moe.num_experts": 6, "moe.min_image_experts": 5.0},
        4,
        "parallel.ep=4 must divide moe.num_experts=6: use 1 or 2",
    ),
    "no experts to share": (
        {"parallel.ep": 2, "moe.blocks": ()},
        2,
        "parallel.ep=2 shares experts, but moe.blocks is empty: use parallel.ep=1",
    ),
    "tp must divide the heads": (
        {"parallel.tp": 2, "model.heads": 3},
        2,
        "parallel.tp=2 must divide model.heads=3: use 1",
    ),
    "tp must divide the MLP": (
        {"parallel.tp": 2, "model.mlp_dim": 15},
        2,
        "parallel.tp=2 must divide model.mlp_dim=15: use 1",
    ),
    "the batch must hold whole groups on every rank": (
        {"train.batch_pairs": 96},
        2,
        "train.batch_pairs=96 must be a multiple of 2 ranks * moe.group_pairs=32 = 64: use 64 or 128",
    ),
    "a batch smaller than one group a rank": (
        {},
        8,
        "train.batch_pairs=128 must be a multiple of 8 ranks * moe.group_pairs=32 = 256: use 256",
    ),
    "a dense batch must be shared evenly": (
        {"moe.blocks": (), "train.batch_pairs": 10},
        4,
        "train.batch_pairs=10 must be a multiple of 4 ranks = 4: use 8 or 12",
    ),
    "a microbatch must divide the pairs of a rank": (
        {"train.microbatch_pairs": 96, "train.batch_pairs": 256},
        2,
        "train.microbatch_pairs=96 must divide the 128 pairs of a rank and be a multiple of moe.group_pairs=32: "
        "use 32, 64 or 128, or 0 for all at once",
    ),
    "a microbatch must hold whole groups": (
        {"train.microbatch_pairs": 16},
        2,
        "train.microbatch_pairs=16 must divide the 64 pairs of a rank and be a multiple of moe.group_pairs=32: "
        "use 32 or 64, or 0 for all at once",
    ),
    "a microbatch of a dense model": (
        {"train.microbatch_pairs": 5, "moe.blocks": (), "train.batch_pairs": 12},
        2,
        "train.microbatch_pairs=5 must divide the 6 pairs of a rank: use 1, 2, 3 or 6, or 0 for all at once",
    ),
    "the native engine has ZeRO stage 1": (
        {"optim.zero_stage": 2},
        None,
        "optim.zero_stage=2 needs optim.engine=deepspeed: the native engine has stage 1",
    ),
    "the native engine does not offload": (
        {"optim.offload": True},
        None,
        "optim.offload needs optim.engine=deepspeed: the native engine keeps its state on the device",
    ),
    "DeepSpeed has no Adafactor": (
        {"optim.engine": "deepspeed", "optim.name": "adafactor"},
        None,
        "optim.engine=deepspeed cannot run optim.name=adafactor: its ZeRO gives the optimizer flat partitions, "
        "without the rows and columns of a matrix: use optim.name=adamw, or optim.engine=native",
    ),
    "DeepSpeed has no float64": (
        {"optim.engine": "deepspeed", "train.dtype": "fp64"},
        None,
        "optim.engine=deepspeed cannot run train.dtype=fp64: its ZeRO keeps sums and masters in fp32: "
        "use train.dtype=fp32, or optim.engine=native",
    ),
    "DeepSpeed does not use apex": (
        {"optim.engine": "deepspeed", "parallel.kernels": "apex"},
        None,
        "optim.engine=deepspeed has no use for parallel.kernels=apex: its update is torch's fused AdamW: "
        "use parallel.kernels=auto or torch, or optim.engine=native",
    ),
    "DeepSpeed has no tensor parallelism": (
        {"optim.engine": "deepspeed", "parallel.tp": 2},
        2,
        "optim.engine=deepspeed cannot run parallel.tp=2: its ZeRO takes the ranks of a tp group, "
        "which hold different weights, for replicas: use parallel.tp=1, or optim.engine=native",
    ),
}


def problems(change, world):
    with pytest.raises(ConfigError) as caught:
        check(changed(preset("tiny"), change), world=world)
    return caught.value.problems


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_one_sentence(rule):
    change, world, sentence = BROKEN[rule]
    assert problems(change, world) == [sentence]


def test_several_broken_rules_are_all_reported():
    found = problems({"model.heads": 5, "moe.top_k": 9, "train.steps": 500, "parallel.ep": 3}, 2)
    assert [sentence.split("=")[0] for sentence in found] == [
        "model.heads",
        "moe.top_k",
        "optim.warmup_steps",
        "parallel.ep",
        "parallel.ep",
    ]


def test_the_error_shows_every_sentence_on_its_own_line():
    with pytest.raises(ConfigError) as caught:
        check(changed(preset("tiny"), {"model.heads": 5, "moe.top_k": 9}))
    assert str(caught.value).splitlines() == caught.value.problems
    assert len(caught.value.problems) == 2


def test_the_layout_is_checked_only_where_the_ranks_are_known():
    run = changed(preset("tiny"), {"parallel.tp": 3})
    check(run)
    with pytest.raises(ConfigError):
        check(run, world=2)


def test_a_dense_model_is_not_asked_about_experts():
    run = changed(
        preset("tiny"), {"moe.blocks": (), "moe.top_k": 9, "moe.min_text_experts": 99, "train.batch_pairs": 6}
    )
    check(run, world=2)


def test_a_threshold_that_is_switched_off_may_be_anything():
    check(changed(preset("tiny"), {"moe.min_text_experts": 99.0, "moe.global_text": 0.0}))


def test_a_load_loss_with_noise_is_lawful():
    check(changed(preset("tiny"), {"moe.load": 1.0, "moe.noise_std": 0.5}))


def test_the_fixes_that_are_offered_work():
    # The first and the last number of three of the sentences above.
    for change, world in (
        ({"model.heads": 48}, None),
        ({"image.size": 39, "image.patch": 13}, None),
        ({"train.batch_pairs": 64}, 2),
        ({"train.batch_pairs": 256}, 8),
        ({"train.microbatch_pairs": 32, "train.batch_pairs": 256}, 2),
        ({"train.microbatch_pairs": 64, "train.batch_pairs": 256}, 2),
        ({"train.steps": 500, "optim.warmup_steps": 50, "optim.cooldown_steps": 250}, None),
        ({"train.steps": 500, "optim.warmup_steps": 250, "optim.cooldown_steps": 250}, None),
        ({"moe.eval_capacity": "paper", "moe.group_pairs": 32, "eval.batch_pairs": 96}, None),
    ):
        check(changed(preset("tiny"), change), world=world)


def test_divisors_by_hand():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(12, up_to=5) == [1, 2, 3, 4]
    assert divisors(1) == [1]


def test_a_resumed_run_names_the_numbers_of_ranks_that_can_share_its_batch():
    run = changed(preset("tiny"), {"train.batch_pairs": 384})
    with pytest.raises(ConfigError) as refused:
        check(run, world=5, resumed=True)
    (problem,) = refused.value.problems
    assert problem == (
        "5 ranks cannot share train.batch_pairs=384 evenly in groups of moe.group_pairs=32, and a resumed run keeps "
        "its batch where no other is given: use 1, 2, 3, 4, 6 or 12 ranks"
    )
    for ranks in (1, 2, 3, 4, 6, 12):
        check(run, world=ranks, resumed=True)
    # With tp=2 those that tp does not divide would be refused too.
    with pytest.raises(ConfigError, match="use 2, 4, 6 or 12 ranks"):
        check(changed(run, {"parallel.tp": 2}), world=8, resumed=True)


def test_microbatches_of_a_larger_batch_hold_what_a_rank_held_before():
    run = changed(preset("tiny"), {"train.batch_pairs": 768})
    # 96 pairs of 384 on each of 4 ranks; now 192 of 768, 96 at once. 8 ranks have 96 again.
    assert fit_microbatches(run, before=4, now=4, batch_before=384).train.microbatch_pairs == 96
    assert fit_microbatches(run, before=4, now=8, batch_before=384) == run


@pytest.mark.parametrize(
    ("asked", "before", "now", "fitted"),
    [
        (0, 4, 4, 0),  # nothing changes
        (0, 4, 2, 96),  # twice the pairs on a rank: as many at once as before
        (0, 2, 4, 0),
        (64, 2, 1, 64),
        (96, 4, 3, 64),  # 128 pairs: 96 no longer divides
        (96, 4, 12, 0),  # 32 pairs are fewer than 96
        (0, 4, 5, 0),  # refused by `check`
    ],
)
def test_microbatches_are_fitted_to_another_number_of_ranks(asked, before, now, fitted):
    run = changed(preset("tiny"), {"train.batch_pairs": 384, "train.microbatch_pairs": asked})
    again = fit_microbatches(run, before=before, now=now)
    assert fit_microbatches(run, before=before, now=now, batch_before=384) == again
    assert again.train.microbatch_pairs == fitted
    if now != 5:
        check(again, world=now, resumed=True)


def test_evaluation_with_a_capacity_takes_whole_routing_groups():
    settings = {"moe.eval_capacity": "paper", "moe.group_pairs": 32, "eval.batch_pairs": 48}
    with pytest.raises(ConfigError, match=r"eval\.batch_pairs=48 must be a multiple of moe\.group_pairs=32"):
        check(changed(preset("tiny"), settings))
