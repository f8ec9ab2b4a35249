"""Fine-tune a network on labelled cells, and test it on others, by the same splits as every other protocol.

    python dinov2/eval/finetune.py --checkpoint DinoBloom-S.pth --data cells/ --test-fraction 0.2 --output-dir tuned/

For each fold a copy of the network learns from the training side. A stratified fifth of that side, whole patients, is
the validation part: it stops the training and chooses the weights. Test cells choose nothing. The command writes what
knn.py and linear.py write, and the networks: `finetuned.pth` (or `finetuned_<fold>.pth`), a checkpoint for predict.py
and, unless it is a network of timm, for every other command.

The same under `torchrun --standalone --nproc_per_node=N` uses N processes. A command that was killed or stopped
continues when it is started again.

Letters: N cells, C classes
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch

from dinov2 import distributed
from dinov2.data.splits import make_folds, without_copies
from dinov2.distributed import is_main_process, on_main_process
from dinov2.eval.extract_features import TIMEOUT_SECONDS, add_embedder_arguments, device_of, embedder_from
from dinov2.eval.features.encoders import Encoder
from dinov2.eval.features.extract import extract
from dinov2.eval.features.store import Features, write_features
from dinov2.eval.linear import choose_lambda, fit_linear_probe
from dinov2.eval.metrics.summaries import draw_losses
from dinov2.eval.protocol import (
    IMAGES,
    N_FOLDS,
    EvaluationData,
    Predictions,
    Protocol,
    add_split_arguments,
    check_one_set,
    load_images,
    runner,
)
from dinov2.eval.results import FoldPredictions, settings_of, write_csv
from dinov2.eval.solvers.finetuning import (
    Balance,
    Epoch,
    LabelledImages,
    Machine,
    Mix,
    TrainingSettings,
    fine_tune,
    training_identity,
)
from dinov2.eval.solvers.image_classifier import ImageClassifier, Mode, predict_images
from dinov2.hub.backbones import checkpoint_file
from dinov2.hub.classifiers import SEEN, SEEN_BYTES, Classifier, read_classifier
from dinov2.hub.weight_files import read_weights_file
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, number_between, positive_int
from dinov2.utils.files import atomic_write, file_sha256
from dinov2.utils.numerics import derive_seed
from dinov2.utils.resources import available_cores

logger = logging.getLogger("dinov2")

NETWORK, REFERENCE = "finetuned", "reference"  # names of files, for one fold without its number
STATES = ".finetune"  # folder of unfinished trainings, and of the predictions of finished ones
LEAST_VALIDATION = 20  # images; fewer choose weights by chance


Head = Literal["probe", "random"]


@dataclass(frozen=True)
class FinetuneOptions:
    training: TrainingSettings = field(default_factory=TrainingSettings)
    kind: str = "cls"  # of features that the classifier takes
    tta: bool = False  # average the test probabilities over eight flips and turns
    head: Head = "probe"  # where the classifier starts, unless the checkpoint has one
    new_head: bool = False  # do not start from the checkpoint's classifier
    keeps_networks: bool = True  # False for few-shot draws


@dataclass(frozen=True)
class Start:
    """What a training starts from, and where it runs and keeps its files."""

    make_encoder: Callable[[], Encoder]  # a new copy for each fold
    classifier: Classifier | None = None  # of the checkpoint, if it was fine-tuned before
    source: str = ""  # of the classifier, for messages
    machine: Machine = field(default_factory=Machine)
    folder: Path | None = None  # None: nothing is written, and nothing is continued
    overwrite: bool = False


def evaluate(data: EvaluationData, options: FinetuneOptions, start: Start) -> Predictions:
    """Fine-tune on the training side of each fold and classify its test images; one row, finetune_<mode>.

    The features of `data` are {IMAGES: paths [N]}. The settings of each fold have the sizes, the epochs, the best one
    and its validation score, and the history.
    """
    paths, n_classes = data.features[IMAGES], len(data.class_names)
    predictions, probabilities = np.full(len(paths), -1, dtype=np.int64), np.full((len(paths), n_classes), np.nan)
    settings = []
    for number, (train, test) in enumerate(data.folds):
        train, validation = split_validation(data, train)
        fold = _Fold(
            name=f"_{number}" if len(data.folds) > 1 else "",
            seed=derive_seed(data.seed, "finetune", number),
            train=LabelledImages(paths[train].tolist(), data.labels[train]),
            validation=LabelledImages(paths[validation].tolist(), data.labels[validation]),
            test=paths[test].tolist(),
        )
        probabilities[test], of_fold = _run_fold(fold, data.class_names, options, start)
        predictions[test] = probabilities[test].argmax(axis=1)
        settings.append(of_fold)
    row = f"finetune_{options.training.mode}"
    return {row: FoldPredictions(list(data.folds), predictions, probabilities, settings)}


def split_validation(data: EvaluationData, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide a training side into training and validation positions; patients stay whole, copies on one side.

    The validation part is the given one, else a stratified fifth; none if that has fewer than `LEAST_VALIDATION`
    images, or if there are too few patients.
    """
    paths, nothing = data.features[IMAGES], np.empty(0, dtype=np.int64)
    if data.validation is not None:
        validation = data.validation
    elif len(train) < N_FOLDS * LEAST_VALIDATION:
        return train, nothing
    else:
        patients = None if data.patients is None else [data.patients[i] for i in train]
        try:
            _, inner = make_folds(data.labels[train], patients, N_FOLDS, data.seed)[0]
        except ValueError as error:
            logger.warning("no validation part, so the last weights are kept: %s", error)
            return train, nothing
        validation = train[inner]
        train = np.setdiff1d(train, validation)
    ((train, _),), _ = without_copies(paths.tolist(), [(train, validation)], ("train", "validation"))
    return train, validation


