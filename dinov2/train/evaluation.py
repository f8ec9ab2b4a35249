"""Write teachers during training, and evaluate them by kNN and a linear probe on the sets of evaluation.datasets.

<run>/eval/training_<n>/teacher_checkpoint.pth   the teacher after n iterations
                        results.json             its kNN and, where asked for, its linear probe
           best.json                             the best teacher so far

Both methods are those of protocol `dinobloom` (dinov2/eval/knn.py, linear.py), on CLS tokens. The best teacher has the
highest balanced accuracy of kNN with the largest k, as the mean over the sets. Evaluations do not change the losses and
weights of a run: each step seeds its random numbers itself.

Letters: N cells, D embedding dim
"""

import json
import logging
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.splits import make_folds, without_copies
from dinov2.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_lost_connection,
    is_main_process,
    on_main_process,
)
from dinov2.eval.features.extract import extract
from dinov2.eval.knn import evaluate_knn
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.results import RESULTS_NAME, read_report, write_report
from dinov2.fsdp.sharding import gather_whole
from dinov2.hub.adapters import merge_adapters
from dinov2.logging import MetricLogger
from dinov2.models import architecture, build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.monitor import feature_statistics
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import error_text
from dinov2.utils.files import atomic_write
from dinov2.utils.numerics import fast_matmul_within

logger = logging.getLogger("dinov2")

CHECKPOINT_NAME = "teacher_checkpoint.pth"
TRACKED_METRICS = ("accuracy", "balanced_accuracy", "weighted_f1")  # of each method, in the trackers
PROTOTYPE_USE = ("prototype_use", "patch_prototype_use")  # of the newest step in training_metrics.json
# a set is split into the first of the evaluation commands' default folds
N_FOLDS, SPLIT_SEED = 5, 0


# --- labelled sets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Training and test cells of one entry of evaluation.datasets."""

    name: str
    train: LabelledCells
    test: LabelledCells  # none of these images is in `train`
    ks: list[int]  # numbers of neighbours for kNN, ascending
    with_linear: bool


def read_labelled_sets(evaluation: Any) -> list[LabelledSet]:
    """Read and check the sets of a configuration's section `evaluation`, in its order.

    `{name, train, test}` names two sets. `{name, data}` names one set; a fifth of it is the test set: stratified, of
    whole patients if they are known, the same cells in every run.
    """
    given: Any = OmegaConf.to_container(evaluation.datasets, resolve=True)
    entries = [{"linear": evaluation.linear, "knn_k": list(evaluation.knn_k), **entry} for entry in given]
    for number, entry in enumerate(entries, start=1):
        _check_entry(entry, f"evaluation.datasets, {entry.get('name') or f'entry {number}'}")
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation.datasets: two sets have the same name among {', '.join(names)}; rename one")
    sets = []
    for entry in entries:
        try:
            sets.append(_read(entry))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"evaluation.datasets, {entry['name']}: {error}") from error
    return sets


def without_copied_images(labelled: LabelledSet) -> LabelledSet:
    """Drop training images that are byte-equal to a test image; reads all files of equal size."""
    n_train = len(labelled.train)
    paths = [str(path) for path in (*labelled.train.paths, *labelled.test.paths)]
    ((kept, _),), _ = without_copies(paths, [(np.arange(n_train), np.arange(n_train, len(paths)))])
    return replace(labelled, train=_select(labelled.train, kept))


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    for key in entry.keys() - {"name", "data", "train", "test", "linear", "knn_k"}:
        raise KeyError(f"{where}: unknown key {key}; there are name, data, train, test, linear, knn_k")
    for key in entry.keys() & {"name", "data", "train", "test"}:
        if not isinstance(entry[key], str):
            raise ValueError(f"{where}: {key} must be a text (in quotes, if it is a number), found {entry[key]!r}")
    if not isinstance(entry["linear"], bool):
        raise ValueError(f"{where}: linear must be true or false, found {entry['linear']!r}")
    ks = entry["knn_k"]
    if not isinstance(ks, list) or not ks or not all(type(k) is int and k >= 1 for k in ks):
        raise ValueError(f"{where}: knn_k must be a list of whole numbers above 0, like [1, 20], found {ks!r}")
    if not entry.get("name"):
        raise ValueError(f"{where}: it has no name; add one, for its results")
    given = [key for key in ("data", "train", "test") if entry.get(key)]
    if given not in (["data"], ["train", "test"]):
        raise ValueError(
            f"{where}: found {' and '.join(given) or 'no cells'}; give data (one set, split here), or train and test"
        )


