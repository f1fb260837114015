"""Every setting with what it decides: classes of results that change with it, or a test of what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TRAIN = {"served in training", "auxiliary losses", "loss", "gradient"}
ROUTING = {"served in training", "auxiliary losses"}
LOSS = {"loss", "gradient"}
AUX = LOSS | {"auxiliary losses"}
EVALUATION = {"evaluation"}
FORWARD = TRAIN | EVALUATION
"""Where only the computation changes, not the shapes of the weights."""
MODEL = FORWARD | {"initial values", "update"}
"""Where shapes of weights change too."""


DENSE: dict[str, Any] = {"moe.blocks": ()}
TWO_TOWERS = DENSE | {"model.towers": "two"}


@dataclass(frozen=True)
class Row:
    """A setting of which a change shows in results that are computed in this process."""

    setting: str
    value: Any
    affects: set[str]
    base: dict[str, Any] = field(default_factory=dict)
    """Settings that must hold, in both runs, for this one to matter."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Settings that must change with it for the run to be valid."""


ROWS = (
    Row("model.width", 12, MODEL, beside={"model.heads": 3}),
    Row("model.depth", 4, MODEL - ROUTING | {"way"}),
    Row("model.depth", 4, MODEL - ROUTING | {"way"}, base=TWO_TOWERS),
    Row("model.heads", 4, MODEL),
    Row("model.mlp_dim", 12, MODEL),
    Row("model.embed_dim", 7, MODEL - ROUTING),
    Row("model.towers", "two", MODEL - ROUTING | {"way"}, base=DENSE),
    Row("model.init_temperature", 0.5, {"initial values"}),
    Row("image.size", 18, MODEL | {"training pixels", "evaluation pixels", "way"}),
    Row("image.patch", 4, MODEL | {"way"}),
    Row("image.mean", 255.0, {"training pixels", "evaluation pixels"}),
    Row("image.std", 64.0, {"training pixels", "evaluation pixels"}),
    Row("image.min_crop_area", 0.9, {"training pixels"}),
    Row("image.flip", 0.0, {"training pixels"}),
    Row("image.rotate_degrees", 20.0, {"training pixels"}),
    Row("image.scale", 0.4, {"training pixels"}),
    Row("image.translate", 0.3, {"training pixels"}),
    Row("image.brightness", 0.4, {"training pixels"}),
    Row("image.contrast", 0.5, {"training pixels"}),
    Row("image.saturation", 0.9, {"training pixels"}),
    Row("image.hue_degrees", 90.0, {"training pixels"}),
    Row("text.length", 5, MODEL | {"tokens", "way"}),
    Row("text.vocab_size", 50, {"initial values", "gradient", "update"}),
    Row("text.pad", "token", FORWARD | {"way"}),
    Row("moe.blocks", (0,), MODEL | {"way"}),
    Row("moe.num_experts", 6, MODEL),
    Row("moe.top_k", 1, FORWARD),
    Row("moe.group_pairs", 4, TRAIN),
    Row("moe.capacity_factor", 0.5, TRAIN),
    Row("moe.capacity_multiple", 3, TRAIN),
    Row("moe.eval_capacity", "paper", EVALUATION),
    Row("moe.eval_capacity_factor", 0.3, EVALUATION, base={"moe.eval_capacity": "paper"}),
    Row("moe.order", "images_first", TRAIN),
    Row("moe.order", "text_first", TRAIN),
    Row("moe.order", "random", TRAIN),
    Row("moe.order", "random", TRAIN, base={"moe.order": "images_first"}),
    Row("moe.order", "text_first", TRAIN, base={"moe.order": "images_first"}),
    Row("moe.priority", "sum", TRAIN),
    Row("moe.routers", "per_modality", MODEL | {"way"}),
    Row("moe.image_experts", 2, FORWARD | {"way"}, base={"moe.min_image_experts": 1.9, "moe.min_text_experts": 1.8}),
    Row("moe.noise_std", 2.0, TRAIN),
    Row("moe.aux_weight", 0.5, LOSS),
    Row("moe.importance", 0.5, LOSS),
    Row("moe.load", 0.5, LOSS),
    Row("moe.z", 0.5, LOSS),
    Row("moe.local_image", 0.5, LOSS),
    Row("moe.local_text", 0.5, LOSS),
    Row("moe.global_image", 0.5, LOSS),
    Row("moe.global_text", 0.5, LOSS),
    Row("moe.mutual_information", 0.5, LOSS),
    Row("moe.modality_prior", "uniform", AUX | {"way"}),
    Row("moe.local_form", "merged", AUX | {"way"}),
    Row("moe.local_form", "above_log_k", AUX - {"gradient"} | {"way"}),
    Row("moe.min_image_experts", 3.8, AUX),
    Row("moe.min_text_experts", 3.7, AUX),
    Row("moe.kept_experts", ("0 1 3", "0 1 2 3"), MODEL),
    Row("data.manifest", "second", {"rows", "tokens"}),
    Row("data.mixture", ("first=1", "second=2"), {"rows"}),
    Row("data.window_rows", 16, {"rows"}),
    Row("data.block_shards", 2, {"rows"}, base={"data.window_rows": 16}),
    Row("data.tokenizer", "second tokenizer", {"tokens"}),
    Row("optim.name", "adafactor", {"update"}),
    Row("optim.lr", 2e-3, {"rate"}),
    Row("optim.beta1", 0.8, {"update"}),
    Row("optim.beta2", 0.9, {"update"}),
    Row("optim.eps", 1e-2, {"update"}),
    Row("optim.decay_exponent", 0.5, {"update"}, base={"optim.name": "adafactor"}),
    Row("optim.max_decay", 0.1, {"update"}, base={"optim.name": "adafactor"}),
    Row("optim.min_factored_dim", 6, {"update"}, base={"optim.name": "adafactor"}),
    Row("optim.beta1", 0.8, {"update"}, base={"optim.name": "adafactor"}),
    Row("optim.weight_decay", 0.3, {"update"}),
    Row("optim.clip_norm", 0.01, {"update"}),
    Row("optim.warmup_steps", 6, {"rate"}),
    Row("optim.timescale", 9, {"rate"}),
    Row("optim.cooldown_steps", 8, {"rate"}),
    Row("train.steps", 24, {"rate"}),
    Row("train.batch_pairs", 16, TRAIN | EVALUATION | {"way"}),
    Row(
        "train.seed",
        8,
        TRAIN | {"initial values", "rows", "training pixels", "caption choice"},
    ),
    Row("train.dtype", "fp32", MODEL - {"served in training"} | {"way"}),
    Row("train.microbatch_pairs", 4, {"way"}),
    Row("train.recompute", True, {"way"}),
    Row("train.contrastive_chunk", 3, {"way"}),
    Row("parallel.bucket_mb", 0.001, {"way"}),
    Row("parallel.reduce_dtype", "fp64", {"gradient", "update", "way"}, base={"train.dtype": "fp32"}),
)
"""Settings whose effect is a number."""