@dataclass(frozen=True)
class _Fold:
    name: str  # in names of files
    seed: int
    train: LabelledImages
    validation: LabelledImages
    test: list[str]


def _run_fold(
    fold: _Fold, class_names: Sequence[str], options: FinetuneOptions, start: Start
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the probabilities of the test images, float64 [n, C], and the settings of the fold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(fold.seed, "head"))
        model = ImageClassifier(start.make_encoder(), options.kind, class_names)
    is_warm = start.classifier is not None and not options.new_head
    if start.classifier is not None and is_warm:
        model.start_head(start.classifier, start.source)  # an error comes before images are embedded
    others = [is_warm, options.head, fold.test, options.tta, options.keeps_networks]
    key = training_identity(model, fold.train, fold.validation, options.training, fold.seed, others)
    state_file = done_file = network_file = None
    if start.folder is not None:
        state_file, done_file = (start.folder / STATES / f"{key}.{suffix}" for suffix in ("pth", "done"))
        if options.keeps_networks:
            network_file = start.folder / f"{NETWORK}{fold.name}.pth"
    if done_file is not None:
        done = on_main_process(partial(_read_done, done_file, network_file, key, start.overwrite))
        if done is not None:
            logger.info("fold%s was finished before: %s", fold.name.replace("_", " "), done_file)
            return done
    title = f"fine-tuning{fold.name.replace('_', ' fold ')}"
    machine, training = start.machine, options.training
    extraction_options = machine.extraction_options(training)
    if state_file is None or not state_file.exists():
        _start_head(model, fold, options, start, extraction_options)
    model, history, best = fine_tune(
        model, fold.train, fold.validation, training, fold.seed, machine, state_file, title
    )
    probabilities = predict_images(model, fold.test, options.tta, **extraction_options)
    settings = {
        "validation": len(fold.validation),
        "epochs": len(history),
        "best_epoch": best,
        "validation_macro_f1": history[best].val_macro_f1,
        "learning_rate": training.peak_lr,
        "history": [tuple(epoch) for epoch in history],
    }

    def write() -> None:
        if network_file is not None:
            _write_network(network_file, model, fold, key, extraction_options)
        if done_file is not None:
            content = {"probabilities": torch.from_numpy(probabilities), "settings": json.dumps(settings)}
            with atomic_write(done_file) as stream:
                torch.save(content, stream)
        if state_file is not None:
            state_file.unlink(missing_ok=True)

    on_main_process(write)
    return probabilities, settings