def _read(entry: Mapping[str, Any]) -> LabelledSet:
    if entry.get("data"):
        train, test = _split(LabelledCells.from_path(entry["data"]))
    else:
        train = LabelledCells.from_path(entry["train"])
        test = LabelledCells.from_path(entry["test"], train.class_names)
    labelled = LabelledSet(entry["name"], train, test, sorted(set(entry["knn_k"])), entry["linear"])
    _check_sides(labelled)
    return labelled


def _split(cells: LabelledCells) -> tuple[LabelledCells, LabelledCells]:
    try:
        train, test = make_folds(cells.labels, cells.patients, N_FOLDS, SPLIT_SEED)[0]
    except ValueError as error:
        n_patients = "" if cells.patients is None else f" of {len(set(cells.patients))} patients"
        raise ValueError(
            f"a fifth of its {len(cells)} cells{n_patients} cannot be set apart, by class and by whole patients; give "
            f"train and test instead of data"
        ) from error
    return _select(cells, train), _select(cells, test)


def _select(cells: LabelledCells, positions: np.ndarray) -> LabelledCells:
    patients = None if cells.patients is None else [cells.patients[i] for i in positions]
    return LabelledCells([cells.paths[i] for i in positions], cells.labels[positions], cells.class_names, patients)


def _check_sides(labelled: LabelledSet) -> None:
    train, test = labelled.train, labelled.test
    train_files, test_files = ({os.path.realpath(path) for path in cells.paths} for cells in (train, test))
    if shared := train_files & test_files:
        raise ValueError(
            f"training and test cells share {len(shared)} images, for instance {min(shared)}; an image may be in only "
            f"one of them: remove it from the other, or list it once"
        )
    train_labels = set(train.labels.tolist())
    if len(train_labels) < 2:
        raise ValueError(
            f"all {len(train)} training cells are of class {train.class_names[train.labels[0]]!r}; two classes or more "
            f"are needed"
        )
    if labelled.ks[-1] > len(train):
        raise ValueError(
            f"knn_k asks for {labelled.ks[-1]} neighbours of {len(train)} training cells; choose numbers up to that"
        )
    if unseen := sorted(set(test.labels.tolist()) - train_labels):
        names = ", ".join(test.class_names[i] for i in unseen)
        logger.warning("%s: test classes without a training cell, always predicted wrong: %s", labelled.name, names)
    if shared_patients := set(train.patients or ()) & set(test.patients or ()):
        logger.warning("%s: %d patients have cells in both train and test", labelled.name, len(shared_patients))


# --- evaluation ------------------------------------------------------------------------------------------------------


