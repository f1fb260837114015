"""The auxiliary losses of the router, each for every routing group on its own.

Shapes: G routing groups, S tokens of a group (or of one modality of it), E experts. valid_GS is False for masked
padding and None where all tokens count. Entropies are in nats. Of a group whose tokens are all masked, means are 0,
and with them all losses but the thresholded one and mutual information with uniform shares: every caption has a valid
token, its end, so that this is no group of training.
Source: LIMoE (arXiv 2206.02770), section 2.2.2; V-MoE (arXiv 2106.05974), appendix A, for importance and load;
ST-MoE (arXiv 2202.08906), equation 5, for the z-loss.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def _mean_over_tokens(values_GS: Tensor, valid_GS: Tensor | None) -> Tensor:
    """Mean over dim 1 of the valid tokens; values may have further dims. Raises ValueError for a group of no tokens."""
    if values_GS.shape[1] == 0:
        raise ValueError("a routing group without a token of this modality has no mean: leave its losses out")
    if valid_GS is None:
        return values_GS.mean(1)
    mask = valid_GS.to(values_GS.dtype).view(*valid_GS.shape, *[1] * (values_GS.dim() - 2))
    return (values_GS * mask).sum(1) / mask.sum(1).clamp(min=1)


def _squared_variation(values_GE: Tensor) -> Tensor:
    """(std / mean)^2 over experts, without a root: its gradient stays finite at exact balance."""
    return values_GE.var(-1, correction=0) / values_GE.mean(-1).square().clamp(min=torch.finfo(values_GE.dtype).tiny)


def importance_loss(gates_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """(G,): squared coefficient of variation over experts of the summed gates; 0 at balance, E - 1 at collapse."""
    return _squared_variation(_mean_over_tokens(gates_GSE, valid_GS))


def load_loss(
    logits_GSE: Tensor, noisy_logits_GSE: Tensor, valid_GS: Tensor | None = None, *, k: int, noise_std: float
) -> Tensor:
    """(G,): squared coefficient of variation of the chance that new noise would choose each expert.

    noise_std: standard deviation of the noise on the logits (V-MoE: 1 / E), above 0. The threshold, the k-th largest
    noisy logit of a token, is differentiable too.
    """
    # The k-th largest value has one gradient path whatever the ties, so topk serves here.
    threshold_GS1 = noisy_logits_GSE.topk(k, dim=-1).values[..., -1:]
    chance_GSE = 1 - torch.special.ndtr((threshold_GS1 - logits_GSE) / noise_std)
    return _squared_variation(_mean_over_tokens(chance_GSE, valid_GS))


def z_loss(logits_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """(G,): mean over tokens of logsumexp(logits)^2, which keeps logits small."""
    return _mean_over_tokens(logits_GSE.logsumexp(-1).square(), valid_GS)


def local_entropy(
    logits_GSE: Tensor,
    valid_GS: Tensor | None = None,
    *,
    k: int = 1,
    form: Literal["plain", "above_log_k", "merged"] = "plain",
) -> Tensor:
    """(G,): mean over the tokens of ONE modality of the entropy of their gates, in [0, log E]; equation 2, left.

    form: what is asked of a token with k > 1 experts, which would not be confident of k experts and of one. The paper's
    own form is in its appendix E.1, which is not public; with k = 1 all are the same. plain: the entropy; above_log_k:
    what of it exceeds log k, that of k equal gates; merged: the entropy after the k largest gates became one.
    """
    entropy_GS = token_entropy(logits_GSE)
    if form == "above_log_k":
        entropy_GS = (entropy_GS - math.log(k)).clamp(min=0)
    elif form == "merged" and k > 1:
        log_top_GSK = logits_GSE.log_softmax(-1).topk(k, dim=-1).values
        log_mass_GS = log_top_GSK.logsumexp(-1)
        apart_GS = (log_top_GSK.exp() * log_top_GSK).sum(-1)
        entropy_GS = entropy_GS + apart_GS - log_mass_GS.exp() * log_mass_GS
    return _mean_over_tokens(entropy_GS, valid_GS)


def token_entropy(logits_GSE: Tensor) -> Tensor:
    """(G, S): the entropy in nats of each token's gates.

    From logits, not gates: a gate that underflows to 0 would have the gradient 0 * inf.
    """
    log_gates_GSE = logits_GSE.log_softmax(-1)
    return -(log_gates_GSE.exp() * log_gates_GSE).sum(-1)


def mean_gates(gates_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """(G, E): the average gate of ONE modality over each group; rows sum to 1."""
    return _mean_over_tokens(gates_GSE, valid_GS)


def entropy(mean_gates_GE: Tensor) -> Tensor:
    """(G,): entropy in nats of distributions over experts, in [0, log E]."""
    safe_GE = mean_gates_GE.clamp(min=torch.finfo(mean_gates_GE.dtype).tiny)
    return -(mean_gates_GE * safe_GE.log()).sum(-1)


def thresholded_global_entropy(mean_gates_GE: Tensor, threshold: float) -> Tensor:
    """(G,): max(0, threshold - H): zero once a modality's average gate is spread over enough experts.

    mean_gates_GE: (G, E), the average gate of ONE modality over a routing group.
    threshold: nats; log(S) asks for at least about S experts to share the modality.
    Raises ValueError where threshold > log(E): it could never be met.
    Source: LIMoE, section 2.2.2, the thresholded global entropy loss.
    """
    num_experts = mean_gates_GE.shape[-1]
    if threshold > math.log(num_experts) + 1e-9:
        raise ValueError(
            f"threshold={threshold:.4f} must not exceed log(E)=log({num_experts})={math.log(num_experts):.4f}"
        )
    return (threshold - entropy(mean_gates_GE)).clamp(min=0)


def mutual_information_loss(
    image_gates_GE: Tensor,
    text_gates_GE: Tensor,
    *,
    tokens: tuple[Tensor | int, Tensor | int],
    prior: Literal["tokens", "uniform"],
) -> Tensor:
    """(G,): minus the mutual information of experts and modalities, in [-log 2, 0]: -(H(p) - sum_m p(m) H(p_m)).

    image_gates_GE, text_gates_GE: (G, E), the average gate of each modality over a routing group.
    tokens: valid tokens of each modality in a group, (G,) or a number; prior: whether p(m) is their share or one half.
    A group in which a modality is absent gives 0 with the prior "tokens".
    Source: LIMoE, sections 2.2.2 and 4.1; the paper does not say which p(m) it takes.
    """
    if prior == "uniform":
        share_G1: Tensor | float = 0.5
    else:
        kind, device = image_gates_GE.dtype, image_gates_GE.device
        images, texts = (torch.as_tensor(number, dtype=kind, device=device) for number in tokens)
        share_G1 = (images / (images + texts).clamp(min=1))[..., None]
    together_GE = share_G1 * image_gates_GE + (1 - share_G1) * text_gates_GE
    share_G = share_G1 if isinstance(share_G1, float) else share_G1[..., 0]
    apart_G = share_G * entropy(image_gates_GE) + (1 - share_G) * entropy(text_gates_GE)
    return apart_G - entropy(together_GE)
