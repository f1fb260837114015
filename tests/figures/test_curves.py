"""Curves of the report: each panel's numbers, its levels to compare with and what is said about them.

Two log lines of two MoE blocks in which no two numbers are alike, so that a panel with another figure's numbers shows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limoe_dist.analysis.curves import (
    Note,
    aux_panels,
    entropy_panels,
    evaluation_panels,
    experts_panels,
    success_panels,
    training_panels,
)
from limoe_dist.analysis.history import History, read_metrics
from limoe_dist.analysis.plots import Line, Panel, Reference, alternative
from limoe_dist.analysis.routing_plots import TextShares, image_shares_svg, ranks_svg, text_shares, text_shares_svg
from limoe_dist.analysis.routing_record import RANK_BINS, BlockRouting, ExpertRouting, ModalityRouting, Ranks
from limoe_dist.config.schema import Eval, Model, Moe, Optim, Run, Train

AUX = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text", "mutual_information")
RUN = Run(
    train=Train(batch_pairs=64),
    eval=Eval(batch_pairs=16),
    model=Model(depth=4),
    optim=Optim(clip_norm=1.75),
    moe=Moe(
        blocks=(1, 3),
        num_experts=8,
        group_pairs=16,
        load=0.5,
        z=0.25,
        mutual_information=0.0,
        min_image_experts=6.0,
        min_text_experts=3.5,
    ),
)
TRAINING = {
    "contrastive": (5.0, 4.5),
    "aux": (0.25, 0.125),
    "accuracy_image_to_text": (0.11, 0.12),
    "accuracy_text_to_image": (0.21, 0.22),
    "lr": (0.001, 0.002),
    "grad_norm": (2.5, 3.5),
    "temperature": (0.07, 0.06),
    "pairs_per_s": (700.0, 800.0),
    # No panel shows these.
    "loss": (5.25, 4.625),
    "seconds_per_step": (0.091, 0.08),
}
BLOCKS = {
    1: {
        "success_image": (0.91, 0.92),
        "success_text": (0.81, 0.82),
        "entropy_image": (1.1, 1.2),
        "entropy_text": (0.6, 0.7),
        "experts_image": (5, 6),
        "experts_text": (2, 3),
    },
    3: {
        "success_image": (0.93, 0.94),
        "success_text": (0.83, 0.84),
        "entropy_image": (1.3, 1.4),
        "entropy_text": (0.8, 0.9),
        "experts_image": (7, 8),
        "experts_text": (1, 4),
    },
}
STEPS = (10, 20)


@pytest.fixture
def history(tmp_path: Path) -> History:
    lines = [
        {
            "step": step,
            **{name: values[place] for name, values in TRAINING.items()},
            **{f"aux_{name}": number + place / 2 for number, name in enumerate(AUX, start=1)},
            "blocks": {
                str(block): {name: values[place] for name, values in figures.items()}
                for block, figures in BLOCKS.items()
            },
        }
        for place, step in enumerate(STEPS)
    ]
    return read(tmp_path, lines)


def read(folder: Path, lines: list[dict[str, Any]]) -> History:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_metrics(path)


def curves(notes: list[Note]) -> dict[str, dict[str, tuple[float, ...]]]:
    assert all(line.steps.tolist() == list(STEPS) for note in notes for line in note.panel.lines)
    return {note.panel.title: {line.name: tuple(line.values) for line in note.panel.lines} for note in notes}


def levels(notes: list[Note]) -> dict[str, dict[str, float]]:
    return {
        note.panel.title: {level.name: level.value for level in note.panel.references}
        for note in notes
        if note.panel.references
    }


@pytest.mark.parametrize(
    ("norms", "scale"),
    [
        # 12 times the least, and twice the median: no step exploded.
        ([1.0] + [6.0] * 18 + [12.0], "linear"),
        ([6.0] * 19 + [60.0], "linear"),
        ([6.0] * 19 + [60.1], "log"),
        ([6.0] * 18 + [60.1], "linear"),
        ([0.0] + [6.0] * 18 + [60.1], "linear"),
    ],
)
def test_gradient_norms_are_on_a_log_scale_where_one_is_ten_times_the_median(
    norms: list[float], scale: str, tmp_path: Path
) -> None:
    found = read(tmp_path, [{"step": step, "grad_norm": norm} for step, norm in enumerate(norms)])
    note = next(note for note in training_panels(found, RUN) if note.panel.title == "Gradient norm")
    assert note.panel.scale == scale
    assert ("log scale" in note.text) == (scale == "log")


def test_panels_of_training_show_their_own_figure(history: History) -> None:
    notes = training_panels(history, RUN)
    assert curves(notes) == {
        "Contrastive loss": {"contrastive loss": (5.0, 4.5)},
        "Auxiliary loss": {"auxiliary loss": (0.25, 0.125)},
        "Accuracy in the batch": {"image to text": (0.11, 0.12), "text to image": (0.21, 0.22)},
        "Learning rate": {"learning rate": (0.001, 0.002)},
        "Gradient norm": {"gradient norm": (2.5, 3.5)},
        "Temperature": {"temperature": (0.07, 0.06)},
        "Throughput": {"throughput": (700.0, 800.0)},
    }
    # ln 64 = 6 ln 2 = 6 * 0.693147; one of 64.
    assert levels(notes) == {
        "Contrastive loss": {"chance": pytest.approx(4.158883)},
        "Accuracy in the batch": {"chance": 0.015625},
        "Gradient norm": {"clipped above": 1.75},
    }
    texts = {note.panel.title: note.text for note in notes}
    assert "ln 64 = 4.16:" in texts["Contrastive loss"]
    assert "the nearest of the 64 in its batch" in texts["Accuracy in the batch"]
    accuracy = next(note.panel for note in notes if note.panel.title == "Accuracy in the batch")
    assert [(line.name, line.tone) for line in accuracy.lines] == [
        ("image to text", "image"),
        ("text to image", "text"),
    ]


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [
        # 19 norms of 1 and one of 10: not above ten times the median of 1. The mean is 1.45.
        (1.0, 10.0, "linear"),
        (1.0, 10.5, "log"),
        # A norm of 0 has no logarithm.
        (0.0, 10.5, "linear"),
    ],
)
def test_the_gradient_norm_is_on_a_log_scale_where_a_step_is_above_ten_times_the_median(
    tmp_path: Path, low: float, high: float, scale: str
) -> None:
    norms = [low, *[1.0] * 18, high]
    lines = [{"step": step, "grad_norm": norm} for step, norm in enumerate(norms, start=1)]
    titles = {note.panel.title: note.panel for note in training_panels(read(tmp_path, lines), RUN)}
    assert titles["Gradient norm"].scale == scale
    # 19 lines are too few.
    titles = {note.panel.title: note.panel for note in training_panels(read(tmp_path, lines[1:]), RUN)}
    assert titles["Gradient norm"].scale == "linear"


def test_panels_of_blocks_show_their_block_and_modality(history: History) -> None:
    for panels, name in (
        (success_panels(history), "success"),
        (entropy_panels(history, RUN), "entropy"),
        (experts_panels(history, RUN), "experts"),
    ):
        wanted = {
            f"Block {block}": {modality: figures[f"{name}_{modality}"] for modality in ("image", "text")}
            for block, figures in BLOCKS.items()
        }
        assert curves(panels) == wanted
        assert [line.tone for note in panels for line in note.panel.lines] == ["image", "text"] * 2
    # ln 8 = 3 * 0.693147.
    even = {"undecided (ln 8)": pytest.approx(2.0794415)}
    assert levels(entropy_panels(history, RUN)) == {"Block 1": even, "Block 3": even}
    assert [(note.panel.low, note.panel.high) for note in experts_panels(history, RUN)] == [(0, 8)] * 2


@pytest.mark.parametrize(
    ("least", "low"),
    # In twentieths, with at least half a one of room: 16.2 and 0.5 below: 15; 16.6: 16; 0.4: 0.
    [(0.81, 0.75), (0.83, 0.8), (0.02, 0.0)],
)
def test_all_success_rates_have_the_scale_of_the_lowest(tmp_path: Path, least: float, low: float) -> None:
    blocks = {"1": {"success_image": 0.9, "success_text": None}, "3": {"success_image": 0.95, "success_text": least}}
    panels = success_panels(read(tmp_path, [{"step": 1, "blocks": blocks}]))
    assert [(note.panel.low, note.panel.high) for note in panels] == [(pytest.approx(low), 1.0)] * 2


def test_panels_of_auxiliary_losses_show_their_loss_and_weight(history: History) -> None:
    notes = aux_panels(history, RUN)
    # The first line has 1 to 8, the second half more.
    assert list(curves(notes).values()) == [
        {name: (float(number), number + 0.5)}
        for number, name in enumerate(
            (
                *("importance", "load", "router z-loss", "local entropy, image", "local entropy, text"),
                *("global entropy, image", "global entropy, text", "minus mutual information"),
            ),
            start=1,
        )
    ]
    assert [note.text.split(";")[0] for note in notes] == [
        *("Weight 1", "Weight 0.5", "Weight 0.25", "Weight 0, only watched", "Weight 1", "Weight 1", "Weight 1"),
        "Weight 0, only watched",
    ]
    assert notes[5].text.endswith("image tokens spread over at least 6 experts.")
    assert notes[6].text.endswith("text tokens spread over at least 3.5 experts.")


WAYS = ("image_to_text", "text_to_image")


def test_panels_of_evaluations_show_their_figure_and_chance(tmp_path: Path) -> None:
    def line(place: int) -> dict[str, Any]:
        def recalls(base: float) -> dict[str, float]:
            return {f"recall_at_{n}": base + n / 100 + place / 1000 for n in (1, 5, 10)}

        retrieval = {way: recalls(0.2 * (number + 1)) for number, way in enumerate(WAYS)}
        retrieval |= {f"chance_{way}": recalls(0.6 + 0.2 * number) for number, way in enumerate(WAYS)}
        return {
            "step": STEPS[place],
            "zeroshot": {"top1": 0.31 + place, "top5": 0.35 + place, "chance_top1": 0.03125, "chance_top5": 0.15625},
            "retrieval": retrieval,
            "contrastive": {
                **{"accuracy": 0.55 + place, "image_to_text": 0.5, "text_to_image": 0.6},
                "chance": 0.0625,
            },
        }

    notes = evaluation_panels(read(tmp_path, [line(0), line(1)]))
    found = {title: {name: pytest.approx(values) for name, values in of.items()} for title, of in curves(notes).items()}
    assert found == {
        "Zero-shot classification": {"top-1": (0.31, 1.31), "top-5": (0.35, 1.35)},
        "Retrieval, image to text": {"R@1": (0.21, 0.211), "R@5": (0.25, 0.251), "R@10": (0.3, 0.301)},
        "Retrieval, text to image": {"R@1": (0.41, 0.411), "R@5": (0.45, 0.451), "R@10": (0.5, 0.501)},
        "Contrastive accuracy in minibatches": {"accuracy": (0.55, 1.55)},
    }
    # Those of the last line.
    assert [note.text for note in notes] == [
        "Chance: top-1 3.12 %, top-5 15.62 %.",
        "Chance: R@1 61.10 %, R@5 65.10 %, R@10 70.10 %.",
        "Chance: R@1 81.10 %, R@5 85.10 %, R@10 90.10 %.",
        "Chance: 6.25 %.",
    ]


def test_a_panel_in_words_has_its_ends_and_extremes() -> None:
    steps, values = np.array([1000.0, 2000, 3000, 4000, 5000]), np.array([np.nan, 0.25, 0.125, 0.75, 0.5])
    panel = Panel("Rate", "%", (Line("image", steps, values),), (Reference(0.015625, "chance"),))
    assert alternative(panel) == (
        "Rate. image: 25.0 % at step 2,000, 50.0 % at step 5,000, between 12.5 % and 75.0 %; chance: 1.6 %."
    )
    large = Panel("Speed", "pairs/s", (Line("speed", steps[1:], np.array([9999.6, 12345.6, 12.3456, 1e6])),))
    assert alternative(large) == (
        "Speed. speed: 1e+04 at step 2,000, 1,000,000 at step 5,000, between 12.35 and 1,000,000."
    )


def label(drawing: str) -> str:
    return drawing.split('aria-label="')[1].split('"')[0]


def test_text_by_expert_in_words_has_the_shares_of_the_last_line(tmp_path: Path) -> None:
    # Image and text tokens that 3 experts kept: texts 1, 3, 4 of 8, then 6, 0, 2 of 8; images must not count.
    kept = [[[9, 1], [5, 3], [7, 4]], [[5, 6], [1, 0], [1, 2]]]
    lines = [{"step": step, "blocks": {"3": {"kept": of}}} for step, of in zip(STEPS, kept, strict=True)]
    shares = text_shares(read(tmp_path, lines), 3)
    assert shares is not None
    assert shares.shares_En.tolist() == [[0.125, 0.75], [0.375, 0.0], [0.5, 0.25]]
    assert label(text_shares_svg(shares, prefix="t")) == (
        "Share of text tokens by expert, block 3. At the last step: expert 0 75%, expert 1 0%, expert 2 25%."
    )


def test_experts_without_a_band_of_their_own_are_summed(tmp_path: Path) -> None:
    # Of 8 experts the 6 with the highest peaks have a band; 2 % and 3 % are the others'.
    last = np.array([0.2, 0.02, 0.15, 0.1, 0.05, 0.25, 0.03, 0.2])
    first = np.array([0.2, 0.01, 0.15, 0.14, 0.05, 0.25, 0.0, 0.2])
    shares = TextShares(1, np.array([1.0, 2.0]), np.stack([first, last], axis=1))
    assert shares.named == [0, 2, 3, 4, 5, 7]
    assert label(text_shares_svg(shares, prefix="t")).endswith("expert 5 25%, expert 7 20%, others 5%.")


def modality(median: float, lower: float, upper: float) -> ModalityRouting:
    return ModalityRouting(
        requested=8,
        kept=6,
        success_rate=0.75,
        effective_experts=1.5,
        effective_experts_by_gates=2.5,
        used_experts=3,
        soft_minimum=4.0,
        soft_minimum_trained=True,
        ranks=Ranks(median=median, lower_quartile=lower, upper_quartile=upper, histogram=(1.0,) + (0.0,) * 19),
    )


def test_drawings_of_a_block_in_words() -> None:
    def expert(number: int, share: float | None, kind: str) -> ExpertRouting:
        tokens = {"image_tokens": 5, "text_tokens": 7, "of_images_frac": 0.01, "of_texts_frac": 0.02}
        return ExpertRouting.model_validate({"expert": number, "image_frac": share, "kind": kind, **tokens})

    experts = (expert(0, 0.25, "mixed"), expert(1, 0.95, "image"), expert(2, 0.5, "idle"), expert(3, None, "idle"))
    block = BlockRouting(image=modality(0.21, 0.11, 0.31), text=modality(0.62, 0.52, 0.72), experts=experts)
    assert len(block.image.ranks.histogram) == RANK_BINS  # type: ignore[union-attr]
    assert label(image_shares_svg(block, number="3", prefix="i")) == (
        "Share of image tokens among those of each expert, block 3: expert 1 95%, expert 0 25%."
    )
    assert label(ranks_svg(block, number="3", prefix="r")) == (
        "Places in the order of service, block 3. image: median 0.21, half of them between 0.11 and 0.31; "
        "text: median 0.62, half of them between 0.52 and 0.72."
    )
    assert math.isclose(sum(block.text.ranks.histogram), 1.0)  # type: ignore[union-attr]
