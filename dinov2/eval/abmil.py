"""ABMIL: predict a patient's class, such as an AML subtype, from the bag of their cells (multiple-instance learning).

Protocol `dinobloom`: one test set (`--test-features`, `--test-bags`, or a stratified part) and 4 folds of the other
patients, each the validation set of 5 trainings from other random weights (`solvers/mil_training.py`). `crossval`: of 5
stratified parts each is the test set once and the next one the validation set. `robust`: the same parts, and the recipe
of `solvers/robust_mil.py`. `--fold-files` reads official folds. Results are the metrics of each network with mean and
spread, and those of each patient's mean probability over the networks that have not seen the patient, with bootstrap
intervals. Beside them stand pooled vectors of the bags (`solvers/patient_vectors.py`). All networks together are the
aggregator that is written. A patient may be in only one of train, validation and test. Every random number derives from
(seed, fold, run), and no sum depends on the number of threads: equal inputs give equal results.json, but for the date,
on one machine and device.

Letters: P patients, N cells of one, D feature dim, C classes, T tested patients, A attention columns (C or 1)
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from dinov2.data.datasets.bag_folds import PARTS, PROTOCOLS, BagFold, FoldedBags, draw_folds, folds_from_files
from dinov2.data.datasets.bags import PatientBags, check_same_attributes, read_patient_labels
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval.extract_features import CELLS_HELP, add_embedder_arguments, device_of, embedder_from
from dinov2.eval.features import Features, read_features
from dinov2.eval.metrics.summaries import draw_confusion, draw_curves, draw_losses
from dinov2.eval.protocol.abmil_report import (
    format_report,
    networks_of,
    write_attention,
    write_deletion,
    write_networks,
    write_probabilities,
)
from dinov2.eval.results import (
    FoldPredictions,
    predictions_file,
    provenance,
    settings_of,
    summarize,
    write_predictions,
    write_report,
)
from dinov2.eval.solvers import patient_vectors
from dinov2.eval.solvers.mil_training import (
    BagPredictions,
    Job,
    Network,
    TrainedAggregator,
    Training,
    TrainingSettings,
    describe_members,
    map_by_single_threads,
    predict_bags,
    train_all,
)
from dinov2.eval.solvers.robust_mil import ROBUST, RUNS, train_robust
from dinov2.logging import setup_logging
from dinov2.models.abmil import MODELS
from dinov2.utils.command import exit_code, number_between, positive_int, seed_number
from dinov2.utils.files import check_regular_file, file_sha256, user_path
from dinov2.utils.numerics import derive_seed

logger = logging.getLogger("dinov2")

NO_ATTENTION = np.empty((1, 0))


@dataclass(frozen=True)
class AbmilOptions:
    """What is trained and how: `runs` trainings of each fold; all bags are kept on the device.

    `top_cells` is the number of cells of a patient in top_cells.csv.
    """

    model: str = "classwise"
    runs: int = 5
    seed: int = 0
    device: str = "cpu"
    training: TrainingSettings = field(default_factory=TrainingSettings)
    top_cells: int = 10
    robust: bool = False  # the recipe of `solvers.robust_mil`; `runs` are those of each of its inner folds


DEFAULTS = AbmilOptions()
ROBUST_DEFAULTS = AbmilOptions(runs=RUNS, training=ROBUST, robust=True)


def evaluate(data: FoldedBags, options: AbmilOptions) -> tuple[BagPredictions, list[Network]]:
    """Train `options.runs` networks on each fold and predict the fold's test patients; return the means and each."""
    labels, n_classes = data.labels, len(data.bags.class_names)
    bags = [torch.from_numpy(bag).to(options.device) for bag in data.bags.features]
    if options.robust:
        folds = data.test_sets()
        jobs, trainings = train_robust(
            bags, labels, folds, n_classes, options.model, options.training, runs=options.runs, seed=options.seed
        )
    else:
        folds = data.folds
        jobs = [
            Job(number, fold.train, fold.val, options.training, derive_seed(options.seed, "abmil", number, run))
            for number, fold in enumerate(folds)
            for run in range(options.runs)
        ]
        trainings = train_all(bags, labels, jobs, n_classes, options.model)

    def predict(pair: tuple[Job, Training]) -> tuple[np.ndarray, list[np.ndarray]]:
        job, training = pair
        output = predict_bags(training.network, [bags[i] for i in folds[job.fold].test])
        training.network.cpu()
        return output

    outputs = map_by_single_threads(predict, list(zip(jobs, trainings, strict=True)), "predicting", options.device)
    networks, runs_of = [], Counter[int]()
    for job, training, (probabilities, _) in zip(jobs, trainings, outputs, strict=True):
        networks.append(Network(job.fold, runs_of[job.fold], folds[job.fold].test, probabilities, training))
        runs_of[job.fold] += 1
    return BagPredictions.collect(
        (folds[job.fold].test, *out) for job, out in zip(jobs, outputs, strict=True)
    ), networks


