"""G routing groups, S tokens of a group, E experts. Entropies in nats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limoe_dist.equations.aux_losses import (
    entropy,
    importance_loss,
    load_loss,
    local_entropy,
    mean_gates,
    mutual_information_loss,
    thresholded_global_entropy,
    z_loss,
)
from tests.golden.load import ROUTING_CASES, arrays, routing_case

# float64 with sums of at most some 200 terms; z-losses reach 30, so relative.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def losses_of(case, logits_SE, k):
    """Every loss of a golden case: name in the file -> (value, name of its gradient)."""
    experts = logits_SE.shape[-1]
    logits_GSE, noisy_GSE = logits_SE[None], (logits_SE + case["noise"])[None]
    found = {
        "vmoe_importance_loss": importance_loss(logits_GSE.softmax(-1)),
        "vmoe_load_loss": load_loss(logits_GSE, noisy_GSE, k=k, noise_std=1 / experts),
        "ref_z_loss": z_loss(logits_GSE),
    }
    for number, modality in enumerate(("img", "txt")):
        own_GSE = logits_SE[case["modality"] == number][None]
        if own_GSE.numel():
            mean_GE = mean_gates(own_GSE.softmax(-1))
            found[f"ref_local_ent_{modality}"] = local_entropy(own_GSE)
            found[f"ref_global_ent_{modality}"] = -entropy(mean_GE)
            found[f"ref_global_ent_thr_{modality}"] = thresholded_global_entropy(
                mean_GE, case[f"tau_{modality}"].item()
            )
    return found


def values_and_gradients(name):
    """Ours beside the reference's, by the loss's name in the golden file: ((value, value), (gradient, gradient))."""
    case = routing_case(name)
    logits_SE = case["logits"].requires_grad_()
    found = {}
    for key, loss_G in losses_of(case, logits_SE, ROUTING_CASES[name]["k"]).items():
        gradient_key = key.replace("_loss", "_grad_logits") if key.startswith("vmoe") else f"{key}_grad"
        (gradient,) = torch.autograd.grad(loss_G.sum(), logits_SE, retain_graph=True)
        found[key] = (loss_G[0].detach(), case[key]), (gradient, case[gradient_key])
    return found


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_values_and_gradients_equal_the_reference(name):
    found = values_and_gradients(name)
    # Three of all tokens and three of each modality: one case has no text.
    assert len(found) == (6 if name == "c16_img_only" else 9)
    for key, (values, (gradient, expected)) in found.items():
        torch.testing.assert_close(*values, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
        if (name, key) == ("c08_all_ties", "vmoe_importance_loss"):
            # Exact balance: vmoe's root makes it NaN, the limit is 0.
            assert expected.isnan().all()
            expected = torch.zeros_like(expected)
        torch.testing.assert_close(gradient, expected, **CLOSE, msg=lambda text, key=key: f"gradient of {key}: {text}")


def noisy_importance(name):
    """(ours, vmoe's): the importance loss of the noisy gates, with the noise given as numbers."""
    case = routing_case(name)
    noisy_GSE = (case["logits"] + case["noise"])[None]
    return importance_loss(noisy_GSE.softmax(-1))[0], case["vmoe_importance_on_noisy_loss"]


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_importance_of_noisy_gates_equals_vmoe(name):
    torch.testing.assert_close(*noisy_importance(name), **CLOSE)


def test_a_modality_without_a_token_in_a_group_is_an_error_and_not_nan():
    nothing = torch.empty(2, 0, 4)
    for loss in (importance_loss, z_loss, local_entropy, mean_gates):
        with pytest.raises(ValueError, match="without a token of this modality"):
            loss(nothing)


def mutual_information_of(case, logits_SE, prior):
    images_GSE, texts_GSE = (logits_SE[case["modality"] == number][None] for number in (0, 1))
    return mutual_information_loss(
        mean_gates(images_GSE.softmax(-1)),
        mean_gates(texts_GSE.softmax(-1)),
        tokens=(images_GSE.shape[1], texts_GSE.shape[1]),
        prior=prior,
    )


MIXED_CASES = [name for name in ROUTING_CASES if name != "c16_img_only"]


def mutual_information(name):
    """Ours beside the reference's: the value with each prior, and the one gradient that the file has."""
    case = routing_case(name)
    logits_SE = case["logits"].requires_grad_()
    loss_G, uniform_G = (mutual_information_of(case, logits_SE, prior) for prior in ("tokens", "uniform"))
    (gradient,) = torch.autograd.grad(loss_G.sum(), logits_SE, retain_graph=True)
    found = {
        "ref_neg_mi_em": loss_G[0].detach(),
        "ref_neg_mi_em_grad": gradient,
        "ref_neg_mi_em_uniform": uniform_G[0].detach(),
    }
    return {key: (ours, case[key]) for key, ours in found.items()}


@pytest.mark.parametrize("name", MIXED_CASES)
def test_mutual_information_equals_the_reference(name):
    for key, pair in mutual_information(name).items():
        torch.testing.assert_close(*pair, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_mutual_information_by_hand():
    # Modalities that share no expert: all is known, log 2 with equal shares, H(1/4, 3/4) = 0.5623 with 1 token to 3.
    image_GE, text_GE = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for prior, tokens, expected in (("uniform", (1, 3), -math.log(2)), ("tokens", (1, 3), -0.5623)):
        loss_G = mutual_information_loss(image_GE, text_GE, tokens=tokens, prior=prior)
        assert loss_G.item() == pytest.approx(expected, abs=1e-4)
    # Modalities that use experts alike: nothing is known.
    same_G = mutual_information_loss(text_GE, text_GE, tokens=(1, 3), prior="tokens")
    assert same_G.item() == pytest.approx(0.0, abs=1e-7)


def test_mutual_information_counts_the_valid_tokens_of_each_group():
    image_GE, text_GE = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    loss_G = mutual_information_loss(image_GE, text_GE, tokens=(3, torch.tensor([1, 0])), prior="tokens")
    assert loss_G.tolist() == pytest.approx([-0.5623, 0.0], abs=1e-4)


@pytest.mark.parametrize("prior", ["tokens", "uniform"])
def test_mutual_information_has_a_finite_gradient_where_an_expert_is_never_used(prior):
    logits_GSE = torch.tensor([[[0.0, -1e30], [0.0, -1e30]]], requires_grad=True)
    gates_GE = mean_gates(logits_GSE.softmax(-1))
    mutual_information_loss(gates_GE, gates_GE, tokens=(1, 1), prior=prior).sum().backward()
    assert logits_GSE.grad.isfinite().all()


def test_local_entropy_of_several_choices_by_hand():
    # Gates 1/2, 1/4, 1/4: H = 1.0397 nats, above log 2 by 0.3466; with 1/2 and 1/4 merged, H(3/4, 1/4) = 0.5623.
    logits_GSE = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    for form, expected in (("plain", 1.0397), ("above_log_k", 0.3466), ("merged", 0.5623)):
        assert local_entropy(logits_GSE, k=2, form=form).item() == pytest.approx(expected, abs=1e-4)
    # Of 1/2, 1/4, 1/8, 1/8 three are merged: H(7/8, 1/8) = 0.3768.
    logits_GSE = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    assert local_entropy(logits_GSE, k=3, form="merged").item() == pytest.approx(0.3768, abs=1e-4)
    # A token that is sure of its two experts has nothing to mend in either form.
    logits_GSE = torch.tensor([[[0.0, 0.0, -1e30]]], requires_grad=True)
    for form in ("above_log_k", "merged"):
        loss_G = local_entropy(logits_GSE, k=2, form=form)
        assert loss_G.item() == pytest.approx(0.0, abs=1e-6)
        loss_G.sum().backward()
    assert logits_GSE.grad.isfinite().all()


@pytest.mark.parametrize("layer", [0, 1])
def test_losses_of_the_golden_tower_come_out_of_its_router_inputs(layer):
    golden = arrays("limoe_tiny_k1_g1")
    kernel = next(v for k, v in golden.items() if "/params/" in k and f"b{2 * layer + 1}_" in k and v.shape == (32, 8))
    # float64 from float32 inputs: the reference itself is rounded to float32, and z is about 40 of them squared.
    logits_GSE = torch.tensor(golden[f"k1_g1/router_in{layer}"]).double() @ torch.tensor(kernel).double()
    images_GSE, texts_GSE = logits_GSE[:, : 6 * 16], logits_GSE[:, 6 * 16 :]
    found = {
        "importance": importance_loss(logits_GSE.softmax(-1)),
        "z": z_loss(logits_GSE),
        "local_txt": local_entropy(texts_GSE),
        "global_txt": thresholded_global_entropy(mean_gates(texts_GSE.softmax(-1)), math.log(0.75 * 8)),
        "global_img": thresholded_global_entropy(mean_gates(images_GSE.softmax(-1)), math.log(0.95 * 8)),
    }
    for name, loss_G in found.items():
        assert loss_G.item() == pytest.approx(golden[f"k1_g1/aux{layer}/{name}"].item(), rel=2e-5), name


def test_importance_is_zero_at_balance_and_e_minus_1_at_collapse():
    balanced_GSE = torch.eye(4).repeat(1, 3, 1)
    assert importance_loss(balanced_GSE).item() == 0.0
    # All on one of 4 experts: sums (S, 0, 0, 0), mean S/4, variance (9 + 1 + 1 + 1) / 4 * (S/4)^2 = 3 (S/4)^2.
    collapsed_GSE = torch.eye(4)[:1].repeat(1, 12, 1)
    assert importance_loss(collapsed_GSE).item() == pytest.approx(3.0)


def test_importance_hardly_sees_that_all_texts_share_one_expert():
    # 196 image tokens evenly on 4 experts, 16 text tokens on expert 0: the loss is (16 / 212)^2 = 0.57 % of its maximum
    # E - 1 for any E. LIMoE, section 2.2.1: "within 0.5% of its minimum"; hence the entropy losses.
    images_SE = torch.eye(4, dtype=torch.float64).repeat(49, 1)
    texts_SE = torch.eye(4, dtype=torch.float64)[:1].repeat(16, 1)
    share = importance_loss(torch.cat([images_SE, texts_SE])[None]).item() / (4 - 1)
    assert share == pytest.approx((16 / 212) ** 2, rel=1e-12)
    assert round(share, 4) == 0.0057


def test_the_gradient_at_exact_balance_is_zero_and_not_nan():
    # Through (std / mean)^2 with a root it would be 0 / 0.
    logits_GSE = torch.zeros(1, 5, 4, requires_grad=True)
    importance_loss(logits_GSE.softmax(-1)).sum().backward()
    assert torch.equal(logits_GSE.grad, torch.zeros(1, 5, 4))


def test_load_loss_by_hand():
    # One token, E = 2, k = 1, clean logits (0, 0), noise of standard deviation 1 gave (1, 0): the threshold is 1, and
    # either expert beats it with the chance 1 - Phi(1) = 0.158655: balanced, loss 0.
    assert load_loss(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]]), k=1, noise_std=1.0).item() == 0.0
    # Clean (1, 0), noisy (1, 0): chances 1 - Phi(0) = 0.5 and 1 - Phi(1) = 0.158655. Mean 0.329328, half the
    # difference 0.170672: loss (0.170672 / 0.329328)^2 = 0.268578.
    logits_GSE = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    assert load_loss(logits_GSE, logits_GSE, k=1, noise_std=1.0).item() == pytest.approx(0.268578, abs=1e-6)
    # k = 2: the threshold is 0: chances 1 - Phi(-1) = 0.841345 and 0.5; (0.170672 / 0.670672)^2 = 0.064760.
    assert load_loss(logits_GSE, logits_GSE, k=2, noise_std=1.0).item() == pytest.approx(0.064760, abs=1e-6)


