"""Load backbones from files, names and URLs in every known layout, and export them."""

from dinov2.hub.backbones import ImageTransform, load_backbone, untrained_backbone
from dinov2.hub.sources import RELEASES, resolve_weights

__all__ = ["RELEASES", "ImageTransform", "load_backbone", "resolve_weights", "untrained_backbone"]
