"""The mixture of experts that replaces a block's MLP: router, capacity and priority see both modalities' tokens.

Shapes: T tokens of this rank, G routing groups, S tokens of a group, K choices, E experts, L = E / ep experts on this
rank, C slots of an expert in a group, D width, F hidden width of an expert.
Source: LIMoE (arXiv 2206.02770), section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.config.presets import threshold
from limoe_dist.config.schema import Moe, Run
from limoe_dist.equations import aux_losses
from limoe_dist.equations.dispatch import SlotIndex, combine, dispatch, index_slots
from limoe_dist.equations.routing import Choices, capacity, kept, priorities, service_order, slots, top_k
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.parallel import counter_rng
from limoe_dist.parallel.collectives import all_to_all_rows, max_over
from limoe_dist.parallel.linear import autocast_type
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import Init, Placement, make_parameter

AUX_LOSSES = (
    "importance",
    "load",
    "z",
    "local_image",
    "local_text",
    "global_image",
    "global_text",
    "mutual_information",
)

NEVER = -1e30
"""The logit of an expert that does not serve a token's modality. Finite: 0 * log 0 must not become NaN."""


@dataclass(frozen=True)
class RoutingMode:
    """What routing needs to know of the step. Evaluation is deterministic: no noise, capacity by moe.eval_capacity."""

    training: bool
    seed: int = 0
    step: int = 0
    first_group: int = 0
    """Global number of the first routing group given: noise belongs to the group, not to the rank."""
    aux: bool = True
    """Whether training computes the auxiliary losses: not where a pass only embeds and is replayed later."""


EVALUATION = RoutingMode(training=False)


@dataclass(frozen=True)
class Route:
    """Who is served by which expert in one MoE block. A replay takes it as it is: a last bit must not move a token."""

    expert_GSK: Tensor
    """(G, S, K) int64."""
    kept_GSK: Tensor
    """(G, S, K) bool: the choices that got a slot."""
    order_GS: Tensor
    """(G, S) int64: the tokens of each group in the order in which they were served."""
    index: SlotIndex


Routes = dict[int, Route]
"""The decisions of one forward pass, by block number. A block that finds its route follows it; else it adds its own."""


@dataclass(frozen=True)
class MoeRecord:
    """What one MoE block reports of a forward pass. Modality 0 is image, 1 is text; only real tokens are counted."""

    losses: dict[str, Tensor]
    """Each auxiliary loss, summed over this rank's groups; differentiable; empty in evaluation."""
    routed_E2: Tensor
    """(E, 2) float: choices that each expert was asked for, by modality."""
    kept_E2: Tensor
    """(E, 2) float: those that it processed."""
    entropy_2: Tensor
    """(2,) float: sum over tokens of the entropy of their gates, by modality, in nats."""
    tokens_2: Tensor
    """(2,) float: real tokens, by modality."""