def test_the_threshold_of_the_load_loss_has_a_gradient():
    # Chances depend on threshold - logit alone: moving all logits of a token, clean and noisy, changes nothing.
    clean, noise = torch.tensor([[[0.3, -0.2, 0.5]]], dtype=torch.float64), torch.tensor([[[0.1, 0.4, -0.3]]])
    clean.requires_grad_()
    load_loss(clean, clean + noise, k=1, noise_std=0.5).sum().backward()
    assert clean.grad.abs().max() > 1e-3
    assert clean.grad.sum().item() == pytest.approx(0.0, abs=1e-14)


def test_z_loss_is_the_squared_logsumexp():
    # logsumexp(0, 0) = log 2 and logsumexp(log 3, 0) = log 4; the mean of 0.480453 and 1.921812 is 1.201133.
    logits_GSE = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    assert z_loss(logits_GSE).item() == pytest.approx(1.201133, abs=1e-6)


def test_local_entropy_by_hand():
    # Gates (1/2, 1/2): log 2 = 0.693147. Gates (3/4, 1/4): 0.75 log(4/3) + 0.25 log 4 = 0.562335. Mean 0.627741.
    logits_GSE = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    assert local_entropy(logits_GSE).item() == pytest.approx(0.627741, abs=1e-6)


def test_gates_that_underflow_have_finite_entropy_gradients():
    # exp(-200) is 0 in float32: 0 * log 0 would be NaN.
    logits_GSE = torch.tensor([[[200.0, 0.0, -200.0], [0.0, 0.0, 500.0]]], requires_grad=True)
    loss = local_entropy(logits_GSE)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits_GSE.grad.isfinite().all()
    logits_GSE.grad = None
    mean_GE = mean_gates(logits_GSE[:, :1].softmax(-1))
    thresholded_global_entropy(mean_GE, math.log(2)).sum().backward()
    assert mean_GE[0, 1:].tolist() == [0.0, 0.0]
    assert logits_GSE.grad.isfinite().all()


