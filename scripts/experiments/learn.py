"""Train small networks on real cells by several recipes, with equal budgets and seeds, and compare them.

    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc
    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --ssl <segmentation_WBC> \
        --output-dir runs/arena --recipes scripts/experiments/recipes.yaml --budgets 560 1680 --seeds 0 1
    python scripts/experiments/learn.py --pbc <PBC_dataset_normal_DIB> --output-dir runs/pbc --name from_weights \
        student.pretrained_weights=<run or file>

Three quarters of the images (Acevedo et al. 2020) are trained on by a .txt list, without labels. kNN and a linear probe
learn from the same images with their labels, and are tested on the rest, on DinoBloom's ten classes: file prefixes
split `ig` and `neutrophil` into stages. With `--ssl` they are also tested on SSL Seg Dataset 1 (Zheng et al. 2018), of
another hospital, on the four classes that both have. Byte-identical copies are left out. All runs in one output folder
share the split.

A budget is in core-seconds: CPU time of the training's steps, over all threads and data workers, which other programs
on the machine change by about a tenth. Before a recipe's first run, short trainings measure the CPU time of a step;
the budget divided by it is the number of steps of all seeds. Start-up and evaluations do not count. Without
`--budgets` a recipe has its own number of steps.

A recipe is a name with config values, in YAML; its `config_file`, or else `--config-file`, has all others. Runs are
ordered by seed, then budget, then recipe. The same command continues a stopped experiment, within a run too. After each
run, scores.csv, results.md and curves.png are written with all runs of the output folder.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from real_cells import find_ssl_cells

import dinov2.train.train as train_command
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.datasets import find_images
from dinov2.data.prepare.class_folders import ACEVEDO_STAGES
from dinov2.eval import extract_features, knn, linear
from dinov2.eval.features import Features, read_features
from dinov2.eval.knn import KnnOptions
from dinov2.eval.linear import LinearOptions
from dinov2.eval.protocol import EvaluationData
from dinov2.eval.results import summarize
from dinov2.train.batches import build_dataset
from dinov2.utils.command import exit_code
from dinov2.utils.config import load_run_config, read_config
from dinov2.utils.files import atomic_write, file_sha256
from dinov2.utils.numerics import derive_seed

SPLITS = ("train", "test")
KINDS = ("cls", "mean", "cls+mean")
FOUR = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")  # SSL Seg has one basophil
WITHIN, TRANSFER = "PBC, ten classes", "PBC to SSL Seg, four classes"
N_EVALUATIONS = 4  # during a run
SHORT, LONG = 5, 25  # steps of the trainings that measure the CPU time of a step
N_MEASUREMENTS = 3  # beside five busy programs, single ones differ by a seventh
METRIC = "balanced_accuracy"
RECALL = "recall of "  # columns of scores.csv: recall of <class> (<test cells>)


def find_pbc_images(pbc: Path) -> list[Path]:
    """Return the paths of all images of the data set; exit if there are none of its ten classes."""
    paths = find_images(pbc)
    if not {path.name.split("_")[0] for path in paths} & ACEVEDO_STAGES.keys():
        raise SystemExit(
            f"--pbc: {pbc} has {len(paths)} images, and no name of one begins with {', '.join(ACEVEDO_STAGES)} "
            "and `_`; give the folder PBC_dataset_normal_DIB"
        )
    return paths


def write_split(paths: Sequence[Path], folder: Path, seed: int = 0) -> dict[str, int]:
    """Write lists/train.txt and {train,test}{8,10}.csv; return the number of images of each split."""
    images = pd.DataFrame({"path": paths})
    images["content"] = images["path"].map(file_sha256)
    images["class"] = images["path"].map(lambda path: path.parent.name)
    images["stage"] = images["path"].map(lambda path: path.name.split("_")[0])
    has_one_class = images.groupby("content")["class"].transform("nunique") == 1
    images = images[has_one_class].drop_duplicates("content")
    order: dict[str, list[int]] = {split: [] for split in SPLITS}
    for stage, rows in images.groupby("stage"):
        positions = rows.index.tolist()
        random.Random(derive_seed(seed, stage)).shuffle(positions)
        order["test"] += positions[: len(positions) // 4]
        order["train"] += positions[len(positions) // 4 :]
    images["path"] = images["path"].map(Path.resolve)
    parts = {split: images.loc[positions] for split, positions in order.items()}
    with atomic_write(folder / "lists" / "train.txt", "w") as file:
        file.writelines(f"{path}\n" for path in parts["train"]["path"])
    for split, part in parts.items():
        for n_classes, labels in ((8, part["class"]), (10, part["stage"].map(ACEVEDO_STAGES))):
            table = pd.DataFrame({"Image Path": part["path"], "Label": labels}).dropna()
            table.to_csv(folder / f"{split}{n_classes}.csv", index=False)
    return {split: len(part) for split, part in parts.items()}


# --- training -------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """A training: a configuration, and values of the command line that replace some of its own."""

    config: Path
    overrides: list[str]


def read_recipes(file: Path, config: Path) -> dict[str, Recipe]:
    """Read {name: {config key: value}}; names that begin with a dot are left out.

    The value of `config_file` is a name in `CONFIG_FOLDER`/train; without it, a recipe has `config`.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipes = {}
        for name, values in content.items():
            values = dict(values or {})
            own = CONFIG_FOLDER / "train" / values.pop("config_file") if "config_file" in values else config
            if not str(name).startswith("."):
                texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
                recipes[str(name)] = Recipe(own, [f"{key}={text}" for key, text in texts.items()])
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SystemExit(
            f"--recipes: {file} is no list of recipes ({text}); write `<name>: {{<config key>: <value>}}` for each"
        ) from error
    return recipes


