"""The teacher during training: written as a file to use, and judged by kNN where labelled cells are given."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from dinov2.data.datasets.cells import LabelledCells
from dinov2.eval.features import extract
from dinov2.eval.knn import evaluate_knn
from dinov2.models import architecture
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")


class TeacherEvaluation:
    """Writes `eval/training_<n>/teacher_checkpoint.pth` and, given labelled cells, kNN results beside it."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self._cells: tuple[LabelledCells, LabelledCells] | None = None
        if cfg.evaluation.train_data:
            train_cells = LabelledCells.from_path(cfg.evaluation.train_data)
            self._cells = train_cells, LabelledCells.from_path(cfg.evaluation.test_data, train_cells.class_names)

    def is_due(self, done: int) -> bool:
        period = self.cfg.evaluation.eval_period_iterations
        return period > 0 and done % period == 0

    def run(self, model: SSLMetaArch, run_folder: Path, done: int) -> None:
        """Write the teacher as it is after `done` iterations, and judge it."""
        checkpoint = run_folder / "eval" / f"training_{done}" / "teacher_checkpoint.pth"
        save_teacher(model, checkpoint, done)
        logger.info("teacher: %s", checkpoint)
        self.judge(model, run_folder, done)

    def judge(self, model: SSLMetaArch, run_folder: Path, done: int) -> None:
        """kNN with the teacher's features where labelled cells are given; writes knn.json, and best.json above it."""
        if self._cells is None:
            return
        results = {"iteration": done, **self._knn(model)}
        with atomic_write(run_folder / "eval" / f"training_{done}" / "knn.json", "w") as file:
            json.dump(results, file, indent=1)
        name, metrics = list(results["knn"].items())[-1]
        score = metrics["balanced_accuracy"]
        best = _remember_best(run_folder / "eval" / "best.json", done, f"{name} balanced accuracy", score)
        logger.info(
            "kNN on %d cells after iteration %d: %s  (best so far: %.3f at iteration %d)",
            *(results["n_test"], done),
            "  ".join(
                f"{name} accuracy {m['accuracy']:.3f} balanced {m['balanced_accuracy']:.3f}"
                for name, m in results["knn"].items()
            ),
            *(best["score"], best["iteration"]),
        )

    def _knn(self, model: SSLMetaArch) -> dict[str, Any]:
        assert self._cells is not None, "run() asks for kNN only when there are cells"
        train_cells, test_cells = self._cells
        features, labels = [], []
        for cells in (train_cells, test_cells):
            found = extract(
                model.teacher_backbone,
                cells.paths,
                image_size=self.cfg.crops.global_crops_size,
                batch_size=self.cfg.evaluation.batch_size,
                device=model.device,
                progress=False,
            )
            features.append(found.features)
            labels.append(cells.labels[found.kept])
        ks = [k for k in sorted(self.cfg.evaluation.knn_k) if k <= len(labels[0])]
        knn = evaluate_knn(features[0], labels[0], features[1], labels[1], train_cells.class_names, ks)
        return {"n_train": len(labels[0]), "n_test": len(labels[1]), "knn": knn}


def save_teacher(model: SSLMetaArch, path: Path, done: int) -> None:
    """Write `{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}` in fp32, with what rebuilds the network."""
    state = {name: value.detach().to("cpu", torch.float32) for name, value in model.teacher.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"teacher": state, "architecture": architecture(model.teacher_backbone), "iteration": done}, file)


def _remember_best(path: Path, done: int, metric: str, score: float) -> dict[str, Any]:
    """Keep in best.json which checkpoint scored highest so far; a resumed run counts what came before it."""
    best = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if best is None or score > best["score"]:
        best = {
            "iteration": done,
            "metric": metric,
            "score": score,
            "checkpoint": f"training_{done}/teacher_checkpoint.pth",
        }
        with atomic_write(path, "w") as file:
            json.dump(best, file, indent=1)
    return best
