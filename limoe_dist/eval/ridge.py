"""Linear classification in closed form: ridge regression to targets of -1 and 1, for any number of penalties at once.

As in big_vision's few-shot evaluation. With N samples and D features, Z the standardised features and a constant:

    W = (Z^T Z + l2 I)^-1 Z^T Y  =  Z^T (Z Z^T + l2 I)^-1 Y

The smaller of the two matrices is decomposed once, into Q diag(s) Q^T: with l2 I added, its inverse is
Q diag(1 / (s + l2)) Q^T, for every l2.

Shapes: N samples, D features, K classes; r = min(N, D + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BIAS = 100.0
"""The constant feature: so large that its weight is hardly penalised."""
MIN_STD = 1e-5
"""Added to the standard deviations: a feature that is the same in all samples is divided by it."""


@dataclass(frozen=True)
class Ridge:
    mean_D: Tensor
    std_D: Tensor
    eigenvalue_r: Tensor
    left_Dr: Tensor
    """(D + 1, r)"""
    right_rK: Tensor

    def weights(self, l2: float) -> Tensor:
        """(D + 1, K): the last row belongs to the constant. l2: the penalty, > 0."""
        return (self.left_Dr / (self.eigenvalue_r + l2)) @ self.right_rK

    def predict(self, x_ND: Tensor, l2: float) -> Tensor:
        """(N,) int64: the class with the largest score, the lower number of equal ones."""
        return (_with_constant((x_ND.to(self.mean_D) - self.mean_D) / self.std_D) @ self.weights(l2)).argmax(1)


def fit(x_ND: Tensor, class_N: Tensor, num_classes: int) -> Ridge:
    """Decomposes N samples, in the dtype of x_ND. class_N: (N,) int64.

    Features are standardised with the samples' own mean and standard deviation (of the N, not N - 1).
    """
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0) + MIN_STD
    z_ND = _with_constant((x_ND - mean_D) / std_D)
    target_NK = torch.full((len(x_ND), num_classes), -1.0, dtype=x_ND.dtype, device=x_ND.device)
    target_NK[torch.arange(len(x_ND), device=x_ND.device), class_N] = 1.0
    if len(z_ND) >= z_ND.shape[1]:
        eigenvalue_r, q = torch.linalg.eigh(z_ND.T @ z_ND)
        left_Dr, right_rK = q, q.T @ (z_ND.T @ target_NK)
    else:
        eigenvalue_r, q = torch.linalg.eigh(z_ND @ z_ND.T)
        left_Dr, right_rK = z_ND.T @ q, q.T @ target_NK
    return Ridge(mean_D, std_D, eigenvalue_r, left_Dr, right_rK)


def _with_constant(z_ND: Tensor) -> Tensor:
    return torch.cat([z_ND, z_ND.new_full((len(z_ND), 1), BIAS)], dim=1)
