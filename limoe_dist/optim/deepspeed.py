"""DeepSpeed's ZeRO 1 and 2, and its optimizer on the CPU, for weights cut over dp x ep.

    backward   DeepSpeed's hooks: gradients -> its buckets -> sums over the replicas -> this rank's flat partition
    step       here: norm over all partitions, clip; DeepSpeed: AdamW on the partition -> all-gather -> weights
    shards     partitions -> the same boxes as the native engine's (parallel/pieces.py), and back in adopt

This drives DeepSpeed's ZeRO optimizer itself. deepspeed.initialize would build the same one, but it finds experts by
its own MoE class, makes all weights one type, and divides gradients by the number of ranks. Here the optimizer gets the
groups of the mesh and sums. There is one for the weights of each type: each would clip by a norm of its own, so the
norm of all is taken here. Read in version 0.19.8, deepspeed/runtime/zero/stage_1_and_2.py.
Source: ZeRO (arXiv 1910.02054), stages 1 and 2; ZeRO-Offload (arXiv 2101.06840).
"""

from __future__ import annotations

import atexit
import math
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.optim.adamw import MOMENTS, stay_out
from limoe_dist.parallel.collectives import all_or_none, gather_into
from limoe_dist.parallel.gradients import norm_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Piece
from limoe_dist.parallel.placement import Shard

VERSION = "0.19.8"
EXPERTS = "experts"
"""Name by which DeepSpeed finds the groups of weights that are cut over ep."""


