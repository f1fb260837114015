"""apex is used where it is NVIDIA's and whole; the double below has its interface, and computes on the CPU.

Kernels of apex itself need a GPU: what these tests hold is the choice, the calls and the state, not its arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Optim
from limoe_dist.model.embed import LayerNorm
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.adamw import AdamW
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel import apex
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Bucket, make_buckets
from limoe_dist.parallel.placement import ONES, Placement, make_parameter
from limoe_dist.train.step import Examples, training_step
from tests.support.cases import batch, perturbed_model, small_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEVER = "raise SystemExit('a stranger must not be imported')\n"

# The constructor, the names of the state and the count of steps in each group are those of apex.optimizers.FusedAdam.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode and bias_correction and not (amsgrad or capturable or master_weights)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                assert weight.dtype == torch.float32
                state = self.state[weight]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.mul_(beta1).add_(weight.grad, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                root = (second / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                update = first / (1 - beta1 ** group["step"]) / root + group["weight_decay"] * weight
                weight.sub_(group["lr"] * update)
"""

# The order of arguments and the cast under autocast are those of apex's function, with the CPU's autocast for CUDA's.
FUSED_LAYER_NORM = """
import torch

CALLS = []

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    CALLS.append(eps)
    if torch.is_autocast_enabled("cpu"):
        input, weight, bias = (x.to(torch.get_autocast_dtype("cpu")) for x in (input, weight, bias))
    assert input.dtype == weight.dtype == bias.dtype != torch.float64
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The first folder of sys.path, in a process that has imported no apex; CPU tensors count as a GPU's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(apex, "DEVICE", "cpu")
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    names = [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")]
    for name in names:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path_importer_cache.clear()


def write_double(folder: Path, *, built: dict[str, str] | None = None) -> None:
    write(
        folder,
        {
            "apex/__init__.py": "from . import normalization, optimizers\n",
            "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam\n",
            "apex/optimizers/fused_adam.py": FUSED_ADAM,
            "apex/normalization/__init__.py": "",
            "apex/normalization/fused_layer_norm.py": FUSED_LAYER_NORM,
        }
        | ({"amp_C.py": "", "fused_layer_norm_cuda.py": ""} if built is None else built),
    )


def refusal(kernels: apex.Kernels = "apex", device: torch.device = CPU) -> str:
    with pytest.raises(UserError) as raised:
        apex.check(kernels, device)
    return str(raised.value)


def test_the_apex_of_pypi_is_refused_and_never_imported(folder: Path) -> None:
    write(folder, {"apex/__init__.py": NEVER, "apex/lib/__init__.py": NEVER, "apex/models.py": NEVER})
    text = refusal()
    assert f"the apex in {folder / 'apex'} has no apex.optimizers.FusedAdam: it is another project, as PyPI's" in text
    assert "git clone https://github.com/NVIDIA/apex" in text
    assert "or use parallel.kernels=auto" in text
    assert apex.layer_norm("auto", CPU) is torch.nn.functional.layer_norm
    assert "apex" not in sys.modules


def test_a_missing_apex_is_refused_with_the_way_to_get_it(folder: Path) -> None:
    text = refusal()
    assert text.startswith("parallel.kernels=apex needs NVIDIA's apex: not installed; build it (git clone")
    assert "`pip install apex` brings another project" in text
    assert apex.fused_adamw("auto", CPU, torch.float32) is None


def test_an_apex_without_its_kernels_or_built_for_another_torch_is_no_apex(folder: Path) -> None:
    write_double(folder, built={"amp_C.py": ""})
    assert "it is installed without its kernels (fused_layer_norm_cuda)" in refusal()
    write(folder, {"fused_layer_norm_cuda.py": "raise ImportError('undefined symbol: _ZN3c10')\n"})
    assert "it does not import (ImportError: undefined symbol: _ZN3c10)" in refusal()
    assert apex.layer_norm("auto", CPU) is torch.nn.functional.layer_norm


def test_apex_is_for_gpus_and_torch_means_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_double(folder)
    assert apex.fused_adamw("torch", CPU, torch.float32) is None
    # What is only planned may run elsewhere.
    assert apex.layer_norm("apex", torch.device("meta")) is torch.nn.functional.layer_norm
    monkeypatch.setattr(apex, "DEVICE", "cuda")
    assert apex.fused_adamw("auto", CPU, torch.float32) is None
    assert refusal() == (
        "parallel.kernels=apex needs a GPU, and this rank computes on the cpu: use parallel.kernels=auto or torch"
    )
    assert "apex" not in sys.modules
    apex.check("apex", GPU)
    assert "apex" in sys.modules


def test_float64_has_no_apex(folder: Path) -> None:
    write_double(folder)
    assert apex.fused_adamw("auto", CPU, torch.float64) is None
    with pytest.raises(UserError, match=r"parallel\.kernels=apex has no AdamW in float64"):
        apex.fused_adamw("apex", CPU, torch.float64)
    norm = LayerNorm(4, mesh=Mesh.single(), kernels="apex")
    x = torch.arange(8, dtype=torch.float64).view(2, 4)
    weight, bias = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    wanted = torch.nn.functional.layer_norm(x, (4,), weight, bias, 1e-6)
    torch.testing.assert_close(norm._layer_norm(x, x.shape[-1:], weight, bias, 1e-6), wanted)


def rule_of(kernels: apex.Kernels) -> tuple[AdamW, list[Bucket]]:
    """Two buckets, one with decay, of known weights."""
    model = torch.nn.Module()
    model.kernel = make_parameter(Placement((6, 4), ONES, decay=True), Mesh.single())
    model.bias = make_parameter(Placement((5,), ONES), Mesh.single())
    buckets = make_buckets(model.named_parameters(), Mesh.single(), numbers=1e6)
    weights = [torch.linspace(-1, 1, bucket.length) for bucket in buckets]
    grads = [torch.empty(bucket.length) for bucket in buckets]
    return AdamW(buckets, weights, grads, Optim(weight_decay=0.1, lr=1e-2), kernels=kernels), buckets


def step(rule: AdamW, number: int) -> None:
    for place, grad in enumerate(rule.grads):
        generator = torch.Generator().manual_seed(10 * number + place)
        grad.copy_(torch.randn(len(grad), generator=generator))
    rule.step(1e-2 / number)


def state_of(rule: AdamW) -> dict[str, Tensor]:
    return {name: shard.tensor.clone() for name, shard in rule.shards().items()}


def test_fused_adam_takes_the_steps_of_torchs_adamw_and_its_state_is_read_and_set(folder: Path) -> None:
    write_double(folder)
    (fused, buckets), (plain, _) = rule_of("apex"), rule_of("torch")
    assert type(fused._rule).__module__ == "apex.optimizers.fused_adam"
    assert len(buckets) == 2
    for number in (1, 2, 3):
        for rule in (fused, plain):
            step(rule, number)
        # A few units in the last place of float32 for weights of 1: the decay is added in another order.
        torch.testing.assert_close(fused.weights, plain.weights, rtol=0, atol=5e-7)
        torch.testing.assert_close(state_of(fused), state_of(plain), rtol=1e-6, atol=1e-7)
        assert fused.steps == plain.steps == number
    assert set(state_of(fused)) == {f"adamw/{m}/{n}" for m in ("exp_avg", "exp_avg_sq") for n in ("kernel", "bias")}


def test_a_fused_run_goes_on_from_a_state_that_torch_left_and_at_its_step(folder: Path) -> None:
    write_double(folder)
    (fused, _), (plain, _) = rule_of("apex"), rule_of("torch")
    for number in (1, 2, 3):
        step(plain, number)
    for name, shard in fused.shards().items():
        shard.tensor.copy_(plain.shards()[name].tensor)
    for mine, theirs in zip(fused.weights, plain.weights, strict=True):
        mine.copy_(theirs)
    fused.steps = plain.steps
    assert fused.steps == 3
    for rule in (fused, plain):
        step(rule, 4)
    torch.testing.assert_close(fused.weights, plain.weights, rtol=0, atol=5e-7)
    # The bias correction of a first step would be another one.
    fused.steps = 0
    for rule in (fused, plain):
        step(rule, 5)
    assert (fused.weights[0] - plain.weights[0]).abs().max() > 1e-5


def test_the_fused_layer_norm_stays_float32_under_autocast_and_has_flaxs_epsilon(folder: Path) -> None:
    write_double(folder)
    fused, plain = (LayerNorm(8, mesh=Mesh.single(), kernels=kernels) for kernels in ("apex", "torch"))
    for norm in (fused, plain):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 8))
            norm.bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = fused(x), plain(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert sys.modules["apex.normalization.fused_layer_norm"].CALLS == [1e-6]
    found.sum().backward()
    assert fused.weight.grad is not None
    assert plain.weight.grad is None


def losses_with(kernels: apex.Kernels) -> tuple[list[float], Limoe, NativeEngine]:
    small = small_run("fp32")
    run = small.model_copy(update={"parallel": small.parallel.model_copy(update={"kernels": kernels})})
    mesh = Mesh.single()
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    losses = []
    for number in range(4):
        examples = Examples(*batch(number, torch.float32))
        result = training_step(model, engine, examples, step=number, run=run, mesh=mesh)
        losses.append(result.losses.contrastive.item())
    return losses, model, engine


def test_the_setting_reaches_every_layer_norm_and_the_optimizer(folder: Path) -> None:
    write_double(folder)
    found, model, engine = losses_with("apex")
    norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
    # Two in each of 4 blocks, one at the end; each was called once in each of 4 steps.
    assert len(sys.modules["apex.normalization.fused_layer_norm"].CALLS) == 4 * len(norms) == 4 * 9
    assert type(engine.rule._rule).__module__ == "apex.optimizers.fused_adam"
    wanted, _, plain = losses_with("torch")
    assert type(plain.rule._rule) is torch.optim.AdamW
    assert found == pytest.approx(wanted, abs=1e-5)
    assert len(sys.modules["apex.normalization.fused_layer_norm"].CALLS) == 4 * 9
