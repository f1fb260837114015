"""What a run tells about itself: means over the steps between two lines, summed over ranks once a line."""

from __future__ import annotations

import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limoe_dist.config.errors import warn
from limoe_dist.config.schema import Run
from limoe_dist.model.moe_layer import AUX_LOSSES, MoeRecord
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from limoe_dist.train.step import StepResult


class Window:
    """Sums of local figures over some steps. Nothing leaves the device, and no rank speaks, until `summary`."""

    def __init__(self, run: Run, mesh: Mesh, device: torch.device) -> None:
        self.run, self.mesh, self.device = run, mesh, device
        self._start()

    def _start(self) -> None:
        self.steps = 0
        self._busy_s = 0.0
        self._began = self._stepped_at = time.perf_counter()
        self._total: Tensor | None = None
        self._last: StepResult | None = None

    @torch.no_grad()
    def add(self, result: StepResult) -> None:
        losses = result.losses
        parts = [losses.contrastive[None], losses.aux[None], losses.correct_2, result.grad_norm[None] / self._ranks]
        for record in losses.records.values():
            parts += [torch.stack([self._loss(record, name) for name in AUX_LOSSES])]
            parts += [record.routed_E2.flatten(), record.kept_E2.flatten(), record.entropy_2, record.tokens_2]
        figures = torch.cat([part.double() for part in parts])
        self._total = figures if self._total is None else self._total + figures
        self._last = result
        self.steps += 1
        self._stepped_at = time.perf_counter()

    @property
    def _ranks(self) -> int:
        return self.mesh.world.size

    def _loss(self, record: MoeRecord, name: str) -> Tensor:
        loss = record.losses.get(name)
        return torch.zeros((), device=self.device) if loss is None else loss.detach()

    def restart_clock(self) -> None:
        """Keeps what follows a step, a save or an evaluation, out of the rate; call it when that is over."""
        self._busy_s += self._stepped_at - self._began
        self._began = self._stepped_at = time.perf_counter()

    def summary(self, *, step: int, scale: Tensor) -> dict[str, Any]:
        """The figures of the steps since the last call, over all ranks; begins a new window. A collective.

        Raises ValueError where no step was added.
        """
        if self._total is None or self._last is None:
            raise ValueError("no step was added since the last summary")
        total = (sum_over(self._total, self.mesh.world) / self.steps).tolist()
        seconds = self._busy_s + self._stepped_at - self._began
        pairs = self.run.train.batch_pairs
        contrastive, aux, image_to_text, text_to_image, grad_norm = total[:5]
        figures: dict[str, Any] = {
            "step": step,
            "time": time.time(),
            "loss": contrastive + aux,
            "contrastive": contrastive,
            "aux": aux,
            "accuracy_image_to_text": image_to_text / pairs,
            "accuracy_text_to_image": text_to_image / pairs,
            "grad_norm": grad_norm,
            "lr": self._last.rate,
            "temperature": 1 / scale.item(),
            "pairs_per_s": pairs * self.steps / seconds,
            "seconds_per_step": seconds / self.steps,
            "memory_bytes": peak_memory(self.device),
        }
        figures |= self._blocks(total[5:], list(self._last.losses.records))
        self._start()
        return figures

    def _blocks(self, total: list[float], indices: list[int]) -> dict[str, Any]:
        """Per MoE block: losses, success rates, entropies, experts in use; and the mean of each loss over blocks."""
        experts, losses = self.run.moe.num_experts, len(AUX_LOSSES)
        groups = self.run.train.batch_pairs // self.run.moe.group_pairs
        blocks: dict[str, dict[str, Any]] = {}
        length = losses + 4 * experts + 4
        for number, index in enumerate(indices):
            part = total[number * length : (number + 1) * length]
            routed = _pairs(part[losses : losses + 2 * experts])
            kept = _pairs(part[losses + 2 * experts : losses + 4 * experts])
            entropy, tokens = part[-4:-2], part[-2:]
            block: dict[str, Any] = {
                name: value / groups for name, value in zip(AUX_LOSSES, part[:losses], strict=True)
            }
            for modality, name in enumerate(("image", "text")):
                asked = sum(pair[modality] for pair in routed)
                block[f"success_{name}"] = sum(pair[modality] for pair in kept) / asked if asked else None
                block[f"entropy_{name}"] = entropy[modality] / tokens[modality] if tokens[modality] else None
                # An expert is in use where it gets at least half of an even share of the modality's tokens. In counts:
                # among means over steps rounding would decide about exactly half.
                counts = [round(pair[modality] * self.steps) for pair in routed]
                block[f"experts_{name}"] = sum(2 * count * experts >= sum(counts) > 0 for count in counts)
            block["kept"] = kept
            blocks[str(index)] = block
        means = {f"aux_{n}": sum(b[n] for b in blocks.values()) / len(blocks) for n in AUX_LOSSES} if blocks else {}
        return means | {"blocks": blocks}


