"""ABMIL: predict a patient's class, such as an AML subtype, from the bag of their cells (multiple-instance learning).

Protocol `dinobloom`. Some patients are the test set of all trainings: those of `--test-features` or `--test-bags`, or
the first of folds + 1 stratified parts. The others make 4 stratified folds, each the validation set of a training on
the rest. Each fold is trained 5 times from other random weights: cross-entropy, SGD with learning rate 1e-3 (cosine
over 150 epochs, one step an epoch) and Nesterov momentum 0.9, a bag a step, until the validation loss has not fallen
for 20 epochs; the weights of the best epoch count (`solvers/mil_training.py`). Protocol `crossval` differs in the
split: of 5 stratified parts each is the test set once and the next one the validation set, so that every patient is
tested. `--fold-files` reads official folds.

Results are the metrics of each network on its test patients with mean and spread, and the metrics of each patient's
mean probability over the networks that have not seen the patient, with bootstrap intervals. All networks together are
the aggregator that is written. It predicts new patients by the mean of the probabilities.

Patients are the unit: a patient may be in only one of train, validation and test. Equal inputs give equal results.json,
but for the date, on one machine and device. Every random number derives from (seed, fold, run), so a network depends
neither on the other networks nor on their number.

Dimension key:  P patients, N cells of one, D feature dim, C classes, T tested patients, A attention columns (C or 1)
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2.data.datasets.bag_folds import (
    PARTS,
    PROTOCOLS,
    BagFold,
    FoldedBags,
    draw_folds,
    folds_from_files,
)
from dinov2.data.datasets.bags import PatientBags, check_same_attributes, read_patient_labels
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval.extract_features import (
    CELLS_HELP,
    add_embedder_arguments,
    device_of,
    embedder_from,
    positive_int,
)
from dinov2.eval.features import Features, read_features
from dinov2.eval.metrics.figures import draw_confusion, draw_curves, draw_losses
from dinov2.eval.metrics.tables import class_table, metrics_table
from dinov2.eval.results import (
    FoldPredictions,
    provenance,
    settings_of,
    summarize,
    write_csv,
    write_predictions,
    write_report,
)
from dinov2.eval.solvers.mil_networks import (
    BagPredictions,
    Network,
    TrainedAggregator,
    describe_networks,
    prediction_header,
    write_attention,
    write_networks,
)
from dinov2.eval.solvers.mil_training import TrainingSettings, predict_bags, train_aggregator
from dinov2.hub.backbones import file_sha256
from dinov2.logging import setup_logging
from dinov2.models.abmil import MODELS
from dinov2.utils.command import exit_code
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class AbmilOptions:
    """What is trained and how.

    Attributes:
        model: a key of `MODELS`.
        runs: trainings of each fold.
        seed: decides all random numbers.
        device: where the networks run; all bags are kept there.
        training: settings of each training.
        top_cells: cells of a patient in top_cells.csv.
    """

    model: str = "classwise"
    runs: int = 5
    seed: int = 0
    device: str = "cpu"
    training: TrainingSettings = field(default_factory=TrainingSettings)
    top_cells: int = 10

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"--runs {self.runs}: train at least once")


DEFAULTS = AbmilOptions()


@dataclass(frozen=True, eq=False)
class AbmilPredictions:
    """Predictions for all test patients.

    Attributes:
        predictions: the mean over the networks that have not seen the patient.
        bags: the same with attention and with the probabilities of each network.
        networks: all runs of the first fold first.
    """

    predictions: FoldPredictions
    bags: BagPredictions
    networks: list[Network]


def evaluate(data: FoldedBags, options: AbmilOptions) -> AbmilPredictions:
    """Train `options.runs` networks on each fold and predict the fold's test patients.

    Raises:
        ValueError: as `train_aggregator`.
    """
    labels, n_classes = data.labels, len(data.bags.class_names)
    bags = [torch.from_numpy(bag).to(options.device) for bag in data.bags.features]
    networks, outputs = [], []
    for fold_number, fold in enumerate(data.folds):
        for run in range(options.runs):
            seed = derive_seed(options.seed, "abmil", fold_number, run)
            training = train_aggregator(
                bags, labels, fold.train, fold.val, n_classes, options.model, options.training, seed
            )
            probabilities, attention = predict_bags(training.network, [bags[i] for i in fold.test])
            training.network.cpu()
            outputs.append((fold.test, probabilities, attention))
            networks.append(Network(fold_number, run, fold.test, probabilities, training))
            best, history = training.best_epoch, training.history
            text = "fold %d run %d: %d epochs, validation loss %.4f after epoch %d"
            logger.info(text, fold_number, run, len(history), history[best].val_loss, best)
    predictions = BagPredictions.collect(outputs)
    return AbmilPredictions(predictions.by_fold(data.folds, len(bags)), predictions, networks)


def run(
    data: FoldedBags,
    options: AbmilOptions,
    output_dir: Path,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluate and write all files of the protocol.

    Args:
        data: labelled bags and their folds.
        options: what is trained and how.
        output_dir: folder of the files; made if missing.
        settings: what results.json records as `settings`, ready for JSON.
        hashes: {input: sha256} to record beside that of the bags.

    Returns:
        the content of results.json.

    Raises:
        ValueError: as `evaluate`.
    """
    bags, labels, names = data.bags, data.labels, data.bags.class_names
    title = f"ABMIL, {options.model}"
    logger.info("%d patients, %d folds x %d runs of %s", len(bags), len(data.folds), options.runs, options.model)
    result = evaluate(data, options)
    together = summarize(labels, result.predictions, names, seed=options.seed)
    report = {
        "protocol": "abmil",
        "results": {options.model: {"together": together, **describe_networks(result.networks, labels, names)}},
        "class_names": names,
        "counts": {
            **bags.counts(),
            "learned_per_class": bags.per_class(data.learned),
            "tested": len(result.bags.positions),
            "folds": [{part: len(getattr(fold, part)) for part in PARTS} for fold in data.folds],
        },
        "training": asdict(options.training),
        **provenance(bags.attributes, settings, {"bags": bags.sha256(), **(hashes or {})}),
    }
    data.write(output_dir / "folds.csv")
    write_predictions(
        output_dir / "predictions.csv", bags.patients, labels, result.predictions, names, key_column="patient"
    )
    write_networks(output_dir, data, result.networks)
    write_attention(output_dir, bags, result.bags, names, options.top_cells)
    draw_confusion(output_dir / "confusion.png", together["confusion"], names, title)
    draw_curves(output_dir / "curves.png", labels[result.bags.positions], result.bags.probabilities, names, title)
    histories = {
        f"fold {data.fold_names[network.fold]}, run {network.run}": [
            (epoch.train_loss, epoch.val_loss) for epoch in network.training.history
        ]
        for network in result.networks
    }
    draw_losses(output_dir / "losses.png", histories, title)
    architecture = {"model": options.model, "dim": bags.dim, "n_classes": len(names)}
    members = [network.training.network.state_dict() for network in result.networks]
    aggregator = TrainedAggregator(
        architecture, names, members, bags.attributes, bags.select(data.learned).bag_hashes()
    )
    aggregator.save(output_dir / "aggregator.pth")
    write_report(output_dir, report)
    return report