def test_the_global_loss_is_zero_where_enough_experts_share():
    # Two of four experts evenly: H = log 2. Asked for 2: nothing to pay; asked for 3: log 3 - log 2 = 0.405465.
    mean_GE = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert thresholded_global_entropy(mean_GE, math.log(2)).item() == pytest.approx(0.0, abs=1e-15)
    assert thresholded_global_entropy(mean_GE, math.log(3)).item() == pytest.approx(0.405465, abs=1e-6)


def test_a_threshold_that_no_gate_can_meet_is_refused():
    mean_GE = torch.full((1, 4), 0.25)
    thresholded_global_entropy(mean_GE, math.log(4))
    with pytest.raises(ValueError, match=r"threshold=1\.6094 must not exceed log\(E\)=log\(4\)=1\.3863"):
        thresholded_global_entropy(mean_GE, math.log(5))


def every_loss(logits_GSE, noisy_GSE, valid_GS):
    mean_GE = mean_gates(logits_GSE.softmax(-1), valid_GS)
    return {
        "importance": importance_loss(logits_GSE.softmax(-1), valid_GS),
        "load": load_loss(logits_GSE, noisy_GSE, valid_GS, k=2, noise_std=0.25),
        "z": z_loss(logits_GSE, valid_GS),
        "local": local_entropy(logits_GSE, valid_GS),
        "global": thresholded_global_entropy(mean_GE, math.log(3.9)),
    }


