"""The tower against values that Google's vmoe code computed: embeddings, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limoe_dist.config.schema import Image, Model, Moe, Run, Text
from limoe_dist.equations.contrastive import contrastive_loss
from limoe_dist.model.moe_layer import RoutingMode
from limoe_dist.model.tower import aux_loss, build_model
from limoe_dist.parallel.mesh import Mesh
from tests.golden.load import arrays

NAMES = {"importance": "importance", "z": "z", "local_text": "local_txt", "global_text": "global_txt"}
NAMES["global_image"] = "global_img"


def values(case: str, prefix: str, moe_blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """vmoe's arrays under this project's names: `prefix` is params or grads."""
    source = arrays(f"limoe_tiny_{case}")

    def q(name: str) -> Tensor:
        return torch.tensor(source[f"{case}/{prefix}/{name}"])

    found = {
        "image_embed.weight": q("patch/kernel").permute(3, 2, 0, 1),
        "image_embed.bias": q("patch/bias"),
        "image_embed.position": q("pos_img")[0],
        "text_embed.table": q("tok/embedding"),
        "text_embed.position": q("pos_txt")[0],
        "norm.weight": q("ln_f/scale"),
        "norm.bias": q("ln_f/bias"),
        "image_projection": q("proj_img/kernel"),
        "text_projection": q("proj_txt/kernel"),
        "log_scale": q("t"),
    }
    for i in range(4):
        block, three = f"blocks.{i}.", ("query", "key", "value")
        for norm in (1, 2):
            found[f"{block}norm{norm}.weight"] = q(f"b{i}_ln{norm}/scale")
            found[f"{block}norm{norm}.bias"] = q(f"b{i}_ln{norm}/bias")
        found[block + "attention.qkv_weight"] = torch.stack(
            [q(f"b{i}_attn/{name}/kernel").permute(1, 2, 0) for name in three]
        )
        found[block + "attention.qkv_bias"] = torch.stack([q(f"b{i}_attn/{name}/bias") for name in three])
        found[block + "attention.out.weight"] = q(f"b{i}_attn/out/kernel").permute(2, 0, 1)
        found[block + "attention.out.bias"] = q(f"b{i}_attn/out/bias")
        for layer, dense in (("up", "Dense_0"), ("down", "Dense_1")):
            if i in moe_blocks:
                found[f"{block}moe.experts.{layer}_weight"] = q(f"b{i}_moe/Mlp/{dense}/kernel")
                found[f"{block}moe.experts.{layer}_bias"] = q(f"b{i}_moe/Mlp/{dense}/bias")
            else:
                found[f"{block}mlp.{layer}.weight"] = q(f"b{i}_mlp/{dense}/kernel").T
                found[f"{block}mlp.{layer}.bias"] = q(f"b{i}_mlp/{dense}/bias")
        if i in moe_blocks:
            found[block + "moe.router"] = q(f"b{i}_moe/Router/dense/kernel")
    return found


# float32 in both programs: sums of up to 126 terms of size 1 differ by some 1e-6; 2e-5 of the largest value is asked.
@pytest.mark.parametrize(("case", "moe_blocks"), [("k1_g1", (1, 3)), ("dense", ())])
def test_embeddings_losses_and_gradients_are_those_of_vmoe(case: str, moe_blocks: tuple[int, ...]) -> None:
    golden = {key: torch.tensor(value) for key, value in arrays(f"limoe_tiny_{case}").items()}
    run = Run(
        model=Model(width=32, depth=4, heads=4, mlp_dim=64, embed_dim=24),
        image=Image(size=16, patch=4),
        text=Text(length=5, vocab_size=50, pad="token"),
        moe=Moe(
            blocks=moe_blocks,
            num_experts=8,
            group_pairs=6,
            capacity_factor=1.0,
            noise_std=0.0,
            min_image_experts=0.95 * 8,
            min_text_experts=0.75 * 8,
        ),
    )
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    parameters = dict(model.named_parameters())
    first = values(case, "params", moe_blocks)
    assert set(first) == set(parameters)
    with torch.no_grad():
        for name, value in first.items():
            parameters[name].copy_(value)

    images = golden[f"{case}/images"].permute(0, 3, 1, 2).contiguous()
    output = model(images, golden[f"{case}/tokens"].long(), mode=RoutingMode(training=True))
    image_BP, text_BP = output.image_BP, output.text_BP
    loss = contrastive_loss(image_BP, text_BP, image_BP, text_BP, first=0, scale=model.scale).loss
    aux = aux_loss(output.records, run, global_groups=1)
    total = loss if aux is None else loss + aux
    total.backward()

    torch.testing.assert_close(image_BP, golden[f"{case}/zi"], rtol=0, atol=2e-6)
    torch.testing.assert_close(text_BP, golden[f"{case}/zt"], rtol=0, atol=2e-6)
    torch.testing.assert_close(loss, golden[f"{case}/contrastive"], rtol=2e-6, atol=0)
    torch.testing.assert_close(total, golden[f"{case}/total"], rtol=2e-6, atol=0)
    for number, record in enumerate(output.records.values()):
        for name, theirs in NAMES.items():
            torch.testing.assert_close(
                record.losses[name], golden[f"{case}/aux{number}/{theirs}"], rtol=5e-6, atol=1e-6
            )
    for name, want in values(case, "grads", moe_blocks).items():
        error = (parameters[name].grad - want).abs().max() / want.abs().max()
        assert error < 2e-5, f"{name}: {error:.1e}"


def vit_values() -> dict[str, Tensor]:
    """The parameters of vmoe's image encoder under this project's names; the projection leaves features as they are."""
    source = arrays("vit_moe")

    def q(name: str) -> Tensor:
        return torch.tensor(source[f"k1_bpr/params/{name}"])

    found = {
        "image_embed.weight": q("embedding/kernel").permute(3, 2, 0, 1),
        "image_embed.bias": q("embedding/bias"),
        "image_embed.position": q("Encoder/posembed_input/pos_embedding")[0],
        "norm.weight": q("Encoder/encoder_norm/scale"),
        "norm.bias": q("Encoder/encoder_norm/bias"),
        "image_projection": torch.eye(32),
    }
    for i in range(4):
        block, theirs, three = f"blocks.{i}.", f"Encoder/encoderblock_{i}", ("query", "key", "value")
        for norm in (1, 2):
            found[f"{block}norm{norm}.weight"] = q(f"{theirs}/LayerNorm_{norm - 1}/scale")
            found[f"{block}norm{norm}.bias"] = q(f"{theirs}/LayerNorm_{norm - 1}/bias")
        attention = f"{theirs}/SelfAttention"
        found[block + "attention.qkv_weight"] = torch.stack(
            [q(f"{attention}/{name}/kernel").permute(1, 2, 0) for name in three]
        )
        found[block + "attention.qkv_bias"] = torch.stack([q(f"{attention}/{name}/bias") for name in three])
        found[block + "attention.out.weight"] = q(f"{attention}/out/kernel").permute(2, 0, 1)
        found[block + "attention.out.bias"] = q(f"{attention}/out/bias")
        for layer, dense in (("up", "Dense_0"), ("down", "Dense_1")):
            if i in (1, 3):
                found[f"{block}moe.experts.{layer}_weight"] = q(f"{theirs}/Moe/Mlp/{dense}/kernel")
                found[f"{block}moe.experts.{layer}_bias"] = q(f"{theirs}/Moe/Mlp/{dense}/bias")
            else:
                found[f"{block}mlp.{layer}.weight"] = q(f"{theirs}/Mlp/{dense}/kernel").T
                found[f"{block}mlp.{layer}.bias"] = q(f"{theirs}/Mlp/{dense}/bias")
        if i in (1, 3):
            found[block + "moe.router"] = q(f"{theirs}/Moe/Router/dense/kernel")
    return found


def test_pictures_alone_in_two_groups_are_encoded_as_by_vmoe() -> None:
    golden = {key: torch.tensor(value) for key, value in arrays("vit_moe").items()}
    run = Run(
        model=Model(width=32, depth=4, heads=4, mlp_dim=64, embed_dim=32),
        image=Image(size=16, patch=4),
        moe=Moe(
            blocks=(1, 3),
            num_experts=4,
            group_pairs=2,
            capacity_factor=1.0,
            noise_std=0.0,
            min_image_experts=3.0,
            min_text_experts=3.0,
        ),
    )
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in vit_values().items():
            parameters[name].copy_(value)
        images = golden["k1_bpr/images"].permute(0, 3, 1, 2).contiguous()
        output = model(images, None, mode=RoutingMode(training=True))
    # The tower's embeddings have length 1; vmoe's features, the mean over tokens, have not.
    torch.testing.assert_close(output.image_BP, F.normalize(golden["k1_bpr/out"], dim=-1), rtol=0, atol=5e-6)
    for block, record in output.records.items():
        want = golden[f"k1_bpr/metrics/encoderblock_{block}/importance_loss"].sum()
        torch.testing.assert_close(record.losses["importance"], want, rtol=1e-5, atol=0)
        assert record.kept_E2.sum() < 4 * 16, "the case drops tokens"