def run_trained(
    aggregator: TrainedAggregator,
    bags: PatientBags,
    options: AbmilOptions,
    output_dir: Path,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Predict the classes of patients by a trained aggregator and write all files; nothing is trained.

    Args:
        aggregator: of the features' network.
        bags: without labels, or with labels by which metrics are computed.
        options: seed, device and top_cells are used.
        output_dir, settings, hashes: as for `run`.

    Returns:
        the content of results.json.

    Raises:
        ValueError: if aggregator and bags are from features of different networks.
    """
    names = aggregator.class_names
    check_same_attributes(aggregator.features, bags.attributes, "the aggregator", "these bags")
    n_seen = sum(digest in set(aggregator.seen) for digest in bags.bag_hashes())
    if n_seen:
        logger.warning(
            "the aggregator was trained with %d of these %d patients: numbers with them say nothing about new ones",
            n_seen,
            len(bags),
        )
    predictions = aggregator.predict(bags.features, options.device)
    report: dict[str, Any] = {
        "protocol": "abmil, applied",
        "results": {},
        "class_names": names,
        "counts": {**bags.counts(), "seen_in_training": n_seen},
        "aggregator": {**aggregator.architecture, "networks": len(aggregator.members)},
        **provenance(bags.attributes, settings, {"bags": bags.sha256(), **(hashes or {})}),
    }
    file = output_dir / "predictions.csv"
    if bags.labels is not None and set(bags.class_names) <= set(names):
        labels = np.array([names.index(name) for name in bags.label_of().values()], dtype=np.int64)
        none = np.empty(0, dtype=np.int64)
        by_fold = predictions.by_fold([BagFold(none, none, np.arange(len(bags)))], len(bags))
        together = summarize(labels, by_fold, names, seed=options.seed)
        report["results"] = {aggregator.architecture["model"]: {"together": together}}
        write_predictions(file, bags.patients, labels, by_fold, names, key_column="patient")
    else:
        logger.warning("no metrics: the patients have no labels, or others than the aggregator's %s", ", ".join(names))
        rows = zip(bags.patients, predictions.classes, predictions.probabilities, strict=True)
        table = [[patient, names[i], *probabilities] for patient, i, probabilities in rows]
        write_csv(file, prediction_header(names, "patient"), table)
    table = [
        [number, patient, names[probabilities.argmax()], *probabilities]
        for patient, networks in zip(bags.patients, predictions.by_network, strict=True)
        for number, probabilities in enumerate(networks)
    ]
    write_csv(output_dir / "predictions_of_networks.csv", prediction_header(names, "network", "patient"), table)
    write_attention(output_dir, bags, predictions, names, options.top_cells)
    write_report(output_dir, report)
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """Return results.json as tables in percent; without metrics, only the number of patients."""
    counts, n_classes = report["counts"], len(report["class_names"])
    if not report["results"]:
        return f"ABMIL: predictions for {counts['patients']} patients are in predictions.csv"
    ((model, results),) = report["results"].items()
    together = results["together"]
    n_tested = sum(row["support"] for row in together["per_class"].values())
    rows = [(model, "mean probability", together)]
    n_networks = len(results.get("networks", ()))
    if n_networks:
        rows.append((model, f"mean of {n_networks} networks", results["mean"]))
    if n_networks > 1:
        titles = {"sd": "SD", "min": "lowest", "max": "highest"}
        rows += [(model, title, results[key]) for key, title in titles.items()]
    lines = [f"ABMIL, {n_tested} test patients of {counts['patients']}, {n_classes} classes (in percent)", ""]
    lines += [*metrics_table(rows, "of"), ""]
    n_learned = counts.get("learned_per_class", dict.fromkeys(report["class_names"], 0))
    return "\n".join(lines + class_table("mean probability", together, n_learned))


# --- the command ----------------------------------------------------------------------------------------------------


def bags_of(features: Features, with_labels: bool = True) -> PatientBags:
    """Group cells by patient; a patient's label is that of their cells.

    Raises:
        ValueError: if the features name no patients, or cells of a patient have different labels.
    """
    labels = [features.class_names[i] for i in features.labels] if with_labels else None
    attributes = {**features.attributes, "kind": features.kind}
    return PatientBags.from_cells(features.features, features.patients, features.paths, labels, attributes)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on patients' bags of cells, test on other patients, print a table and write "
        "<output-dir>/results.json, predictions, attention and the trained aggregator. Give --features, or --bags, or "
        "--checkpoint (or --encoder) with --data. With --apply a trained aggregator predicts these patients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=False)
    parser.set_defaults(device="cpu")  # bags are small, and equal bytes matter more
    add = parser.add_argument
    add("--data", type=Path, help=f"cells to embed, with their patients: {CELLS_HELP}")
    add("--features", type=Path, help="a features.h5 of cells with their patients")
    add("--test-features", type=Path, help="another one, of the test patients")
    layouts = (
        "<patient>.h5 (with --labels or --fold-files), <class>/<patient>.h5 or <class>/<patient>/*.h5 in this folder, "
        "or a CSV with the columns patient,label,file"
    )
    add("--bags", type=Path, help=layouts)
    add("--test-bags", type=Path, help="likewise, of the test patients")
    add("--labels", type=Path, help="CSV with the columns patient,label, which replaces all other labels")
    add("--output-dir", type=Path, required=True, help="folder of all files; made if missing")
    add("--model", choices=tuple(MODELS), default=DEFAULTS.model, help="the aggregator")
    protocols = "dinobloom: one test set, folds of training and validation; crossval: every patient is tested once"
    add("--protocol", choices=tuple(PROTOCOLS), default="dinobloom", help=protocols)
    add("--folds", type=positive_int, help="number of folds; default 4 for dinobloom, 5 for crossval")
    add("--fold-files", type=Path, help="official folds: <fold>/{train,val,test}.csv, or the folds.csv of another run")
    add("--runs", type=positive_int, default=DEFAULTS.runs, help="trainings of each fold")
    add("--seed", type=int, default=0, help="decides all random numbers")
    add("--epochs", type=positive_int, default=DEFAULTS.training.epochs, help="the most epochs of a training")
    add("--learning-rate", type=float, default=DEFAULTS.training.learning_rate, help="at the start")
    patience = "epochs without a lower validation loss"
    add("--patience", type=positive_int, default=DEFAULTS.training.patience, help=patience)
    add("--class-weights", action="store_true", help="give rare classes more weight in the loss")
    add("--top-cells", type=positive_int, default=DEFAULTS.top_cells, help="cells of a patient in top_cells.csv")
    add("--apply", type=Path, help="an aggregator.pth that predicts these patients; nothing is trained")
    args = parser.parse_args(argv)
    if problem := _wrong_combination(args):
        parser.error(problem)
    return args


def _wrong_combination(args: argparse.Namespace) -> str:
    """Return what is wrong with the flags together, or ""."""
    names = ("data", "features", "test_features", "bags", "test_bags", "checkpoint", "encoder")
    given = {name for name in names if getattr(args, name)}
    allowed = ("checkpoint data", "encoder data", "features", "features test_features", "bags", "bags test_bags")
    if given not in [set(names.split()) for names in allowed]:
        flags = ["--" + name.replace("_", "-") for name in sorted(given)]
        return (
            f"got {' '.join(flags) or 'no cells'}; give --features [--test-features], or --bags [--test-bags], "
            f"or --checkpoint (or --encoder) --data"
        )
    has_test_set = bool(given & {"test_features", "test_bags"})
    if args.apply and (has_test_set or args.fold_files):
        return "--apply predicts the patients of --features, --bags or --data; it takes no test set and no fold files"
    if args.fold_files and (has_test_set or args.folds):
        return "--fold-files name the test patients and the folds; drop --folds and the test set"
    if has_test_set and args.protocol == "crossval":
        return "--protocol crossval tests every patient; a test set of its own goes with --protocol dinobloom"
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    training = TrainingSettings(
        args.epochs, args.learning_rate, patience=args.patience, class_weights=args.class_weights
    )
    options = AbmilOptions(args.model, args.runs, args.seed, str(device_of(args)), training, args.top_cells)
    files = {name: getattr(args, name) for name in ("features", "test_features", "labels", "apply")}
    hashes = {name: file_sha256(path) for name, path in files.items() if path is not None}
    if args.apply:
        aggregator = TrainedAggregator.load(args.apply)
        bags = _load_bags(args, args.features, args.bags, aggregator.class_names)
        bags = bags.with_labels(read_patient_labels(args.labels)) if args.labels else bags
        report = run_trained(aggregator, bags, options, args.output_dir, settings_of(args), hashes)
    else:
        report = run(_load_data(args), options, args.output_dir, settings_of(args), hashes)
    print(format_report(report))


def _load_data(args: argparse.Namespace) -> FoldedBags:
    """Read the bags, their labels and their folds."""
    bags, test = _load_bags(args, args.features, args.bags), None
    if args.test_features or args.test_bags:
        bags, test = bags.joined(_load_bags(args, args.test_features, args.test_bags))
    if args.labels:
        bags = bags.with_labels(read_patient_labels(args.labels))
    if args.fold_files:
        return folds_from_files(bags, args.fold_files)
    return draw_folds(bags, args.protocol, args.folds, args.seed, test)


def _load_bags(
    args: argparse.Namespace,
    features_file: Path | None,
    bags_path: Path | None,
    known_classes: Sequence[str] | None = None,
) -> PatientBags:
    """Read bags, or embed the cells of --data where there is no file.

    Labels of cells are their patients', unless there is --labels, or they are not among `known_classes`: then they may
    be classes of cells, and the bags have no labels.
    """
    if bags_path is not None:
        return PatientBags.from_path(bags_path)
    if features_file is not None:
        features = read_features(features_file)
    else:
        cells = LabelledCells.from_path(args.data)
        features = embedder_from(args).features_of(cells, args.output_dir / "features.h5", args.overwrite)
    is_known = known_classes is None or set(features.class_names) <= set(known_classes)
    return bags_of(features, with_labels=is_known and not args.labels)


if __name__ == "__main__":
    sys.exit(exit_code(main))
