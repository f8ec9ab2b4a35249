import torch

from dinov2.layers import projection_head


def test_it_normalizes_by_its_rows_in_evaluation_too():
    torch.manual_seed(0)
    head = projection_head(8, 16, 4).double()
    rows = torch.randn(10, 8, dtype=torch.float64)
    hidden = rows @ head.fc1.weight.T
    normal = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + head.norm.eps).sqrt()
    expected = torch.nn.functional.gelu(normal) @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(head(rows), expected)
    torch.testing.assert_close(head.eval()(rows), expected)
