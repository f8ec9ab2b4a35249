"""Solvers that fit classifiers to features."""
