"""Helpers with more than one user: configuration, seeds, files, cores, how commands end.

They import `configs` and `distributed` alone, so every package but those two and `layers` may use them.
"""
