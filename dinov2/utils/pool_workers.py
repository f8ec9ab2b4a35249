"""How a process of a pool behaves while it works: signals are its parent's matter, and it ends with its parent."""

import multiprocessing
import os
import signal
import threading
from contextlib import suppress

from dinov2.utils.stop_signals import ignore_stop_signals


def become_pool_worker() -> None:
    """Leave all signals that stop a run to the process that gives the work, and end when that one does."""
    ignore_stop_signals()  # a terminal and a batch system send them to all; the parent decides what they mean
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a pool's workers wait for work for ever if their parent was killed
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            parent.join()
        os._exit(1)
