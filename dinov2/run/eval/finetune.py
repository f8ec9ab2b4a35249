"""Submit dinov2/eval/finetune.py to a SLURM cluster."""

import sys
from functools import partial

from dinov2.run.eval import launch

main = partial(launch, "dinov2.eval.finetune")

if __name__ == "__main__":
    sys.exit(main())
