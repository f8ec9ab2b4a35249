"""Losses and teacher targets against upstream's numbers and against their definitions."""

import math

import pytest
import torch

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss, smooth_rank_loss

K = 128
TEMPERATURES = (0.04, 0.07)
# arrays of the recorded numbers move by 1.4e-6 between thread counts; losses by 1e-6 relative (tests/golden/README.md)
ATOL, RTOL = 2e-5, 1e-5


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(array)


@pytest.fixture
def teacher(formulas):
    return formulas.sym("golden/loss/teacher", (16, K), 1)


@pytest.fixture
def student(formulas):
    return formulas.sym("golden/loss/student", (16, K), 1)


@pytest.mark.parametrize("temp", TEMPERATURES)
def test_sinkhorn_is_upstreams(temp, teacher, golden_arrays, golden_json):
    expected = tensor(golden_arrays[f"loss/sinkhorn_dino/{temp}"])
    dino = DINOLoss(K).sinkhorn_knopp_teacher(teacher, temp)
    ibot = iBOTPatchLoss(K).sinkhorn_knopp_teacher(teacher, temp, n_masked_patches_tensor=torch.tensor([16]))
    torch.testing.assert_close(dino, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(ibot, expected, rtol=0, atol=ATOL)
    assert (ibot - dino).abs().max().item() == golden_json[f"sinkhorn_ibot_minus_dino/{temp}"]


def test_sinkhorn_gives_every_prototype_the_same_mass(teacher):
    targets = DINOLoss(K).sinkhorn_knopp_teacher(teacher, 0.3, n_iterations=100)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((K,), 16 / K), rtol=1e-3, atol=0)


def test_sinkhorn_survives_logits_that_overflow_exp(teacher):
    targets = DINOLoss(K).sinkhorn_knopp_teacher(100 * teacher, 0.05)  # exp(2000)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))


def test_sinkhorn_of_no_rows_is_empty():
    empty = iBOTPatchLoss(K).sinkhorn_knopp_teacher(torch.zeros(0, K), 0.04, torch.tensor([0]))
    assert empty.shape == (0, K)


@pytest.mark.parametrize("temp", TEMPERATURES)
@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_softmax_centering_is_upstreams(name, temp, teacher, golden_arrays):
    loss = DINOLoss(K) if name == "dino" else iBOTPatchLoss(K)
    for step, expected in enumerate(golden_arrays[f"loss/softmax_center_{name}/{temp}"]):
        logits = teacher + 0.1 * step
        if name == "ibot":
            logits = logits.unsqueeze(0)
        targets = loss.softmax_center_teacher(logits, teacher_temp=temp)
        torch.testing.assert_close(targets.view(16, K), tensor(expected), rtol=0, atol=ATOL)
        loss.update_center(logits)
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, tensor(golden_arrays[f"loss/center_{name}/{temp}"]), rtol=0, atol=ATOL)


def test_a_queued_center_update_is_not_lost_by_the_next_one():
    loss = DINOLoss(2, center_momentum=0.5)
    loss.update_center(torch.tensor([[4.0, 0.0]]))
    loss.update_center(torch.tensor([[0.0, 8.0]]))
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, torch.tensor([[1.0, 4.0]]))


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_batch_that_is_not_finite_does_not_stay_in_the_center(name):
    loss = DINOLoss(2) if name == "dino" else iBOTPatchLoss(2)
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    loss.update_center(rows if name == "dino" else rows.unsqueeze(0))
    loss.apply_center_update()
    assert loss.center.flatten().tolist() == [0.0, 0.0]


def test_dino_loss_and_gradient_are_those_of_the_plain_cross_entropy(student, teacher):
    targets = torch.softmax(teacher, dim=-1)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    DINOLoss(K)([a], [targets]).backward()
    torch.nn.functional.cross_entropy(b / 0.1, targets).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("temp", TEMPERATURES)
def test_dino_loss_is_upstreams(temp, teacher, student, golden_json):
    loss, expected = DINOLoss(K), golden_json[f"dino_loss/{temp}"]
    targets = loss.sinkhorn_knopp_teacher(teacher, temp)
    assert loss(student.chunk(2), targets.view(2, 8, K)).item() == pytest.approx(expected["pairs"], rel=RTOL)
    assert loss([student], [targets]).item() == pytest.approx(expected["flat"], rel=RTOL)


