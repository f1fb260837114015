"""Rules that join several settings. Each broken rule is one sentence: the setting, its value, the rule and the fix."""

from __future__ import annotations

import math

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.config.templates import problems as template_problems


class ConfigError(UserError):
    """Settings that cannot train; `problems` holds one sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check(run: Run, *, world: int | None = None, resumed: bool = False) -> None:
    """Raises ConfigError with every broken rule of the run, and of its layout where `world` (ranks) is given.

    resumed: the run goes on, so that its batch stays and the number of ranks has to fit it.
    """
    problems = [*_model(run), *_moe(run), *_schedule(run), *_engine(run)]
    if world is not None:
        problems += _layout(run, world, resumed=resumed)
    if problems:
        raise ConfigError(problems)


def divisors(number: int, *, up_to: int | None = None) -> list[int]:
    return [d for d in range(1, (up_to or number) + 1) if number % d == 0]


def _choices(values: list[int]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " or " + texts[-1]


def _model(run: Run) -> list[str]:
    problems = []
    if run.model.width % run.model.heads:
        problems.append(
            f"model.heads={run.model.heads} must divide model.width={run.model.width}: "
            f"use {_choices(divisors(run.model.width, up_to=64))}"
        )
    if run.image.size % run.image.patch:
        nearest = max(1, run.image.size // run.image.patch) * run.image.patch
        problems.append(
            f"image.patch={run.image.patch} must divide image.size={run.image.size}: use image.size={nearest}"
        )
    problems += template_problems(run.eval.templates)
    return problems


def _moe(run: Run) -> list[str]:
    moe = run.moe
    if not moe.blocks:
        return []
    problems = [*_slots(run), *_pools(run), *_pruned(run)]
    if run.model.towers == "two":
        problems.append(
            f"model.towers=two has no mixture of experts, but moe.blocks={moe.blocks}: use moe.blocks=() or towers=one"
        )
    if outside := [block for block in moe.blocks if block >= run.model.depth]:
        problems.append(
            f"moe.blocks={moe.blocks}: block {outside[0]} does not exist; "
            f"blocks are numbered 0 to {run.model.depth - 1} (model.depth={run.model.depth})"
        )
    if len(set(moe.blocks)) != len(moe.blocks) or tuple(sorted(moe.blocks)) != moe.blocks:
        problems.append(f"moe.blocks={moe.blocks} must rise, each block once: use {tuple(sorted(set(moe.blocks)))}")
    if moe.top_k > moe.num_experts:
        problems.append(
            f"moe.top_k={moe.top_k} must not exceed moe.num_experts={moe.num_experts}: use 1 to {moe.num_experts}"
        )
    pools = {"image": moe.image_experts, "text": moe.num_experts - moe.image_experts if moe.image_experts else 0}
    for name, pool in pools.items():
        wanted, most = getattr(moe, f"min_{name}_experts"), pool or moe.num_experts
        if getattr(moe, f"global_{name}") and not 1 <= wanted <= most:
            of = f"moe.num_experts={moe.num_experts}" + (f", moe.image_experts={moe.image_experts}" if pool else "")
            problems.append(
                f"moe.min_{name}_experts={wanted:g} can never be met with {of}: the threshold log({wanted:g}) "
                f"= {math.log(wanted):.2f} nats is not within 0 and log({most}) = {math.log(max(most, 1)):.2f}: "
                f"use 1 to {most}"
            )
    if moe.eval_capacity == "paper" and run.eval.batch_pairs % moe.group_pairs:
        problems.append(
            f"eval.batch_pairs={run.eval.batch_pairs} must be a multiple of moe.group_pairs={moe.group_pairs} "
            f"with moe.eval_capacity=paper: use {-(-run.eval.batch_pairs // moe.group_pairs) * moe.group_pairs}"
        )
    if moe.load and not moe.noise_std:
        problems.append(f"moe.load={moe.load:g} needs router noise: set moe.noise_std above 0 (the paper's is 1)")
    return problems


def _slots(run: Run) -> list[str]:
    """A capacity of less than one token would be rounded up: not what was asked for."""
    moe, problems = run.moe, []
    tokens = moe.group_pairs * (run.image_tokens + run.text.length)
    for name, factor in (
        ("capacity_factor", moe.capacity_factor),
        ("eval_capacity_factor", moe.eval_capacity_factor),
    ):
        if factor and tokens * moe.top_k * factor < moe.num_experts:
            least = moe.num_experts / (tokens * moe.top_k)
            problems.append(
                f"moe.{name}={factor:g} leaves an expert less than one slot: a group has {tokens} tokens "
                f"(moe.group_pairs={moe.group_pairs}) for moe.num_experts={moe.num_experts}: use at least {least:.3g}"
            )
    if moe.eval_capacity_factor and moe.eval_capacity == "full":
        problems.append(
            f"moe.eval_capacity_factor={moe.eval_capacity_factor:g} needs moe.eval_capacity=paper: with full, nothing "
            "is dropped in evaluation"
        )
    return problems


def _pools(run: Run) -> list[str]:
    moe = run.moe
    pool = moe.image_experts
    if not pool:
        return []
    if pool >= moe.num_experts:
        return [
            f"moe.image_experts={pool} leaves texts no expert of moe.num_experts={moe.num_experts}: "
            f"use 1 to {moe.num_experts - 1}, or 0 for experts that serve both"
        ]
    least = min(pool, moe.num_experts - pool)
    if moe.top_k <= min(moe.num_experts, least):
        return []
    return [f"moe.top_k={moe.top_k} must not exceed the smaller pool of experts, {least}: use 1 to {least}"]


def _pruned(run: Run) -> list[str]:
    moe = run.moe
    if not moe.kept_experts:
        return []
    if len(moe.kept_experts) != len(moe.blocks):
        return [
            f"moe.kept_experts has {len(moe.kept_experts)} entries for the {len(moe.blocks)} blocks of "
            f"moe.blocks={moe.blocks}: give one for each, as `limoe prune` does"
        ]
    problems = []
    for text in moe.kept_experts:
        words = text.split()
        numbers = [int(word) for word in words if word.isdecimal()]
        rising = len(numbers) == len(words) and numbers == sorted(set(numbers))
        if not rising or not numbers or numbers[-1] >= moe.num_experts:
            problems.append(
                f'moe.kept_experts: "{text}" must be rising numbers of experts, 0 to {moe.num_experts - 1}, as "0 4 7"'
            )
        elif len(numbers) < moe.top_k:
            problems.append(f'moe.kept_experts: "{text}" has fewer experts than moe.top_k={moe.top_k}: keep more')
    if run.parallel.ep > 1:
        problems.append(
            f"parallel.ep={run.parallel.ep} cannot share experts that were pruned (moe.kept_experts): use parallel.ep=1"
        )
    return problems


def _schedule(run: Run) -> list[str]:
    optim, steps = run.optim, run.train.steps
    if optim.warmup_steps + optim.cooldown_steps > steps:
        return [
            f"optim.warmup_steps={optim.warmup_steps} and optim.cooldown_steps={optim.cooldown_steps} "
            f"must fit into train.steps={steps}: use at most {steps // 10} and {steps // 2}, or more steps"
        ]
    return []


def _engine(run: Run) -> list[str]:
    optim, problems = run.optim, []
    if optim.engine == "native":
        if optim.zero_stage == 2:
            problems.append("optim.zero_stage=2 needs optim.engine=deepspeed: the native engine has stage 1")
        if optim.offload:
            problems.append(
                "optim.offload needs optim.engine=deepspeed: the native engine keeps its state on the device"
            )
        return problems
    if optim.name != "adamw":
        problems.append(
            f"optim.engine=deepspeed cannot run optim.name={optim.name}: its ZeRO gives the optimizer flat partitions, "
            "without the rows and columns of a matrix: use optim.name=adamw, or optim.engine=native"
        )
    for name, value in (("train.dtype", run.train.dtype), ("parallel.reduce_dtype", run.parallel.reduce_dtype)):
        if value == "fp64":
            problems.append(
                f"optim.engine=deepspeed cannot run {name}=fp64: its ZeRO keeps sums and masters in fp32: "
                f"use {name}=fp32, or optim.engine=native"
            )
    if run.parallel.kernels == "apex":
        problems.append(
            "optim.engine=deepspeed has no use for parallel.kernels=apex: its update is torch's fused AdamW: "
            "use parallel.kernels=auto or torch, or optim.engine=native"
        )
    if run.parallel.tp > 1:
        problems.append(
            f"optim.engine=deepspeed cannot run parallel.tp={run.parallel.tp}: its ZeRO takes the ranks of a tp group, "
            "which hold different weights, for replicas: use parallel.tp=1, or optim.engine=native"
        )
    return problems


def _layout(run: Run, world: int, *, resumed: bool) -> list[str]:
    if world < 1:
        return [f"{world} ranks cannot train: use 1 or more"]
    problems = []
    parallel, moe = run.parallel, run.moe
    cut = {"tp": math.gcd(run.model.heads, run.model.mlp_dim), "ep": moe.num_experts if moe.blocks else 1}
    for axis, size in (("tp", parallel.tp), ("ep", parallel.ep)):
        if world % size:
            # Only what will pass the other rules too is worth naming.
            fitting = [d for d in divisors(world) if cut[axis] % d == 0]
            problems.append(
                f"parallel.{axis}={size} must divide the number of ranks, {world}: use {_choices(fitting)}, "
                "or another number of ranks"
            )
    if moe.blocks and moe.num_experts % parallel.ep:
        fitting = [d for d in divisors(world) if moe.num_experts % d == 0]
        problems.append(
            f"parallel.ep={parallel.ep} must divide moe.num_experts={moe.num_experts}: use {_choices(fitting)}"
        )
    if parallel.ep > 1 and not moe.blocks:
        problems.append(f"parallel.ep={parallel.ep} shares experts, but moe.blocks is empty: use parallel.ep=1")
    fitting = [d for d in divisors(world) if run.model.heads % d == 0 and run.model.mlp_dim % d == 0]
    for name, size in (("heads", run.model.heads), ("mlp_dim", run.model.mlp_dim)):
        if size % parallel.tp:
            problems.append(f"parallel.tp={parallel.tp} must divide model.{name}={size}: use {_choices(fitting)}")
    unit = world * (moe.group_pairs if moe.blocks else 1)
    if run.train.batch_pairs % unit and resumed:
        group = f" in groups of moe.group_pairs={moe.group_pairs}" if moe.blocks else ""
        problems.append(
            f"{world} ranks cannot share train.batch_pairs={run.train.batch_pairs} evenly{group}, and a resumed run "
            f"keeps its batch where no other is given: use {_choices(_fitting_ranks(run, world))} ranks"
        )
    elif run.train.batch_pairs % unit:
        below, above = run.train.batch_pairs // unit * unit, -(-run.train.batch_pairs // unit) * unit
        fits = f"{below} or {above}" if below else str(above)
        ranks = f"{world} rank{'s' if world > 1 else ''}"
        unit_text = f"{ranks} * moe.group_pairs={moe.group_pairs}" if moe.blocks else ranks
        problems.append(
            f"train.batch_pairs={run.train.batch_pairs} must be a multiple of {unit_text} = {unit}: use {fits}"
        )
    else:
        problems += _microbatch(run, run.train.batch_pairs // world)
    return problems


def _fitting_ranks(run: Run, world: int) -> list[int]:
    """The numbers of ranks nearest to `world`, at most four on each side, that can go on with a run in its layout."""
    groups = run.train.batch_pairs // (run.moe.group_pairs if run.moe.blocks else 1)
    fitting = divisors(groups)
    layout = math.lcm(run.parallel.tp, run.parallel.ep)
    fitting = [ranks for ranks in fitting if ranks % layout == 0] or fitting
    return [ranks for ranks in fitting if ranks < world][-4:] + [ranks for ranks in fitting if ranks > world][:4]


def fit_microbatches(run: Run, *, before: int, now: int, batch_before: int | None = None) -> Run:
    """A run that `before` ranks trained, for `now` ranks: no more pairs of a rank are in memory at once than before.

    batch_before: the batch of those ranks, where the run goes on with another one.
    The gradient is that of the batch. Numbers of ranks that cannot share the batch are left to `check`.
    """
    batch, unit = run.train.batch_pairs, run.moe.group_pairs if run.moe.blocks else 1
    if batch % (now * unit):
        return run
    pairs, at_once = batch // now, run.train.microbatch_pairs or (batch_before or batch) // before
    if pairs == (batch_before or batch) // before and (not run.train.microbatch_pairs or pairs % at_once == 0):
        return run
    fitting = [part for part in divisors(pairs, up_to=at_once) if part % unit == 0] if pairs > at_once else [0]
    return run.model_copy(
        update={"train": run.train.model_copy(update={"microbatch_pairs": max(fitting, default=unit)})}
    )


def _microbatch(run: Run, pairs: int) -> list[str]:
    """pairs: those of a rank."""
    asked, unit = run.train.microbatch_pairs, run.moe.group_pairs if run.moe.blocks else 1
    if asked == 0 or (pairs % asked == 0 and asked % unit == 0):
        return []
    fitting = [d for d in divisors(pairs) if d % unit == 0]
    group = f" and be a multiple of moe.group_pairs={unit}" if unit > 1 else ""
    return [
        f"train.microbatch_pairs={asked} must divide the {pairs} pairs of a rank{group}: "
        f"use {_choices(fitting)}, or 0 for all at once"
    ]
