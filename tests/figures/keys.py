"""Keys of the files that a run and `limoe eval` write, each with the test that works its value out."""

from __future__ import annotations

_ORACLE = "tests/oracle/test_product.py::test_three_steps_of_one_process_are_those_of_the_oracle"
_LINE = "tests/train/test_window.py::test_figures_of_a_line_are_means_over_its_steps"
_PACE = "tests/train/test_heartbeat.py::test_the_file_holds_where_a_run_is_and_is_replaced_at_most_every_five_seconds"
_ZEROSHOT = "tests/figures/test_evaluation_files.py::test_zero_shot_figures"
_RETRIEVAL = "tests/figures/test_evaluation_files.py::test_retrieval_figures"
_CONTRASTIVE = "tests/figures/test_evaluation_files.py::test_contrastive_figures"
_FEWSHOT = "tests/figures/test_evaluation_files.py::test_few_shot_figures"
_POSITIONS = (
    "tests/train/test_restart_numbers.py::test_lines_of_positions_follow_each_other_and_name_what_is_quarantined_inside"
)
_REPLACED = "tests/data/test_loader.py::test_replaced_rows_are_written_down_with_their_stand_ins"
_EVENT = "tests/figures/test_guard_line.py::test_every_number_of_an_event_by_hand"

AUX = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text", "mutual_information")
_BLOCK = (*AUX, *(f"{kind}_{of}" for kind in ("success", "entropy", "experts") for of in ("image", "text")), "kept")
_RECALLS = [
    f"{prefix}{way}/recall_at_{n}"
    for prefix in ("", "chance_")
    for way in ("image_to_text", "text_to_image")
    for n in (1, 5, 10)
]
_SKIPPED_ROWS = ("bad_rows", "pictureless_rows")

KEYS: dict[str, dict[str, str]] = {
    "metrics.jsonl": {
        **dict.fromkeys(["step", "loss", "contrastive", "aux", "grad_norm", "lr", "temperature"], _ORACLE),
        **dict.fromkeys(
            ["accuracy_image_to_text", "accuracy_text_to_image", *(f"aux_{name}" for name in AUX)], _ORACLE
        ),
        **{f"blocks/N/{name}": _ORACLE for name in _BLOCK},
        **dict.fromkeys(["time", "pairs_per_s", "seconds_per_step"], _LINE),
        "memory_bytes": "tests/train/test_window.py::test_memory_is_that_of_the_process_in_bytes",
        **{f"busy_s/{name}": _PACE for name in ("median", "max", "rank", "host")},
    },
    "evaluations.jsonl": {
        "step": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
        **{
            f"zeroshot/{name}": _ZEROSHOT
            for name in ("rows", "classes", "top1", "top5", "chance_top1", "chance_top5", *_SKIPPED_ROWS)
        },
        **{
            f"zeroshot/{name}": _ZEROSHOT
            for name in ("unnamed_rows", "templates", "templates_used", "prompts", "capacity")
        },
        **{
            f"retrieval/{name}": _RETRIEVAL
            for name in (*_RECALLS, "captions", "rows", "texts", *_SKIPPED_ROWS, "uncaptioned_rows", "capacity")
        },
        "retrieval/rule": "tests/eval/test_retrieval.py::test_the_json_holds_the_rule_and_every_figure",
        **{
            f"contrastive/{name}": _CONTRASTIVE
            for name in ("image_to_text", "text_to_image", "accuracy", "chance", "minibatch", "asked_minibatch")
        },
        **{
            f"contrastive/{name}": _CONTRASTIVE
            for name in ("left_out_rows", "minibatches", "rows", *_SKIPPED_ROWS, "uncaptioned_rows", "capacity")
        },
        "contrastive/rule": "tests/eval/test_command.py::test_contrastive_writes_what_the_library_finds",
    },
    "positions.jsonl": dict.fromkeys(["step", "from_step", "first", "end", "quarantined"], _POSITIONS)
    | {
        "rows": "tests/train/test_restart_numbers.py::"
        "test_the_checksum_of_a_line_is_the_sum_of_what_all_steps_read_modulo_2_64"
    },
    "replaced/rank-00000.jsonl": dict.fromkeys(
        ["position", "row", "key", "reason", "bad_stand_ins", "stand_in"], _REPLACED
    ),
    "heartbeat.json": dict.fromkeys(
        ["time", "step", "steps", "phase", "seconds_per_step", "ranks", "hosts", "busy_s", "job", "restart"], _PACE
    ),
    "ended.json": dict.fromkeys(
        ("step", "signal", "status", "reason"), "tests/launch/test_ended.py::test_the_status_is_that_of_the_run"
    ),
    "guard.jsonl": dict.fromkeys(["kind", "action", "step", "text", "loss", "grad_norm", "z", "time"], _EVENT)
    | dict.fromkeys(["first", "end", "to_step"], _EVENT),
    "eval-fewshot-N.json": dict.fromkeys(
        ["accuracy", "std", "min", "max", "of_seeds", "l2", "of_l2", "chance", "rows", "shots", "seeds", "features"],
        _FEWSHOT,
    )
    | dict.fromkeys(["classes", "short_classes", "short", "training_rows", "bad_training_rows"], _FEWSHOT)
    | dict.fromkeys(["bad_rows", "pictureless_rows", "unnamed_rows", "other_rows", "capacity"], _FEWSHOT),
}