ELSEWHERE: dict[str, Any] = {
    "data.validation": "second",
    "data.check": "never",
    "data.cache": "a folder",
    "data.cache_gb": 1.0,
    "data.threads": 2,
    "data.prefetch": 5,
    "data.max_bad_frac": 0.5,
    "parallel.overlap": False,
    "parallel.kernels": "auto",
    "parallel.start_timeout_s": 1.0,
    "parallel.timeout_s": 1.0,
    "parallel.threads": 2,
    "train.stop_grace_s": 1.0,
    "eval.every_steps": 1,
    "eval.batch_pairs": 2,
    "eval.classes": "trained",
    "eval.templates": ("a {}",),
    "eval.captions": "all",
    "eval.minibatch": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.every_minutes": 1.0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 1,
    "checkpoint.read_back": False,
    "guard.non_finite": "stop",
    "guard.spike": "skip",
    "guard.collapse": "stop",
    "guard.spike_z": 1.0,
    "guard.spike_window": 8,
    "guard.min_success": 1.0,
    "guard.max_dead_frac": 0.0,
    "guard.collapse_lines": 1,
    "guard.rollback_batches": 1,
    "guard.max_skips": 1,
    "guard.max_rollbacks": 1,
    "log.every_steps": 1,
    "log.tensorboard": False,
    "log.straggler_factor": 1.0,
    "preset": "other",
}
"""Settings that must not show in a number of a step, each with a value that is not its default."""

NEED_RANKS = {"parallel.tp", "parallel.ep", "optim.engine", "optim.zero_stage", "optim.offload", "train.init_from"}
"""Settings that need other ranks, or a finished run: tests/ranks compares the numbers of their runs."""

