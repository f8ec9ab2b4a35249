"""The boxes of random crops against torchvision's distribution; what else is drawn: test_augmentations.py."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from dinov2.data.crop_parameters import CROP_RATIO, N_BOX_UNIFORMS, draw_boxes

SCALE = (0.32, 1.0)


@pytest.mark.parametrize("size", [(64, 64), (50, 80), (20, 200), (200, 20)])
def test_boxes_are_distributed_like_torchvisions(size):
    """Kolmogorov-Smirnov on area, ratio and both positions; (20, 200) uses the fallback nearly always."""
    height, width = size
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, CROP_RATIO) for _ in range(3000)], dtype=float)
    ours = (
        draw_boxes(torch.rand(3000, N_BOX_UNIFORMS, generator=torch.Generator().manual_seed(0)), height, width, SCALE)
        .double()
        .numpy()
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    for statistic in (
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: boxes[:, 3] / boxes[:, 2],
        lambda boxes: boxes[:, 0],
        lambda boxes: boxes[:, 1],
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3