class TeacherEvaluation:
    """Writes and evaluates teachers on the labelled sets, and removes those that keep_teachers does not keep."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.sets = read_labelled_sets(cfg.evaluation)
        self.n_failed = 0

    @cached_property
    def _sets_without_copies(self) -> list[LabelledSet]:
        """The sets without copied images; made at the first evaluation, since it reads many files."""
        return [without_copied_images(labelled) for labelled in self.sets]

    def is_due(self, done: int) -> bool:
        period = self.cfg.evaluation.eval_period_iterations
        return period > 0 and done % period == 0

    def is_missing(self, run_folder: Path, done: int) -> bool:
        """Return True if no teacher was written although one was due: a signal stopped the run at this iteration."""
        return self.is_due(done) and not on_main_process((_folder(run_folder, done) / CHECKPOINT_NAME).is_file)

    def run(self, model: SSLMetaArch, run_folder: Path, done: int, metrics: MetricLogger | None = None) -> bool:
        """Write and evaluate the teacher after `done` iterations, then remove older ones; return False on failure."""
        checkpoint = _folder(run_folder, done) / CHECKPOINT_NAME
        state = teacher_state(model)
        try:
            on_main_process(lambda: save_teacher(state, model, checkpoint, done))
        except OSError as error:
            logger.error("the teacher after iteration %d could not be written: %s", done, error)
            return False
        logger.info("teacher: %s", checkpoint)
        is_evaluated = self.evaluate(model, run_folder, done, metrics)
        n_kept = self.cfg.evaluation.keep_teachers
        if n_kept is not None:
            on_main_process(lambda: _remove_teachers(run_folder / "eval", done, n_kept))
        return is_evaluated

    def evaluate(self, model: SSLMetaArch, run_folder: Path, done: int, metrics: MetricLogger | None = None) -> bool:
        """Write results.json and best.json, if there are labelled sets; log and count a failure, and return False.

        No failure ends the training, but a lost connection to another rank.
        """
        if not self.sets:
            return True
        try:
            with fast_matmul_within(False, model.device):  # as in the evaluation commands
                features = self._extract(model)
                on_main_process(lambda: self._write(features, model, run_folder, done, metrics))
        except Exception as error:
            if is_lost_connection(error):
                raise
            self.n_failed += 1
            text = "the teacher after iteration %d could not be evaluated: %s (failed evaluations so far: %d)"
            logger.error(text, done, error_text(error), self.n_failed)
            return False
        return True

    def _extract(self, model: SSLMetaArch) -> dict[Path, np.ndarray]:
        """Return the features [D] of each readable image on every process; each process extracts a part of them."""
        backbone = whole_teacher_backbone(model)
        paths = list(dict.fromkeys(path for each in self.sets for path in (*each.train.paths, *each.test.paths)))
        own_paths = paths[get_rank() :: get_world_size()]
        outcome: dict[Path, np.ndarray] | Exception = {}
        try:
            if own_paths:  # there may be fewer images than processes
                extraction = extract(
                    backbone,
                    own_paths,
                    image_size=self.cfg.crops.global_crops_size,
                    batch_size=self.cfg.evaluation.batch_size,
                    device=model.device,
                    num_workers=self.cfg.train.num_workers,
                    progress=False,
                    fp32_matmul=self.cfg.compute_precision.fp32_matmul,
                )
                outcome = {own_paths[i]: row for i, row in zip(extraction.kept, extraction.features, strict=True)}
        except Exception as error:
            outcome = error.with_traceback(None)  # a traceback would keep tensors in memory
        features: dict[Path, np.ndarray] = {}
        for share in all_gather_objects(outcome):
            if isinstance(share, Exception):
                raise share
            features |= share
        return features

    def _write(
        self,
        features: Mapping[Path, np.ndarray],
        model: SSLMetaArch,
        run_folder: Path,
        done: int,
        metrics: MetricLogger | None,
    ) -> None:
        """Write results.json and best.json, and send the numbers to the log and the trackers."""
        sets, newest = self._sets_without_copies, metrics.newest if metrics is not None else {}
        first = np.concatenate([_features_and_labels(cells, features)[0] for cells in (sets[0].train, sets[0].test)])
        statistics_of_cells = feature_statistics(torch.as_tensor(first, device=model.device))
        results = {
            "iteration": done,
            "datasets": {labelled.name: _evaluate_set(labelled, features, model.device) for labelled in sets},
            "teacher": {
                **{name: value.item() for name, value in statistics_of_cells.items()},
                **{name: newest[name] for name in PROTOTYPE_USE if math.isfinite(newest.get(name, math.nan))},
            },
        }
        write_report(_folder(run_folder, done), results)
        _log_results(results, _write_best(run_folder / "eval", done, score(results)[0]))
        if metrics is not None:
            metrics.log_evaluation(done, _tracked_values(results))


# --- the teacher ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_state(model: SSLMetaArch) -> dict[str, Tensor]:
    """Gather the teacher's tensors on the main process, fp32 on the CPU, adapters merged; every process calls this."""
    state = {}
    for name, value in model.teacher.state_dict().items():
        tensor = gather_whole(value)
        if is_main_process():
            state[name] = tensor.detach().to("cpu", torch.float32)
    return merge_adapters(state, model.lora_scaling)


@torch.no_grad()
def whole_teacher_backbone(model: SSLMetaArch) -> DinoVisionTransformer:
    """Return the teacher's backbone as a network that one process can run alone; every process must call this."""
    backbone = model.teacher_backbone
    is_sharded = any(isinstance(parameter, DTensor) for parameter in backbone.parameters())
    is_compiled = model.cfg.train.compile_blocks  # for the batches of training only
    if not (is_sharded or is_compiled or model.lora_scaling):
        return backbone
    copy = build_backbone(architecture(backbone)).to(model.device).requires_grad_(False)
    state = {name: gather_whole(value) for name, value in backbone.state_dict().items()}
    copy.load_state_dict(merge_adapters(state, model.lora_scaling))
    return copy.eval()


def save_teacher(state: dict[str, Tensor], model: SSLMetaArch, path: Path, done: int) -> None:
    """Write `{"teacher": {"backbone.*", "<name>_head.*"}}` in fp32, and the network's architecture."""
    with atomic_write(path) as file:
        torch.save({"teacher": state, "architecture": architecture(model.teacher_backbone), "iteration": done}, file)


