"""Numbers that say how good predictions are: metrics, their intervals, and paired tests of two methods.

`metrics.summaries` has them as tables and figures.
"""

from dinov2.eval.metrics.classification import classification_metrics, log_losses
from dinov2.eval.metrics.intervals import N_RESAMPLES, bootstrap_intervals, compare_paired

__all__ = ["N_RESAMPLES", "bootstrap_intervals", "classification_metrics", "compare_paired", "log_losses"]
