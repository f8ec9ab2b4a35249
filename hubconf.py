"""The names that `torch.hub.load(<this folder>, <name>, source="local", weights=<file>)` finds."""

from dinov2.hub.backbones import (
    dinobloom_b,
    dinobloom_g,
    dinobloom_l,
    dinobloom_s,
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)

dependencies = ["torch"]

__all__ = [
    "dinobloom_b",
    "dinobloom_g",
    "dinobloom_l",
    "dinobloom_s",
    "dinov2_vitb14",
    "dinov2_vitb14_reg",
    "dinov2_vitg14",
    "dinov2_vitg14_reg",
    "dinov2_vitl14",
    "dinov2_vitl14_reg",
    "dinov2_vits14",
    "dinov2_vits14_reg",
]