def test_dino_loss_of_no_crops_is_an_error(teacher):
    with pytest.raises(ValueError, match="student_output_list is empty"):
        DINOLoss(K)([], [teacher])


def test_ibot_loss_is_upstreams_and_both_forms_agree(formulas, golden_arrays, golden_json):
    golden = golden_json["ibot"]
    masks = tensor(golden_arrays["loss/ibot/masks"])
    logits_t = formulas.sym("golden/ibot/t", (golden["n"], K), 1)
    logits_s = formulas.sym("golden/ibot/s", (golden["n"], K), 1)
    loss = iBOTPatchLoss(K)
    targets = tensor(golden_arrays["loss/ibot/teacher_probs"])
    weights = tensor(golden_arrays["loss/ibot/weights"])
    ours = loss.sinkhorn_knopp_teacher(logits_t, 0.07, n_masked_patches_tensor=torch.tensor([golden["n"]]))
    torch.testing.assert_close(ours, targets, rtol=0, atol=ATOL)
    assert masks.sum(dim=1).tolist() == golden["mask_counts"]
    assert weights.sum().item() == pytest.approx(golden["weights_sum"])
    value = loss.forward_masked(logits_s, targets, masks, n_masked_patches=golden["n"], masks_weight=weights)
    assert value.item() == pytest.approx(golden["loss"], rel=RTOL)
    by_default = loss.forward_masked(logits_s, targets, masks)
    assert by_default.item() == pytest.approx(golden["loss_default_weights"], rel=RTOL)

    dense_s, dense_t = torch.zeros(*masks.shape, K), torch.zeros(*masks.shape, K)
    dense_s[masks], dense_t[masks] = logits_s, targets
    assert loss(dense_s, dense_t, masks).item() == pytest.approx(golden["loss"], rel=RTOL)


def test_koleo_is_upstreams(formulas, golden_arrays, golden_json):
    golden = golden_json["koleo"]
    x = formulas.sym("golden/koleo", (12, 64), 1).requires_grad_()
    value = KoLeoLoss()(x)
    value.backward()
    assert value.item() == pytest.approx(golden["loss"], rel=RTOL)
    torch.testing.assert_close(x.grad, tensor(golden_arrays["koleo/grad"]), rtol=0, atol=ATOL)
    assert formulas.checksum(x.grad)[1:] == pytest.approx(golden["grad"][1:], rel=RTOL)
    twice = torch.cat([x[:6], x[:6]]).detach()
    assert KoLeoLoss()(twice).item() == pytest.approx(golden["loss_dup"], rel=RTOL)


def test_koleo_needs_a_neighbour():
    with pytest.raises(ValueError, match="train.batch_size_per_gpu"):
        KoLeoLoss()(torch.ones(1, 8))


def test_smooth_rank_is_upstreams(formulas, golden_json):
    x = formulas.sym("golden/smooth_rank", (100, 64), 1)
    assert smooth_rank_loss(x).item() == pytest.approx(golden_json["smooth_rank_loss"], rel=RTOL)
    assert -smooth_rank_loss(x).item() == pytest.approx(golden_json["smooth_rank_measure"], abs=0.005)


def test_smooth_rank_of_deficient_features_is_their_rank_with_finite_gradient():
    basis = torch.linalg.qr(torch.randn(32, 4))[0].T  # four orthonormal directions of equal weight
    x = torch.eye(4).repeat(8, 1) @ basis
    x.requires_grad_()
    value = smooth_rank_loss(x)
    value.backward()
    assert value.item() == pytest.approx(-4.0, rel=1e-4)
    assert torch.isfinite(x.grad).all()


def test_half_precision_logits_give_float_losses(student, teacher):
    targets = DINOLoss(K).sinkhorn_knopp_teacher(teacher.bfloat16(), 0.04)
    assert targets.dtype == torch.float32
    value = DINOLoss(K)([student.bfloat16()], [targets])
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
