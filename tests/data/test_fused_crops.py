"""The program for torch.compile against the tensor operations that follow one another."""

import shutil

import pytest
import torch

from dinov2.data import fused_crops
from dinov2.data.augmentations import DataAugmentationDINO, DataAugmentationHEMA
from dinov2.data.crop_making import apply_crops_as_tensors, apply_crops_compiled
from dinov2.data.crop_parameters import JITTER_ORDERS

RECIPES = [DataAugmentationDINO, DataAugmentationHEMA]
GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, height, width):
    coarse = torch.rand(n, 3, 9, 9, generator=seeded(1))
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images[0, :] = images[0, :1]  # without colour
    return (images * 255).round().to(torch.uint8)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(fused_crops, "run_compiled", fused_crops.run_program)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("height", "width", "sizes"), [(60, 50, (48, 28)), (31, 100, (45, 15)), (28, 28, (28, 28)), (90, 80, (61, 28))]
)
def test_program_makes_the_crops_of_the_operations(recipe, height, width, sizes):
    """But for pixels at which rotation or solarisation are near a tie."""
    images, augmentation = random_images(16, height, width), recipe(GLOBAL, LOCAL, 2, *sizes)
    for crops, size in zip(augmentation.draw(16, height, width, seeded()), sizes, strict=True):
        expected = apply_crops_as_tensors(images, crops, size, augmentation.settings)
        made = apply_crops_compiled(images, crops, size, augmentation.settings)
        assert ((made - expected).abs() > 1e-4).float().mean() < 1e-3


@pytest.mark.usefixtures("uncompiled")
def test_each_order_of_the_jitter_and_each_side_of_its_range():
    """Strong factors, so that the values between two operations are cut off, and hues up to half a turn either way."""
    strong = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5, "jitter_probability": 1.0}
    augmentation = DataAugmentationHEMA(GLOBAL, LOCAL, 0, 20, rotation_probability=0.0, **strong)
    images = random_images(4 * len(JITTER_ORDERS), 30, 30)
    crops, _ = augmentation.draw(len(images), 30, 30, seeded())
    crops.jitter_order[:] = JITTER_ORDERS.repeat(8, 1)
    expected = apply_crops_as_tensors(images, crops, 20, augmentation.settings)
    made = apply_crops_compiled(images, crops, 20, augmentation.settings)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_program_equals_the_uncompiled_one():
    images, augmentation = random_images(3, 24, 24), DataAugmentationHEMA(GLOBAL, LOCAL, 0, 24, blur_kernel_size=3)
    crops, _ = augmentation.draw(3, 24, 24, seeded())
    program = fused_crops.program_of(crops, 3, 128)
    for dtype in (torch.float32, torch.bfloat16):
        compiled = fused_crops.run_compiled(images, program, 24, dtype)
        assert compiled.dtype == dtype
        expected = fused_crops.run_program(images, program, 24, torch.float32)
        torch.testing.assert_close(compiled.float(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)