def random_logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_masked_padding_counts_in_no_loss():
    logits_GSE, noisy_GSE = random_logits(2, 6, 4), random_logits(2, 6, 4, seed=1)
    valid_GS = torch.tensor([[True, False, True, True, False, True]]).expand(2, -1)
    masked = every_loss(logits_GSE, noisy_GSE, valid_GS)
    alone = every_loss(logits_GSE[:, valid_GS[0]], noisy_GSE[:, valid_GS[0]], None)
    for name, loss_G in masked.items():
        # The same four tokens, added in another order: last bits of float64.
        torch.testing.assert_close(loss_G, alone[name], rtol=1e-13, atol=1e-13)


def test_a_group_of_padding_alone_gives_finite_gradients():
    logits_GSE = random_logits(2, 3, 4).requires_grad_()
    valid_GS = torch.tensor([[False, False, False], [True, True, True]])
    found = every_loss(logits_GSE, logits_GSE * 1.1, valid_GS)
    for name in ("importance", "load", "z", "local"):
        assert found[name][0].item() == 0.0, name
        assert found[name][1].item() != 0.0, name
    sum(loss_G.sum() for loss_G in found.values()).backward()
    assert torch.equal(logits_GSE.grad[0], torch.zeros(3, 4, dtype=torch.float64))
    assert logits_GSE.grad[1].isfinite().all()