class Arena:
    """The runs of one output folder, which share the split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, run: Path, recipe: Recipe, *overrides: str) -> None:
        """Run train.py as a user would, which resumes an unfinished run; exit as it does if it is stopped or fails."""
        command = [sys.executable, train_command.__file__, "--config-file", recipe.config, "--output-dir", run.parent]
        settings = ["--name", run.name, self.images, *recipe.overrides, *overrides]
        done = subprocess.run([*map(str, command), *settings])
        if done.returncode:
            sys.exit(done.returncode)

    @property
    def images(self) -> str:
        """Return the override that names the training images, decoded once for all runs."""
        lists, cache = self.folder / "lists", self.folder / "cache"
        return f"train.dataset_path=HemaStandardDataset:root={lists}:shuffle=1:cache={cache}"

    def cost(self, name: str, recipe: Recipe) -> float:
        """Return the core-seconds of a step of a recipe, measured once."""
        file = self.folder / name / "cost.json"
        if file.is_file():
            return float(json.loads(file.read_text(encoding="utf-8"))["core_seconds_per_step"])
        cache = build_dataset(load_run_config(recipe.config, [*recipe.overrides, self.images])).cache
        assert cache is not None, "named in the dataset string"
        cache.build()  # else the first training would, and count it
        cpu: dict[int, list[float]] = {SHORT: [], LONG: []}
        for n_steps in (SHORT, LONG) * N_MEASUREMENTS:
            run = file.parent / f"{n_steps}_steps"
            shutil.rmtree(run, ignore_errors=True)  # of a stopped measurement: its steps would not be counted
            before = cpu_of_children()
            self.train(run, recipe, *self.steps(recipe, n_steps), "evaluation.datasets=[]", "train.views=0")
            cpu[n_steps].append(cpu_of_children() - before)
            shutil.rmtree(run)
        # the shortest, since shared caches and cores only add to it
        seconds = (min(cpu[LONG]) - min(cpu[SHORT])) / (LONG - SHORT)
        if seconds <= 0:
            raise SystemExit(
                f"recipe {name}: {LONG} steps took {min(cpu[LONG]):.1f} core-seconds and {SHORT} steps "
                f"{min(cpu[SHORT]):.1f}: the machine is too busy to measure a step; try again later"
            )
        with atomic_write(file, "w") as stream:
            json.dump({"core_seconds_per_step": seconds}, stream, indent=1)
        return seconds

    def steps(self, recipe: Recipe, n_steps: int | None) -> list[str]:
        """Return overrides for a run of `n_steps` with N_EVALUATIONS evaluations; None: the recipe's own numbers."""
        if n_steps is None:
            return []
        cfg = load_run_config(recipe.config, [*recipe.overrides, self.images])
        epochs, period = n_steps / cfg.train.OFFICIAL_EPOCH_LENGTH, math.ceil(n_steps / N_EVALUATIONS)
        overrides = [f"optim.epochs={epochs!r}", f"evaluation.eval_period_iterations={period}"]
        # trainings that only measure are shorter than a warm-up
        return overrides + ["optim.warmup_epochs=0"] * (epochs < cfg.optim.warmup_epochs)

    def run(self, name: str, recipe: Recipe, budget: float | None, seed: int) -> None:
        """Train, and write the scores of the features, unless this is done already."""
        cfg = load_run_config(recipe.config, [*recipe.overrides, "train.dataset_path=HemaStandardDataset:root=lists"])
        settings = {"recipe": [recipe.config.name, *recipe.overrides], "checksum of all values": checksum(cfg)}
        keep_settings(self.folder / name, settings, "recipe or --name")
        place = self.folder / name / (f"{budget:g}s" if budget else "") / f"seed{seed}"
        if (place / "scores.csv").is_file():
            return
        n_steps = max(1, round(budget / self.cost(name, recipe))) if budget else None
        labelled = {"name": "pbc", "knn_k": [20], **{side: str(self.folder / f"{side}10.csv") for side in SPLITS}}
        overrides = [f"train.seed={seed}", f"evaluation.datasets={json.dumps([labelled])}"]
        self.train(place, recipe, *self.steps(recipe, n_steps), *overrides)
        scores = self.score(["--checkpoint", str(place), "--kinds", *KINDS], place / "features")
        write_table(scores, place / "scores.csv")

    def score(self, network: Sequence[str], folder: Path) -> pd.DataFrame:
        """Extract features of all cells and evaluate them: a row for each task, kind of features and protocol."""
        features, cells = {}, {side: self.folder / f"{side}8.csv" for side in SPLITS}
        if (self.folder / "ssl.csv").is_file():
            cells["ssl"] = self.folder / "ssl.csv"
        for side, table in cells.items():
            flags = ["--data", str(table), "--num-workers", "0", "--overwrite"]
            extract_features.main([*network, *flags, "--output-dir", str(folder / side)])
            features[side] = read_features(folder / side / "features.h5")
        ten = pd.concat([pd.read_csv(self.folder / f"{side}10.csv") for side in SPLITS])
        rows = score(WITHIN, features["train"], features["test"], ten)
        if "ssl" in features:
            four = pd.concat([pd.read_csv(cells["train"]), pd.read_csv(cells["ssl"])])
            rows += score(TRANSFER, features["train"], features["ssl"], four[four["Label"].isin(FOUR)])
        return pd.DataFrame(rows)


