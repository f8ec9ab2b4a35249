"""DINOv2 self-distillation for blood and bone-marrow cells, as DinoBloom uses it (arXiv 2304.07193, 2404.05022).

Commands import this package before torch, because OpenMP reads its settings when torch loads it.
"""

import getpass
import os

__version__ = "0.1.0"

# How often a thread that waits at a barrier checks it before it sleeps. libgomp's default of 300,000 is good only on a
# quiet machine: otherwise waiting threads keep cores that other processes need. This number costs nothing on a quiet
# machine (docs/benchmarks/contention.md).
OPENMP_SPIN_COUNT = 100_000


def limit_openmp_spinning() -> None:
    """Let waiting OpenMP threads sleep soon, unless the user chose a policy."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(OPENMP_SPIN_COUNT)


def name_the_user() -> None:
    """Give a user without an entry in /etc/passwd (docker run --user) a name, which torch's caches are named after."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


limit_openmp_spinning()
name_the_user()
