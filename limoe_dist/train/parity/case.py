"""What a layout and one process are compared on: a perturbed model, and batches that are functions of a seed.

As a new model comes, all biases are zero and a defect in them moves nothing. So every parameter is moved first, and
every MoE block is tilted: one expert is wanted by nobody, and one by so many that tokens are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from limoe_dist.config.schema import Optim, Run
from limoe_dist.model.block import Block
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.parallel import counter_rng
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Init, initialise, make_parameter, placement_of
from limoe_dist.train.step import Examples

Given = Literal["pairs", "images", "texts"]
"""What a batch consists of: pictures with captions, or pictures or captions alone."""

NORM2_BIAS = 0.5
"""Added to the bias before a tilted router: its inputs then have this mean, and a constant column moves a logit."""
UNWANTED = -12.0
"""The logit of the expert that nobody wants; its gate stays far above the smallest float."""
CONSTANT_STEP, RANDOM_STEP = 0.05, 0.1
"""Standard deviation of the perturbation: of what begins at a constant or as good as zero, and as a share of others."""


@dataclass(frozen=True)
class Case:
    run: Run
    """As the ranks run it: layout, precision and global batch included."""
    skew: float = 0.0
    """By how much the logits of each MoE block's favourite expert are ahead."""

    @property
    def first_step(self) -> int:
        """Where the schedule has its peak: in a warm-up the updates could vanish beside the weights."""
        return self.run.optim.warmup_steps

    def alone(self, *, microbatch_pairs: int = 0) -> Case:
        """The reference: one process, the native engine, the batch in one piece unless told otherwise."""
        own = Optim()
        parallel = self.run.parallel.model_copy(update={"tp": 1, "ep": 1})
        optim = self.run.optim.model_copy(
            update={"engine": own.engine, "zero_stage": own.zero_stage, "offload": own.offload}
        )
        train = self.run.train.model_copy(update={"microbatch_pairs": microbatch_pairs})
        run = self.run.model_copy(update={"parallel": parallel, "optim": optim, "train": train})
        return replace(self, run=run)

    def model(self, mesh: Mesh, device: torch.device) -> Limoe:
        """The same logical weights in every layout."""
        model = build_model(self.run, mesh=mesh, device=device)
        _perturb(model, seed=self.run.train.seed, mesh=mesh, device=device)
        for module in model.modules():
            if isinstance(module, Block) and hasattr(module, "moe"):
                self._tilt(module)
        return model

    @torch.no_grad()
    def _tilt(self, block: Block) -> None:
        """The inputs of the router are layer-normalised, so that their sum is about NORM2_BIAS times the width."""
        layer, experts, width = block.moe, self.run.moe.num_experts, self.run.model.width
        if experts == 1:
            return
        block.norm2.bias.add_(NORM2_BIAS)
        # Other experts in other blocks, so that another rank holds them.
        layer.router[..., layer.index % experts] += self.skew / (NORM2_BIAS * width)
        layer.router[..., (layer.index + experts // 2) % experts] = UNWANTED / (NORM2_BIAS * width)

    def examples(self, given: Given, *, step: int, mesh: Mesh, device: torch.device) -> Examples:
        """This rank's slice of the step's batch: each pair is a function of (seed, step, its global number)."""
        run = self.run
        count = run.train.batch_pairs // mesh.world.size
        pair_b = torch.arange(mesh.rank * count, (mesh.rank + 1) * count, device=device)

        def numbers(name: str) -> Tensor:
            return counter_rng.keys(counter_rng.key(f"verify-{name}", run.train.seed, step), pair_b)

        images = tokens = valid = None
        if given != "texts":
            side = run.image.size
            dtype = torch.float64 if run.train.dtype == "fp64" else torch.float32
            images = counter_rng.normal(numbers("images"), 3 * side * side, device=device, dtype=dtype)
            images = images.view(count, 3, side, side)
        if given != "images":
            length = run.text.length
            tokens = _whole_numbers(numbers("tokens"), length, run.text.vocab_size)
            valid = torch.arange(length, device=device) <= _whole_numbers(numbers("lengths"), 1, length)
        return Examples(images, tokens, valid)


def _whole_numbers(stream: Tensor, count: int, end: int) -> Tensor:
    """(n, count) int64, uniform in 0 to end - 1."""
    unit = counter_rng.uniform(stream, count, device=stream.device, dtype=torch.float64)
    return (unit * end).long().clamp(max=end - 1)


@torch.no_grad()
def _perturb(model: nn.Module, *, seed: int, mesh: Mesh, device: torch.device) -> None:
    """Moves every parameter by normal numbers of (seed, logical name, expert), and every bias by a constant too."""
    for name, parameter in model.named_parameters():
        placement = placement_of(parameter)
        constant = placement.init.kind == "constant" or name.endswith("bias")
        init = Init("normal", CONSTANT_STEP if constant else RANDOM_STEP * placement.init.scale)
        step = nn.Module()
        with torch.device(device):
            # A parameter with the same placement: initialisation knows how to give each rank its own slice.
            step.values = make_parameter(replace(placement, shape=placement.shape or (1,), init=init), mesh)
        initialise(step, seed=counter_rng.key("perturbation", seed, name), mesh=mesh)
        parameter.add_(step.values.view(parameter.shape))
        if name.endswith("bias"):
            parameter.add_(CONSTANT_STEP)
