"""Which public data sets published networks saw, without labels, in their pretraining.

A test on such a set says less about new data: the network has seen these images.
"""

from collections.abc import Iterable

# {name of a network, or the beginning of several: names of `dinov2.data.prepare`}
PRETRAINED_ON = {
    "dinobloom_tiny_pbc": ("acevedo",),
    # the sets of the paper (arXiv 2404.05022) but Acevedo, which it kept for tests
    "dinobloom": (
        *("aml_hehr", "aml_matek", "apl_aml", "aslan", "bccd", "bmc", "krd_wbc", "lisc", "nuclick"),
        *("raabin_leukemia", "raabin_wbc", "ssl_seg", "warty_pig", "white_blood_cell_dataset"),
    ),
}


def pretrained_on(name: str) -> tuple[str, ...]:
    """Return the public data sets that the published network of that name saw in its pretraining."""
    return PRETRAINED_ON.get(name) or PRETRAINED_ON.get(name.partition("_")[0], ())


def seen_in_pretraining(name: str, datasets: Iterable[str]) -> list[str]:
    """Return which of these data sets the published network of that name saw in its pretraining, sorted."""
    return sorted(set(datasets).intersection(pretrained_on(name)))
