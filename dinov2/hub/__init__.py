"""Load backbones from files, names and URLs in every known layout, and export them."""

from dinov2.hub.backbones import load_backbone, untrained_backbone
from dinov2.hub.downloads import RELEASES, resolve_weights
from dinov2.hub.transform import ImageTransform

__all__ = ["RELEASES", "ImageTransform", "load_backbone", "resolve_weights", "untrained_backbone"]
