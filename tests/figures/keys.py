"""Keys of the files that a run and `limoe eval` write, each with the test that works its value out."""

from __future__ import annotations

_LINE = "tests/figures/test_metrics_line.py::test_a_line_is_the_mean_of_its_steps"
_BUSY = "tests/figures/test_metrics_line.py::test_busy_seconds_are_those_of_the_slowest_rank_and_the_lower_median"
_MEMORY = "tests/figures/test_metrics_line.py::test_memory_is_the_peak_of_the_process_or_of_the_gpu"
_PACE = "tests/train/test_heartbeat.py::test_the_file_holds_where_a_run_is_and_is_replaced_at_most_every_five_seconds"
_ZEROSHOT = "tests/figures/test_evaluation_files.py::test_zero_shot_figures"
_RETRIEVAL = "tests/figures/test_evaluation_files.py::test_retrieval_figures"
_CONTRASTIVE = "tests/figures/test_evaluation_files.py::test_contrastive_figures"
_FEWSHOT = "tests/figures/test_evaluation_files.py::test_few_shot_figures"
_LACKING = "tests/figures/test_evaluation_files.py::test_rows_that_cannot_be_classified_are_counted_by_what_they_lack"
_EXAMPLES = "tests/figures/test_evaluation_files.py::test_examples_show_the_best_of_a_row"
_PIXELS = "tests/eval/test_pixels.py::test_the_nearest_grey_gives_the_class"
_HEAD = "tests/figures/test_keys.py::test_the_head_of_an_evaluation_s_file_says_what_was_evaluated"
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

_TASKS = {
    "zeroshot": dict.fromkeys(
        (
            *("rows", "classes", "top1", "top5", "chance_top1", "chance_top5", *_SKIPPED_ROWS, "unnamed_rows"),
            *("templates", "templates_used", "prompts", "capacity"),
        ),
        _ZEROSHOT,
    )
    | {"unnamed_rows": _LACKING},
    "retrieval": dict.fromkeys(
        (*_RECALLS, "captions", "rows", "texts", *_SKIPPED_ROWS, "uncaptioned_rows", "capacity"), _RETRIEVAL
    )
    | {"rule": "tests/eval/test_retrieval.py::test_the_json_holds_the_rule_and_every_figure"},
    "contrastive": dict.fromkeys(
        (
            *("image_to_text", "text_to_image", "accuracy", "chance", "minibatch", "asked_minibatch", "minibatches"),
            *("rows", "left_out_rows", *_SKIPPED_ROWS, "uncaptioned_rows", "capacity"),
        ),
        _CONTRASTIVE,
    )
    | {"rule": _CONTRASTIVE},
    "fewshot": dict.fromkeys(
        (
            *("accuracy", "std", "min", "max", "of_seeds", "l2", "of_l2", "shots", "short_classes", "short"),
            *("bad_training_rows", "capacity"),
        ),
        _FEWSHOT,
    )
    | dict.fromkeys(
        (
            "chance",
            "rows",
            "classes",
            "seeds",
            "features",
            "training_rows",
            *_SKIPPED_ROWS,
            "unnamed_rows",
            "other_rows",
        ),
        _LACKING,
    )
    | {"training_data": _HEAD},
}


def _task(task: str) -> dict[str, str]:
    return {f"{task}/{name}": test for name, test in _TASKS[task].items()}


def _file(task: str) -> dict[str, str]:
    """What `limoe eval` writes: more than a line of evaluations.jsonl holds."""
    more = dict.fromkeys(("task", "run", "preset", "step", "data", "ranks"), _HEAD)
    if task in ("zeroshot", "retrieval"):
        more[f"{task}/examples"] = _EXAMPLES
    if task == "zeroshot":
        names = ("rows", "training_rows", "classes", "classes_in_training", "top1", "top5")
        more |= {f"pixel_nearest_neighbour/{name}": _PIXELS for name in names}
        more["pixel_nearest_neighbour/training_data"] = _HEAD
    return _task(task) | more


KEYS: dict[str, dict[str, str]] = {
    "metrics.jsonl": {
        **dict.fromkeys(("step", "time", "loss", "contrastive", "aux", "grad_norm", "lr", "temperature"), _LINE),
        **dict.fromkeys(("accuracy_image_to_text", "accuracy_text_to_image"), _LINE),
        **dict.fromkeys(("pairs_per_s", "seconds_per_step", *(f"aux_{name}" for name in AUX)), _LINE),
        **{f"blocks/N/{name}": _LINE for name in _BLOCK},
        "memory_bytes": _MEMORY,
        **{f"busy_s/{name}": _BUSY for name in ("median", "max", "rank", "host")},
    },
    "evaluations.jsonl": {
        "step": "tests/settings/test_behaviour.py::test_a_run_writes_at_the_steps_that_its_settings_name",
        **_task("zeroshot"),
        **_task("retrieval"),
        **_task("contrastive"),
    },
    **{f"eval-{task}-4.json": _file(task) for task in _TASKS},
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
    "faults.jsonl": dict.fromkeys(
        ("time", "kind", "ranks", "hosts", "text", "job", "restart"),
        "tests/train/test_faults.py::test_a_fault_is_a_line_with_the_job_and_its_restart",
    ),
}
