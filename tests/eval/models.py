"""A small real model for evaluation tests, the same values in every layout, and the shards that it looks at."""

from __future__ import annotations

import torch

from limoe_dist.config.schema import Eval, Image, Model, Moe, Parallel, Run, Text
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.parallel.mesh import Mesh

CPU = torch.device("cpu")
RUN = Run(
    model=Model(width=16, depth=2, heads=2, mlp_dim=32, embed_dim=8),
    image=Image(size=16, patch=8),
    text=Text(length=8, vocab_size=64, pad="masked"),
    # A capacity so small that most tokens would be dropped, were it obeyed.
    moe=Moe(blocks=(1,), num_experts=4, group_pairs=4, capacity_factor=0.1, eval_capacity="full"),
    eval=Eval(batch_pairs=4, templates=("{}", "a {} here")),
)


def laid_out(*, tp: int, ep: int) -> Run:
    return RUN.model_copy(update={"parallel": Parallel(tp=tp, ep=ep)})


def small_model(run: Run = RUN, *, mesh: Mesh | None = None) -> Limoe:
    model = build_model(run, mesh=mesh or Mesh.single(), device=CPU)
    with torch.no_grad():
        # First values give nearly equal gates: larger ones send tokens to different experts.
        for name, parameter in model.named_parameters():
            if name.endswith("router") or ".experts." in name:
                parameter.mul_(4)
    return model
