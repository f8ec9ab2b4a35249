"""The commands that the README shows do their work on sample cells, and no command has lost a flag.

The commands are written out here, so that a README that drops one does not drop its test. `python
tests/test_readme_commands.py` records the flags of all commands in recorded_flags.json; do that after adding one.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from dinov2.data.sample_cells import write_sample_cells
from dinov2.models import build_backbone

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_name("recorded_flags.json")
COMMANDS = (
    *("dinov2/train/train.py", "dinov2/run/train/train.py", "dinov2/hub/export.py"),
    *(f"dinov2/eval/{name}.py" for name in ("evaluate", "extract_features", "knn", "linear", "abmil", "cross")),
    *(f"dinov2/eval/{name}.py" for name in ("finetune", "predict", "trust")),
    *(f"dinov2/eval/{name}.py" for name in ("compare", "report", "explorer", "cell_maps")),
    *(f"dinov2/run/eval/{name}.py" for name in ("extract_features", "knn", "linear", "abmil", "finetune")),
    *(f"scripts/{name}.py" for name in ("make_patch_lists", "make_sample_cells", "check_lists", "pack_dataset")),
    *(f"scripts/{name}.py" for name in ("prepare_dataset", "watch_run", "make_media", "fault_drill")),
)
SMALL = (
    "student.arch=vit_tiny student.depth=1 crops.global_crops_size=28 train.image_size=32 train.batch_size_per_gpu=4 "
    "train.num_workers=0 optim.epochs=1 optim.warmup_epochs=0 train.OFFICIAL_EPOCH_LENGTH=2 "
    "student.pretrained_weights=null dino.head_n_prototypes=64 ibot.head_n_prototypes=64"
)
# what a reader types, and a file that must be there afterwards
STEPS = [
    ("scripts/make_patch_lists.py images --output lists/cells.txt", "lists/cells.txt"),
    (
        f"dinov2/train/train.py --config-file {ROOT}/dinov2/configs/train/custom.yaml --output-dir runs --name first "
        f"train.dataset_path=HemaStandardDataset:root=lists:shuffle=1 {SMALL}",
        "runs/first/training_metrics.json",
    ),
    (
        "scripts/check_lists.py lists --eval-splits test.csv --output-dir list_report/",
        "list_report/report.md",
    ),
    ("scripts/pack_dataset.py HemaStandardDataset:root=lists --cache cache", "cache"),
    (
        "dinov2/eval/evaluate.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir results/ --baseline histogram",
        "results/results.json",
    ),
    (
        "dinov2/eval/extract_features.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir features/",
        "features/features.h5",
    ),
    (
        "dinov2/eval/knn.py --features features/features.h5 --output-dir results/knn/ --few-shot 1 2",
        "results/knn/predictions_knn_20.csv",
    ),
    (
        "dinov2/eval/linear.py --features features/features.h5 --output-dir results/linear/",
        "results/linear/predictions.csv",
    ),
    (
        "dinov2/eval/trust.py --features features/features.h5 --output-dir results/trust/",
        "results/trust/label_errors.csv",
    ),
    (
        "dinov2/eval/extract_features.py --checkpoint DinoBloom-S.pth --data patients.csv --output-dir patients/",
        "patients/features.h5",
    ),
    (
        "dinov2/eval/abmil.py --features patients/features.h5 --output-dir results/abmil/ --epochs 3 --runs 1",
        "results/abmil/aggregator.pth",
    ),
    (
        "dinov2/eval/abmil.py --features patients/features.h5 --apply results/abmil/aggregator.pth --output-dir new/",
        "new/predictions.csv",
    ),
    (
        "dinov2/eval/extract_features.py --checkpoint DinoBloom-S.pth --data others/ --output-dir others_features/",
        "others_features/features.h5",
    ),
    (
        "dinov2/eval/cross.py --features features/features.h5 others_features/features.h5 --output-dir results/cross/",
        "results/cross/matrix.csv",
    ),
    (
        "dinov2/eval/finetune.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir results/finetune/ --epochs 1 "
        "--image-size 28 --num-workers 0 --folds 2",
        "results/finetune/finetuned_1.pth",
    ),
    (
        "dinov2/eval/predict.py --checkpoint results/finetune/ --data others/ --output-dir predictions/",
        "predictions/review.csv",
    ),
    (
        "dinov2/eval/compare.py results/linear/predictions.csv results/finetune/predictions.csv --output both.json",
        "both.json",
    ),
    ("scripts/watch_run.py runs/first", "runs/first/status.json"),
    ("dinov2/eval/report.py runs/first results/ --output report.html --cells cells/", "report.html"),
    ("dinov2/eval/explorer.py --features features/features.h5 --output explorer.html", "explorer.html"),
    ("dinov2/eval/cell_maps.py --checkpoint runs/first --data cells/ --output-dir maps/", "maps/cells.html"),
]


def run(command: str) -> str:
    """Run a script as `python <script> ...` does, in this process; return what it prints."""
    script, *arguments = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code, (command, end.value.code)
    return printed.getvalue()


def flags(script: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", run(f"{script} --help"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README's reader has: images, labelled cells of two places, patients, and a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    cells = folder / "drawn"
    write_sample_cells(cells, 16, 80, 60, n_patients=30, size=48, cells_per_patient=(2, 3))
    for name, target in {"images": "train", "cells": "probe/train", "others": "probe/test"}.items():
        (folder / name).symlink_to(cells / target)
    for name, source in {"test.csv": "probe/test.csv", "patients.csv": "patients.csv"}.items():
        table = pd.read_csv(cells / source)
        table["Image Path"] = [str((cells / source).parent / path) for path in table["Image Path"]]
        table.to_csv(folder / name, index=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_backbone(
            {"arch": "vit_tiny", "depth": 1, "patch_size": 14, "layerscale": 1.0, "block_chunks": 0, "img_size": 224}
        )
    weights = {"teacher": {f"backbone.{name}": value for name, value in network.state_dict().items()}}
    torch.save(weights, folder / "DinoBloom-S.pth")
    return folder


def test_commands_do_their_work_one_after_the_other(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "umap", None)  # it compiles for seconds, and tests/eval has its tests
    for command, result in STEPS:
        run(command)
        assert (folder / result).exists(), command


@pytest.mark.parametrize("script", COMMANDS)
def test_no_flag_is_lost(script):
    assert set(json.loads(RECORDED.read_text())[script]) <= set(flags(script))


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({script: flags(script) for script in COMMANDS}, indent=1) + "\n")
