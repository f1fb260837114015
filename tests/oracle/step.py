"""One training step of LIMoE in one process: forward pass, losses, gradients by reverse differentiation, update.

Written from the paper (arXiv 2206.02770), apart from the product: it shares no code with it, only the settings.
Shapes: B pairs, N tokens of a sequence, G routing groups, S tokens of a group, E experts, K choices, D width,
P embedding width. In pairs of numbers and columns of 2, modality 0 is image and 1 is text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import autograd.numpy as np
from autograd import value_and_grad

from tests.oracle import losses, optimizer, routing, tower
from tests.oracle.losses import _value

Weights = dict[str, Any]
UNREACHABLE = -1e30
"""The logit of an expert of the other modality's pool."""


@dataclass(frozen=True)
class Batch:
    images: Any
    """(B, 3, height, width); None for a batch of captions alone."""
    tokens: Any
    """(B, N) int64; None for a batch of pictures alone."""
    valid: Any
    """(B, N) bool, False at padding."""

    @property
    def pairs(self) -> int:
        return len(self.tokens if self.images is None else self.images)


@dataclass(frozen=True)
class BlockRecord:
    """What happened in one MoE block."""

    losses: dict[str, Any]
    """Sum over the routing groups of each auxiliary loss; empty in evaluation."""
    expert_GSK: Any
    kept_GSK: Any
    order_GS: Any
    routed_E2: Any
    """Choices that each expert was asked for, by modality."""
    kept_E2: Any
    """Choices that each expert processed."""
    entropy_2: Any
    """Sum over tokens of the entropy of their clean gates."""
    tokens_2: Any


@dataclass(frozen=True)
class Forward:
    image_BP: Any
    text_BP: Any
    image_BD: Any
    text_BD: Any
    blocks: dict[int, BlockRecord]


@dataclass(frozen=True)
class StepResult:
    forward: Forward
    contrastive: float
    aux: float
    correct_2: Any
    """Images that found their text, texts that found their image."""
    gradients: Weights
    """Before clipping."""
    grad_norm: float
    rate: float
    weights: Weights
    """After the update."""


def forward(run, weights: Weights, batch: Batch, *, training: bool, noise=None, uniform=None) -> Forward:
    """noise: (G, S, E) standard normal numbers, by block; uniform: (G, S), for moe.order=random, by block."""
    image = None if batch.images is None else tower.embed_images(batch.images, weights, run.image.patch)
    text = None if batch.tokens is None else tower.embed_texts(batch.tokens, weights)
    masked = batch.valid if run.text.pad == "masked" else None
    blocks: dict[int, BlockRecord] = {}
    for index in range(run.model.depth):
        image_name, text_name = f"blocks.{index}", f"blocks.{index}"
        if run.model.towers == "two":
            text_name = f"text_blocks.{index}"
        if image is not None:
            image = image + tower.attention(
                tower.layer_norm(image, weights, f"{image_name}.norm1"), weights, f"{image_name}.attention"
            )
        if text is not None:
            text = text + tower.attention(
                tower.layer_norm(text, weights, f"{text_name}.norm1"), weights, f"{text_name}.attention", masked
            )
        normed_image = None if image is None else tower.layer_norm(image, weights, f"{image_name}.norm2")
        normed_text = None if text is None else tower.layer_norm(text, weights, f"{text_name}.norm2")
        if index in run.moe.blocks:
            layer = _MoeLayer(run, weights, index, training)
            numbers = [None if given is None else given[index] for given in (noise, uniform)]
            image_out, text_out, blocks[index] = layer(normed_image, normed_text, masked, *numbers)
        else:
            image_out = None if image is None else tower.mlp(normed_image, weights, f"{image_name}.mlp")
            text_out = None if text is None else tower.mlp(normed_text, weights, f"{text_name}.mlp")
        image = None if image is None else image + image_out
        text = None if text is None else text + text_out
    text_norm = "text_norm" if run.model.towers == "two" else "norm"
    image_BD = None if image is None else tower.pool(tower.layer_norm(image, weights, "norm"))
    text_BD = None if text is None else tower.pool(tower.layer_norm(text, weights, text_norm), masked)
    return Forward(
        image_BP=None if image is None else tower.normalized(np.dot(image_BD, weights["image_projection"])),
        text_BP=None if text is None else tower.normalized(np.dot(text_BD, weights["text_projection"])),
        image_BD=image_BD,
        text_BD=text_BD,
        blocks=blocks,
    )


