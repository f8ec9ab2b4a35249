"""Helpers with more than one user: configuration, seeds, files."""
