"""Backbones from files: every layout that weights come in, and the names that torch.hub finds."""

from dinov2.hub.backbones import load_backbone, untrained_backbone

__all__ = ["load_backbone", "untrained_backbone"]
