"""From files on disk to the batch that training reads."""

from dinov2.data.augmentations import DataAugmentationDINO, DataAugmentationHEMA
from dinov2.data.collate import collate_data_and_cast
from dinov2.data.loaders import make_data_loader, make_dataset
from dinov2.data.masking import MaskingGenerator
from dinov2.data.samplers import SamplerType

__all__ = [
    "DataAugmentationDINO",
    "DataAugmentationHEMA",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_data_loader",
    "make_dataset",
]
