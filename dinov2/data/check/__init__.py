"""Find broken, duplicate and leaking images in image lists before a network is trained on them."""

from dinov2.data.check.check import check_lists
from dinov2.data.check.report import describe

__all__ = ["check_lists", "describe"]
