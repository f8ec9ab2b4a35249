"""What lies on disk: unlabelled path lists, labelled cells, and how a picture file is decoded."""

from dinov2.data.datasets.cells import LabelledCells, find_pictures
from dinov2.data.datasets.decode import UnreadableImageError, load_image, resize_image
from dinov2.data.datasets.hema_data import HemaStandardDataset, Sample

__all__ = [
    "HemaStandardDataset",
    "LabelledCells",
    "Sample",
    "UnreadableImageError",
    "find_pictures",
    "load_image",
    "resize_image",
]
