"""Which experts a modality uses, and a model that holds no others (LIMoE, arXiv 2206.02770, appendix E.4).

Texts alone, or pictures alone, need the experts that their tokens choose: the others are dead weight. The router keeps
all its columns, so that the gates, and with them the outputs, stay what they were; a token whose expert is gone takes
the best of those that are left.

Shapes: E experts, b rows of a forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limoe_dist.analysis.pruned import MODALITIES, Modality
from limoe_dist.checkpoint.average import weights_in, weights_state
from limoe_dist.checkpoint.reader import Reader
from limoe_dist.checkpoint.weights import Progress, planned, silent, write_weights
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive, fingerprint
from limoe_dist.config.schema import Parallel, Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches, num_evaluation_batches
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.model.tower import Limoe, autocast

SHARES = (0.9, 0.99, 0.999, 1.0)
"""For a person who chooses another coverage."""
COVERAGE = 0.999
"""Of a hundred tokens that pass ten MoE blocks, one meets one other expert: see docs/after-training.md for what that
costs in accuracy."""
_EXPERTS = re.compile(r"model/blocks\.(\d+)\.moe\.experts\.")


@dataclass(frozen=True)
class Usage:
    """How often a modality's tokens chose each expert, where nobody was dropped."""

    modality: Modality
    inputs: int
    """Pictures or texts."""
    count_E: dict[int, tuple[int, ...]]
    """By MoE block: choices of each expert; their sum is tokens * moe.top_k."""


@dataclass(frozen=True)
class Kept:
    """The experts of one MoE block that are left."""

    block: int
    experts: tuple[int, ...]
    """By their number before, rising."""
    coverage: float
    """Share of the modality's choices that they serve."""
    needed_for: dict[float, int]
    """How many experts each of some shares of the choices would need."""


def unlimited(run: Run) -> Run:
    """The run with moe.eval_capacity=full on one rank: nobody is dropped where one modality comes alone."""
    moe = run.moe.model_copy(update={"eval_capacity": "full"})
    parallel = Parallel(threads=run.parallel.threads)
    return run.model_copy(update={"moe": moe, "parallel": parallel})


@torch.no_grad()
def usage_of_pictures(
    model: Limoe, run: Run, shards: ShardSet, *, device: torch.device, progress: Progress = silent
) -> Usage:
    """Of every picture that can be decoded; run: `unlimited`. Raises UserError where there is none."""
    size = min(run.eval.batch_pairs, len(shards))
    total, inputs = num_evaluation_batches(len(shards), batch_pairs=size, world=1), 0
    tally = _Tally("image", run)
    batches = evaluation_batches(run, shards, None, batch_pairs=size, rank=0, world=1, device=device)
    dtype = next(model.parameters()).dtype
    for done, batch in enumerate(batches, start=1):
        images = batch.images[batch.real].to(dtype)
        inputs += len(images)
        if len(images):
            with autocast(run, device):
                tally.add(model(images, None).records)
        progress("experts of pictures", done, total)
    if not inputs:
        raise UserError(f"{shards.path}: none of its {len(shards)} pictures can be decoded: pack again")
    return tally.usage(inputs)


@torch.no_grad()
def usage_of_texts(
    model: Limoe,
    run: Run,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    device: torch.device,
    progress: Progress = silent,
) -> Usage:
    """run: `unlimited`. Masked padding does not count; where padding is an ordinary token, it does."""
    encoded = tokenizer(texts)
    tally, size = _Tally("text", run), run.eval.batch_pairs
    starts = range(0, len(texts), size)
    for done, start in enumerate(starts, start=1):
        rows = slice(start, start + size)
        tokens, valid = (torch.from_numpy(x[rows]).to(device) for x in (encoded.tokens, encoded.valid))
        with autocast(run, device):
            tally.add(model(None, tokens, valid).records)
        progress("experts of texts", done, len(starts))
    return tally.usage(len(texts))


class _Tally:
    def __init__(self, modality: Modality, run: Run) -> None:
        self._modality = modality
        # float64: float32 loses count at 16 million tokens.
        self._sum_E = {block: torch.zeros(run.moe.num_experts, dtype=torch.float64) for block in run.moe.blocks}

    def add(self, records: dict[int, Any]) -> None:
        for block, record in records.items():
            self._sum_E[block] += record.routed_E2[:, MODALITIES.index(self._modality)].double().cpu()

    def usage(self, inputs: int) -> Usage:
        count_E = {block: tuple(int(count) for count in sum_E.tolist()) for block, sum_E in self._sum_E.items()}
        return Usage(self._modality, inputs, count_E)


