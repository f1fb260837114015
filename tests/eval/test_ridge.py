from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limoe_dist.eval.ridge import BIAS, fit
from tests.golden.load import arrays


def golden(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = arrays("fewshot")
    x, y, xt, yt = (torch.tensor(found[f"wide/{name}"]) for name in ("x", "y", "xt", "yt"))
    return x.to(dtype), y, xt.to(dtype), yt


def standardised(x: Tensor) -> Tensor:
    z = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)
    return torch.cat([z, z.new_full((len(z), 1), BIAS)], dim=1)


def targets(y: Tensor, classes: int) -> Tensor:
    return 2 * torch.nn.functional.one_hot(y, classes).double() - 1


EXPONENTS = (-4, 0, 5, 10)


def weights_and_accuracies(exponent: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours, in float64, beside vmoe's; exponent: of the penalty 2^e."""
    x, y, xt, yt = golden(torch.float64)
    ridge, found, l2 = fit(x, y, 3), arrays("fewshot"), 2.0**exponent
    accuracy = (ridge.predict(xt, l2) == yt).double().mean()
    return {
        "weights": (ridge.weights(l2), torch.tensor(found[f"wide/w_l2_2^{exponent}"]).double()),
        "accuracy": (accuracy, torch.tensor(found[f"wide/acc_l2_2^{exponent}"]).double()),
    }


def residuals(exponent: int) -> tuple[float, float]:
    """(ours, vmoe's): what is left of (Z^T Z + l2 I) W = Z^T Y, relative to the right side."""
    x, y, _, _ = golden(torch.float64)
    z = standardised(x)
    matrix, right = z.T @ z + 2.0**exponent * torch.eye(49, dtype=torch.float64), z.T @ targets(y, 3)
    ours, theirs = ((matrix @ w - right).norm() / right.norm() for w in weights_and_accuracies(exponent)["weights"])
    return ours.item(), theirs.item()


# The golden weights were computed in float32. Z Z^T has an eigenvalue of 30 * 100^2 = 3e5 beside others of about 10,
# so that rounding moves those by up to 6e-8 * 3e5 = 0.02: a thousandth, which the penalty hides only where it is large.
@pytest.mark.parametrize(("exponent", "tolerance"), [(-4, 1e-3), (0, 1e-3), (5, 1e-4), (10, 1e-6)])
def test_weights_and_accuracy_are_vmoe_s(exponent: int, tolerance: float) -> None:
    found = weights_and_accuracies(exponent)
    weights, expected = found["weights"]
    assert weights.shape == (49, 3)
    assert torch.allclose(weights, expected, atol=tolerance, rtol=0)
    accuracy, wanted = found["accuracy"]
    assert accuracy.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_what_differs_from_the_golden_weights_is_their_rounding(exponent: int) -> None:
    # Both are put into the equations that define them; ours leave a residual of float64, theirs one of float32.
    ours, theirs = residuals(exponent)
    assert ours < 1e-10
    assert theirs > 100 * ours


@pytest.mark.parametrize("samples", [4, 8, 9, 40])
def test_wide_and_tall_sets_solve_the_same_equations(samples: int) -> None:
    # 8 features and the constant: 9 unknowns, so that 9 samples are the first to take the other matrix.
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(samples) % 3
    z = standardised(x)
    expected = torch.linalg.solve(z.T @ z + 2 * torch.eye(9, dtype=torch.float64), z.T @ targets(y, 3))
    assert torch.allclose(fit(x, y, 3).weights(2.0), expected, atol=1e-9, rtol=0)


def test_two_samples_by_hand() -> None:
    # One feature, samples 1 (class 0) and 3 (class 1): mean 2, standard deviation 1, so that z = -1 and 1 (to 1e-5).
    # Z = [[-1, 100], [1, 100]]: Z^T Z = diag(2, 20000). Targets of class 0: 1 and -1: Z^T y = (-2, 0).
    # With l2 = 2: weights of class 0: -2 / (2 + 2) = -0.5 and 0; of class 1 the opposite.
    ridge = fit(torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([0, 1]), 2)
    expected = torch.tensor([[-0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(ridge.weights(2.0), expected, atol=1e-4)
    assert ridge.predict(torch.tensor([[0.0], [1.9], [2.1], [9.0]]), 2.0).tolist() == [0, 0, 1, 1]


def test_a_feature_that_never_changes_spoils_nothing() -> None:
    x = torch.tensor([[1.0, 7.0], [3.0, 7.0]], dtype=torch.float64)
    ridge = fit(x, torch.tensor([0, 1]), 2)
    assert ridge.weights(1.0).isfinite().all()
    assert ridge.predict(x, 1.0).tolist() == [0, 1]
