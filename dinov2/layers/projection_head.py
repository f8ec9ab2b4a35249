"""The head of losses that compare projections of images with each other."""

from collections import OrderedDict

from torch import nn


def projection_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Return an MLP of two layers, from [R, in_dim] to [R, out_dim], whose rows should be the global batch.

    The batch norm is that of these rows, in evaluation too. Without it, the nearly equal projections of an untrained
    network hardly move.
    """
    layers = {
        "fc1": nn.Linear(in_dim, hidden_dim, bias=False),
        "norm": nn.BatchNorm1d(hidden_dim, track_running_stats=False),
        "act": nn.GELU(),
        "fc2": nn.Linear(hidden_dim, out_dim),
    }
    return nn.Sequential(OrderedDict(layers))
