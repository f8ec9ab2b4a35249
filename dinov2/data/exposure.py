"""Which public data sets released networks saw, without labels, in their pretraining.

A test on such a set says less about new data: the network has seen these images.
"""

from collections.abc import Iterable

# {beginning of a release's name: names of `dinov2.data.prepare`}
PRETRAINED_ON = {
    # the sets of the paper (arXiv 2404.05022) but Acevedo, which it kept for tests
    "dinobloom": (
        *("aml_hehr", "aml_matek", "apl_aml", "aslan", "bccd", "bmc", "krd_wbc", "lisc", "nuclick"),
        *("raabin_leukemia", "raabin_wbc", "ssl_seg", "warty_pig", "white_blood_cell_dataset"),
    ),
}


def seen_in_pretraining(release: str, datasets: Iterable[str]) -> list[str]:
    """Return which of these data sets the released network of that name saw in its pretraining, sorted."""
    return sorted(set(datasets).intersection(PRETRAINED_ON.get(release.partition("_")[0], ())))
