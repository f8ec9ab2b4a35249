"""Files and tables of abmil.py beside the predictions by patient: those of each network, attention and deletion curves.

Letters: C classes
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dinov2.data.datasets.bag_folds import FoldedBags
from dinov2.data.datasets.bags import PatientBags
from dinov2.eval.metrics.intervals import intervals_of
from dinov2.eval.metrics.summaries import class_table, metrics_table, percent
from dinov2.eval.results import PROBABILITY_PREFIX, write_csv
from dinov2.eval.solvers.mil_training import BagPredictions, Epoch, Network, deletion_curve, map_by_single_threads
from dinov2.models.abmil import Aggregator
from dinov2.utils.files import atomic_write
from dinov2.utils.numerics import derive_seed


def write_probabilities(
    file: Path, keys: Sequence[str], rows: Iterable[tuple[Sequence[Any], np.ndarray]], class_names: Sequence[str]
) -> None:
    """Write a CSV of rows of keys and probabilities [C]: the keys, `prediction` and p_<class>."""
    header = [*keys, "prediction", *(f"{PROBABILITY_PREFIX}{name}" for name in class_names)]
    write_csv(file, header, [[*key, class_names[int(values.argmax())], *values] for key, values in rows])


def write_networks(output_dir: Path, data: FoldedBags, networks: Sequence[Network], fold_names: Sequence[str]) -> None:
    """Write predictions_of_networks.csv (a row for each network and test patient) and history.csv (for each epoch)."""
    label_of, patients = data.bags.label_of(), data.bags.patients
    predictions, epochs = [], []
    for network in networks:
        key = (fold_names[network.fold], network.run)
        for i, probabilities in zip(network.test.tolist(), network.probabilities, strict=True):
            predictions.append(((*key, patients[i], label_of[patients[i]]), probabilities))
        epochs += [[*key, i, *map(str, epoch)] for i, epoch in enumerate(network.training.history)]
    keys = ["fold", "run", "patient", "label"]
    write_probabilities(output_dir / "predictions_of_networks.csv", keys, predictions, data.bags.class_names)
    write_csv(output_dir / "history.csv", ["fold", "run", "epoch", *Epoch._fields], epochs)


def write_attention(
    output_dir: Path, bags: PatientBags, predictions: BagPredictions, class_names: Sequence[str], n_top: int
) -> None:
    """Write attention.csv, a row per cell of the tested patients, and top_cells.csv, each patient's `n_top` highest.

    `attention` is for the predicted class; `attention_<class>` columns follow if attention differs by class.
    """
    tables, top_tables = [], []
    predicted = zip(predictions.positions.tolist(), predictions.classes, predictions.predicted_attention(), strict=True)
    for (position, i, attention), by_class in zip(predicted, predictions.attention, strict=True):
        cells = bags.cells[position]
        keys = {"patient": bags.patients[position], "cell": range(len(cells)), "source": cells, "attention": attention}
        columns = zip(class_names, by_class, strict=True) if len(by_class) > 1 else ()
        table = pd.DataFrame(keys | {f"attention_{name}": column for name, column in columns})
        top = table.nlargest(n_top, "attention")
        tables.append(table)
        top_tables.append(top.assign(prediction=class_names[i], rank=range(1, len(top) + 1)))
    top_columns = ["patient", "prediction", "rank", "cell", "source", "attention"]
    files = {"attention.csv": pd.concat(tables), "top_cells.csv": pd.concat(top_tables)[top_columns]}
    for name, table in files.items():
        with atomic_write(output_dir / name, "w") as stream:
            table.to_csv(stream, index=False, float_format="%.6g", lineterminator="\n")


def networks_of(networks: Sequence[Network]) -> dict[int, list[Aggregator]]:
    """Return {position of a patient: the networks that predict the patient}."""
    by_patient: dict[int, list[Aggregator]] = defaultdict(list)
    for network in networks:
        for i in network.test.tolist():
            by_patient[i].append(network.training.network)
    return by_patient


def write_deletion(
    output_dir: Path,
    bags: PatientBags,
    predictions: BagPredictions,
    networks: Mapping[int, Sequence[Aggregator]],
    seed: int,
) -> dict[str, Any]:
    """Write deletion.csv, each patient's `deletion_curve` of the predicted class, and return a summary.

    `gap` is the mean over patients and shares of how much lower the probability is without the most attended cells than
    without as many random ones, with its 95 % interval over patients.
    """
    columns = predictions.positions.tolist(), predictions.classes.tolist(), predictions.predicted_attention()

    def curve_of(item: tuple[int, int, np.ndarray]) -> pd.DataFrame:
        i, column, attention = item
        curve_seed = derive_seed(seed, "deletion", i)
        curve = deletion_curve(networks[i], bags.features[i], attention, column, curve_seed)
        return pd.DataFrame({"patient": bags.patients[i], **curve})

    tables = map_by_single_threads(curve_of, list(zip(*columns, strict=True)), "attention")
    with atomic_write(output_dir / "deletion.csv", "w") as stream:
        pd.concat(tables).to_csv(stream, index=False, float_format="%.6g", lineterminator="\n")
    gaps = np.array([(table["random"] - table["most_attended"])[1:].mean() for table in tables])

    def mean_gap(weights: np.ndarray) -> dict[str, float]:
        return {"gap": float(gaps @ weights / weights.sum())}

    return {"gap": float(gaps.mean()), "interval": intervals_of(mean_gap, len(gaps), seed=seed).get("gap")}


def format_report(report: Mapping[str, Any]) -> str:
    """Return results.json as tables in percent; without metrics, only the number of patients."""
    counts, n_classes = report["counts"], len(report["class_names"])
    if not report["results"]:
        return f"ABMIL: predictions for {counts['patients']} patients are in predictions.csv"
    (model, results), *of_vectors = report["results"].items()
    together = results["together"]
    n_tested = sum(row["support"] for row in together["per_class"].values())
    rows = [(model, "mean probability", together)]
    n_networks = len(results.get("networks", ()))
    if n_networks:
        rows.append((model, f"mean of {n_networks} networks", results["mean"]))
    if n_networks > 1:
        titles = {"sd": "SD", "min": "lowest", "max": "highest"}
        rows += [(model, title, results[key]) for key, title in titles.items()]
    for name, of_row in of_vectors:
        rows.append((name, "mean probability", of_row["together"]))
        if len(of_row["fits"]) > 1:
            rows.append((name, f"mean of {len(of_row['fits'])} fits", of_row["mean"]))
    lines = [f"ABMIL, {n_tested} test patients of {counts['patients']}, {n_classes} classes (in percent)", ""]
    lines += [*metrics_table(rows, "of"), ""]
    for pooling, found in report.get("retrieval", {}).items():
        lines.append(f"retrieval by {pooling}, mAP@3: {percent(found['map_at_3'], found['interval'])}")
    gap = report["deletion"]
    lines.append(
        f"without the most attended cells, probabilities of the predicted classes are lower by "
        f"{percent(gap['gap'], gap['interval'])} than without random cells"
    )
    n_learned = counts.get("learned_per_class", {})
    return "\n".join([*lines, "", *class_table("mean probability", together, n_learned)])
