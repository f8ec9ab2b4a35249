"""Read what is on disk: lists of images, labelled cells, bags, tables, and image files."""

from dinov2.data.datasets.decode import UnreadableImageError, find_images, load_image, resize_image
from dinov2.data.datasets.hema_data import HemaStandardDataset, Sample
from dinov2.data.datasets.labelled_cells import LabelledCells

__all__ = [
    "HemaStandardDataset",
    "LabelledCells",
    "Sample",
    "UnreadableImageError",
    "find_images",
    "load_image",
    "resize_image",
]