def checksum(cfg: Any) -> str:
    """Return a short checksum of all values of a configuration, whose file may change between two runs."""
    return hashlib.sha256(OmegaConf.to_yaml(cfg).encode()).hexdigest()[:8]


def keep_settings(folder: Path, settings: Mapping[str, Any], key: str) -> None:
    """Write settings.json into a folder of results; exit if it has other settings, since its results are of those."""
    file, content = folder / "settings.json", json.loads(json.dumps(settings))
    if file.is_file() and (known := json.loads(file.read_text(encoding="utf-8"))) != content:
        raise SystemExit(f"{folder} has results of other settings: {known}, and now {content}; choose another {key}")
    with atomic_write(file, "w") as stream:
        json.dump(content, stream, indent=1)


def write_table(table: pd.DataFrame, file: Path) -> None:
    with atomic_write(file, "w") as stream:
        table.to_csv(stream, index=False)


def cpu_of_children() -> float:
    """Return the CPU time in seconds of all ended processes that this one started, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- evaluation -----------------------------------------------------------------------------------------------------


def score(task: str, train: Features, test: Features, labels: pd.DataFrame) -> list[dict[str, Any]]:
    """Evaluate kNN-20 and a linear probe on each kind of features of the cells in `labels`."""
    known = dict(zip(labels["Image Path"], labels["Label"], strict=True))
    class_names = sorted(set(known.values()))
    sides = [side.select(np.array([path in known for path in side.paths])) for side in (train, test)]
    numbers = np.array([class_names.index(known[path]) for side in sides for path in side.paths])
    fold = np.split(np.arange(len(numbers)), [len(sides[0])])
    rows = []
    for kind in train.kinds:
        values = np.concatenate([side.of_kind(kind).features for side in sides])
        data = EvaluationData({kind: values}, numbers, class_names, [(fold[0], fold[1])])
        predictions = knn.evaluate(data, KnnOptions(k=[20])) | linear.evaluate(data, LinearOptions("sweep"))
        for method, predicted in predictions.items():
            metrics = summarize(numbers, predicted, class_names)
            low, high = metrics["intervals"][METRIC]
            row = {"task": task, "kind": kind, "method": method.removesuffix("_sweep")}
            recalls = {
                f"{RECALL}{name} ({values['support']})": values["recall"]
                for name, values in metrics["per_class"].items()
            }
            rows.append({**row, "score": metrics[METRIC], "low": low, "high": high, **recalls})
    return rows


def curve(run: Path) -> dict[int, float]:
    """Return kNN-20 of the CLS token during training by number of steps."""
    reports = [json.loads(path.read_text()) for path in run.glob("eval/training_*/results.json")]
    scores = {r["iteration"]: r["datasets"]["pbc"]["knn"]["knn_20"][METRIC] for r in reports}
    return {iteration: scores[iteration] for iteration in sorted(scores)}


def draw_curves(runs: Mapping[str, Path], scores: pd.DataFrame, file: Path) -> None:
    """Draw the curves over core-seconds, a colour for each recipe, and the histogram's scores as dotted lines.

    Runs without a budget are left out, since the CPU time of their steps is not measured.
    """
    figure, numbers = Figure(figsize=(9, 6), layout="constrained"), {}
    axes = figure.add_subplot()
    for name, run in runs.items():
        cost = run.parents[1] / "cost.json"
        if cost.is_file():
            seconds = json.loads(cost.read_text(encoding="utf-8"))["core_seconds_per_step"]
            recipe = name.split(",")[0]
            label = None if recipe in numbers else recipe
            number = numbers.setdefault(recipe, len(numbers))
            line = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            values = {step * seconds: score for step, score in curve(run).items() if step}  # 0 is not on a log axis
            axes.plot(list(values), list(values.values()), label=label, linewidth=1, marker=".", **line)
    histogram = scores[(scores["name"] == "colour histogram") & (scores["task"] == WITHIN)]
    for method, level in zip(histogram["method"], histogram["score"], strict=True):
        axes.axhline(level, color="grey", linestyle=":", linewidth=1)
        text, place = f"colour histogram, {method}", axes.get_yaxis_transform()
        axes.text(1, level, text, transform=place, ha="right", va="bottom")
    axes.set(xscale="log", xlabel="core-seconds of the steps", ylabel="balanced accuracy, ten classes (kNN-20, CLS)")
    if numbers:
        axes.legend(fontsize=7)
    with atomic_write(file) as stream:
        figure.savefig(stream, dpi=100, format="png")


def cost_of(run: Path) -> dict[str, str]:
    """Return steps, images and minutes of a run."""
    cfg = read_config(run / "config.yaml")
    metrics = pd.read_json(run / "training_metrics.json", lines=True)
    n_images = len(metrics) * cfg.train.global_batch_size
    # the median step, which other work on the machine does not stretch
    minutes = metrics["iter_time"].median() * len(metrics) / 60
    return {"steps": f"{len(metrics)}", "images": f"{n_images}", "minutes": f"{minutes:.1f}"}


def markdown(first: str, rows: Mapping[Any, Mapping[str, str]]) -> list[str]:
    """Return a Markdown table with a row for each entry."""
    header = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[first, *header], ["---"] * (len(header) + 1)]
    lines += [[str(name), *(row.get(column, "") for column in header)] for name, row in rows.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def read_scores(folder: Path) -> tuple[pd.DataFrame, dict[str, Path]]:
    """Return the scores of all finished runs in a folder, and {name with its budget and seed: run}."""
    parts, runs = [pd.read_csv(folder / "histogram.csv").assign(name="colour histogram", seed=0)], {}
    for file in sorted(folder.glob("*/**/seed*/scores.csv")):
        name, seed = ", ".join(file.parts[len(folder.parts) : -2]), int(file.parent.name.removeprefix("seed"))
        parts.append(pd.read_csv(file).assign(name=name, seed=seed))
        runs[f"{name}, {seed}"] = file.parent
    return pd.concat(parts), runs


def recalls_of(scores: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return the recall of each of the ten classes by name of the runs, for kNN-20 of the CLS token."""
    rows = scores[(scores["task"] == WITHIN) & (scores["kind"] == "cls") & (scores["method"] == "knn_20")]
    recalls = rows.set_index("name").filter(like=RECALL).dropna(axis="columns", how="all")
    means = recalls.rename(columns=lambda column: column.removeprefix(RECALL)).groupby("name", sort=False).mean()
    return {str(name): {column: f"{value:.2f}" for column, value in row.items()} for name, row in means.iterrows()}


