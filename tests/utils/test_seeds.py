"""Seed streams."""

import torch

from dinov2.utils.seeds import derive_seed


def test_streams_are_functions_of_seed_and_name_and_differ():
    seeds = {derive_seed(s, name, i) for s in range(3) for name in ("masks", "crops") for i in range(50)}
    assert len(seeds) == 300
    assert derive_seed(0, "masks", 1) == derive_seed(0, "masks", 1)
    # "1" + "23" and "12" + "3" are different names
    assert derive_seed(0, 1, 23) != derive_seed(0, 12, 3)
    torch.Generator().manual_seed(max(seeds))  # fits what torch takes
