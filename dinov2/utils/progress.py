"""Progress bars, and durations in words."""

from datetime import timedelta
from functools import partial

from tqdm import tqdm

progress_bar = partial(tqdm, unit=" images", mininterval=2)  # seconds; in a log file each update is a line


def duration_text(seconds: float) -> str:
    """Format a duration: 42s as 0m42s, then 1h05m, then 2d03h."""
    whole = timedelta(seconds=round(seconds))
    hours, minutes = whole.seconds // 3600, whole.seconds // 60 % 60
    if whole.days:
        return f"{whole.days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole.seconds % 60:02d}s"
