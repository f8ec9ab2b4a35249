"""The teacher during training: written as a file to use, and judged on the labelled sets of evaluation.datasets.

<run>/eval/training_<n>/teacher_checkpoint.pth   the teacher after n iterations
                        results.json             what it can do: kNN and, where asked for, a linear probe
           best.json                             which of the teachers is the best so far

kNN and probe are those of protocol `dinobloom` (dinov2/eval/knn.py, linear.py), on CLS tokens. The best teacher has the
highest balanced accuracy of kNN with the largest k, as the mean over the sets. An evaluation draws no number that the
training would have drawn: a run with it has the losses and weights of a run without.

Letters: N cells, D embedding dim
"""

import json
import logging
import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_process
from dinov2.eval.embedding import Extraction, extract
from dinov2.eval.knn import evaluate_knn
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.metrics import classification_metrics
from dinov2.logging import MetricLogger
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.monitor import feature_statistics
from dinov2.train.labelled_sets import LabelledSet, read_labelled_sets, without_copied_pictures
from dinov2.train.shown_cells import ShownCells
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import atomic_write
from dinov2.utils.matmul import fast_matmul_within

logger = logging.getLogger("dinov2")

CHECKPOINT_NAME = "teacher_checkpoint.pth"
RESULTS_NAME = "results.json"
FOLLOWED = ("accuracy", "balanced_accuracy", "weighted_f1")  # of each method, in the trackers
PROTOTYPE_USE = ("prototype_use", "patch_prototype_use")  # of the newest step, as training_metrics.json has them


