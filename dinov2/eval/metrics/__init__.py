"""Numbers that say how good predictions are: metrics, their intervals, and paired tests of two methods.

`metrics.summaries` has them as tables and figures.
"""

from dinov2.eval.metrics.classification import auroc_per_class, classification_metrics, log_losses, reliability
from dinov2.eval.metrics.intervals import N_RESAMPLES, bootstrap_intervals, compare_paired

__all__ = [
    "N_RESAMPLES",
    "auroc_per_class",
    "bootstrap_intervals",
    "classification_metrics",
    "compare_paired",
    "log_losses",
    "reliability",
]
