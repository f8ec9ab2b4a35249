"""Backbones by file and by name: DinoBloom's, DINOv2's and those of a training run."""
