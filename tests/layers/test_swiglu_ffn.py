import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import SwiGLUFFN, SwiGLUFFNFused


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
