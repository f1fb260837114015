"""Who is served first, from the weights of the choices alone: batch priority routing, or first come."""

from __future__ import annotations

import torch

from limoe_dist.equations.routing import priorities, service_order


def in_order(weight_GSK, valid_GS=None, *, order, by="max"):
    """(G, S): order is "priority" or "images_first"; images stand first in a group."""
    first_come = torch.zeros_like(weight_GSK[..., 0])
    return service_order(priorities(weight_GSK, by) if order == "priority" else first_come, valid_GS)
