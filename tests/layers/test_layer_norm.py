import pytest
import torch
from torch import nn

from dinov2.layers import LayerNorm


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
def test_half_precision_weights_serve_a_float32_stream(weight_type):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    norm, reference = LayerNorm(6, eps=1e-6).to(weight_type), nn.LayerNorm(6, eps=1e-6)
    with torch.no_grad():
        for parameter, other in zip(norm.parameters(), reference.parameters(), strict=True):
            other.copy_(torch.linspace(0.5, 2, 6).to(weight_type))
            parameter.copy_(other)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(x))
