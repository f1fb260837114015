"""NVIDIA's apex: AdamW and layer norm as fused kernels of a GPU. No other file imports it.

It is known by its features, not by its name: the `apex` of PyPI is another project. torch is imported in functions
only: `limoe doctor` asks here too, on machines without it.
Written from apex's source, commit 6424da3 (apex/optimizers/fused_adam.py, apex/normalization/fused_layer_norm.py,
csrc/layer_norm_cuda_kernel.cu); its kernels have not been run with this project yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limoe_dist.config.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kernels = Literal["auto", "torch", "apex"]
"""parallel.kernels."""
DEVICE = "cuda"
"""Type of the devices that apex has kernels for."""
HOW = (
    "build it (git clone https://github.com/NVIDIA/apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex), "
    "or use NVIDIA's PyTorch image from NGC, which has it; `pip install apex` brings another project"
)

_FEATURES = {
    "apex.optimizers.FusedAdam": "optimizers/fused_adam.py",
    "apex.normalization.fused_layer_norm": "normalization/fused_layer_norm.py",
}
_BUILT = ("amp_C", "fused_layer_norm_cuda")


def shortfall() -> str | None:
    """What NVIDIA's apex lacks, told from its files; None where all is there.

    Nothing is imported: the import of a stranger's apex would run its code.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for feature, file in _FEATURES.items():
        if not any((folder / file).is_file() for folder in folders):
            place = folders[0] if folders else spec.origin
            return f"the apex in {place} has no {feature}: it is another project, as PyPI's is"
    unbuilt = [name for name in _BUILT if importlib.util.find_spec(name) is None]
    return f"it is installed without its kernels ({' and '.join(unbuilt)})" if unbuilt else None


def check(kernels: Kernels, device: torch.device) -> None:
    """Raises UserError where parallel.kernels=apex cannot be had on this device."""
    _find(kernels, device)


def fused_adamw(
    kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> Callable[..., torch.optim.Optimizer] | None:
    """apex's FusedAdam for weights of this type, to be called as torch.optim.AdamW is; None: use torch's.

    It keeps `exp_avg` and `exp_avg_sq` for each weight, and counts `step` in each parameter group, as a plain int.
    Raises UserError where parallel.kernels=apex cannot be.
    """
    import torch

    found = _find(kernels, device)
    if found is None:
        return None
    if dtype == torch.float64:
        if kernels == "auto":
            return None
        raise UserError(
            "parallel.kernels=apex has no AdamW in float64, which train.dtype=fp64 and parallel.reduce_dtype=fp64 "
            "ask for: use fp32, or parallel.kernels=auto",
            told_by=0,
        )
    return partial(found.fused_adam, adam_w_mode=True)


def layer_norm(kernels: Kernels, device: torch.device) -> Callable[[Tensor, torch.Size, Tensor, Tensor, float], Tensor]:
    """torch.nn.functional.layer_norm, or apex's kernel with the same arguments.

    Raises UserError where parallel.kernels=apex cannot be.
    """
    from torch.nn import functional

    found = _find(kernels, device)
    return functional.layer_norm if found is None else partial(_fused_layer_norm, found.layer_norm)


def _fused_layer_norm(
    affine: Callable[..., Tensor], x: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    import torch
    from torch.nn import functional

    if x.dtype == torch.float64:
        # apex has no backward pass in float64.
        return functional.layer_norm(x, shape, weight, bias, eps)
    # Under autocast apex would first make input, weight and bias bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        return affine(x, weight, bias, shape, eps)


@dataclass(frozen=True)
class _Apex:
    fused_adam: Any
    layer_norm: Any


def _find(kernels: Kernels, device: torch.device) -> _Apex | None:
    """None: torch's kernels are to be used. Raises UserError where parallel.kernels=apex cannot be."""
    # Nothing is computed on meta, and what is planned there may run on other machines.
    if kernels == "torch" or device.type == "meta":
        return None
    if device.type != DEVICE:
        if kernels == "auto":
            return None
        raise UserError(
            f"parallel.kernels=apex needs a GPU, and this rank computes on the {device.type}: "
            "use parallel.kernels=auto or torch"
        )
    found = shortfall() or _import()
    if isinstance(found, _Apex):
        return found
    if kernels == "auto":
        return None
    raise UserError(f"parallel.kernels=apex needs NVIDIA's apex: {found}; {HOW}; or use parallel.kernels=auto")


def _import() -> _Apex | str:
    """apex, or why it does not import."""
    try:
        # apex itself would put off the failure of its kernels to their first use.
        import amp_C  # noqa: F401
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
        from apex.optimizers import FusedAdam
    # Exception, not a list of kinds: a package that was built for another torch fails in any way.
    except Exception as error:
        return f"it does not import ({type(error).__name__}: {error})"
    return _Apex(FusedAdam, fused_layer_norm_affine)
