import copy

import pytest
import torch

from dinov2.layers import DINOHead, WeightNormLinear


def golden_head(formulas, nlayers: int) -> DINOHead:
    head = DINOHead(64, 128, nlayers=nlayers, hidden_dim=96, bottleneck_dim=32)
    return formulas.fill_(head, f"golden/head{nlayers}")


@pytest.mark.parametrize("nlayers", [3, 1])
def test_recorded_logits(formulas, golden_arrays, golden_json, nlayers):
    head = golden_head(formulas, nlayers)
    shapes = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert shapes == golden_json[f"head{nlayers}_params"]
    logits = head(formulas.sym("golden/head/x", (6, 64), 1)).detach().numpy()
    assert logits == pytest.approx(golden_arrays[f"head{nlayers}/out"], abs=2e-5)


def test_logits_are_the_bottleneck_times_the_normalised_prototypes(formulas):
    head = golden_head(formulas, 3)
    x = formulas.sym("golden/head/x", (6, 64), 1)
    embedding, prototypes = head(x, with_logits=False)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(6))
    torch.testing.assert_close(embedding @ prototypes.T, head(x))


def test_weight_norm_is_torchs_own_in_value_and_gradient(formulas):
    ours = formulas.fill_(WeightNormLinear(8, 20), "test/wn")
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 20, bias=False))
    parametrized = theirs.parametrizations.weight
    with torch.no_grad():
        parametrized.original0.copy_(ours.weight_g)
        parametrized.original1.copy_(ours.weight_v)
    x = formulas.sym("test/wn/x", (5, 8), 1)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, parametrized.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, parametrized.original1.grad)


def test_products_run_in_the_type_of_the_head_and_prototypes_are_made_in_float32(formulas):
    head = golden_head(formulas, 3)
    x = formulas.sym("golden/head/x", (6, 64), 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
        embedding, prototypes = head(x, with_logits=False)
    assert (logits.dtype, embedding.dtype, prototypes.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(prototypes, head.last_layer.weight())


def test_a_zero_bottleneck_stays_finite_in_half_precision():
    head = DINOHead(8, 16, nlayers=1, bottleneck_dim=4).half()
    embedding, _ = head(torch.zeros(2, 8, dtype=torch.half), with_logits=False)
    assert not embedding.any()


def test_start_values():
    torch.manual_seed(0)
    head = DINOHead(256, 512, hidden_dim=256, bottleneck_dim=64)
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max() <= 64**-0.5
    torch.testing.assert_close(head.last_layer.weight().norm(dim=1), torch.ones(512))
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert abs(layer.weight.std().item() - 0.02) < 5e-4
        assert not layer.bias.any()


def test_batch_norm_and_biases_change_the_layers():
    head = DINOHead(8, 16, use_bn=True, nlayers=3, hidden_dim=6, bottleneck_dim=4, mlp_bias=False)
    kinds = [type(layer).__name__ for layer in head.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in head.mlp if isinstance(layer, torch.nn.Linear))
    assert head(torch.randn(5, 8)).shape == (5, 16)
    assert isinstance(DINOHead(8, 16, nlayers=0).mlp, torch.nn.Linear)


def test_a_copy_is_independent():
    """The teacher's head starts as a copy of the student's."""
    head = DINOHead(8, 16, hidden_dim=6, bottleneck_dim=4)
    twin = copy.deepcopy(head)
    x = torch.randn(3, 8)
    before = twin(x)
    with torch.no_grad():
        head.last_layer.weight_v.add_(1)
    assert torch.equal(twin(x), before)
