"""DINOv2 self-distillation for blood and bone-marrow cells, as DinoBloom uses it (arXiv 2304.07193, 2404.05022).

Commands import this package before torch, because OpenMP reads how its threads wait when it is loaded.
"""

import os

__version__ = "0.1.0"

# Turns of the loop in which a thread that waits at a barrier keeps its core, before it sleeps. libgomp's own 300,000
# are good on a quiet machine only: beside other processes, threads spin on cores that the others' work needs. This
# number costs nothing on a quiet machine (docs/benchmarks/contention.md).
OPENMP_SPIN_COUNT = 100_000


def limit_openmp_spinning() -> None:
    """Let OpenMP threads sleep soon when they wait, unless the user chose a policy."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(OPENMP_SPIN_COUNT)


limit_openmp_spinning()