def _fit_probe(features: np.ndarray, labels: np.ndarray, n_train: int, class_names: list[str], kind: str) -> Classifier:
    """Fit a linear probe to the first `n_train` images (LP-FT: Kumar et al. 2022, arXiv 2202.10054).

    Its penalty has the lowest log loss on the other images, the validation part; without any it is 1, which few images
    need.
    """
    n_classes, sides = len(class_names), (np.arange(n_train), np.arange(n_train, len(labels)))
    lam = choose_lambda(features, labels, n_classes, [sides])[0] if len(sides[1]) else 1.0
    probe = fit_linear_probe(features[:n_train], labels[:n_train], n_classes, lam)
    bias = np.maximum(probe.bias, probe.bias[np.isfinite(probe.bias)].min() - 5)  # -inf for classes without an image
    return Classifier(torch.from_numpy(probe.weights), torch.from_numpy(bias), class_names, kind)


def _start_head(
    model: ImageClassifier, fold: _Fold, options: FinetuneOptions, start: Start, extraction_options: Mapping[str, Any]
) -> None:
    """Let the classifier learn in whitened features of the training images, from the start that the options name."""
    paths = [Path(path) for path in [*fold.train.paths, *fold.validation.paths]]
    extraction = on_main_process(partial(extract, model.encoder, paths, kinds=[model.kind], **extraction_options))
    n_train = int(np.searchsorted(extraction.kept, len(fold.train)))
    if n_train > 1:
        model.cpu().whiten(extraction.features[:n_train])
    if start.classifier is not None and not options.new_head:
        model.start_head(start.classifier, start.source)
    elif options.head == "probe":
        labels = np.concatenate([fold.train.labels, fold.validation.labels])[extraction.kept]
        probe = _fit_probe(extraction.features, labels, n_train, model.class_names, model.kind)
        model.start_head(probe, "the linear probe")


