"""The modules under test, and the tests that must notice a defect in each: the most specific and fastest first.

A list takes at most 60 s. Entries are paths of files or folders, or node ids of single tests.
"""

from __future__ import annotations

LAYOUTS = "tests/ranks/test_layout_parity.py::"
PASS = "tests/oracle/test_product.py::test_a_forward_pass_is_that_of_the_paper"
ORACLE = (
    PASS,
    "tests/oracle/test_product.py::test_three_steps_of_one_process_are_those_of_the_oracle",
    "tests/oracle/test_product.py::test_three_steps_of_rarer_cases_are_those_of_the_oracle",
)
GOLDEN = ("tests/model/test_layer_golden.py", "tests/model/test_tower_golden.py")
INITIAL = "tests/draws/test_initial_values.py"
MODEL = ("tests/model", INITIAL)
SETTINGS = ("tests/settings/test_every_setting.py",)
PARITY = tuple(
    LAYOUTS + name
    for name in (
        "test_gradients_of_4_ranks_equal_those_of_one_process[2-2-fp64]",
        "test_gradients_of_4_ranks_equal_those_of_one_process[1-4-fp64]",
        "test_gradients_of_4_ranks_equal_those_of_one_process[2-1-fp64]",
        "test_microbatches_and_recompute_have_the_gradient_of_the_whole_batch[2-2-fp64-1e-10]",
        "test_auxiliary_losses_are_computed_where_their_gradient_is_and_not_where_a_pass_only_embeds",
        "test_every_router_order_and_loss_has_the_gradient_of_one_process",
        "test_two_towers_have_the_gradient_of_one_process",
        "test_a_batch_without_a_modality_has_zeros_for_it_and_nobody_waits[True-texts]",
    )
)
"""Ranks against one process."""
STEPS = (
    "tests/optim/test_left_out.py",
    LAYOUTS + "test_20_steps_on_2_ranks_lose_what_one_process_loses[2-2-fp64-adamw]",
    LAYOUTS + "test_20_steps_on_2_ranks_lose_what_one_process_loses[2-2-fp64-adafactor]",
)
GUARDED_RUNS = tuple(
    "tests/ranks/test_guard.py::test_" + name
    for name in (
        "a_last_save_that_fails_does_not_hide_why_the_guard_stopped",
        "a_stop_of_the_guard_weighs_more_than_a_signal",
        "a_save_between_two_batches_that_are_left_out_loses_none_of_them",
        "a_run_that_begins_again_passes_over_what_its_ledger_tells",
        "without_a_checkpoint_to_go_back_to_the_batch_is_left_out",
        "a_collapse_that_goes_back_comes_again_until_it_ends_the_run",
        "a_leap_that_is_noted_is_trained_on",
        "a_leap_takes_the_run_back_to_its_checkpoint_and_past_the_data",
    )
)
GUARD = (
    "tests/train/test_guard.py",
    "tests/pipeline/test_guard_numbers.py",
    "tests/pipeline/test_guard_in_steps.py",
    *GUARDED_RUNS,
)
RUNS = ("tests/train/test_loop.py", "tests/train/test_restart.py")
VERIFY = (
    "tests/train/test_parity.py",
    "tests/train/test_routes.py",
    "tests/train/test_along.py",
    "tests/pipeline/test_verify_limits.py",
    "tests/pipeline/test_verdicts.py",
    "tests/ranks/test_planted_defects.py::test_a_flip_fails_by_its_margin_alone_and_the_rest_is_compared_on_equal_routes",
    "tests/ranks/test_planted_defects.py::test_healthy_twins_and_routers_pass_too",
)
BAD_ROWS = (
    "tests/draws/test_bad_rows.py",
    "tests/train/test_loop.py::test_broken_pictures_and_empty_captions_are_replaced_and_named",
    "tests/train/test_restart.py::test_quarantined_positions_stay_out_of_a_run_that_goes_on",
)