class _MoeLayer:
    """The mixture of experts in place of a block's MLP."""

    def __init__(self, run, weights: Weights, index: int, training: bool):
        self.moe, self.weights, self.training = run.moe, weights, training
        self.name = f"blocks.{index}.moe"
        self.held = list(range(run.moe.num_experts))
        if run.moe.kept_experts:
            self.held = [int(word) for word in run.moe.kept_experts[run.moe.blocks.index(index)].split()]

    def __call__(self, image_BND, text_BND, masked_BN, noise, uniform):
        """(B, N, D) of each modality -> the same shapes, and the record."""
        groups = self._groups(image_BND, text_BND)
        images, texts = _grouped(image_BND, groups), _grouped(text_BND, groups)
        outputs, found = [], []
        for group in range(groups):
            parts = [part[group] for part in (images, texts) if part is not None]
            num_images = 0 if images is None else len(images[group])
            is_text_S = np.arange(sum(map(len, parts))) >= num_images
            valid_S = np.ones(len(is_text_S), dtype=bool)
            if masked_BN is not None and texts is not None:
                valid_S[num_images:] = masked_BN.reshape(groups, -1)[group]
            output_SD, record = self._group(
                np.concatenate(parts),
                is_text_S,
                valid_S,
                None if noise is None else noise[group],
                None if uniform is None else uniform[group],
            )
            outputs.append((output_SD[:num_images], output_SD[num_images:]))
            found.append(record)
        image_out = None if images is None else np.reshape(np.concatenate([o[0] for o in outputs]), image_BND.shape)
        text_out = None if texts is None else np.reshape(np.concatenate([o[1] for o in outputs]), text_BND.shape)
        return image_out, text_out, _together(found)

    def _groups(self, image_BND, text_BND) -> int:
        """Routing groups of moe.group_pairs pairs; in evaluation without a capacity all tokens are one group."""
        if not self.training and self.moe.eval_capacity == "full":
            return 1
        counts = {len(x) for x in (image_BND, text_BND) if x is not None}
        whole = len(counts) == 1 and not any(count % self.moe.group_pairs for count in counts)
        return counts.pop() // self.moe.group_pairs if whole else 1

    def _group(self, x_SD, is_text_S, valid_S, noise_SE, uniform_S):
        """One routing group: (S, D) -> (S, D), with its record."""
        moe, experts = self.moe, self.moe.num_experts
        pool_SE = np.ones((len(x_SD), experts), dtype=bool)
        if moe.image_experts:
            pool_SE = (np.arange(experts) >= moe.image_experts)[None] == is_text_S[:, None]
        clean_SE = np.where(pool_SE, self._logits(x_SD, is_text_S), UNREACHABLE)
        noisy_SE = clean_SE
        if self.training and moe.noise_std:
            noisy_SE = clean_SE + noise_SE * moe.noise_std / experts
        gates_SE = tower.softmax(noisy_SE)
        held_E = np.isin(np.arange(experts), self.held)
        decision = routing.decide(
            moe, _value(gates_SE), pool_SE & held_E, is_text_S, uniform_S, valid_S, self._slots(len(x_SD))
        )
        output_SD = self._combined(x_SD, gates_SE, decision)
        aux = losses.of_group(moe, clean_SE, noisy_SE, valid_S, is_text_S) if self.training else {}
        return output_SD, self._record(aux, decision, _value(clean_SE), is_text_S, valid_S)

    def _logits(self, x_SD, is_text_S):
        router = self.weights[f"{self.name}.router"]
        if self.moe.routers == "shared":
            return np.dot(x_SD, router)
        return np.where(is_text_S[:, None], np.dot(x_SD, router[1]), np.dot(x_SD, router[0]))

    def _slots(self, tokens: int) -> int | None:
        moe = self.moe
        if self.training:
            return routing.capacity(tokens, moe, moe.capacity_factor)
        if moe.eval_capacity == "full":
            return None
        return routing.capacity(tokens, moe, moe.eval_capacity_factor or moe.capacity_factor)

    def _combined(self, x_SD, gates_SE, decision):
        """Sum over the experts that serve a token of gate times expert(token) (LIMoE, section 2.2)."""
        output_SD = np.zeros(_value(x_SD).shape)
        for place, expert in enumerate(self.held):
            served = np.flatnonzero(((decision.expert_SK == expert) & decision.kept_SK).any(1))
            if len(served):
                result = tower.expert_mlp(x_SD[served], self.weights, f"{self.name}.experts", place)
                scatter = np.eye(len(gates_SE))[:, served]
                output_SD = output_SD + np.dot(scatter, gates_SE[served, expert][:, None] * result)
        return output_SD

    def _record(self, aux, decision, clean_SE, is_text_S, valid_S) -> BlockRecord:
        experts = self.moe.num_experts
        counts = np.zeros((2, experts, 2))
        for token in np.flatnonzero(valid_S):
            for expert, kept in zip(decision.expert_SK[token], decision.kept_SK[token], strict=True):
                counts[0, expert, int(is_text_S[token])] += 1
                counts[1, expert, int(is_text_S[token])] += kept
        entropy_S = losses.entropy(tower.softmax(clean_SE)) * valid_S
        return BlockRecord(
            losses=aux,
            expert_GSK=decision.expert_SK[None],
            kept_GSK=decision.kept_SK[None],
            order_GS=decision.order_S[None],
            routed_E2=counts[0],
            kept_E2=counts[1],
            entropy_2=np.array([entropy_S[~is_text_S].sum(), entropy_S[is_text_S].sum()]),
            tokens_2=np.array([valid_S[~is_text_S].sum(), valid_S[is_text_S].sum()]),
        )


