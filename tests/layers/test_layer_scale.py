import torch

from dinov2.layers import LayerScale


def test_scales_each_channel_and_touches_its_input_only_in_place():
    x = torch.ones(2, 3)
    scale = LayerScale(3, init_values=0.5)
    with torch.no_grad():
        scale.gamma[1] = 2.0
        assert scale(x).tolist() == [[0.5, 2.0, 0.5]] * 2
        assert x.tolist() == [[1.0] * 3] * 2
        in_place = LayerScale(3, init_values=0.5, inplace=True)
        assert in_place(x) is x
    assert x.tolist() == [[0.5] * 3] * 2