def _pairs(values: list[float]) -> list[list[float]]:
    return [values[i : i + 2] for i in range(0, len(values), 2)]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU's allocator held, or this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def success(figures: dict[str, Any], modality: str) -> float | None:
    """The lowest success rate of a modality over the MoE blocks; None for a dense model."""
    rates = [block[f"success_{modality}"] for block in figures["blocks"].values()]
    known = [rate for rate in rates if rate is not None]
    return min(known) if known else None


class Log:
    """metrics.jsonl, evaluations.jsonl, positions.jsonl and TensorBoard of a run; rank 0 writes, others do nothing.

    A line that cannot be written, on a full disk, is lost with a warning: the run goes on. Those of positions.jsonl are
    written with the next one: a gap there would be rows that nobody can account for.
    """

    def __init__(self, out: Path, run: Run, *, first_step: int, writes: bool) -> None:
        self.out, self.writes = out, writes
        self._board: Any = None
        self._owed: list[dict[str, Any]] = []
        """Lines of positions.jsonl that are not written yet."""
        if not writes:
            return
        for name in ("metrics.jsonl", "evaluations.jsonl", "positions.jsonl"):
            _forget_after(out / name, first_step)
        if run.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)  # type: ignore[no-untyped-call]

    def has_evaluation(self, step: int) -> bool:
        """Whether evaluations.jsonl has a line of this step; False on ranks that do not write."""
        return self.writes and any(line["step"] == step for _, line in _read(self.out / "evaluations.jsonl"))

    def metrics(self, figures: dict[str, Any]) -> None:
        self._line("metrics.jsonl", figures)
        self._scalars(figures, figures["step"])

    def evaluation(self, figures: dict[str, Any]) -> None:
        self._line("evaluations.jsonl", figures)
        self._scalars({"evaluation": {k: v for k, v in figures.items() if k != "step"}}, figures["step"])

    def positions(self, consumed: dict[str, Any]) -> None:
        """Which positions of the data order some steps read; see Restart.consumed."""
        self._owed.append(consumed)
        if self._line("positions.jsonl", *self._owed):
            self._owed.clear()

    def newest_positions(self) -> dict[str, Any] | None:
        """The last whole line of positions.jsonl; None where there is none, and on ranks that do not write."""
        lines = _read(self.out / "positions.jsonl") if self.writes else []
        return next((line for _, line in reversed(lines) if _is_number(line.get("end"))), None)

    def _line(self, name: str, *contents: dict[str, Any]) -> bool:
        """Whether the lines are there now; True on ranks that do not write."""
        if not self.writes:
            return True
        path, size = self.out / name, None
        try:
            with path.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.write("".join(json.dumps(content) + "\n" for content in contents))
            return True
        except OSError as error:
            # Half a line would spoil the next one too. A file that was not even opened stays as it is.
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)
            warn(f"{path}: the line of step {contents[-1]['step']} cannot be written: {error.strerror}")
            return False

    def _scalars(self, figures: dict[str, Any], step: int) -> None:
        try:
            for name, value in _scalars(figures) if self._board is not None else []:
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._drop_board(error)

    def close(self) -> None:
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            self._drop_board(error)

    def _drop_board(self, error: OSError) -> None:
        warn(f"{self.out / 'tensorboard'}: no more TensorBoard figures from here on: {error.strerror or error}")
        self._board = None


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run does again, and what is no line of a step."""
    if not path.exists():
        return
    kept = "".join(f"{text}\n" for text, line in _read(path) if line["step"] <= step)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(kept, encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line as it is and what it holds; without those that a power cut or a person damaged: they have no step."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _is_number(line.get("step")):
                lines.append((text, line))
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _scalars(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "time":
            scalars.append((prefix + name, value))
    return scalars
