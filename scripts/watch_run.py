"""Print a line on the state of each run: python scripts/watch_run.py RUN [RUN ...] [--follow] [--interval S]"""

import sys

from dinov2.run.watch import main

if __name__ == "__main__":
    sys.exit(main())