def report(scores: pd.DataFrame, runs: Mapping[str, Path], n_images: int) -> list[str]:
    """Return all tables as lines of Markdown."""
    lines = [
        f"Trained on {n_images} PBC images without labels, tested on others: balanced accuracy of kNN-20 / linear "
        "probe, means over seeds with the range in brackets.",
        "",
    ]
    for task, of_task in scores.groupby("task", sort=False):
        rows: dict[str, dict[str, str]] = {}
        for (name, kind), of_kind in of_task.groupby(["name", "kind"], sort=False):
            by_method = of_kind.groupby("method", sort=False)["score"]
            row = rows.setdefault(name, {"seeds": str(of_kind["seed"].nunique())})
            row[kind] = " / ".join(spread(values.tolist()) for _, values in by_method)
        half = (of_task["high"] - of_task["low"]).mean() / 2
        lines += [f"{task} (95 % interval of one run over the test cells: +- {half:.3f} on average):", ""]
        lines += [*markdown("recipe, budget in core-seconds", rows), ""]
    lines += [
        "Share of the cells of a class (number of test cells) that kNN-20 of the CLS token finds, mean of seeds:",
        "",
    ]
    lines += [*markdown("recipe, budget in core-seconds", recalls_of(scores)), ""]
    lines += ["kNN-20 of the CLS token on ten classes by share of the steps, and the cost of a run:", ""]
    rows = {}
    for name, run in runs.items():
        values = curve(run)
        # to the nearest 5 %: the number of steps is rarely a multiple of that of the evaluations
        shares = {f"{round(20 * step / max(values)) / 20:.0%}": f"{value:.3f}" for step, value in values.items()}
        rows[name] = {**shares, **cost_of(run)}
    return lines + markdown("recipe, budget, seed", rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pbc", type=Path, required=True, help="the data set's folder, with a folder per class")
    parser.add_argument("--ssl", type=Path, help="the repository segmentation_WBC, to test on")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the split, and a folder for each recipe")
    parser.add_argument("--recipes", type=Path, help="YAML with recipes (default: one, the configuration)")
    parser.add_argument("--only", nargs="+", help="these of --recipes (default: all)")
    parser.add_argument("--name", default="from_scratch", help="of the one recipe (default: %(default)s)")
    parser.add_argument("--config-file", type=Path, default=CONFIG_FOLDER / "train" / "small_from_scratch.yaml")
    parser.add_argument("--budgets", type=float, nargs="+", default=[None], help="core-seconds of a run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for every run")
    args = parser.parse_intermixed_args(argv)
    recipes = (
        read_recipes(args.recipes, args.config_file) if args.recipes else {args.name: Recipe(args.config_file, [])}
    )
    if unknown := set(args.only or []) - recipes.keys():
        parser.error(f"--only: {args.recipes} has no {', '.join(sorted(unknown))}; it has {', '.join(recipes)}")
    recipes = {
        name: Recipe(recipe.config, [*recipe.overrides, *args.overrides])
        for name, recipe in recipes.items()
        if name in (args.only or recipes)
    }
    pbc_images = find_pbc_images(args.pbc)
    ssl_cells = None if args.ssl is None else find_ssl_cells(args.ssl)
    arena = Arena(args.output_dir.resolve())
    sources = {name: path and str(path.resolve()) for name, path in (("pbc", args.pbc), ("ssl", args.ssl))}
    keep_settings(arena.folder, sources, "--output-dir")
    counts = write_split(pbc_images, arena.folder)
    if ssl_cells is not None:
        ssl_cells.to_csv(arena.folder / "ssl.csv", index=False)
    if not (arena.folder / "histogram.csv").is_file():
        scores = arena.score(["--encoder", "histogram", "--kinds", "cls"], arena.folder / "histogram")
        write_table(scores, arena.folder / "histogram.csv")
    for seed, budget, (name, recipe) in itertools.product(args.seeds, args.budgets, recipes.items()):
        arena.run(name, recipe, budget, seed)
        scores, runs = read_scores(arena.folder)
        write_table(scores, arena.folder / "scores.csv")
        lines = report(scores, runs, counts["train"])
        with atomic_write(arena.folder / "results.md", "w") as file:
            file.write("\n".join(lines) + "\n")
        draw_curves(runs, scores, arena.folder / "curves.png")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code(main))