def covering(usage: Usage, coverage: float, *, at_least: int) -> list[Kept]:
    """Per block the fewest experts that serve this share of the choices, but `at_least` (moe.top_k) of them.

    coverage: above 0 to 1. Where two experts serve as many, the one with the lower number stays.
    """
    return [_kept(block, count_E, _fewest(count_E, coverage), at_least) for block, count_E in usage.count_E.items()]


def sharing(usage: Usage, min_share: float, *, at_least: int) -> list[Kept]:
    """Per block the experts that serve this share of the choices or more each, but `at_least` (moe.top_k) of them."""
    return [
        _kept(block, count_E, sum(count >= Fraction(str(min_share)) * sum(count_E) for count in count_E), at_least)
        for block, count_E in usage.count_E.items()
    ]


def _busiest(count_E: Sequence[int]) -> list[int]:
    return sorted(range(len(count_E)), key=lambda expert: (-count_E[expert], expert))


def _fewest(count_E: Sequence[int], coverage: float) -> int:
    # As it was given: 0.7 * 10 is more than 7 in binary.
    served = 0
    for number, expert in enumerate(_busiest(count_E), start=1):
        served += count_E[expert]
        if served >= Fraction(str(coverage)) * sum(count_E):
            return number
    return len(count_E)


def _kept(block: int, count_E: Sequence[int], number: int, at_least: int) -> Kept:
    experts = tuple(sorted(_busiest(count_E)[: max(number, at_least)]))
    coverage = sum(count_E[expert] for expert in experts) / max(1, sum(count_E))
    return Kept(block, experts, coverage, {share: _fewest(count_E, share) for share in SHARES})


def pruned_run(run: Run, kept: Sequence[Kept]) -> Run:
    """The run of the smaller model: on one rank, without a capacity limit in evaluation."""
    run = unlimited(run)
    texts = tuple(" ".join(map(str, each.experts)) for each in kept)
    return run.model_copy(update={"moe": run.moe.model_copy(update={"kept_experts": texts})})


def write_pruned(reader: Reader, run: Run, kept: Sequence[Kept], out: Path, *, progress: Progress = silent) -> Path:
    """A checkpoint of weights alone in the run directory `out`: expert tensors with fewer rows, the others as they are.

    run: the `pruned_run`. Returns its directory. Raises Damaged and OSError as `write_weights` does.
    """
    experts_of = {each.block: each.experts for each in kept}

    def rows_of(name: str) -> tuple[int, ...] | None:
        match = _EXPERTS.match(name)
        return experts_of[int(match[1])] if match else None

    def shape_of(name: str) -> tuple[int, ...]:
        rows, shape = rows_of(name), reader.shape(name)
        return shape if rows is None else (len(rows), *shape[1:])

    tensors = {name: planned(shape_of(name), reader.dtype(name)) for name in sorted(weights_in(reader))}

    def rows(name: str, first: int, end: int) -> Tensor:
        shape, chosen = reader.shape(name), rows_of(name)
        out = torch.empty((end - first, *shape[1:]) if shape else (), dtype=reader.dtype(name))
        if chosen is None:
            reader.fill(name, out, (first, *(0 for _ in shape[1:])) if shape else ())
        else:
            for place, expert in enumerate(chosen[first:end]):
                reader.fill(name, out[place : place + 1], (expert, *(0 for _ in shape[1:])))
        return out

    state = weights_state(reader.state, made_by="prune", settings=decisive(run), fingerprint=fingerprint(run))
    return write_weights(out, state, tensors, rows, progress=progress)


@dataclass(frozen=True)
class Parameters:
    total: int
    experts: int

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "experts": self.experts}


def parameters(model: Limoe) -> Parameters:
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Parameters(sum(counts.values()), sum(n for name, n in counts.items() if ".experts." in name))


def captions_of(shards: ShardSet, templates: Sequence[str]) -> list[str]:
    """What a model is given as texts of these rows: all captions; the prompts of its concept where a row has none."""
    return list(_captions_of(shards, templates))


def _captions_of(shards: ShardSet, templates: Sequence[str]) -> Iterator[str]:
    for number in range(len(shards)):
        row = shards.row(number)
        if row.captions:
            yield from row.captions
        elif row.concept.strip():
            yield from (template.replace("{}", row.concept) for template in templates)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], *, times: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions that take turns, so that a busy moment of the machine meets both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * times):
        began = clock()
        (first, second)[turn % 2]()
        seconds[turn % 2].append(clock() - began)
    return seconds
