import torch
import torch.nn.functional as F

from dinov2.layers import Mlp


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