MODULES: dict[str, tuple[str, ...]] = {
    "limoe_dist/equations/aux_losses.py": ("tests/equations/test_aux_losses.py", *ORACLE, *MODEL),
    "limoe_dist/equations/contrastive.py": ("tests/equations/test_contrastive.py", *ORACLE, *GOLDEN),
    "limoe_dist/equations/dispatch.py": ("tests/equations/test_dispatch.py", *ORACLE, *GOLDEN),
    "limoe_dist/equations/routing.py": ("tests/equations/test_routing.py", *ORACLE, *GOLDEN),
    "limoe_dist/model/attention.py": (*MODEL, *ORACLE, *PARITY),
    "limoe_dist/model/block.py": (*MODEL, *ORACLE, *SETTINGS, *PARITY),
    "limoe_dist/model/embed.py": (*MODEL, *ORACLE, *PARITY),
    "limoe_dist/model/moe_layer.py": (
        "tests/pipeline/test_moe_layer.py",
        *MODEL,
        *ORACLE,
        "tests/draws/test_router_noise.py",
        *PARITY,
    ),
    "limoe_dist/model/tokens.py": (*MODEL, *ORACLE, *PARITY),
    "limoe_dist/model/tower.py": (
        *MODEL,
        *ORACLE,
        *SETTINGS,
        "tests/eval/test_embed.py",
        *PARITY,
        "tests/ranks/test_bf16.py",
    ),
    "limoe_dist/optim/adafactor.py": (
        "tests/optim/test_adafactor.py",
        *ORACLE,
        "tests/ranks/test_adafactor.py",
        *STEPS,
    ),
    "limoe_dist/optim/adamw.py": ("tests/optim/test_adamw.py", "tests/pipeline/test_update.py", *ORACLE, *STEPS),
    "limoe_dist/optim/native.py": (
        "tests/checkpoint/test_state.py",
        "tests/ranks/test_gradients.py",
        "tests/pipeline/test_update.py",
        *ORACLE,
        *STEPS,
        "tests/ranks/test_bf16.py",
    ),
    "limoe_dist/optim/schedule.py": ("tests/optim/test_schedule.py", "tests/pipeline/test_schedule.py"),
    "limoe_dist/parallel/counter_rng.py": (
        "tests/parallel/test_counter_rng.py",
        "tests/draws/test_generators.py",
        "tests/draws/test_router_noise.py",
        "tests/draws/test_initial_values.py",
        *MODEL,
    ),
    "limoe_dist/parallel/gradients.py": (
        "tests/ranks/test_gradients.py",
        "tests/pipeline/test_update.py",
        *ORACLE,
        *PARITY,
        "tests/ranks/test_bf16.py",
    ),
    "limoe_dist/parallel/linear.py": (*MODEL, *ORACLE, *PARITY),
    "limoe_dist/parallel/pieces.py": (
        "tests/checkpoint/test_state.py",
        "tests/ranks/test_gradients.py",
        "tests/pipeline/test_update.py",
        "tests/ranks/test_adafactor.py",
        *STEPS,
        *PARITY[:3],
    ),
    "limoe_dist/parallel/placement.py": (
        "tests/checkpoint/test_state.py",
        "tests/checkpoint/test_initial.py",
        "tests/draws/test_initial_values.py",
        *MODEL,
        *ORACLE,
        *PARITY,
    ),
    "limoe_dist/train/step.py": (
        "tests/pipeline/test_schedule.py",
        *ORACLE,
        "tests/ranks/test_gradients.py",
        *PARITY,
        *GUARD,
    ),
    "limoe_dist/train/metrics.py": (
        "tests/train/test_metrics.py",
        "tests/figures/test_metrics_line.py",
        "tests/train/test_loop.py",
    ),
    "limoe_dist/train/guard.py": GUARD,
    "limoe_dist/train/votes.py": (
        *GUARD,
        "tests/train/test_loop.py::test_a_signal_to_one_rank_ends_all_after_the_same_step_with_a_checkpoint",
    ),
    "limoe_dist/train/restart.py": (
        "tests/train/test_restart_numbers.py",
        "tests/settings/test_reach.py::test_a_new_run_takes_the_weights_that_the_settings_name",
        "tests/train/test_restart.py",
        *GUARD[:-3],
    ),
    "limoe_dist/data/order.py": (
        "tests/data/test_order.py",
        "tests/draws/test_data_order.py",
        "tests/pipeline/test_order.py",
        "tests/data/test_mixture.py",
    ),
    "limoe_dist/data/mixture.py": (
        "tests/data/test_mixture.py",
        "tests/draws/test_data_order.py",
        "tests/pipeline/test_order.py",
        "tests/data/test_loader.py",
    ),
    "limoe_dist/data/augment.py": (
        "tests/data/test_augment.py",
        "tests/draws/test_augmentation.py",
        "tests/draws/test_geometry.py",
        "tests/data/test_dali.py",
        "tests/data/test_loader.py",
    ),
    "limoe_dist/data/philox.py": (
        "tests/data/test_philox.py",
        "tests/draws/test_generators.py",
        "tests/draws/test_augmentation.py",
        "tests/data/test_augment.py",
    ),
    "limoe_dist/data/stand_ins.py": ("tests/data/test_bad_count.py", "tests/data/test_loader.py", *BAD_ROWS),
    "limoe_dist/data/loader.py": (
        "tests/data/test_bad_count.py",
        "tests/data/test_fetch_ahead.py",
        "tests/data/test_loader.py",
        "tests/pipeline/test_order.py",
        "tests/data/test_dali.py",
        *BAD_ROWS,
    ),
    "limoe_dist/data/resize.py": (
        "tests/data/test_resize.py",
        "tests/draws/test_geometry.py",
        "tests/data/test_dali.py",
        "tests/data/test_loader.py",
    ),
    "limoe_dist/train/parity/checks.py": VERIFY,
    "limoe_dist/train/parity/compare.py": VERIFY,
    "limoe_dist/train/parity/along.py": VERIFY,
    "limoe_dist/train/parity/facts.py": VERIFY,
    "limoe_dist/train/parity/routes.py": VERIFY,
    "limoe_dist/train/parity/boxes.py": VERIFY,
}
