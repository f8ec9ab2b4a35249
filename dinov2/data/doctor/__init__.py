"""Finds what is broken, doubled or leaking in lists of pictures before a network learns from them."""

from dinov2.data.doctor.check import Options, check_lists, describe

__all__ = ["Options", "check_lists", "describe"]
