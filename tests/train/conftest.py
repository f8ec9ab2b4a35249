"""A run small enough for tests: a two-block ViT on 28-px images."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.models import architecture, build_backbone
from dinov2.train import train as train_module
from dinov2.train.batches import resolve_batch_size
from dinov2.train.dry_run import count_step_flops, measured_matmul_rate
from dinov2.train.train import main
from dinov2.utils.config import load_run_config

TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=14", "crops.global_crops_size=28", "crops.local_crops_size=14"),
    *("dino.head_n_prototypes=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8"),
    *("ibot.head_n_prototypes=16", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8"),
    *("train.batch_size_per_gpu=4", "train.num_workers=0", "train.log_period=1", "train.tensorboard=false"),
    *("train.device=cpu", "student.pretrained_weights=null"),  # custom.yaml would download some
    *("train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2", "optim.warmup_epochs=1", "train.saveckp_freq=1"),
    "teacher.warmup_teacher_temp_epochs=1",
]


@pytest.fixture(scope="session")
def lejepa_alone() -> list[str]:
    """The objective without prototypes and teacher."""
    return [
        *(f"{key}=0" for key in ("dino.loss_weight", "ibot.loss_weight", "dino.koleo_loss_weight")),
        "lejepa.loss_weight=1",
    ]


@pytest.fixture(scope="session")
def make_guided():
    """Settings for metadata guidance and distillation on the images of a list, whose table and teacher are written."""

    def make(lists: Path) -> list[str]:
        network = {"arch": "custom", "embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 7, "img_size": 28}
        torch.manual_seed(3)
        backbone = build_backbone({**network, "layerscale": 1.0})
        state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        file = lists / "frozen" / "teacher_checkpoint.pth"
        file.parent.mkdir()
        torch.save({"teacher": state, "architecture": architecture(backbone), "iteration": 1}, file)
        table, names = lists / "slides.csv", (lists / "all.txt").read_text().split()
        rows = [f"{name},{['a', 'b', '', 'c'][i % 4]}\n" for i, name in enumerate(names)]
        table.write_text("".join(["Image Path,slide\n", *rows]))
        return [
            *(f"train.dataset_path=HemaStandardDataset:root={table}:shuffle=1", f"teacher.pretrained_weights={file}"),
            *("train.metadata.column=slide", "train.metadata.weight=0.5"),
        ]

    return make


@pytest.fixture(scope="session")
def make_tiny_overrides():
    """Arguments that shrink any recipe to a run of four iterations on the lists in `folder`."""

    def make(folder, *more: str) -> list[str]:
        return [f"train.dataset_path=HemaStandardDataset:root={folder}:shuffle=1", *TINY, *more]

    return make


@pytest.fixture
def tiny_overrides(make_tiny_overrides):
    return make_tiny_overrides


COUNTED: dict[str, int] = {}
matmul_rate_once = functools.cache(measured_matmul_rate)


@pytest.fixture(autouse=True)
def _measure_speed_once(monkeypatch):
    """Count the FLOP of equal networks and batches once, and time products once: it takes longer than tiny steps."""

    def count(cfg, *, backbone_is_frozen: bool) -> int:
        sections = {name: OmegaConf.to_container(cfg[name]) for name in ("student", "crops", "dino", "ibot", "train")}
        sections["train"] |= {"output_dir": "", "dataset_path": "", "frozen": backbone_is_frozen}
        key = json.dumps(sections)
        if key not in COUNTED:
            COUNTED[key] = count_step_flops(cfg, backbone_is_frozen=backbone_is_frozen)
        return COUNTED[key]

    monkeypatch.setattr(train_module, "count_step_flops", count)
    monkeypatch.setattr(train_module, "measured_matmul_rate", matmul_rate_once)


@pytest.fixture
def run(tmp_path, image_list, tiny_overrides):
    """Run train.py in this process on eight images; returns (exit code, run folder)."""
    lists = image_list()

    def go(*overrides: str, name: str = "run", arguments: tuple[str, ...] = ()) -> tuple[int, Path]:
        common = ["--output-dir", str(tmp_path / "out"), "--name", name, *arguments]
        return main([*common, *tiny_overrides(lists, *overrides)]), tmp_path / "out" / name

    return go


@pytest.fixture
def failing(run, capfd):
    """Run train.py with a mistake; returns what it prints."""

    def go(*overrides, **kwargs) -> str:
        code, _ = run(*overrides, **kwargs)
        assert code == 2
        return capfd.readouterr().err

    return go


@pytest.fixture
def rows():
    """The rows of a run's training_metrics.json without times and rates, which differ between equal runs."""

    times = {"iter_time", "data_time", "images_per_second", "matmul_share"}

    def read(folder: Path) -> list[dict]:
        found = [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in times and not k.startswith("seconds_")} for row in found]

    return read


@pytest.fixture
def configured(tiny_overrides):
    """The configuration of a tiny run."""

    def make(*overrides: str, recipe=None, lists="nowhere"):
        return load_run_config(recipe, tiny_overrides(lists, *overrides), lambda cfg: resolve_batch_size(cfg.train, 1))

    return make


@pytest.fixture(scope="session")
def run_on_processes():
    """Run commands for run_commands.py on `n_processes`; returns their exit codes."""

    def go(n_processes: int, commands: list[dict], folder: Path) -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"commands{len(list(folder.glob('commands*.json')))}.json"
        path.write_text(json.dumps(commands))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("run_commands.py")), str(n_processes), str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(Path(f"{path}.codes").read_text())

    return go
