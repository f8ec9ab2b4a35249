"""Backbones from files, names and URLs: every layout that weights come in, and the names that torch.hub finds."""

from dinov2.hub.backbones import load_backbone, untrained_backbone
from dinov2.hub.downloads import RELEASES, resolve_weights
from dinov2.hub.transform import ImageTransform

__all__ = ["RELEASES", "ImageTransform", "load_backbone", "resolve_weights", "untrained_backbone"]
