"""The tower: embedding, attention within a modality, blocks, pooling and projection.

Shapes: B pairs, N tokens of a sequence, D width, H heads, d width of a head, F hidden width, P embedding width.
Source: LIMoE (arXiv 2206.02770), section 2; ViT (arXiv 2010.11929), equations 1 to 4.
"""

from __future__ import annotations

import autograd.numpy as np

EPSILON = 1e-6
"""Added to the variance in every layer normalization (flax's default)."""
MASKED = -1e30
"""The attention logit of a masked key: its weight underflows to 0."""


def layer_norm(x, weights, name):
    """(..., D) -> (..., D): mean 0 and variance 1 over D, then scale and shift."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    """The tanh approximation of x * Phi(x) (arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(logits):
    """Over the last axis."""
    shifted = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return shifted / np.sum(shifted, axis=-1, keepdims=True)


def embed_images(images, weights, patch):
    """(B, 3, height, width) -> (B, N, D): a linear map of each patch, row by row, plus a learned position."""
    batch, _, height, width = images.shape
    rows = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            rows.append(images[:, :, top : top + patch, left : left + patch].reshape(batch, -1))
    patches = np.stack(rows, axis=1)
    kernel = weights["image_embed.weight"]
    kernel = np.reshape(kernel, (kernel.shape[0], -1))
    return np.dot(patches, kernel.T) + weights["image_embed.bias"] + weights["image_embed.position"]


def embed_texts(tokens, weights):
    """(B, N) -> (B, N, D): a learned vector for each token, plus a learned position."""
    return weights["text_embed.table"][tokens] + weights["text_embed.position"]


def attention(x_BND, weights, name, valid_BN=None):
    """(B, N, D) -> (B, N, D): scaled dot-product attention of each sequence on itself; masked keys get no weight."""
    query, key, value = np.einsum("bnd,chkd->cbnhk", x_BND, weights[f"{name}.qkv_weight"]) + np.reshape(
        weights[f"{name}.qkv_bias"], (3, 1, 1, *weights[f"{name}.qkv_bias"].shape[1:])
    )
    logits = np.einsum("bnhk,bmhk->bhnm", query, key) / np.sqrt(query.shape[-1])
    if valid_BN is not None:
        logits = np.where(valid_BN[:, None, None, :], logits, MASKED)
    mixed = np.einsum("bhnm,bmhk->bnhk", softmax(logits), value)
    return np.einsum("bnhk,dhk->bnd", mixed, weights[f"{name}.out.weight"]) + weights[f"{name}.out.bias"]


def mlp(x, weights, name):
    """(..., D) -> (..., D): a dense layer to F, gelu, a dense layer back."""
    hidden = gelu(np.dot(x, weights[f"{name}.up.weight"].T) + weights[f"{name}.up.bias"])
    return np.dot(hidden, weights[f"{name}.down.weight"].T) + weights[f"{name}.down.bias"]


def expert_mlp(x, weights, name, place):
    """The same for the expert that is number `place` of those that the block holds."""
    hidden = gelu(np.dot(x, weights[f"{name}.up_weight"][place]) + weights[f"{name}.up_bias"][place])
    return np.dot(hidden, weights[f"{name}.down_weight"][place]) + weights[f"{name}.down_bias"][place]


def pool(x_BND, valid_BN=None):
    """(B, D): mean over the tokens of each sequence, masked padding excluded."""
    if valid_BN is None:
        return np.mean(x_BND, axis=1)
    return np.sum(x_BND * valid_BN[..., None], axis=1) / np.sum(valid_BN, axis=1)[:, None]


def normalized(x_BP):
    """Rows divided by their length + 1e-8 (big_vision)."""
    return x_BP / (np.sqrt(np.sum(x_BP**2, axis=-1, keepdims=True)) + 1e-8)
