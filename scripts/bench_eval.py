"""Times kNN, linear probe and feature extraction against the plain way, and measures their memory.

    python scripts/bench_eval.py --folder bench [--pictures <folder of cells>] [--only knn linear ...] [--rounds 5]

The plain way is upstream's: scikit-learn's KNeighborsClassifier, fitted and asked for each k; its LogisticRegression
with 1000 iterations of L-BFGS, which stops early (`linear-optimum`: with a tolerance that takes it to where ours ends);
and a PyTorch loop over a loader with one worker and torchvision's transforms. Features are made up (50,000 x 384, ten
classes that overlap); pictures are drawn cells, or those of a folder. Every measurement is a process of its own, ways
take turns, and a ratio is that of the medians. Memory is the most that the process held.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import machine, resident_mib

N_CELLS, N_TEST, DIM, N_CLASSES = 50_000, 10_000, 384, 10
KS = (1, 20)
N_PICTURES, BATCH_SIZE, IMAGE_SIZE = 400, 64, 224
OURS, PLAIN = "ours", "plain"
PACKAGES = ("torch", "scikit-learn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for what is made up, and results.json")
    parser.add_argument("--pictures", type=Path, help=f"folder of cells; the first {N_PICTURES} are embedded")
    parser.add_argument("--only", nargs="+", choices=[*WORK], default=[*WORK])
    parser.add_argument("--arch", default="vit_small", help="of the network that embeds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "WAY"), help="one measurement, as the others start it")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(WORK[args.run[0]][args.run[1]], args)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make_features(args.folder)
    if "extract" in args.only and args.pictures is None:
        args.pictures = draw_pictures(args.folder)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {what: {OURS: [], PLAIN: []} for what in args.only}
    n_done, n_all, started = 0, args.rounds * 2 * len(args.only), time.monotonic()
    for number in range(args.rounds):
        for what in args.only:
            for way in (OURS, PLAIN) if number % 2 == 0 else (PLAIN, OURS):
                found[what][way].append(in_a_process(what, way, args))
                n_done += 1
                left = (time.monotonic() - started) / n_done * (n_all - n_done)
                seconds = found[what][way][-1]["seconds"]
                print(f"{n_done}/{n_all} {what} {way}: {seconds:.2f} s (eta {left / 60:.0f} min)", file=sys.stderr)
    print("\n".join(as_table(found)))
    (args.folder / "results.json").write_text(json.dumps({"machine": machine(*PACKAGES), "found": found}, indent=1))


def in_a_process(what: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", args.folder, "--arch", args.arch, "--run", what, way]
    if args.pictures:
        command += ["--pictures", args.pictures]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(work: Callable[[argparse.Namespace], Callable[[], np.ndarray]], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the work alone; memory of the process, with the libraries and the inputs that it has loaded."""
    do = work(args)
    before = resident_mib()
    started = time.perf_counter()
    result = do()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "added_mib": peak - before, "result": result.tolist()}