class MoeLayer(nn.Module):
    def __init__(self, run: Run, index: int, *, mesh: Mesh) -> None:
        super().__init__()
        self.moe: Moe = run.moe
        self.index = index
        self.ep = mesh.ep
        width, experts = run.model.width, run.moe.num_experts
        routers = (2,) if run.moe.routers == "per_modality" else ()
        router = Placement((*routers, width, experts), Init.lecun(width), decay=True, wide=True, stacked=len(routers))
        self.router = make_parameter(router, mesh)
        self.kept_experts = kept_experts(run, index)
        self.experts = Experts(width=width, hidden=run.model.mlp_dim, num_experts=len(self.kept_experts), mesh=mesh)

    def forward(self, x_TD: Tensor, layout: TokenLayout, mode: RoutingMode, routes: Routes) -> tuple[Tensor, MoeRecord]:
        """(T, D) -> (T, D): the gated sum of each token's experts; zero where all its choices were dropped."""
        clean_GSE, noisy_GSE = self.logits(x_TD, layout, mode)
        gates_GSE = noisy_GSE.softmax(-1)
        if self.index not in routes:
            # Without a graph: a recomputed block, which finds its route, must save the same tensors.
            with torch.no_grad():
                routes[self.index] = self._decide(gates_GSE, layout, mode)
        route = routes[self.index]
        weight_GSK = gates_GSE.gather(-1, route.expert_GSK)
        # The exchange and the experts run in autocast's type, the router above does not.
        buffer_RD = self.experts(dispatch(autocast_type(x_TD), route.index))
        out_TD = combine(buffer_RD, _flat(weight_GSK, layout), route.index)
        losses = self._losses(clean_GSE, noisy_GSE, layout) if mode.training and mode.aux else {}
        return out_TD, self._record(losses, clean_GSE, route, layout)

    def _decide(self, gates_GSE: Tensor, layout: TokenLayout, mode: RoutingMode) -> Route:
        there, valid_GS = len(self.kept_experts), layout.valid_GS
        pruned = there < self.moe.num_experts
        choices = top_k(gates_GSE, self.moe.top_k, self._allowed(layout))
        order_GS = service_order(self._priority(choices, layout, mode), valid_GS)
        # Where experts were pruned, those that are left stand in their own order in the buffers.
        place_GSK = self._there_E(gates_GSE.device).cumsum(0)[choices.expert_GSK] - 1 if pruned else choices.expert_GSK
        slot_GSK = slots(place_GSK, order_GS, valid_GS, num_experts=there)
        slots_C = self._capacity(slot_GSK, valid_GS, layout, mode)
        kept_GSK = kept(slot_GSK, valid_GS, capacity=slots_C)
        index = index_slots(place_GSK, slot_GSK, kept_GSK, layout.token_GS, num_experts=there, capacity=slots_C)
        return Route(choices.expert_GSK, kept_GSK, order_GS, index)

    def _there_E(self, device: torch.device) -> Tensor:
        """(E,) bool: the experts that were not pruned."""
        there = torch.zeros(self.moe.num_experts, dtype=torch.bool, device=device)
        there[list(self.kept_experts)] = True
        return there

    def _allowed(self, layout: TokenLayout) -> Tensor | None:
        """(S, E) or (E,) bool: the experts that a token may choose; None where it may choose all."""
        pruned = len(self.kept_experts) < self.moe.num_experts
        there_E = self._there_E(layout.device) if pruned else None
        if not self.moe.image_experts:
            return there_E
        own_SE = self._own_pool(layout)
        return own_SE if there_E is None else own_SE & there_E

    def _own_pool(self, layout: TokenLayout) -> Tensor:
        """(S, E) bool: the experts of each token's modality, with separate pools."""
        image_S1 = torch.arange(layout.group_tokens, device=layout.device)[:, None] < layout.group_image_tokens
        image_E = torch.arange(self.moe.num_experts, device=layout.device) < self.moe.image_experts
        return image_S1 == image_E

    def _priority(self, choices: Choices, layout: TokenLayout, mode: RoutingMode) -> Tensor:
        """(G, S): who is served before whom, by moe.order."""
        groups, tokens, _ = choices.expert_GSK.shape
        weight_GSK = choices.weight_GSK
        if self.moe.order == "priority":
            return priorities(weight_GSK, self.moe.priority)
        if self.moe.order == "random":
            stream = counter_rng.key("random-order", mode.seed, mode.step, self.index)
            group_G = torch.arange(mode.first_group, mode.first_group + groups, device=weight_GSK.device)
            keys = counter_rng.keys(stream, group_G)
            return counter_rng.uniform(keys, tokens, device=weight_GSK.device, dtype=torch.float64)
        # Images stand first in a group: to be served as they stand, all are equal.
        text_S = torch.arange(tokens, device=weight_GSK.device) >= layout.group_image_tokens
        return (text_S if self.moe.order == "text_first" else torch.zeros_like(text_S)).double().expand(groups, tokens)

    def logits(self, x_TD: Tensor, layout: TokenLayout, mode: RoutingMode) -> tuple[Tensor, Tensor]:
        """(G, S, E) clean and noisy logits, at least float32: gates in bf16 tie, and ties change who is served."""
        with torch.autocast(x_TD.device.type, enabled=False):
            kind = torch.promote_types(x_TD.dtype, torch.float32)
            x, router = x_TD.to(kind), self.router.to(kind)
            if router.dim() == 3:
                image_TD, text_TD = x.split([layout.num_image_tokens, layout.num_text_tokens])
                logits_TE = torch.cat([image_TD @ router[0], text_TD @ router[1]])
            else:
                logits_TE = x @ router
        clean_GSE = logits_TE[layout.token_GS]
        if self.moe.image_experts:
            clean_GSE = clean_GSE.masked_fill(~self._own_pool(layout), NEVER)
        if not mode.training or self.moe.noise_std == 0:
            return clean_GSE, clean_GSE
        groups, tokens, experts = clean_GSE.shape
        stream = counter_rng.key("router-noise", mode.seed, mode.step, self.index)
        group_G = torch.arange(mode.first_group, mode.first_group + groups, device=x_TD.device)
        noise = counter_rng.normal(
            counter_rng.keys(stream, group_G), tokens * experts, device=x_TD.device, dtype=kind
        ).view_as(clean_GSE)
        return clean_GSE, clean_GSE + noise * (self.moe.noise_std / experts)

    def _capacity(self, slot_GSK: Tensor, valid_GS: Tensor | None, layout: TokenLayout, mode: RoutingMode) -> int:
        if mode.training or self.moe.eval_capacity == "paper":
            factor = self.moe.capacity_factor
            return capacity(
                layout.group_tokens,
                num_experts=self.moe.num_experts,
                k=self.moe.top_k,
                factor=factor if mode.training else self.moe.eval_capacity_factor or factor,
                multiple=self.moe.capacity_multiple,
            )
        # Nothing is dropped: as many slots as the fullest expert needs. Buffers are exchanged with equal splits,
        # so the ranks of an ep group agree on the largest.
        if valid_GS is not None:
            slot_GSK = slot_GSK.masked_fill(~valid_GS[..., None], -1)
        return int(max_over(slot_GSK.max() + 1, self.ep).clamp(min=1).item())

    def _losses(self, clean_GSE: Tensor, noisy_GSE: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
        """Every auxiliary loss, summed over this rank's groups; a modality that is absent has none."""
        moe, valid_GS = self.moe, layout.valid_GS
        gates_GSE = clean_GSE.softmax(-1)
        losses = {
            "importance": aux_losses.importance_loss(gates_GSE, valid_GS),
            "z": aux_losses.z_loss(clean_GSE, valid_GS),
        }
        if moe.noise_std > 0:
            losses["load"] = aux_losses.load_loss(
                clean_GSE, noisy_GSE, valid_GS, k=moe.top_k, noise_std=moe.noise_std / moe.num_experts
            )
        image = slice(0, layout.group_image_tokens)
        text = slice(layout.group_image_tokens, layout.group_tokens)
        mean_gates_GE, tokens = [], []
        for name, part, present, min_experts in (
            ("image", image, layout.images, moe.min_image_experts),
            ("text", text, layout.texts, moe.min_text_experts),
        ):
            if not present:
                continue
            valid = None if valid_GS is None else valid_GS[:, part]
            mean_gates_GE.append(aux_losses.mean_gates(gates_GSE[:, part], valid))
            tokens.append(part.stop - part.start if valid is None else valid.sum(-1))
            losses[f"local_{name}"] = aux_losses.local_entropy(
                clean_GSE[:, part], valid, k=moe.top_k, form=moe.local_form
            )
            # Where the loss is off, its threshold may be one that these experts cannot meet.
            reachable = min(min_experts, moe.num_experts)
            losses[f"global_{name}"] = aux_losses.thresholded_global_entropy(mean_gates_GE[-1], threshold(reachable))
        if len(mean_gates_GE) == 2:
            losses["mutual_information"] = aux_losses.mutual_information_loss(
                mean_gates_GE[0], mean_gates_GE[1], tokens=(tokens[0], tokens[1]), prior=moe.modality_prior
            )
        return {name: loss_G.sum() for name, loss_G in losses.items()}

    @torch.no_grad()
    def _record(self, losses: dict[str, Tensor], clean_GSE: Tensor, route: Route, layout: TokenLayout) -> MoeRecord:
        kept_GSK = route.kept_GSK
        groups, tokens, _ = kept_GSK.shape
        text_S = torch.arange(tokens, device=clean_GSE.device) >= layout.group_image_tokens
        real_GS = layout.valid_GS
        if real_GS is None:
            real_GS = torch.ones(groups, tokens, dtype=torch.bool, device=clean_GSE.device)
        cell_GSK = route.expert_GSK * 2 + text_S.long()[:, None]
        count = torch.zeros(2, 2 * self.moe.num_experts, device=clean_GSE.device)
        count[0].scatter_add_(0, cell_GSK.flatten(), real_GS[..., None].expand_as(kept_GSK).flatten().float())
        count[1].scatter_add_(0, cell_GSK.flatten(), kept_GSK.flatten().float())
        entropy_GS = aux_losses.token_entropy(clean_GSE) * real_GS
        by_modality = torch.stack([~text_S, text_S]).to(entropy_GS.dtype)
        return MoeRecord(
            losses=losses,
            routed_E2=count[0].view(-1, 2),
            kept_E2=count[1].view(-1, 2),
            entropy_2=by_modality @ entropy_GS.sum(0),
            tokens_2=by_modality @ real_GS.sum(0).to(entropy_GS.dtype),
        )


def kept_experts(run: Run, block: int) -> tuple[int, ...]:
    """The experts that a MoE block has, by their number in the router: all, but where `limoe prune` took some out."""
    if not run.moe.kept_experts:
        return tuple(range(run.moe.num_experts))
    return tuple(int(number) for number in run.moe.kept_experts[run.moe.blocks.index(block)].split())


def _flat(weight_GSK: Tensor, layout: TokenLayout) -> Tensor:
    """(G, S, K) -> (T, K), in the flat order of the tokens."""
    place_T = torch.empty_like(layout.token_GS.flatten())
    place_T[layout.token_GS.flatten()] = torch.arange(place_T.numel(), device=place_T.device)
    return weight_GSK.flatten(0, 1)[place_T]


class Experts(nn.Module):
    """E MLPs of which this rank holds L; the others' tokens come and go by all-to-all over the ep axis."""

    def __init__(self, *, width: int, hidden: int, num_experts: int, mesh: Mesh) -> None:
        super().__init__()
        self.ep: Axis = mesh.ep
        init, bias = Init.xavier(width, hidden), Init("normal", 1e-6)
        self.up_weight = make_parameter(
            Placement((num_experts, width, hidden), init, "ep", 0, decay=True, stacked=1), mesh
        )
        self.up_bias = make_parameter(Placement((num_experts, hidden), bias, "ep", 0, stacked=1), mesh)
        self.down_weight = make_parameter(
            Placement((num_experts, hidden, width), init, "ep", 0, decay=True, stacked=1), mesh
        )
        self.down_bias = make_parameter(Placement((num_experts, width), bias, "ep", 0, stacked=1), mesh)

    def forward(self, buffer_RD: Tensor) -> Tensor:
        """(E * G * C, D) -> (E * G * C, D), rows ordered by expert, then group, then slot."""
        local, width = self.up_weight.shape[:2]
        # 1. rows leave for the rank of their expert: chunk r of the experts goes to rank r of the ep group
        x = all_to_all_rows(buffer_RD, self.ep).view(self.ep.size, local, -1, width)
        # 2. what came from different ranks for one expert is put together: (L, ep * G * C, D)
        x = x.transpose(0, 1).reshape(local, -1, width)
        hidden = F.gelu(torch.baddbmm(self.up_bias[:, None], x, self.up_weight), approximate="tanh")
        y = torch.baddbmm(self.down_bias[:, None], hidden, self.down_weight)
        # 3. and back: (ep, L, G * C, D), then each rank's rows return to it
        y = y.view(local, self.ep.size, -1, width).transpose(0, 1).reshape(-1, width)
        return all_to_all_rows(y, self.ep)
