"""Submit dinov2/eval/abmil.py to a SLURM cluster."""

import sys
from collections.abc import Sequence

from dinov2.run.eval import launch


def main(argv: Sequence[str] | None = None) -> int:
    return launch("dinov2.eval.abmil", argv)


if __name__ == "__main__":
    sys.exit(main())