def as_table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    lines = [
        "| what | plain / ours, time | range over rounds | plain: memory added | ours: memory added | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for what, ways in found.items():
        seconds = {way: [run["seconds"] for run in runs] for way, runs in ways.items()}
        ratios = [plain / ours for plain, ours in zip(seconds[PLAIN], seconds[OURS], strict=True)]
        ratio = statistics.median(seconds[PLAIN]) / statistics.median(seconds[OURS])
        memory = {way: statistics.median(run["added_mib"] for run in runs) for way, runs in ways.items()}
        lines.append(
            f"| {what} | {ratio:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {memory[PLAIN]:.0f} MiB | "
            f"{memory[OURS]:.0f} MiB | {agreement(what, ways)} |"
        )
    return [*lines, "", f"Machine: {machine(*PACKAGES)}."]


def agreement(what: str, ways: dict[str, list[dict[str, Any]]]) -> str:
    ours, plain = (np.array(ways[way][0]["result"]) for way in (OURS, PLAIN))
    if what == "extract":
        cosines = (ours * plain).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(plain, axis=1)
        return f"least cosine of two features {cosines.min():.4f}"
    return f"{(ours == plain).mean():.2%} of predictions are equal"


# --- what is measured: each prepares, and returns the work to be timed ---------------------------------------------


def knn_ours(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from dinov2.eval.knn import KnnOptions, evaluate
    from dinov2.eval.protocol import EvaluationData

    train, train_labels, test, test_labels = load_features(args.folder)
    features, labels = np.concatenate([train, test]), np.concatenate([train_labels, test_labels])
    folds = [(np.arange(len(train)), np.arange(len(train), len(labels)))]

    def work() -> np.ndarray:
        data = EvaluationData({"cls": features}, labels, [str(i) for i in range(N_CLASSES)], folds)
        rows = evaluate(data, KnnOptions(k=KS))
        return np.stack([rows[f"knn_{k}"].predictions[folds[0][1]] for k in KS])

    return work


def knn_plain(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, test, _ = load_features(args.folder)
    return lambda: np.stack([KNeighborsClassifier(k).fit(train, train_labels).predict(test) for k in KS])


def linear_ours(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from dinov2.eval.linear import fit_linear_probe

    train, train_labels, test, _ = load_features(args.folder)
    return lambda: fit_linear_probe(train, train_labels, N_CLASSES).predict_proba(test).argmax(axis=1)


def linear_plain(args: argparse.Namespace, tolerance: float = 1e-4, max_iter: int = 1000) -> Callable[[], np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    train, train_labels, test, _ = load_features(args.folder)
    strength = DIM * N_CLASSES / 100

    def work() -> np.ndarray:
        model = LogisticRegression(C=strength, tol=tolerance, max_iter=max_iter).fit(train, train_labels)
        return model.predict_proba(test).argmax(axis=1)

    return work


def linear_plain_to_the_end(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    return linear_plain(args, tolerance=1e-7, max_iter=100_000)


def extract_ours(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from dinov2.eval.features.extract import extract
    from dinov2.utils.parallel import available_cores

    model, paths = network(args.arch), pictures(args.pictures)
    workers = available_cores()
    return lambda: extract(model, paths, IMAGE_SIZE, BATCH_SIZE, num_workers=workers, progress=False).features


def extract_plain(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    import torch
    from PIL import Image
    from torchvision import transforms

    from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

    model, paths = network(args.arch), pictures(args.pictures)
    transform = transforms.Compose(
        [
            transforms.Resize(IMAGE_SIZE, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(paths[index]).convert("RGB"))

    def work() -> np.ndarray:
        loader = torch.utils.data.DataLoader(Pictures(), BATCH_SIZE, num_workers=1)
        with torch.no_grad():
            return torch.cat([model(images) for images in loader]).numpy()

    return work


WORK = {
    "knn": {OURS: knn_ours, PLAIN: knn_plain},
    "linear": {OURS: linear_ours, PLAIN: linear_plain},
    "linear-optimum": {OURS: linear_ours, PLAIN: linear_plain_to_the_end},
    "extract": {OURS: extract_ours, PLAIN: extract_plain},
}


# --- inputs ---------------------------------------------------------------------------------------------------------


def make_features(folder: Path) -> None:
    """Features as those of a small trained ViT: classes overlap, deviations fall from 6 in a few directions to 0.02."""
    if (folder / "features.npz").is_file():
        return
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_CLASSES, N_CELLS)
    scales = 6 / (1 + np.arange(DIM) / 8) ** 1.5  # of the directions
    centres = 0.6 * rng.standard_normal((N_CLASSES, DIM))
    features = (centres[labels] + rng.standard_normal((N_CELLS, DIM))) * scales
    features = features @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    np.savez(folder / "features.npz", features=features.astype(np.float32), labels=labels)


def load_features(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    with np.load(folder / "features.npz") as file:
        features, labels = file["features"], file["labels"]
    return features[N_TEST:], labels[N_TEST:], features[:N_TEST], labels[:N_TEST]


def draw_pictures(folder: Path) -> Path:
    from dinov2.data.sample_cells import write_sample_cells

    cells = folder / "cells"
    if not cells.is_dir():
        write_sample_cells(cells, N_PICTURES, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    return cells


def pictures(folder: Path) -> list[Path]:
    from dinov2.data.datasets import find_images

    return find_images(folder)[:N_PICTURES]


def network(arch: str) -> Any:
    import torch

    from dinov2.models import vision_transformer

    torch.manual_seed(0)
    return getattr(vision_transformer, arch)(patch_size=14, img_size=IMAGE_SIZE, init_values=1.0).eval()


if __name__ == "__main__":
    main()
