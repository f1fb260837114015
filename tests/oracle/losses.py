"""The auxiliary losses of one routing group, and the contrastive loss of the global batch.

Shapes: S tokens (valid ones only), E experts, B pairs, P embedding width. Entropies are in nats.
Source: LIMoE (arXiv 2206.02770), section 2.2.2; V-MoE (arXiv 2106.05974), appendix A; ST-MoE (arXiv 2202.08906), eq. 5.
"""

from __future__ import annotations

import math

import autograd.numpy as np
from autograd.scipy.special import erf, logsumexp

from tests.oracle.tower import softmax


def entropy(p, axis=-1):
    """-sum p log p, with 0 log 0 = 0."""
    positive = np.where(p > 0, p, 1.0)
    return -np.sum(positive * np.log(positive), axis=axis)


def squared_variation(values_E):
    """(standard deviation / mean)^2 over experts."""
    return np.mean((values_E - np.mean(values_E)) ** 2) / np.mean(values_E) ** 2


def importance(logits_SE):
    """How unevenly the summed gates are spread over experts (V-MoE, appendix A.1)."""
    return squared_variation(np.sum(softmax(logits_SE), axis=0))


def load(logits_SE, noisy_SE, k, sigma):
    """How unevenly the chances of being chosen under new noise are spread over experts (V-MoE, appendix A.2)."""
    rows = np.arange(len(logits_SE))
    kth = np.argsort(-np.array(_value(noisy_SE)), axis=1, kind="stable")[:, k - 1]
    threshold_S1 = noisy_SE[rows, kth][:, None]
    chance_SE = 1 - 0.5 * (1 + erf((threshold_S1 - logits_SE) / sigma / math.sqrt(2)))
    return squared_variation(np.mean(chance_SE, axis=0))


def z(logits_SE):
    """Mean of log-sum-exp squared (ST-MoE, equation 5)."""
    return np.mean(logsumexp(logits_SE, axis=1) ** 2)


def local_entropy(logits_SE, k, form):
    """Mean entropy of the tokens' gates (equation 2), or a variant for k > 1."""
    gates_SE = softmax(logits_SE)
    entropy_S = entropy(gates_SE)
    if form == "above_log_k":
        entropy_S = np.maximum(0, entropy_S - math.log(k))
    if form == "merged":
        largest_SE = np.argsort(-np.array(_value(gates_SE)), axis=1, kind="stable")
        rows = np.arange(len(gates_SE))[:, None]
        merged_S1 = np.sum(gates_SE[rows, largest_SE[:, :k]], axis=1, keepdims=True)
        entropy_S = entropy(np.concatenate([merged_S1, gates_SE[rows, largest_SE[:, k:]]], axis=1))
    return np.mean(entropy_S)


def global_entropy(logits_SE, threshold):
    """max(0, threshold - entropy of the mean gates): zero once the modality uses about exp(threshold) experts."""
    return np.maximum(0, threshold - entropy(np.mean(softmax(logits_SE), axis=0)))


def mutual_information(image_SE, text_SE, prior):
    """-(H(p) - sum over modalities of p(m) H(p_m)), where p_m are the mean gates of modality m (section 2.2.2)."""
    share = len(image_SE) / (len(image_SE) + len(text_SE)) if prior == "tokens" else 0.5
    image_E, text_E = np.mean(softmax(image_SE), axis=0), np.mean(softmax(text_SE), axis=0)
    mixed_E = share * image_E + (1 - share) * text_E
    return share * entropy(image_E) + (1 - share) * entropy(text_E) - entropy(mixed_E)


def of_group(moe, clean_SE, noisy_SE, valid_S, is_text_S):
    """Every auxiliary loss of one group, by name; none for a modality without a token."""
    clean, noisy = clean_SE[np.flatnonzero(valid_S)], noisy_SE[np.flatnonzero(valid_S)]
    found = {"importance": importance(clean), "z": z(clean)}
    if moe.noise_std > 0:
        found["load"] = load(clean, noisy, moe.top_k, moe.noise_std / moe.num_experts)
    apart = {}
    for name, of_modality_S, wanted in (
        ("image", ~is_text_S, moe.min_image_experts),
        ("text", is_text_S, moe.min_text_experts),
    ):
        if of_modality_S.any():
            apart[name] = logits = clean_SE[np.flatnonzero(of_modality_S & valid_S)]
            found[f"local_{name}"] = local_entropy(logits, moe.top_k, moe.local_form)
            found[f"global_{name}"] = global_entropy(logits, math.log(min(wanted, moe.num_experts)))
    if len(apart) == 2:
        found["mutual_information"] = mutual_information(apart["image"], apart["text"], moe.modality_prior)
    return found


def contrastive(image_BP, text_BP, scale):
    """Half the cross entropy of each direction, averaged over the pairs (equation 1)."""
    logits_BB = scale * np.dot(image_BP, text_BP.T)
    pairs = np.arange(len(image_BP))
    image_to_text = np.mean(logsumexp(logits_BB, axis=1) - logits_BB[pairs, pairs])
    text_to_image = np.mean(logsumexp(logits_BB, axis=0) - logits_BB[pairs, pairs])
    return (image_to_text + text_to_image) / 2


def _value(x):
    """The plain number of what autograd traces."""
    while hasattr(x, "_value"):
        x = x._value
    return x
