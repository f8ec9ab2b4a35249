"""Sharding, precision and checkpoints of a run, on one device or many."""