def test_several_groups_equal_each_group_alone():
    logits_GSE, noisy_GSE = random_logits(3, 5, 4), random_logits(3, 5, 4, seed=1)
    together = every_loss(logits_GSE, noisy_GSE, None)
    for group in range(3):
        own = slice(group, group + 1)
        for name, loss_G in every_loss(logits_GSE[own], noisy_GSE[own], None).items():
            # Reductions of another shape may be vectorised otherwise: last bits of float64.
            torch.testing.assert_close(together[name][own], loss_G, rtol=1e-13, atol=1e-13)


@st.composite
def logits(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(2, 6))
    return random_logits(*shape, seed=draw(st.integers(0, 2**31))) * draw(st.sampled_from([0.01, 1.0, 10.0]))


@given(logits())
def test_entropies_lie_between_zero_and_log_e(logits_GSE):
    highest = math.log(logits_GSE.shape[-1])
    for entropy_G in (local_entropy(logits_GSE), entropy(mean_gates(logits_GSE.softmax(-1)))):
        # log E and the sums are rounded: a few last bits.
        assert entropy_G.min() >= -1e-14
        assert entropy_G.max() <= highest + 1e-14


@given(logits())
def test_local_minus_global_entropy_is_minus_an_information_and_never_positive(logits_GSE):
    # Local + unthresholded global loss = -MI(experts; tokens of the modality) <= 0: entropy is concave.
    def both(own_GSE):
        return local_entropy(own_GSE) - entropy(mean_gates(own_GSE.softmax(-1)))

    assert both(logits_GSE).max() <= 1e-14
    # Equal tokens carry no information about the expert.
    assert both(logits_GSE[:, :1].expand_as(logits_GSE)).abs().max() <= 1e-14


@given(logits(), st.floats(0.0, 1.0))
def test_the_thresholded_global_loss_is_what_is_missing_to_the_threshold(logits_GSE, fraction):
    mean_GE = mean_gates(logits_GSE.softmax(-1))
    threshold = fraction * math.log(logits_GSE.shape[-1])
    loss_G, entropy_G = thresholded_global_entropy(mean_GE, threshold), entropy(mean_GE)
    assert torch.equal(loss_G == 0, entropy_G >= threshold)
    short = entropy_G < threshold
    torch.testing.assert_close(loss_G[short], threshold - entropy_G[short], rtol=0.0, atol=1e-14)


@given(logits())
def test_importance_stays_between_zero_and_e_minus_1(logits_GSE):
    loss_G = importance_loss(logits_GSE.softmax(-1))
    assert loss_G.min() >= 0.0
    assert loss_G.max() <= logits_GSE.shape[-1] - 1 + 1e-12
