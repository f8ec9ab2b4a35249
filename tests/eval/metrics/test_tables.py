"""Tables show the numbers they were given, in aligned columns."""

from dinov2.eval.metrics.tables import class_table, metrics_table, scores_table

METRICS = {
    **{"accuracy": 0.818, "balanced_accuracy": 0.75, "weighted_f1": 0.8, "macro_f1": 1.0},
    **{"kappa": 0.5, "auroc": None, "log_loss": 0.12345},
}


def titles(line):
    return [text.strip() for text in line.split("  ") if text.strip()]


def test_metrics_are_in_percent_with_intervals_and_spread():
    of_folds = {"mean_over_folds": dict.fromkeys(METRICS, 0.7), "sd_over_folds": dict.fromkeys(METRICS, 0.02)}
    with_all = {**METRICS, "intervals": {"accuracy": [0.7, 0.9]}, **of_folds, "folds": [{}, {}]}
    title, row, over_folds, plain = metrics_table([("model", "sweep", with_all), ("pixels", "20", METRICS)], "protocol")
    assert titles(title) == ["protocol", "accuracy", "balanced acc.", "weighted F1", "macro F1"]
    assert row.split() == ["model", "sweep", "81.8", "(70.0-90.0)", "75.0", "80.0", "100.0"]
    assert over_folds.startswith("mean of 2 folds ")
    assert over_folds.split()[4:] == 4 * ["70.0", "+-", "2.0"]
    assert plain.split() == ["pixels", "20", "81.8", "75.0", "80.0", "100.0"]
    assert len({len(line) for line in (title, row, over_folds, plain)}) == 1


def test_scores_are_as_they_are():
    title, row = scores_table([("model", METRICS)])
    assert titles(title) == ["Cohen's kappa", "AUROC", "log loss"]
    assert row.split() == ["model", "0.500", "-", "0.123"]


def test_classes_have_counts_and_shares():
    per_class = {
        "blast": {"support": 4, "recall": 1.0, "precision": 0.8, "f1": 0.889},
        "large, rare": {"support": 0, "recall": None, "precision": 0.0, "f1": 0.0},
    }
    lines = class_table("model", {"per_class": per_class}, {"blast": 8, "large, rare": 12})
    assert lines == [
        "model        train  test  recall  precision    F1",
        "blast            8     4   100.0       80.0  88.9",
        "large, rare     12     0       -        0.0   0.0",
    ]