def evaluate_vectors(data: FoldedBags, seed: int) -> tuple[dict[str, Any], dict[str, FoldPredictions]]:
    """Return results and predictions of each row of `patient_vectors.evaluate`."""
    bags, labels = data.bags, data.labels
    results, predicted = {}, {}
    with threadpool_limits(1):
        rows = patient_vectors.evaluate(data)
    for row, members in rows.items():
        means = BagPredictions.collect(
            (member.test, member.probabilities, [NO_ATTENTION] * len(member.test)) for member in members
        )
        predicted[row] = means.by_fold(data.test_sets(["train"]), len(bags))
        together = summarize(labels, predicted[row], bags.class_names, seed=seed)
        results[row] = {"together": together, **describe_members(members, labels, bags.class_names, "fits")}
    return results, predicted


def run(
    data: FoldedBags, options: AbmilOptions, output_dir: Path, settings: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """Evaluate, write all files of the protocol, and return the content of results.json.

    It records `settings`, ready for JSON, and `hashes`, {input: sha256}, beside that of the bags.
    """
    bags, labels, names = data.bags, data.labels, data.bags.class_names
    title = f"ABMIL, {options.model}"
    logger.info("%d patients, %d folds x %d runs of %s", len(bags), len(data.folds), options.runs, options.model)
    by_bag, networks = evaluate(data, options)
    predictions = by_bag.by_fold(data.test_sets(), len(bags))
    together = summarize(labels, predictions, names, seed=options.seed)
    of_vectors, predicted_by_vectors = evaluate_vectors(data, options.seed)
    deletion = write_deletion(output_dir, bags, by_bag, networks_of(networks), options.seed)
    report = {
        "protocol": "abmil",
        "results": {options.model: {"together": together, **describe_members(networks, labels, names)}, **of_vectors},
        "retrieval": patient_vectors.retrieval(data, options.seed),
        "deletion": deletion,
        "class_names": names,
        "counts": {
            **bags.counts(),
            "learned_per_class": bags.per_class(data.learned),
            "tested": len(by_bag.positions),
            "folds": [{part: len(getattr(fold, part)) for part in PARTS} for fold in data.folds],
        },
        "training": asdict(options.training),
        **provenance(bags.attributes, settings, {"bags": bags.sha256(), **hashes}),
    }
    data.write(output_dir / "folds.csv")
    write_predictions(output_dir / "predictions.csv", bags.patients, labels, predictions, names, key_column="patient")
    for row, of_row in predicted_by_vectors.items():
        file = predictions_file(output_dir, row)
        write_predictions(file, bags.patients, labels, of_row, names, key_column="patient")
    fold_names = data.fold_names if not options.robust else [str(i) for i in range(len(data.folds))]
    write_networks(output_dir, data, networks, fold_names)
    write_attention(output_dir, bags, by_bag, names, options.top_cells)
    draw_confusion(output_dir / "confusion.png", together["confusion"], names, title)
    draw_curves(output_dir / "curves.png", labels[by_bag.positions], by_bag.probabilities, names, title)
    histories = {
        f"fold {fold_names[network.fold]}, run {network.run}": [epoch[1:] for epoch in network.training.history]
        for network in networks
    }
    draw_losses(output_dir / "losses.png", histories, title)
    architecture = networks[0].training.network.architecture
    members = [network.training.network.state_dict() for network in networks]
    learned = bags.select(data.learned).bag_hashes()
    TrainedAggregator(architecture, names, members, bags.attributes, learned).save(output_dir / "aggregator.pth")
    write_report(output_dir, report)
    return report


def run_trained(
    aggregator: TrainedAggregator,
    bags: PatientBags,
    options: AbmilOptions,
    output_dir: Path,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """Predict the classes of patients by a trained aggregator, write all files, and return results.json.

    Bags with labels get metrics, too. `settings` and `hashes` are as for `run`.
    """
    names = aggregator.class_names
    check_same_attributes(aggregator.features, bags.attributes, "the aggregator", "these bags")
    n_seen = sum(digest in set(aggregator.seen) for digest in bags.bag_hashes())
    if n_seen:
        text = "the aggregator was trained with %d of these %d patients: numbers with them say nothing about new ones"
        logger.warning(text, n_seen, len(bags))
    predictions = aggregator.predict(bags.features, options.device)
    members = aggregator.networks()
    by_patient = dict.fromkeys(range(len(bags)), members)
    report: dict[str, Any] = {
        "protocol": "abmil, applied",
        "results": {},
        "class_names": names,
        "counts": {**bags.counts(), "seen_in_training": n_seen},
        "deletion": write_deletion(output_dir, bags, predictions, by_patient, options.seed),
        "aggregator": {**aggregator.architecture, "networks": len(aggregator.members)},
        **provenance(bags.attributes, settings, {"bags": bags.sha256(), **hashes}),
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
        keys = [(patient,) for patient in bags.patients]
        write_probabilities(file, ["patient"], zip(keys, predictions.probabilities, strict=True), names)
    rows = [
        ((number, patient), probabilities)
        for patient, networks in zip(bags.patients, predictions.by_network, strict=True)
        for number, probabilities in enumerate(networks)
    ]
    write_probabilities(output_dir / "predictions_of_networks.csv", ["network", "patient"], rows, names)
    write_attention(output_dir, bags, predictions, names, options.top_cells)
    write_report(output_dir, report)
    return report


# --- the command ----------------------------------------------------------------------------------------------------


def bags_of(features: Features, with_labels: bool = True) -> PatientBags:
    """Group cells by patient; a patient's label is that of their cells."""
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
    add("--data", type=user_path, help=f"cells to embed, with their patients: {CELLS_HELP}")
    add("--features", type=user_path, help="a features.h5 of cells with their patients")
    add("--test-features", type=user_path, help="another one, of the test patients")
    layouts = (
        "<patient>.h5 (with --labels or --fold-files), <class>/<patient>.h5 or <class>/<patient>/*.h5 in this folder, "
        "a folder of another layout of extract_features.py, a CSV patient,label,file, or a parquet file"
    )
    add("--bags", type=user_path, help=layouts)
    add("--test-bags", type=user_path, help="likewise, of the test patients")
    add("--labels", type=user_path, help="CSV with the columns patient,label, which replaces all other labels")
    add("--output-dir", type=user_path, required=True, help="folder of all files; made if missing")
    add("--model", choices=tuple(MODELS), default=DEFAULTS.model, help="the aggregator")
    protocols = (
        "dinobloom: one test set, folds of training and validation; crossval: every patient is tested once; robust: "
        "likewise, with a recipe for one to two hundred patients"
    )
    add("--protocol", choices=tuple(PROTOCOLS), default="dinobloom", help=protocols)
    add("--folds", type=positive_int, help="number of folds; default 4 for dinobloom, 5 for the others")
    add(
        "--fold-files",
        type=user_path,
        help="official folds: <fold>/{train,val,test}.csv, or the folds.csv of another run",
    )
    plain, robust = DEFAULTS, ROBUST_DEFAULTS
    add("--runs", type=positive_int, help=f"trainings of each fold; default {plain.runs}, robust {robust.runs}")
    add("--seed", type=seed_number, default=0, help="decides all random numbers")
    epochs = f"the most epochs of a training; default {plain.training.epochs}, robust {robust.training.epochs}"
    add("--epochs", type=positive_int, help=epochs)
    rate = f"at the start; default {plain.training.learning_rate}; robust chooses it on inner folds"
    add("--learning-rate", type=number_between(1e-12, 1e6), help=rate)
    patience = (
        f"epochs without a lower validation loss; default {plain.training.patience}, robust {robust.training.patience}"
    )
    add("--patience", type=positive_int, help=patience)
    add("--class-weights", action="store_true", help="give rare classes more weight in the loss, as robust does")
    add("--top-cells", type=positive_int, default=DEFAULTS.top_cells, help="cells of a patient in top_cells.csv")
    add("--apply", type=user_path, help="an aggregator.pth that predicts these patients; nothing is trained")
    args = parser.parse_args(argv)
    _check_combination(parser, args)
    return args


def _check_combination(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    names = ("data", "features", "test_features", "bags", "test_bags", "checkpoint", "encoder")
    given = {name for name in names if getattr(args, name)}
    allowed = ("checkpoint data", "encoder data", "features", "features test_features", "bags", "bags test_bags")
    if given not in [set(names.split()) for names in allowed]:
        flags = ["--" + name.replace("_", "-") for name in sorted(given)]
        expected = "--features [--test-features], or --bags [--test-bags], or --checkpoint (or --encoder) --data"
        parser.error(f"got {' '.join(flags) or 'no cells'}; give {expected}")
    has_test_set = bool(given & {"test_features", "test_bags"})
    if args.apply and (has_test_set or args.fold_files):
        parser.error("--apply predicts all patients; it takes no test set and no fold files")
    if args.fold_files and (has_test_set or args.folds):
        parser.error("--fold-files name the test patients and the folds; drop --folds and the test set")
    if args.protocol == "robust" and args.learning_rate:
        parser.error("--protocol robust chooses the learning rate on inner folds; drop --learning-rate")
    if has_test_set and args.protocol == "crossval":
        parser.error("--protocol crossval tests every patient; a test set of its own goes with the other protocols")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    options = _options_from(args)
    files = {name: getattr(args, name) for name in ("features", "test_features", "labels", "apply")}
    hashes = {
        name: file_sha256(check_regular_file(path, f"--{name.replace('_', '-')}"))
        for name, path in files.items()
        if path is not None
    }
    aggregator = TrainedAggregator.load(args.apply) if args.apply else None
    known_classes = None if aggregator is None else aggregator.class_names
    bags, test = _load_bags(args, args.features, args.bags, known_classes), None
    if args.test_features or args.test_bags:
        bags, test = bags.joined(_load_bags(args, args.test_features, args.test_bags))
    if args.labels:
        bags = bags.with_labels(read_patient_labels(args.labels))
    if aggregator is not None:
        report = run_trained(aggregator, bags, options, args.output_dir, settings_of(args), hashes)
    elif args.fold_files:
        report = run(folds_from_files(bags, args.fold_files), options, args.output_dir, settings_of(args), hashes)
    else:
        data = draw_folds(bags, args.protocol, args.folds, args.seed, test)
        report = run(data, options, args.output_dir, settings_of(args), hashes)
    print(format_report(report))


def _options_from(args: argparse.Namespace) -> AbmilOptions:
    defaults = ROBUST_DEFAULTS if args.protocol == "robust" else DEFAULTS
    given = {name: getattr(args, name) for name in ("epochs", "learning_rate", "patience", "class_weights")}
    training = replace(defaults.training, **{name: value for name, value in given.items() if value})
    return replace(
        defaults,
        model=args.model,
        runs=args.runs or defaults.runs,
        seed=args.seed,
        device=str(device_of(args)),
        training=training,
        top_cells=args.top_cells,
    )


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
        cells = LabelledCells.from_path(args.data, needs_labels=not (args.labels or args.apply))
        features = embedder_from(args).features_of(cells, args.output_dir / "features.h5", args.overwrite)
    is_known = known_classes is None or set(features.class_names) <= set(known_classes)
    return bags_of(features, with_labels=is_known and features.has_labels and not args.labels)


if __name__ == "__main__":
    sys.exit(exit_code(main))