TESTS = {
    "data.validation": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
    "data.check": "tests/settings/test_behaviour.py::test_checksums_of_shards_are_compared_at_the_start_or_never",
    "data.cache": "tests/data/test_cache.py::test_the_settings_name_the_folder_and_its_limit",
    "data.cache_gb": "tests/data/test_cache.py::test_the_settings_name_the_folder_and_its_limit",
    "data.threads": "tests/settings/test_behaviour.py::test_the_loader_gives_its_threads_to_the_decoder",
    "data.prefetch": "tests/data/test_loader.py::test_the_thread_works_ahead_and_no_further_than_it_is_told",
    "data.max_bad_frac": "tests/data/test_loader.py::test_too_many_bad_rows_stop_the_run_and_name_the_first",
    "optim.engine": "tests/settings/test_behaviour.py::test_deepspeed_is_told_stage_and_offload",
    "optim.zero_stage": "tests/settings/test_behaviour.py::test_deepspeed_is_told_stage_and_offload",
    "optim.offload": "tests/settings/test_behaviour.py::test_deepspeed_is_told_stage_and_offload",
    "parallel.tp": "tests/settings/test_behaviour.py::test_the_axes_of_the_mesh_are_those_of_the_settings",
    "parallel.ep": "tests/settings/test_behaviour.py::test_the_axes_of_the_mesh_are_those_of_the_settings",
    "parallel.overlap": "tests/settings/test_behaviour.py::test_with_overlap_buckets_leave_in_the_backward_pass",
    "parallel.kernels": "tests/settings/test_reach.py::"
    "test_every_norm_and_the_update_look_for_the_kernels_of_the_settings",
    "parallel.start_timeout_s": "tests/ranks/test_start.py::"
    "test_a_rank_that_never_comes_is_named_with_its_host_on_all_that_came_and_told_once",
    "parallel.timeout_s": "tests/ranks/test_start.py::"
    "test_a_hang_is_told_with_what_each_rank_was_in_and_where_the_missing_one_stood",
    "parallel.threads": "tests/settings/test_behaviour.py::test_a_rank_computes_with_the_threads_of_its_settings",
    "train.init_from": "tests/settings/test_reach.py::test_a_new_run_takes_the_weights_that_the_settings_name",
    "train.stop_grace_s": "tests/settings/test_reach.py::"
    "test_ranks_of_this_machine_are_started_with_the_threads_and_the_grace_of_the_settings",
    "eval.every_steps": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
    "eval.batch_pairs": "tests/settings/test_behaviour.py::test_an_evaluation_takes_its_batch_classes_and_prompts",
    "eval.classes": "tests/settings/test_behaviour.py::test_an_evaluation_takes_its_batch_classes_and_prompts",
    "eval.templates": "tests/settings/test_behaviour.py::test_an_evaluation_takes_its_batch_classes_and_prompts",
    "eval.captions": "tests/settings/test_behaviour.py::test_an_evaluation_takes_its_batch_classes_and_prompts",
    "eval.minibatch": "tests/settings/test_behaviour.py::test_an_evaluation_takes_its_batch_classes_and_prompts",
    "checkpoint.every_steps": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
    "checkpoint.every_minutes": "tests/settings/test_reach.py::"
    "test_minutes_between_checkpoints_are_of_60_seconds_on_the_clock_of_rank_0",
    "checkpoint.keep": "tests/checkpoint/test_saver.py::test_only_what_the_settings_ask_for_is_kept",
    "checkpoint.keep_every": "tests/checkpoint/test_saver.py::test_only_what_the_settings_ask_for_is_kept",
    "checkpoint.read_back": "tests/checkpoint/test_saver.py::test_without_reading_back_nothing_counts_as_verified",
    "guard.non_finite": "tests/pipeline/test_guard_numbers.py::"
    "test_the_setting_of_spikes_decides_about_spikes_and_that_of_non_finite_about_non_finite",
    "guard.spike": "tests/pipeline/test_guard_numbers.py::"
    "test_the_setting_of_spikes_decides_about_spikes_and_that_of_non_finite_about_non_finite",
    "guard.collapse": "tests/pipeline/test_guard_numbers.py::test_a_collapse_is_an_event_after_so_many_lines_in_a_row",
    "guard.spike_z": "tests/pipeline/test_guard_numbers.py::test_a_loss_at_the_limit_is_a_spike_and_one_below_is_not",
    "guard.spike_window": "tests/pipeline/test_guard_numbers.py::"
    "test_losses_are_compared_from_a_quarter_of_the_window_and_at_least_eight",
    "guard.min_success": "tests/pipeline/test_guard_numbers.py::"
    "test_collapse_begins_below_the_least_success_and_above_the_largest_share_of_dead_experts",
    "guard.max_dead_frac": "tests/pipeline/test_guard_numbers.py::"
    "test_collapse_begins_below_the_least_success_and_above_the_largest_share_of_dead_experts",
    "guard.collapse_lines": "tests/pipeline/test_guard_numbers.py::"
    "test_a_collapse_is_an_event_after_so_many_lines_in_a_row",
    "guard.rollback_batches": "tests/ranks/test_guard.py::"
    "test_a_leap_takes_the_run_back_to_its_checkpoint_and_past_the_data",
    "guard.max_skips": "tests/train/test_guard.py::"
    "test_skips_in_a_row_come_to_an_end_and_a_good_step_begins_the_count_again",
    "guard.max_rollbacks": "tests/train/test_guard.py::test_going_back_to_one_checkpoint_comes_to_an_end",
    "log.every_steps": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
    "log.tensorboard": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
    "log.straggler_factor": "tests/settings/test_behaviour.py::test_a_run_watches_for_stragglers_by_its_factor",
}
"""Settings whose effect is what a run does, with the test that fails where they are ignored."""

NO_EFFECT = {"preset": "a name: where the settings came from, shown by reports and looked up by with_losses"}
"""Settings that decide nothing, with the reason."""
