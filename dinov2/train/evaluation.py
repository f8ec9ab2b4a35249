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

CHECKPOINT_NAME = "teacher_checkpoint.pth"


class TeacherEvaluation:
    """Writes `eval/training_<n>/teacher_checkpoint.pth` and, given labelled cells, kNN results beside it."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self._cells: tuple[LabelledCells, LabelledCells] | None = None
        if not cfg.evaluation.train_data:
            return
        train_cells = LabelledCells.from_path(cfg.evaluation.train_data)
        test_cells = LabelledCells.from_path(cfg.evaluation.test_data, train_cells.class_names)
        shared = {path.resolve() for path in train_cells.paths} & {path.resolve() for path in test_cells.paths}
        if shared:
            raise ValueError(
                f"evaluation.train_data and evaluation.test_data share {len(shared)} pictures, for instance "
                f"{min(shared)}; a picture that is judged must not vote"
            )
        if not cfg.evaluation.knn_k or max(cfg.evaluation.knn_k) > len(train_cells):
            raise ValueError(
                f"evaluation.knn_k must name numbers of neighbours up to the {len(train_cells)} cells of "
                f"evaluation.train_data, found {list(cfg.evaluation.knn_k)}"
            )
        self._cells = train_cells, test_cells

    def is_due(self, done: int) -> bool:
        period = self.cfg.evaluation.eval_period_iterations
        return period > 0 and done % period == 0

    def run(self, model: SSLMetaArch, run_folder: Path, done: int) -> None:
        """Write the teacher as it is after `done` iterations, and judge it."""
        checkpoint = run_folder / "eval" / f"training_{done}" / CHECKPOINT_NAME
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
        name = list(results["knn"])[-1]
        best = _write_best(run_folder / "eval", done, name)
        logger.info(
            "kNN on %d cells after iteration %d: %s%s",
            *(results["n_test"], done),
            "  ".join(
                f"{name} accuracy {m['accuracy']:.3f} balanced {m['balanced_accuracy']:.3f}"
                for name, m in results["knn"].items()
            ),
            f"  (best so far: {best['score']:.3f} at iteration {best['iteration']})" if best else "",
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
                num_workers=self.cfg.train.num_workers,
                progress=False,
            )
            features.append(found.features)
            labels.append(cells.labels[found.kept])
        ks = sorted(self.cfg.evaluation.knn_k)
        knn = evaluate_knn(features[0], labels[0], features[1], labels[1], train_cells.class_names, ks)
        return {"n_train": len(labels[0]), "n_test": len(labels[1]), "knn": knn}


def save_teacher(model: SSLMetaArch, path: Path, done: int) -> None:
    """Write `{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}` in fp32, with what rebuilds the network."""
    state = {name: value.detach().to("cpu", torch.float32) for name, value in model.teacher.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"teacher": state, "architecture": architecture(model.teacher_backbone), "iteration": done}, file)


def _write_best(folder: Path, done: int, name: str) -> dict[str, Any] | None:
    """Write best.json: the teacher with the highest balanced accuracy up to `done` iterations; None if none is saved.

    It is worked out from the results on disk, so a resumed run counts what came before it and nothing that came after.
    """
    candidates = []
    for found in folder.glob("training_*/knn.json"):
        result = json.loads(found.read_text(encoding="utf-8"))
        if result["iteration"] <= done and name in result["knn"] and (found.parent / CHECKPOINT_NAME).is_file():
            candidates.append((result["knn"][name]["balanced_accuracy"], -result["iteration"]))
    if not candidates:
        return None
    score, iteration = max(candidates)
    best = {
        "iteration": -iteration,
        "metric": f"{name} balanced accuracy",
        "score": score,
        "checkpoint": f"training_{-iteration}/{CHECKPOINT_NAME}",
    }
    with atomic_write(folder / "best.json", "w") as file:
        json.dump(best, file, indent=1)
    return best
