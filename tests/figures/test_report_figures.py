"""Numbers of the report's head and tables, from logs in which no two numbers are alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limoe_dist.analysis.evaluated import results
from limoe_dist.analysis.history import read_evaluations, read_metrics
from limoe_dist.analysis.summary import Facts, tiles
from limoe_dist.config.presets import preset
from tests.analysis.lines import metrics_line, write

RUN = preset("tiny").model_copy(
    update={
        "train": preset("tiny").train.model_copy(update={"steps": 30, "batch_pairs": 64}),
        "parallel": preset("tiny").parallel.model_copy(update={"tp": 2, "ep": 4}),
    }
)
LINES = [
    metrics_line(10, loss=6.0, contrastive=5.5, aux=0.5, pairs_per_s=100.0, seconds_per_step=2.0),
    metrics_line(20, loss=4.0, contrastive=3.75, aux=0.25, pairs_per_s=900.0, seconds_per_step=1.0),
    metrics_line(30, loss=3.0, contrastive=2.875, aux=0.125, pairs_per_s=300.0, seconds_per_step=3.0),
]


def test_the_tiles_of_the_head(tmp_path: Path) -> None:
    LINES[2]["memory_bytes"], LINES[2]["time"] = 3 * 2**29, 1_700_000_000
    history = read_metrics(write(tmp_path / "metrics.jsonl", LINES))
    facts = Facts("runs/first", parameters=1_234_567, per_token=345_678, world=8)
    found = {tile.name: (tile.value, tile.note) for tile in tiles(RUN, history, facts)}
    assert found == {
        "Preset": ("tiny", "8 experts in 2 of 4 blocks, top-1"),
        "Parameters": ("1.23 M", "345,678 for each token"),
        # 30 steps of 64 pairs.
        "Steps": ("30 of 30", "finished; 1,920 pairs"),
        "Last log line": ("2023-11-14", "22:13 UTC"),
        # 10 steps of 2 s, 10 of 1 s and 10 of 3 s.
        "Training time": ("1 min 0 s", "from the logged seconds per step"),
        # 8 ranks: dense weights in 2 shards, 4 replicas; experts in 4 shards, 2 replicas.
        "Ranks": ("8", "dp 4 × tp 2; experts edp 2 × ep 4"),  # noqa: RUF001
        "Throughput": ("300 pairs/s", "median over the log lines"),
        "Final loss": ("3", "contrastive 2.875 + auxiliary 0.125"),
        "Peak memory": ("1.50 GiB", "of rank 0"),
    }


WAYS = ("image_to_text", "text_to_image")
RETRIEVAL = {
    way: {f"recall_at_{n}": (number + 1) / 100 + n / 1000 for n in (1, 5, 10)} for number, way in enumerate(WAYS)
}
CHANCES = {
    f"chance_{way}": {f"recall_at_{n}": (number + 3) / 100 + n / 1000 for n in (1, 5, 10)}
    for number, way in enumerate(WAYS)
}
EVALUATION = {
    "zeroshot": {"rows": 50, "top1": 0.42, "top5": 0.77, "chance_top1": 0.125, "chance_top5": 0.625},
    "retrieval": {"rows": 48} | RETRIEVAL | CHANCES,
    "contrastive": {"rows": 40, "accuracy": 0.33, "chance": 0.05, "minibatch": 20},
}
# 1 + n / 10, 2 + n / 10, 3 + n / 10 and 4 + n / 10 hundredths.
TABLE = {
    "Zero-shot top-1": (0.42, 0.125),
    "Zero-shot top-5": (0.77, 0.625),
    "Image to text R@1": (0.011, 0.031),
    "Image to text R@5": (0.015, 0.035),
    "Image to text R@10": (0.020, 0.040),
    "Text to image R@1": (0.021, 0.041),
    "Text to image R@5": (0.025, 0.045),
    "Text to image R@10": (0.030, 0.050),
    "Contrastive accuracy among 20": (0.33, 0.05),
}


def test_the_table_of_evaluations_in_training_shows_the_last_line(tmp_path: Path) -> None:
    earlier = {"step": 10, "zeroshot": EVALUATION["zeroshot"] | {"top1": 0.9}}
    evaluations = read_evaluations(write(tmp_path / "e.jsonl", [earlier, {"step": 20} | EVALUATION]))
    (found,) = results(tmp_path, evaluations, validation="val/manifest.json")
    assert (found.title, found.step, found.rows) == ("During training", 20, 48)
    assert {figure.name: pytest.approx((figure.value, figure.chance)) for figure in found.figures} == TABLE


def test_the_tables_of_limoe_eval_show_each_task_at_its_newest_step(tmp_path: Path) -> None:
    contents = EVALUATION | {"fewshot": {"rows": 44, "shots": 10, "accuracy": 0.61, "chance": 0.02}}
    for task, content in contents.items():
        for step in (9, 10):
            line = {"step": step, "data": "d/manifest.json", task: content | {"rows": content["rows"] + step}}
            (tmp_path / f"eval-{task}-{step}.json").write_text(json.dumps(line))
    found = {result.title: result for result in results(tmp_path, None, validation="")}
    assert {title: (result.step, result.rows) for title, result in found.items()} == {
        "limoe eval zeroshot": (10, 60),
        "limoe eval retrieval": (10, 58),
        "limoe eval contrastive": (10, 50),
        "limoe eval fewshot": (10, 54),
    }
    shown = {figure.name: (figure.value, figure.chance) for result in found.values() for figure in result.figures}
    wanted = TABLE | {"10-shot, linear": (0.61, 0.02)}
    assert {name: pytest.approx(numbers) for name, numbers in shown.items()} == wanted
