"""A MoE layer whose logits are the tokens themselves, and whose expert e answers every token with the e-th unit vector.

So an output is a token's combine weights by expert, zero where it was dropped; everything can be worked out by hand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from limoe_dist.config.schema import Moe, Run
from limoe_dist.model.moe_layer import MoeLayer, MoeRecord, Route, Routes, RoutingMode
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.parallel.mesh import Mesh
from tests.support.cases import small_run

CPU = torch.device("cpu")
BLOCK = 1
TRAINING = RoutingMode(training=True, seed=3)

Gates = list[list[float]]
"""One row of gates a token."""


def run_of(experts: int, *, pad: str = "token", **moe: Any) -> Run:
    """E experts, width E, no noise unless given."""
    small = small_run("fp64", pad=pad)
    settings = {"blocks": (BLOCK,), "num_experts": experts, "noise_std": 0.0, "capacity_multiple": 1} | moe
    thresholds = {"min_image_experts": float(experts), "min_text_experts": float(experts)}
    return small.model_copy(
        update={
            "model": small.model.model_copy(update={"width": experts, "heads": 1}),
            "moe": Moe(**(thresholds | settings)),
        }
    )


def layer_of(run: Run) -> MoeLayer:
    layer = MoeLayer(run, BLOCK, mesh=Mesh.single()).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.router.copy_(torch.eye(run.moe.num_experts))
        layer.experts.down_bias.copy_(torch.eye(run.moe.num_experts))
    return layer


def layout_of(
    images: int, image_tokens: int, texts: int, text_tokens: int, *, groups: int = 1, valid: Tensor | None = None
) -> TokenLayout:
    return TokenLayout(images, image_tokens, texts, text_tokens, groups, CPU, valid)


def logs(gates: Gates) -> Tensor:
    """Logits whose softmax is `gates`; rows need not sum to 1."""
    return torch.tensor(gates, dtype=torch.float64).log()


def passed(
    layer: MoeLayer,
    x_TD: Tensor,
    layout: TokenLayout,
    mode: RoutingMode = TRAINING,
    *,
    noisy: Tensor | None = None,
) -> tuple[Tensor, MoeRecord, Route]:
    """Output, record and route; `noisy`: (G, S, E) logits with noise that was chosen by hand."""
    routes: Routes = {}
    if noisy is not None:
        plain = layer.logits
        layer.logits = lambda *given: (plain(*given)[0], noisy)  # type: ignore[method-assign]
    with torch.no_grad():
        out_TD, record = layer(x_TD, layout, mode, routes)
    return out_TD, record, routes[BLOCK]


# The auxiliary losses of one group, on lists of gates or logits. ------------------------------------------------------


def mean_rows(rows: Gates) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def squared_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def shannon(gates: list[float]) -> float:
    return -sum(gate * math.log(gate) for gate in gates if gate > 0)


def importance(logits: Gates) -> float:
    return squared_variation(mean_rows([softmax(row) for row in logits]))


def z(logits: Gates) -> float:
    return sum(math.log(sum(math.exp(logit) for logit in row)) ** 2 for row in logits) / len(logits)


def load(clean: Gates, noisy: Gates, *, k: int, deviation: float) -> float:
    chances = []
    for row, drawn in zip(clean, noisy, strict=True):
        threshold = sorted(drawn, reverse=True)[k - 1]
        chances.append([0.5 * math.erfc((threshold - logit) / deviation / math.sqrt(2)) for logit in row])
    return squared_variation(mean_rows(chances))


def local(logits: Gates) -> float:
    return sum(shannon(softmax(row)) for row in logits) / len(logits)


def global_loss(logits: Gates, experts: float) -> float:
    return max(0.0, math.log(experts) - shannon(mean_rows([softmax(row) for row in logits])))


def mutual_information(images: Gates, texts: Gates, share: float) -> float:
    """share: of the image modality."""
    one, other = (mean_rows([softmax(row) for row in logits]) for logits in (images, texts))
    together = [share * a + (1 - share) * b for a, b in zip(one, other, strict=True)]
    return share * shannon(one) + (1 - share) * shannon(other) - shannon(together)