class TeacherEvaluation:
    """Writes and judges teachers, and removes those that evaluation.keep_teachers does not keep.

    Reads and checks the labelled sets when it is made, before there is a model.

    Raises:
        FileNotFoundError, KeyError, ValueError: what is wrong with evaluation.datasets.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.sets = read_labelled_sets(cfg.evaluation)
        self._shown = ShownCells()

    @cached_property
    def _judging_sets(self) -> list[LabelledSet]:
        """The sets as the main process judges by them; made at the first evaluation, since it reads many files."""
        return [without_copied_pictures(labelled) for labelled in self.sets]

    def is_due(self, done: int) -> bool:
        period = self.cfg.evaluation.eval_period_iterations
        return period > 0 and done % period == 0

    def run(self, model: SSLMetaArch, run_folder: Path, done: int, metrics: MetricLogger | None = None) -> bool:
        """Write the teacher as it is after `done` iterations, and judge it; False, and why in the log, if that failed.

        Older teachers go once the new one is whole on disk, and judged.
        """
        checkpoint = _folder(run_folder, done) / CHECKPOINT_NAME
        state = model.teacher_state()
        try:
            on_main_process(lambda: save_teacher(state, model, checkpoint, done))
        except OSError as error:
            logger.error("the teacher after iteration %d could not be written: %s", done, error)
            return False
        logger.info("teacher: %s", checkpoint)
        is_judged = self.judge(model, run_folder, done, metrics)
        n_kept = self.cfg.evaluation.keep_teachers
        if n_kept is not None:
            on_main_process(lambda: _remove_teachers(run_folder / "eval", done, n_kept))
        return is_judged

    def judge(self, model: SSLMetaArch, run_folder: Path, done: int, metrics: MetricLogger | None = None) -> bool:
        """Write results.json, and best.json above it, where labelled sets are given; False, and why in the log, if that
        failed: training can go on."""
        if not self.sets:
            return True
        try:
            with random_state_kept(model.device), fast_matmul_within(False, model.device):  # as the commands judge
                embedded = self._embed(model)
                on_main_process(lambda: self._judge(embedded, model.device, run_folder, done, metrics))
        except (OSError, ValueError) as error:
            logger.error("the teacher after iteration %d could not be judged: %s", done, error)
            return False
        return True

    def _judge(
        self,
        embedded: dict[Path, np.ndarray],
        device: torch.device,
        run_folder: Path,
        done: int,
        metrics: MetricLogger | None,
    ) -> None:
        newest = metrics.newest if metrics is not None else {}
        results = {
            "iteration": done,
            "datasets": {labelled.name: _results_on(labelled, embedded, device) for labelled in self._judging_sets},
            "teacher": {
                **_spread_on(self._judging_sets[0], embedded, device),
                **{name: newest[name] for name in PROTOTYPE_USE if math.isfinite(newest.get(name, math.nan))},
            },
        }
        with atomic_write(_folder(run_folder, done) / RESULTS_NAME, "w") as file:
            json.dump(results, file, indent=1)
        best = _write_best(run_folder / "eval", done, score(results)[0])
        _report(results, best)
        if metrics is not None:
            metrics.log_evaluation(done, _scalars(results))
            if metrics.takes_pictures:
                metrics.log_cells(done, self._shown.of_sets(self._judging_sets, embedded))

    def _embed(self, model: SSLMetaArch) -> dict[Path, np.ndarray]:
        """Features [D] of each readable picture of the sets, on every process; each embeds its share of them.

        Raises:
            OSError, ValueError: no picture of a share could be read, or the teacher is broken; on every process.
        """
        backbone = model.whole_teacher_backbone()
        paths = list(dict.fromkeys(path for each in self.sets for path in (*each.train.paths, *each.test.paths)))
        mine = paths[get_rank() :: get_world_size()]
        own: dict[Path, np.ndarray] | OSError | ValueError = {}
        try:
            if mine:  # there may be fewer pictures than processes
                found = self._extract(backbone, mine, model.device)
                own = {mine[i]: features for i, features in zip(found.kept, found.features, strict=True)}
        except (OSError, ValueError) as error:
            own = error  # the others wait for this share
        embedded: dict[Path, np.ndarray] = {}
        for share in all_gather_objects(own):
            if not isinstance(share, dict):
                raise share
            embedded |= share
        return embedded

    def _extract(self, backbone: DinoVisionTransformer, paths: list[Path], device: torch.device) -> Extraction:
        return extract(
            backbone,
            paths,
            image_size=self.cfg.crops.global_crops_size,
            batch_size=self.cfg.evaluation.batch_size,
            device=device,
            num_workers=self.cfg.train.num_workers,
            progress=False,
            fp32_matmul=self.cfg.compute_precision.fp32_matmul,
        )


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the draws after it are those that there would have been without."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def save_teacher(state: dict[str, Tensor], model: SSLMetaArch, path: Path, done: int) -> None:
    """Write `{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}` in fp32, with what rebuilds the network."""
    with atomic_write(path) as file:
        torch.save({"teacher": state, "architecture": architecture(model.teacher_backbone), "iteration": done}, file)


def score(results: Mapping[str, Any]) -> tuple[str, float]:
    """What teachers are compared by: the balanced accuracy of kNN with the largest k, as the mean over the data sets.

    Args:
        results: the content of a results.json.

    Returns:
        which numbers these are, in words, and their mean. Teachers are compared where the words are the same.
    """
    values = {}
    for name, found in results["datasets"].items():
        largest = max(found["knn"], key=lambda key: int(key.removeprefix("knn_")))
        values[f"{largest} on {name}"] = found["knn"][largest]["balanced_accuracy"]
    words = "balanced accuracy of " if len(values) == 1 else "mean balanced accuracy of "
    return words + ", ".join(values), statistics.fmean(values.values())


def _folder(run_folder: Path, done: int) -> Path:
    return run_folder / "eval" / f"training_{done}"


def _side(cells: LabelledCells, embedded: Mapping[Path, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and labels [N] of those cells that have features."""
    kept = [i for i, path in enumerate(cells.paths) if path in embedded]
    if not kept:
        raise ValueError(f"none of {len(cells)} pictures could be read, for instance {cells.paths[0]}")
    return np.stack([embedded[cells.paths[i]] for i in kept]), cells.labels[kept]


