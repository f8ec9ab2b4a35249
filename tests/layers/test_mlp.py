import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import Mlp, SwiGLUFFN, SwiGLUFFNFused


def test_two_layers_with_gelu_between():
    torch.manual_seed(0)
    mlp = Mlp(6, hidden_features=10, out_features=4)
    x = torch.randn(2, 3, 6)
    expected = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_widths_default_to_the_input_and_biases_can_go():
    mlp = Mlp(6, bias=False)
    assert {name: tuple(p.shape) for name, p in mlp.state_dict().items()} == {
        "fc1.weight": (6, 6),
        "fc2.weight": (6, 6),
    }


def test_first_half_of_w12_is_the_gate():
    torch.manual_seed(0)
    ffn = SwiGLUFFN(6, hidden_features=10, out_features=4)
    x = torch.randn(2, 3, 6)
    w1, w2 = ffn.w12.weight.chunk(2)
    b1, b2 = ffn.w12.bias.chunk(2)
    expected = (F.silu(x @ w1.T + b1) * (x @ w2.T + b2)) @ ffn.w3.weight.T + ffn.w3.bias
    torch.testing.assert_close(ffn(x), expected)


@pytest.mark.parametrize(("asked", "width"), [(256, 176), (6144, 4096), (384, 256), (10, 8)])
def test_fused_takes_two_thirds_rounded_up_to_eight(asked, width):
    with torch.device("meta"):
        ffn = SwiGLUFFNFused(64, hidden_features=asked)
    assert ffn.w12.weight.shape == (2 * width, 64)
    assert ffn.w3.weight.shape == (64, width)