def _read_done(
    done_file: Path, network_file: Path | None, key: str, overwrite: bool
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Return what a finished training predicted, if its files are there; ValueError if another one's network is."""
    is_same = network_file is None
    if network_file is not None and network_file.exists():
        is_same = read_weights_file(network_file).get("training") == key
        if not is_same and not overwrite:
            raise ValueError(
                f"--output-dir: {network_file} was fine-tuned with other images or settings; pass --overwrite to "
                f"replace it, or another --output-dir"
            )
    if not is_same or not done_file.exists():
        return None
    content = read_weights_file(done_file)
    return content["probabilities"].numpy(), json.loads(content["settings"])


def _write_network(
    file: Path, model: ImageClassifier, fold: _Fold, key: str, extraction_options: Mapping[str, Any]
) -> None:
    """Write the network's checkpoint, and the features of its training images, which predict.py compares with."""
    learned = [*fold.train.paths, *fold.validation.paths]
    hashes = [list(bytes.fromhex(file_sha256(path))[:SEEN_BYTES]) for path in learned]
    extraction = extract(model.encoder, [Path(path) for path in learned], kinds=[model.kind], **extraction_options)
    labels = np.concatenate([fold.train.labels, fold.validation.labels])
    reference = Features(
        features=extraction.features,
        labels=labels[extraction.kept],
        class_names=model.class_names,
        paths=[learned[i] for i in extraction.kept],
        attributes={"training": key, "transform": model.encoder.transform},
        kind=model.kind,
    )
    write_features(file.with_name(f"{REFERENCE}{fold.name}.h5"), reference)
    with atomic_write(file) as stream:
        torch.save({**model.content(), "training": key, SEEN: torch.tensor(hashes, dtype=torch.uint8)}, stream)


# --- the command ----------------------------------------------------------------------------------------------------


def protocol(options: FinetuneOptions, start: Start) -> Protocol:
    """Return the protocol with its options, for `runner.run`."""
    return Protocol(
        name="finetune",
        title=f"fine-tuning ({options.training.mode})",
        setting="mode",
        evaluate=partial(evaluate, start=start),
        options=options,
        few_shot_options=lambda n_train: replace(options, keeps_networks=False),
        kinds=(IMAGES,),
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a network on labelled cells and test it on others: --checkpoint (or --encoder "
        "timm:<model>) with --train and --test, or with --data. Print a table and write the fine-tuned network, "
        "results.json, predictions.csv and figures to <output-dir>. A stopped command continues when it is started "
        "again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, default = parser.add_argument, TrainingSettings()
    modes = (
        "what learns: the whole network; its last blocks; low-rank adapters of its attention (needs peft); or the "
        "classifier alone, on augmented images"
    )
    add("--mode", choices=get_args(Mode), default=default.mode, help=modes)
    add("--last-blocks", type=positive_int, default=default.last_blocks, help="that learn with --mode last-n")
    add("--lora-rank", type=positive_int, default=default.lora_rank, help="of the adapters of --mode lora")
    epochs = "passes over the training images; 0: 60 for 200 images, 24 for 2,000, 10 for 20,000"
    add("--epochs", type=number_between(0, 100_000), default=default.epochs, help=epochs)
    rates = (
        "learning rate after the warm-up; 0: 3e-4 for full and last-n, 1e-3 for lora, 1e-2 for head; beside a network "
        "that learns, the classifier has ten times as much"
    )
    add("--lr", type=number_between(0.0, 10.0), default=default.lr, help=rates)
    add("--layer-decay", type=number_between(0.0, 1.0), default=default.layer_decay, help="lr of a layer per next one")
    add("--weight-decay", type=number_between(0.0, 10.0), default=default.weight_decay, help="of matrices")
    add("--warmup", type=number_between(0.0, 0.9), default=default.warmup, help="share of the steps")
    add("--drop-path", type=number_between(0.0, 0.9), default=default.drop_path, help="stochastic depth (not in timm)")
    smoothing = number_between(0.0, 0.9)
    add("--label-smoothing", type=smoothing, default=default.label_smoothing, help="of the targets")
    balance = "rare classes count as much as frequent ones, by drawing their images more often or by the loss"
    add("--balance", choices=get_args(Balance), default=default.balance, help=balance)
    add("--mix", choices=get_args(Mix), default=default.mix, help="of pairs of training images")
    add("--ema", type=number_between(0.0, 0.99999), default=default.ema, help="decay of averaged weights; 0: none")
    patience = "epochs without a better validation macro-F1 before the training ends; 0: it never ends early"
    add("--patience", type=number_between(0, 100_000), default=default.patience, help=patience)
    add("--accumulate", type=positive_int, default=default.accumulate, help="forwards of --batch-size in a step")
    add("--tta", action="store_true", help="average test probabilities over eight flips and turns")
    head = "where a new classifier starts: from a linear probe of the training images, or from random weights"
    add("--head", choices=get_args(Head), default="probe", help=head)
    add("--new-head", action="store_true", help="a new classifier, also if the checkpoint has one")
    add_embedder_arguments(parser, checkpoint_required=True)
    add_split_arguments(parser)
    args = parser.parse_args(argv)
    given = {name for name in ("train", "test", "data") if getattr(args, name)}
    if given not in ({"train", "test"}, {"data"}):
        parser.error(
            f"got {' '.join(f'--{name}' for name in sorted(given)) or 'no cells'}; give --train and --test, or --data"
        )
    if args.test:
        check_one_set(parser, args)
    if args.compile:
        parser.error("--compile: fine-tuning runs the network as it is; leave it out")
    if len(args.kinds) > 1:
        parser.error(f"--kinds {' '.join(args.kinds)}: a classifier takes one kind of features; give one")
    return args


def options_of(args: argparse.Namespace) -> FinetuneOptions:
    names = {each.name for each in fields(TrainingSettings)}
    training = TrainingSettings(**{name: value for name, value in vars(args).items() if name in names})
    return FinetuneOptions(training, args.kinds[0], args.tta, args.head, args.new_head)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    launch = distributed.read_launch()
    setup_logging(rank=launch.rank if launch else 0)
    try:
        if launch is not None:
            args.num_workers = min(args.num_workers, max(1, available_cores() // launch.local_world_size))
            distributed.enable(launch, torch.device(device_of(args, launch)), TIMEOUT_SECONDS)
        _finetune(args, device_of(args, launch))
    finally:
        distributed.disable()


def _finetune(args: argparse.Namespace, device: str) -> None:
    embedder = embedder_from(args)
    path = None if args.checkpoint is None else checkpoint_file(args.checkpoint)
    start = Start(
        make_encoder=lambda: embedder_from(args).encoder,
        classifier=None if path is None else read_classifier(path),
        source=str(path),
        machine=Machine(device, args.num_workers, args.fp32_matmul),
        folder=args.output_dir,
        overwrite=args.overwrite,
    )
    options = options_of(args)
    # a network that cannot learn is an error before images are read
    ImageClassifier(start.make_encoder(), options.kind, ["a", "b"]).limit_learning(
        options.training.mode, options.training.last_blocks, options.training.lora_rank
    )
    evaluation = load_images(args)
    on_main_process(partial(_check_networks, args.output_dir, len(evaluation.folds), args.overwrite))
    attributes = {
        "model": embedder.encoder.description,
        "checkpoint": embedder.encoder.origin,
        **embedder.identity,
        "image_size": str(embedder.image_size),
    }
    evaluation = replace(evaluation, cells=replace(evaluation.cells, attributes=attributes))
    _ = evaluation.patients_kept_apart  # warns before the training
    of_cells = protocol(options, start)
    report = runner.run(of_cells, evaluation, args.output_dir, args.few_shot, args.repeats, settings_of(args))
    if is_main_process():
        ((_, metrics),) = report["results"]["model"].items()
        _write_histories(args.output_dir, [fold["history"] for fold in metrics["folds"]], of_cells.title)
        print(runner.format_report(report, of_cells))


def _check_networks(folder: Path, n_folds: int, overwrite: bool) -> None:
    """Remove networks of another number of folds, which predict.py would use; ValueError unless `overwrite` is set."""
    names = {f"{NETWORK}.pth"} if n_folds == 1 else {f"{NETWORK}_{number}.pth" for number in range(n_folds)}
    others = sorted(file for file in folder.glob(f"{NETWORK}*.pth") if file.name not in names)
    if others and not overwrite:
        raise ValueError(
            f"--output-dir: {others[0]} is a network of another split; pass --overwrite to remove it, or another "
            f"--output-dir"
        )
    for file in others:
        file.unlink()


def _write_histories(output_dir: Path, histories: Sequence[Sequence[Sequence[float | None]]], title: str) -> None:
    """Write history.csv (a row for each epoch of each fold) and losses.png."""
    rows = [
        [fold, number, *("" if value is None else value for value in epoch)]
        for fold, history in enumerate(histories)
        for number, epoch in enumerate(history)
    ]
    write_csv(output_dir / "history.csv", ["fold", "epoch", *Epoch._fields], rows)
    losses = {
        f"fold {fold}": [(epoch[0], epoch[1]) for epoch in history if epoch[1] is not None]
        for fold, history in enumerate(histories)
    }
    if known := {name: history for name, history in losses.items() if history}:
        draw_losses(output_dir / "losses.png", known, title)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(exit_code(main))
