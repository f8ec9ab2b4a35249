"""What is on disk: unlabelled image lists, labelled cells, tables, and how an image file is decoded."""

from dinov2.data.datasets.decode import UnreadableImageError, load_image, resize_image
from dinov2.data.datasets.hema_data import HemaStandardDataset, Sample
from dinov2.data.datasets.image_paths import find_images
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
