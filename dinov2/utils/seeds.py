"""Derive the seeds of independent random streams from one seed."""

import hashlib


def derive_seed(seed: int, *names: int | str) -> int:
    """Return the 63-bit seed of the stream `names` of a run with `seed`.

    Streams with different names are independent. A step's random numbers depend on its number, not on earlier draws,
    so a resumed run is exact.
    """
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