def score(results: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name and value of the score that teachers are compared by; the best teacher has the highest.

    It is the balanced accuracy of kNN with the largest k, as the mean over the data sets of a results.json. Only
    scores of the same name are compared.
    """
    values = {}
    for name, result in results["datasets"].items():
        largest = max(result["knn"], key=lambda key: int(key.removeprefix("knn_")))
        values[f"{largest} on {name}"] = result["knn"][largest]["balanced_accuracy"]
    words = "balanced accuracy of " if len(values) == 1 else "mean balanced accuracy of "
    return words + ", ".join(values), statistics.fmean(values.values())


def _folder(run_folder: Path, done: int) -> Path:
    return run_folder / "eval" / f"training_{done}"


def _features_and_labels(cells: LabelledCells, features: Mapping[Path, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return features [N, D] and labels [N] of the readable cells."""
    kept = [i for i, path in enumerate(cells.paths) if path in features]
    if not kept:
        raise ValueError(f"none of {len(cells)} images could be read, for instance {cells.paths[0]}")
    return np.stack([features[cells.paths[i]] for i in kept]), cells.labels[kept]


def _evaluate_set(labelled: LabelledSet, features: Mapping[Path, np.ndarray], device: torch.device) -> dict[str, Any]:
    """Return `n_train`, `n_test`, `knn` and, with a linear probe, `linear` of one set."""
    train, train_labels = _features_and_labels(labelled.train, features)
    test, test_labels = _features_and_labels(labelled.test, features)
    class_names = labelled.train.class_names
    on_device = torch.as_tensor(train, device=device), train_labels, torch.as_tensor(test, device=device), test_labels
    results = {"n_train": len(train), "n_test": len(test), "knn": evaluate_knn(*on_device, class_names, labelled.ks)}
    if labelled.with_linear:
        probe = fit_linear_probe(train, train_labels, len(class_names), device=device)
        probabilities = probe.predict_proba(test)
        predictions = probabilities.argmax(axis=1)
        results["linear"] = classification_metrics(test_labels, predictions, class_names, probabilities)
    return results


def _methods(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {knn_<k> or linear: its metrics}."""
    return {**result["knn"], **({"linear": result["linear"]} if "linear" in result else {})}


def _tracked_values(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a results.json that go to the trackers."""
    of_sets = {
        f"evaluation/{name}/{method}_{metric}": values[metric]
        for name, result in results["datasets"].items()
        for method, values in _methods(result).items()
        for metric in TRACKED_METRICS
    }
    return {**of_sets, **{f"evaluation/teacher/{name}": value for name, value in results["teacher"].items()}}


def _log_results(results: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
    done = results["iteration"]
    for name, result in results["datasets"].items():
        text = "  ".join(
            f"{method} accuracy {values['accuracy']:.3f} balanced {values['balanced_accuracy']:.3f}"
            for method, values in _methods(result).items()
        )
        logger.info("after iteration %d, %s (%d cells): %s", done, name, result["n_test"], text)
    text = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in results["teacher"].items())
    if best is not None:
        text += f"  (best so far: {best['score']:.3f} at iteration {best['iteration']})"
    logger.info("after iteration %d, teacher: %s", done, text)


def _write_best(folder: Path, done: int, metric: str) -> dict[str, Any] | None:
    """Write and return best.json, the teacher with the highest `metric` up to `done` iterations; None if there is none.

    It is computed from the results on disk, so a resumed run includes earlier parts of the run and ignores later ones.
    """
    scores = {}
    for iteration, teacher in _teachers(folder, done).items():
        file = teacher.with_name(RESULTS_NAME)
        if file.is_file():
            its_metric, its_score = score(read_report(file))
            if its_metric == metric:
                scores[iteration] = its_score
    if not scores:
        return None
    iteration = max(scores, key=lambda each: scores[each])  # the earliest of equal ones
    checkpoint = f"training_{iteration}/{CHECKPOINT_NAME}"
    best = {"iteration": iteration, "metric": metric, "score": scores[iteration], "checkpoint": checkpoint}
    with atomic_write(folder / "best.json", "w") as output:
        json.dump(best, output, indent=1)
    return best


def _teachers(folder: Path, done: int) -> dict[int, Path]:
    """Return {iteration: file} of the teachers up to `done` iterations, ascending.

    Later ones come from a part of the run that was rolled back and is repeated.
    """
    teachers = {int(file.parent.name.removeprefix("training_")): file for file in folder.glob(f"*/{CHECKPOINT_NAME}")}
    return {iteration: teachers[iteration] for iteration in sorted(teachers) if iteration <= done}


def _remove_teachers(folder: Path, done: int, n_kept: int) -> None:
    """Remove all teachers but the newest `n_kept` and the best; their results stay."""
    best_file = folder / "best.json"
    try:
        best = json.loads(best_file.read_text(encoding="utf-8"))["checkpoint"] if best_file.is_file() else ""
        for teacher in list(_teachers(folder, done).values())[:-n_kept]:
            if teacher != folder / best:
                teacher.unlink()
                if not any(teacher.parent.iterdir()):
                    teacher.parent.rmdir()
    except OSError as error:
        logger.warning("teachers beyond those of evaluation.keep_teachers could not be removed: %s", error)