def _grouped(x_BND, groups: int):
    """(B, N, D) -> (G, B / G * N, D); None stays None."""
    return None if x_BND is None else np.reshape(x_BND, (groups, -1, x_BND.shape[-1]))


def _together(records: list[BlockRecord]) -> BlockRecord:
    """One record of all groups."""
    return BlockRecord(
        losses={name: sum(record.losses[name] for record in records) for name in records[0].losses},
        **{
            name: np.concatenate([getattr(record, name) for record in records])
            for name in ("expert_GSK", "kept_GSK", "order_GS")
        },
        **{
            name: sum(getattr(record, name) for record in records)
            for name in ("routed_E2", "kept_E2", "entropy_2", "tokens_2")
        },
    )


def aux_loss(run, blocks: dict[int, BlockRecord], groups: int):
    """aux_weight * mean over the active losses of weight * loss, averaged over groups and summed over MoE blocks."""
    names = (
        "importance",
        "load",
        "z",
        "local_image",
        "local_text",
        "global_image",
        "global_text",
        "mutual_information",
    )
    active = {name: getattr(run.moe, name) for name in names if getattr(run.moe, name) > 0}
    total = 0.0
    for record in blocks.values():
        for name, weight in active.items():
            if name in record.losses:
                total = total + weight * record.losses[name] / groups
    return run.moe.aux_weight * total / len(active) if active else 0.0


class Trainer:
    """Weights and optimizer state, one step after the other."""

    def __init__(self, run, weights: Weights) -> None:
        self.run, self.weights, self.steps = run, dict(weights), 0
        kind = optimizer.AdamW if run.optim.name == "adamw" else optimizer.Adafactor
        self.optimizer = kind(run.optim, weights)

    def step(self, batch: Batch, *, noise=None, uniform=None) -> StepResult:
        run, kept = self.run, {}

        def loss(weights):
            passed = forward(run, weights, batch, training=True, noise=noise, uniform=uniform)
            contrastive = 0.0
            if passed.image_BP is not None and passed.text_BP is not None:
                contrastive = losses.contrastive(passed.image_BP, passed.text_BP, np.exp(weights["log_scale"]))
            aux = aux_loss(run, passed.blocks, batch.pairs // run.moe.group_pairs)
            kept.update(passed=passed, contrastive=float(_value(contrastive)), aux=float(_value(aux)))
            return contrastive + aux + 0.0 * weights["log_scale"]

        _, gradients = value_and_grad(loss)(self.weights)
        norm = optimizer.global_norm(gradients)
        rate = optimizer.learning_rate(self.steps, run.optim, run.train.steps)
        scaled = optimizer.clipped(gradients, norm, run.optim.clip_norm)
        self.weights = {
            name: self.optimizer.update(name, weight, scaled[name], rate, self.steps)
            for name, weight in self.weights.items()
        }
        self.steps += 1
        passed = _plain(kept["passed"])
        return StepResult(
            forward=passed,
            contrastive=kept["contrastive"],
            aux=kept["aux"],
            correct_2=_found(passed),
            gradients=gradients,
            grad_norm=norm,
            rate=rate,
            weights=dict(self.weights),
        )


def _found(passed: Forward):
    """(2,): images whose most similar text is their own, and texts likewise; the first of equals counts."""
    if passed.image_BP is None or passed.text_BP is None:
        return np.zeros(2)
    similarity_BB = np.dot(passed.image_BP, passed.text_BP.T)
    pairs = np.arange(len(similarity_BB))
    return np.array([(similarity_BB.argmax(axis) == pairs).sum() for axis in (1, 0)], dtype=float)


def _plain(passed: Forward) -> Forward:
    """Numbers in place of what autograd traces."""
    blocks = {
        index: replace(record, losses={name: float(_value(loss)) for name, loss in record.losses.items()})
        for index, record in passed.blocks.items()
    }
    return Forward(*(_value(getattr(passed, name)) for name in ("image_BP", "text_BP", "image_BD", "text_BD")), blocks)
