"""Config files, values of the command line, results.json, and the folder of a run as the pages read it."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.eval.pages.runs import read_run
from dinov2.eval.results import read_result
from dinov2.train.setup import resolve_arch
from dinov2.utils.config import load_run_config
from tests.fuzz.mutations import (
    ODD_TEXTS,
    Content,
    Format,
    damaged,
    damaged_folder,
    json_with_odd_values,
    with_odd_values,
)

BROKEN_YAML = (
    "a: &a [*a]\ntrain: *a\n",
    "a: &a {b: *a}\n",
    "x0: &x0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 9)),
    "train:\n\tseed: 1\n",
    "train: {seed: 1, seed: 2}\n",
    "train: !!python/object/apply:os.system [true]\n",
    "---\ntrain: {}\n---\ntrain: {}\n",
    "train: " + "[" * 5000,
    "? [a, b]\n: 1\n",
    "1: 2\n",
    "train: 2024-01-01\n",
    "%YAML 9.9\n---\n{}\n",
    "train: !!binary 'x'\n",
    "train: {seed: 1_000_000_000_000_000_000_000_000}\n",
)


@cache
def defaults() -> dict[str, Any]:
    """Return {section: {key: value}} of the default configuration."""
    content: Any = OmegaConf.to_container(dinov2_default_config)
    return {section: keys for section, keys in content.items() if isinstance(keys, dict) and keys}


def config_case(rng: random.Random) -> tuple[str, Content]:
    tree = {section: dict(rng.sample(list(keys.items()), min(3, len(keys)))) for section, keys in defaults().items()}
    action = rng.random()
    if action < 0.2:
        data = rng.choice(BROKEN_YAML).encode()
    else:
        try:
            text = yaml.safe_dump(with_odd_values(tree, rng) if action < 0.8 else tree, allow_unicode=True)
        except (RecursionError, yaml.YAMLError):
            text = "train: " + "{a: " * 3000
        data = text.encode("utf-8", "surrogatepass")
    return "recipe.yaml", damaged(data, rng) if action > 0.7 else data


def read_config(path: Path) -> None:
    load_run_config(path, (), resolve_arch)


def override_case(rng: random.Random) -> tuple[str, Content]:
    section = rng.choice(list(defaults()))
    key = rng.choice(list(defaults()[section]))
    value = rng.choice(
        (*ODD_TEXTS, "99999999999999999999", "-1", "inf", "-inf", "1e308", "0", "[1,2]", "{a: 1}", "{{", ",")
    )
    return f"{section}.{key}", f"{section}.{key}={value}".encode("utf-8", "surrogateescape")


def read_override(path: Path) -> None:
    load_run_config(None, [path.read_bytes().decode("utf-8", "surrogateescape")], resolve_arch)


METRICS = {"knn_5": {"accuracy": 0.5, "balanced_accuracy": 0.5}, "knn_20": {"accuracy": 0.5}}
RESULT: dict[str, Any] = {
    "protocol": "knn",
    "settings": {"k": [5, 20], "seed": 0},
    "provenance": {"date": "2024-01-01T00:00:00", "commit": "abc", "checkpoint": "x.pth"},
    "class_names": ["a", "b"],
    "metrics": METRICS,
    "folds": [METRICS, METRICS],
    "summary": {name: {metric: {"mean": 0.5, "std": 0.1} for metric in of} for name, of in METRICS.items()},
    "n_train": 10,
    "n_test": 5,
}


def results_case(rng: random.Random) -> tuple[str, Content]:
    data = json.dumps(RESULT).encode()
    return "results.json", json_with_odd_values(data, rng) if rng.random() < 0.7 else damaged(data, rng)


@cache
def run_files() -> dict[str, bytes]:
    rows = [{"iteration": number, "total_loss": 9.0 - number, "lr": 0.1, "iter_time": 0.5} for number in range(5)]
    return {
        "config.yaml": OmegaConf.to_yaml(dinov2_default_config).encode(),
        "training_metrics.json": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "status.json": json.dumps({"state": "running", "iteration": 4, "n_iterations": 5, "reason": ""}).encode(),
        "bad_images.csv": b"path,reason\na.png,truncated\n",
        "eval/training_4/results.json": json.dumps(RESULT).encode(),
        "eval/best.json": json.dumps({"iteration": 4, "metric": "knn", "value": 0.5}).encode(),
    }


def run_case(rng: random.Random) -> tuple[str, Content]:
    return "run", damaged_folder(run_files(), rng)


FORMATS = {
    "config": Format(config_case, read_config),
    "override": Format(override_case, read_override, is_file=False),
    "results": Format(results_case, lambda path: read_result(path, "run")),
    "run": Format(run_case, lambda path: read_run(path, "run")),
}
