"""One seed decides everything: independent streams are derived from it by name."""

import hashlib


def derive_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed for the stream called `names` of the run seeded `seed`.

    Streams with different names are unrelated, and a stream is a pure function of its arguments: what a step draws
    depends on the step's number and not on what was drawn before, which is what makes a resumed run exact.
    """
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
