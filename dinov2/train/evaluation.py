"""The teacher during training: written as a file to use, and judged by kNN where labelled cells are given."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.cells import LabelledCells
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, on_main_process
from dinov2.eval.features import Extraction, extract
from dinov2.eval.knn import evaluate_knn
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
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

    def run(self, model: SSLMetaArch, run_folder: Path, done: int) -> bool:
        """Write the teacher as it is after `done` iterations, and judge it; False if it could not be written."""
        checkpoint = run_folder / "eval" / f"training_{done}" / CHECKPOINT_NAME
        state = model.teacher_state()
        try:
            on_main_process(lambda: save_teacher(state, model, checkpoint, done))
            logger.info("teacher: %s", checkpoint)
            self.judge(model, run_folder, done)
        except OSError as error:
            logger.error("the teacher after iteration %d could not be written or judged: %s", done, error)
            return False
        return True

    def judge(self, model: SSLMetaArch, run_folder: Path, done: int) -> None:
        """kNN with the teacher's features where labelled cells are given; writes knn.json, and best.json above it."""
        if self._cells is None:
            return
        embedded = self._embed(model)
        on_main_process(lambda: self._judge(embedded, run_folder, done))

    def _judge(self, embedded: list[tuple[np.ndarray, np.ndarray]], run_folder: Path, done: int) -> None:
        assert self._cells is not None, "judge() asks for kNN only when there are cells"
        (train, train_labels), (test, test_labels) = embedded
        ks = sorted(self.cfg.evaluation.knn_k)
        knn = evaluate_knn(train, train_labels, test, test_labels, self._cells[0].class_names, ks)
        results = {"iteration": done, "n_train": len(train_labels), "n_test": len(test_labels), "knn": knn}
        with atomic_write(run_folder / "eval" / f"training_{done}" / "knn.json", "w") as file:
            json.dump(results, file, indent=1)
        name = list(knn)[-1]
        best = _write_best(run_folder / "eval", done, name)
        logger.info(
            "kNN on %d cells after iteration %d: %s%s",
            *(len(test_labels), done),
            "  ".join(
                f"{name} accuracy {m['accuracy']:.3f} balanced {m['balanced_accuracy']:.3f}" for name, m in knn.items()
            ),
            f"  (best so far: {best['score']:.3f} at iteration {best['iteration']})" if best else "",
        )

    def _embed(self, model: SSLMetaArch) -> list[tuple[np.ndarray, np.ndarray]]:
        """(features, labels) of the training and the test cells; each process embeds its share of them."""
        assert self._cells is not None, "judge() asks for kNN only when there are cells"
        backbone = model.whole_teacher_backbone()
        embedded = []
        for cells in self._cells:
            mine = np.arange(get_rank(), len(cells), get_world_size())
            found = self._extract(backbone, [cells.paths[i] for i in mine], model.device)
            shares = all_gather_objects((mine[found.kept], found.features) if found is not None else None)
            present = [share for share in shares if share is not None]
            kept = np.concatenate([indices for indices, _ in present])
            order = np.argsort(kept)
            features = np.concatenate([features for _, features in present])[order]
            embedded.append((features, cells.labels[kept[order]]))
        return embedded

    def _extract(self, backbone: DinoVisionTransformer, paths: list[Path], device: torch.device) -> Extraction | None:
        if not paths:  # fewer cells than processes
            return None
        return extract(
            backbone,
            paths,
            image_size=self.cfg.crops.global_crops_size,
            batch_size=self.cfg.evaluation.batch_size,
            device=device,
            num_workers=self.cfg.train.num_workers,
            progress=False,
        )


def save_teacher(state: dict[str, Tensor], model: SSLMetaArch, path: Path, done: int) -> None:
    """Write `{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}` in fp32, with what rebuilds the network."""
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