def _results_on(labelled: LabelledSet, embedded: Mapping[Path, np.ndarray], device: torch.device) -> dict[str, Any]:
    """What the features are worth on one set: `n_train`, `n_test`, `knn` and, if asked for, `linear`."""
    train, train_labels = _side(labelled.train, embedded)
    test, test_labels = _side(labelled.test, embedded)
    class_names = labelled.train.class_names
    on_device = torch.as_tensor(train, device=device), train_labels, torch.as_tensor(test, device=device), test_labels
    results = {
        "n_train": len(train),
        "n_test": len(test),
        "knn": evaluate_knn(*on_device, class_names, labelled.ks),
    }
    if labelled.with_linear:
        probe = fit_linear_probe(train, train_labels, len(class_names), device=device)
        probabilities = probe.predict_proba(test)
        results["linear"] = classification_metrics(
            test_labels, probabilities.argmax(axis=1), class_names, probabilities
        )
    return results


def _spread_on(labelled: LabelledSet, embedded: Mapping[Path, np.ndarray], device: torch.device) -> dict[str, float]:
    """`effective_rank` and `feature_spread` (train/monitor.py) of all cells of a set; training_metrics.json has those of
    the crops of a step."""
    features = np.concatenate([_side(cells, embedded)[0] for cells in (labelled.train, labelled.test)])
    found = feature_statistics(torch.as_tensor(features, device=device))
    return {name: value.item() for name, value in found.items()}


def _methods(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{knn_<k> or linear: its metrics}."""
    return {**found["knn"], **({"linear": found["linear"]} if "linear" in found else {})}


def _scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a results.json that trackers follow."""
    of_sets = {
        f"evaluation/{name}/{method}_{metric}": values[metric]
        for name, found in results["datasets"].items()
        for method, values in _methods(found).items()
        for metric in FOLLOWED
    }
    return {**of_sets, **{f"evaluation/teacher/{name}": value for name, value in results["teacher"].items()}}


def _report(results: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
    done = results["iteration"]
    for name, found in results["datasets"].items():
        told = "  ".join(
            f"{method} accuracy {values['accuracy']:.3f} balanced {values['balanced_accuracy']:.3f}"
            for method, values in _methods(found).items()
        )
        logger.info("after iteration %d, %s (%d cells): %s", done, name, found["n_test"], told)
    told = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in results["teacher"].items())
    if best is not None:
        told += f"  (best so far: {best['score']:.3f} at iteration {best['iteration']})"
    logger.info("after iteration %d, teacher: %s", done, told)


def _write_best(folder: Path, done: int, metric: str) -> dict[str, Any] | None:
    """Write best.json: the teacher with the highest `metric` up to `done` iterations; None if none is saved.

    It is worked out from the results on disk, so a resumed run counts what came before it and nothing that came after.
    """
    candidates = []
    for iteration, teacher in _teachers(folder, done).items():
        found = teacher.with_name(RESULTS_NAME)
        if found.is_file():
            its_metric, its_score = score(json.loads(found.read_text(encoding="utf-8")))
            if its_metric == metric:
                candidates.append((its_score, -iteration))
    if not candidates:
        return None
    best_score, iteration = max(candidates)
    best = {
        "iteration": -iteration,
        "metric": metric,
        "score": best_score,
        "checkpoint": f"training_{-iteration}/{CHECKPOINT_NAME}",
    }
    with atomic_write(folder / "best.json", "w") as file:
        json.dump(best, file, indent=1)
    return best


def _teachers(folder: Path, done: int) -> dict[int, Path]:
    """{iteration: file} of the teachers up to `done` iterations, ascending.

    Later ones are of a part of the run that was lost, and come again.
    """
    found = {
        int(match[1]): file
        for file in folder.glob(f"training_*/{CHECKPOINT_NAME}")
        if (match := re.fullmatch(r"training_(\d+)", file.parent.name)) and int(match[1]) <= done
    }
    return dict(sorted(found.items()))


def _remove_teachers(folder: Path, done: int, n_kept: int) -> None:
    """Remove all teachers but the newest `n_kept` and the best; their results stay."""
    best_file, best = folder / "best.json", None
    try:
        if best_file.is_file():
            best = folder / json.loads(best_file.read_text(encoding="utf-8"))["checkpoint"]
        for teacher in list(_teachers(folder, done).values())[:-n_kept]:
            if teacher != best:
                teacher.unlink()
                if not any(teacher.parent.iterdir()):
                    teacher.parent.rmdir()
    except OSError as error:
        logger.warning("teachers beyond those of evaluation.keep_teachers could not be removed: %s", error)