class DeepSpeedEngine:
    """See limoe_dist.optim.engine.Engine for what each method promises; `shards` returns copies here.

    Raises UserError on every rank where DeepSpeed is missing on one. config/rules.py refuses what it cannot do.
    """

    def __init__(self, model: nn.Module, run: Run, mesh: Mesh) -> None:
        self.device = next(model.parameters()).device
        with all_or_none(mesh.world, self.device):
            _load(self.device)
        _join(self.device)
        self.mesh, self.clip_norm = mesh, run.optim.clip_norm
        self.pieces = [Piece.of(name, parameter, mesh) for name, parameter in model.named_parameters()]
        self.zeros = [
            _zero([piece for piece in self.pieces if piece.parameter.dtype == dtype], run, mesh)
            for dtype in dict.fromkeys(piece.parameter.dtype for piece in self.pieces)
        ]
        self._given: set[str] = set()
        for piece in self.pieces:
            piece.parameter.register_post_accumulate_grad_hook(partial(self._note, piece.name))

    @property
    def steps(self) -> int:
        return int(next(self._states())["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._states():
            state["step"].fill_(value)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        for zero in self.zeros:
            zero.set_gradient_accumulation_boundary(last)
            zero.clear_backward_seen_flag()
            zero.enter_backward()
        loss.backward()
        for zero in self.zeros:
            if zero.partition_gradients:
                self._fill(zero)
                zero.overlapping_partition_gradients_reduce_epilogue()
            elif last:
                self._fill(zero)
                zero.reduce_gradients()
            zero.exit_backward()
        self._given.clear()

    def gradients(self) -> dict[str, Shard]:
        from deepspeed.utils import safe_get_full_grad

        return {piece.name: self._box(piece, safe_get_full_grad(piece.parameter)) for piece in self.pieces}

    @torch.no_grad()
    def norm(self, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lengths = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in self._sums()])
        # A partition is on one rank, and its padding is zero: over the world every logical element counts once.
        return norm_over(lengths.square().sum().to(self.device), beside, self.mesh)

    def step(self, rate: float, *, norm: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        norm = self.norm()[0] if norm is None else norm
        self._clip(norm, keep)
        for zero in self.zeros:
            # With offload the update is on the host, which has to wait for the verdict too.
            stay_out(zero.optimizer, None if keep is None else keep.to(zero.device))
            zero.set_lr(rate)
            zero.step()
            zero.zero_grad()
        return norm

    def shards(self) -> dict[str, Shard]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        boxes = {}
        for piece in self.pieces:
            boxes[f"model/{piece.name}"] = self._box(piece, safe_get_full_fp32_param(piece.parameter))
            for moment in MOMENTS:
                state = safe_get_full_optimizer_state(piece.parameter, moment)
                boxes[f"adamw/{moment}/{piece.name}"] = self._box(piece, state)
        return boxes

    def adopt(self, shards: dict[str, Shard]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for piece in self.pieces:
            safe_set_full_fp32_param(piece.parameter, _whole(piece, shards[f"model/{piece.name}"].tensor))
            for moment in MOMENTS:
                state = _whole(piece, shards[f"adamw/{moment}/{piece.name}"].tensor)
                safe_set_full_optimizer_state(piece.parameter, state, moment)
        for zero in self.zeros:
            zero.update_lp_params()

    def _note(self, name: str, parameter: nn.Parameter) -> None:
        self._given.add(name)

    def _fill(self, zero: Any) -> None:
        """A zero gradient for what the backward pass did not reach: no token came there, or the modality is absent.

        DeepSpeed would leave it out of its buckets, and with offload take the gradient of an earlier step for it.
        """
        for number, group in enumerate(zero.bit16_groups):
            for parameter in group:
                if zero.param_names[parameter] in self._given:
                    continue
                if zero.get_gradient_for_reduction(parameter) is None:
                    parameter.grad = torch.zeros_like(parameter)
                zero.process_gradients(parameter, number)

    def _sums(self) -> list[Tensor]:
        return [part for zero in self.zeros for part in _sums(zero)]

    @torch.no_grad()
    def _clip(self, norm: Tensor, keep: Tensor | None) -> None:
        """Scales all sums by min(1, clip_norm / norm); those of a step that is left out become zeros."""
        parts = self._sums()
        factor = (self.clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
        torch._foreach_mul_(parts, factor.to(parts[0]))
        if keep is not None:
            # With offload these are buffers that stay: what is not finite would be in all later sums.
            left_out = (keep == 0).to(parts[0].device)
            for part in parts:
                part.masked_fill_(left_out, 0.0)

    def _states(self) -> Iterator[dict[str, Tensor]]:
        for zero in self.zeros:
            for flat in zero.single_partition_of_fp32_groups:
                yield zero.state[flat]

    def _box(self, piece: Piece, local: Tensor) -> Shard:
        """This rank's piece of a tensor of the parameter's shape, where the optimizer's state is."""
        rows_nL = local.new_zeros(piece.replicas.size, piece.row_numel)
        for part, row in piece.match(local, rows_nL):
            row.copy_(part)
        mine = rows_nL[piece.replicas.index, : math.prod(piece.shape)].view(piece.shape)
        return piece.shard(mine.to(self.zeros[0].device, copy=True))


def _whole(piece: Piece, mine: Tensor) -> Tensor:
    """The tensor of the parameter's shape, from the pieces of all replicas. A collective."""
    parameter = piece.parameter
    row_L = torch.zeros(piece.row_numel, device=parameter.device)
    row_L[: mine.numel()] = mine.flatten()
    rows_nL = row_L.new_empty(piece.replicas.size, piece.row_numel)
    gather_into(rows_nL, row_L, piece.replicas)
    local = row_L.new_empty(parameter.shape)
    for part, row in piece.match(local, rows_nL):
        part.copy_(row)
    return local


def _sums(zero: Any) -> list[Tensor]:
    """The summed gradients that the optimizer is about to take: views of this rank's partitions."""
    if zero.cpu_offload:
        return [flat.grad for flat in zero.single_partition_of_fp32_groups]
    return [part for parts in zero.averaged_gradients.values() for part in parts]


def _zero(pieces: list[Piece], run: Run, mesh: Mesh) -> Any:
    """DeepSpeed's optimizer for these weights, all of one type; it moves their values into flat tensors."""
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    optim, device = run.optim, pieces[0].parameter.device
    groups = _parameter_groups(pieces, optim.weight_decay, mesh)
    has_experts = any(group.get("moe") for group in groups)
    offload = DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=device.type != "cpu")
    zero = DeepSpeedZeroOptimizer(
        torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True),
        {piece.parameter: piece.name for piece in pieces},
        NoopTimer(),
        {},
        reduce_bucket_size=run.parallel.bucket_mb * 1e6 / torch.float32.itemsize,
        dp_process_group=dist.group.WORLD,
        expert_parallel_group={EXPERTS: mesh.ep.group} if has_experts else None,
        expert_data_parallel_group={EXPERTS: mesh.edp.group or _alone()} if has_experts else None,
        has_moe_layers=has_experts,
        overlap_comm=run.parallel.overlap,
        offload_optimizer_config=offload if optim.offload else None,
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
        gradient_average=False,
        partition_grads=optim.zero_stage == 2,
        check_grad_overflow=False,
    )
    # Its own norm would be wasted, and where that is not finite it would leave the step out without a word. With
    # offload the constructor refuses False, for the sake of another optimizer (Muon).
    zero.compute_grad_norm = False
    # The state exists from the start, so that a checkpoint can be read into it before the first step.
    for flat in zero.single_partition_of_fp32_groups:
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        zero.state[flat] = {"step": torch.zeros((), device=flat.device)} | moments
    zero._lazy_init_hp_params_optimizer_state()
    return zero


def _parameter_groups(pieces: list[Piece], weight_decay: float, mesh: Mesh) -> list[dict[str, Any]]:
    """Groups of AdamW by decay, and by what DeepSpeed calls MoE: weights whose replicas are not the whole world."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    for piece in pieces:
        if piece.replicas.size < mesh.world.size:
            # Its marks: no sum over the world, but over the group of this name.
            piece.parameter.allreduce = False  # type: ignore[attr-defined]
            piece.parameter.group_name = EXPERTS  # type: ignore[attr-defined]
    groups = [
        {
            "name": "kernels" if decay else "others",
            "params": [piece.parameter for piece in pieces if piece.placement.decay == decay],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]


def _alone() -> dist.ProcessGroup:
    """This rank's own group, for experts without replicas: the mesh needs none, but to DeepSpeed None is the world."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _load(device: torch.device) -> None:
    """Imports DeepSpeed for this device. Raises UserError where that fails, and for another version."""
    if device.type == "cpu":
        # Read at import; without it DeepSpeed guesses from what is installed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    fix = f"install torch, then `pip install deepspeed=={VERSION}` (built from source), or use optim.engine=native"
    try:
        import deepspeed
    # Whatever a broken installation raises: the other ranks wait to be told.
    except Exception as error:
        raise UserError(f"optim.engine=deepspeed needs DeepSpeed, which does not import ({error}): {fix}") from None
    if deepspeed.__version__.split(".")[:2] != VERSION.split(".")[:2]:
        raise UserError(
            f"optim.engine=deepspeed drives parts of DeepSpeed {VERSION} that change with its versions, "
            f"and found {deepspeed.__version__}: {fix}"
        )
    # An all-reduce in shared memory, which it would compile for minutes at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It still calls this by its old name, once a step.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)


def _join(device: torch.device) -> None:
    """Lets DeepSpeed use the process group that is there; one process alone gets one, for it asks at every turn."""
    import deepspeed

    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
