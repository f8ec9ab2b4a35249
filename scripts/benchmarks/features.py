"""Measure embedding, kNN and the linear probe against the plain way.

    python scripts/benchmarks/features.py --folder bench [--only network files protocols] [--rounds 7]

  network    a batch of uint8 images in memory to CLS features. `plain` is plain.py's ViT with the same weights, eager
             and with PyTorch's own settings; `exact` is --fp32-matmul exact
  files      image files to features.h5; `plain` is a loader with one worker, Pillow and torchvision's transforms
  protocols  kNN (k = 1 and 20) and the linear probe of 40,000 x 384 features with the spectrum of a small trained
             network's, 10,000 to test, ten classes. `plain` is scikit-learn: a KNeighborsClassifier for each k, and
             LogisticRegression with its defaults, which stops early, or with a tolerance that reaches the optimum

Each way has a process of its own and all take turns. Weights are random with layer scale 1 unless --weights is given.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from harness import Worker, finish, memory_mib, ratio, serve, table, take_turns
from PIL import Image
from plain import embed
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.sample_cells import write_sample_cells
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.eval import knn
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import Embedder, embed_images
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.protocol import EvaluationData
from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, vision_transformer
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.matmul import fast_matmul_within
from dinov2.utils.memory import keep_freed_memory

ARCHS = {"Ti": "vit_tiny", "S": "vit_small", "B": "vit_base", "L": "vit_large"}
REFERENCE, PLAIN_FILES = "plain fp32", "plain fp32, 1 worker"
NETWORK_WAYS = ("ours fp32", "ours fp32 exact", "ours bf16", REFERENCE, "plain bf16")
FILE_WAYS = (*(f"ours {precision}, {n} workers" for precision in ("fp32", "bf16") for n in (0, 2)), PLAIN_FILES)
PROTOCOLS = {
    "kNN, k = 1 and 20": ("knn", "knn plain"),
    "linear probe, scikit-learn's defaults": ("linear", "linear plain"),
    "linear probe, both to the optimum": ("linear", "linear plain to the optimum"),
}
N_CELLS, DIM, N_CLASSES, KS = 50_000, 384, 10, (1, 20)


# --- the network alone -----------------------------------------------------------------------------------------------


def save_weights(args: argparse.Namespace, arch: str) -> Path:
    """Write the given weights, or random ones, for the workers."""
    if arch in args.weights:
        model = load_backbone(args.weights[arch], args.image_size)
    else:
        torch.manual_seed(0)
        build = getattr(vision_transformer, ARCHS[arch])
        # with the usual 1e-5 the blocks of a random network add nothing, and no precision would make a difference
        model = build(patch_size=14, img_size=args.image_size, init_values=1.0, block_chunks=0)
    file = args.folder / f"weights_{arch}.pth"
    torch.save({"model": model.state_dict(), "architecture": architecture(model)}, file)
    return file


def measure_network(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    numbers, tables = {}, {}
    for arch in args.archs:
        common = {"weights": str(save_weights(args, arch)), **settings(args)}
        workers = {way: Worker(__file__, {"part": "network", "way": way, **common}) for way in args.ways}
        features = {way: torch.tensor(each.ask("features")) for way, each in workers.items()}
        seconds = take_turns({way: partial(each.ask, "run") for way, each in workers.items()}, args.rounds, arch)
        for each in workers.values():
            each.close()
        rows = []
        for way, times in seconds.items():
            plain = seconds.get(f"plain {way.split()[1]}")
            rate, near = f"{args.batch / statistics.median(times):.1f}", ["", ""]
            if REFERENCE in features and way != REFERENCE:
                wanted = features[REFERENCE]
                cosine = F.cosine_similarity(features[way].double(), wanted.double()).min()
                near = [f"{cosine:.6f}", f"{(features[way] - wanted).abs().max() / wanted.abs().max():.1e}"]
            rows.append([way, rate, ratio(seconds.get(REFERENCE), times), ratio(plain, times), *near])
        header = ["way", "images/s", f"{REFERENCE} / it", "same type / it", "least cosine", "largest difference"]
        name = f"ViT-{arch}/14, {args.image_size} px, batch {args.batch}"
        numbers[name], tables[name] = seconds, table(header, rows)
    return numbers, tables


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"image_size": args.image_size, "batch": args.batch, "device": args.device}


def serve_network(task: Mapping[str, Any]) -> None:
    way, device = task["way"], torch.device(task["device"])
    if way.startswith("ours") and device.type == "cpu":
        keep_freed_memory()  # as the commands do
    model = load_backbone(task["weights"], task["image_size"]).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    spots = F.interpolate(torch.rand(task["batch"], 3, 8, 8, generator=generator), task["image_size"], mode="bicubic")
    images = (spots.clamp(0, 1) * 255).to(torch.uint8).to(device)
    if way.endswith("compiled"):
        DinoEncoder(model, task["image_size"]).compile()

    def compute() -> Tensor:
        if way.startswith("plain"):
            return embed_plainly(model, normalize_images(images), way.split()[1])
        matmul: Any = "exact" if way.endswith("exact") else "fast"
        precision: Any = way.split()[1]
        return embed_images(model, images, precision, fp32_matmul=matmul)

    def run() -> float:
        started = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    serve({"run": run, "features": lambda: compute().float().cpu().tolist()})


@torch.no_grad()
def embed_plainly(model: DinoVisionTransformer, images: Tensor, precision: str) -> Tensor:
    kind, is_bf16 = images.device.type, precision == "bf16"
    with fast_matmul_within(False), torch.autocast(kind, dtype=torch.bfloat16, enabled=is_bf16):
        return embed(model, [images], [None])[0][0]


# --- from files to features ------------------------------------------------------------------------------------------


def measure_files(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    images = args.images or args.folder / f"cells_{args.n_images}"
    if not images.is_dir():
        write_sample_cells(images, args.n_images, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    numbers, tables = {}, {}
    for arch in args.archs:
        common = {"weights": str(save_weights(args, arch)), "images": str(images), "n_images": args.n_images}
        common |= {"output": str(args.folder / "features.h5"), **settings(args)}
        workers = {way: Worker(__file__, {"part": "files", "way": way, **common}) for way in FILE_WAYS}
        seconds = take_turns({way: partial(each.ask, "run") for way, each in workers.items()}, args.rounds, arch)
        for each in workers.values():
            each.close()
        rows = []
        for way, times in seconds.items():
            rows.append([way, f"{args.n_images / statistics.median(times):.1f}", ratio(seconds[PLAIN_FILES], times)])
        name = f"ViT-{arch}/14, {args.image_size} px, {args.n_images} files"
        numbers[name], tables[name] = seconds, table(["way", "images/s", f"{PLAIN_FILES} / it"], rows)
    return numbers, tables


class Images(Dataset[Tensor]):
    """Image files as upstream's loader prepares them."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = paths
        resize = tv.Resize(size, tv.InterpolationMode.LANCZOS)
        normalize = tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.transform = tv.Compose([resize, tv.CenterCrop(size), tv.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.transform(Image.open(self.paths[index]).convert("RGB"))
        return image


def serve_files(task: Mapping[str, Any]) -> None:
    way, device, batch = task["way"], task["device"], task["batch"]
    precision, n_workers = way.split()[1].strip(","), int(way.split()[2])
    paths = find_images(Path(task["images"]))[: task["n_images"]]
    if way.startswith("ours"):
        if device == "cpu":
            keep_freed_memory()
        cells = LabelledCells(paths, np.zeros(len(paths), dtype=np.int64), ["cell"])
        options = {"image_size": task["image_size"], "device": device, "batch_size": batch, "num_workers": n_workers}
        embedder = Embedder(checkpoint=task["weights"], precision=precision, **options)
        _ = embedder.encoder.sha256, embedder.identity  # loads the weights

        def work() -> object:
            return embedder.features_of(cells, Path(task["output"]), overwrite=True)

    else:
        model = load_backbone(task["weights"], task["image_size"]).to(device).eval()

        def work() -> object:
            loader = DataLoader(Images(paths, task["image_size"]), batch, num_workers=n_workers)
            return torch.cat([embed_plainly(model, images.to(device), precision).cpu() for images in loader])

    serve({"run": lambda: timed(work)[0]})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


# --- kNN and the linear probe ----------------------------------------------------------------------------------------


def measure_protocols(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Each measurement has a process of its own: the memory that it adds is its own, too."""
    ways = list(dict.fromkeys(way for pair in PROTOCOLS.values() for way in pair))
    runs: dict[str, list[Any]] = {way: [] for way in ways}

    def measure(way: str) -> float:
        worker = Worker(__file__, {"part": "protocols", "way": way, "n_cells": args.n_cells})
        runs[way].append(worker.ask("run"))
        worker.close()
        return float(runs[way][-1][0])

    seconds = take_turns({way: partial(measure, way) for way in ways}, args.rounds, "protocols")
    rows = []
    for name, (ours, plain) in PROTOCOLS.items():
        added = [f"{statistics.median(run[1] for run in runs[way]):.0f} MiB" for way in (plain, ours)]
        equal = np.mean(np.array(runs[ours][0][2]) == np.array(runs[plain][0][2]))
        rows.append([name, ratio(seconds[plain], seconds[ours]), *added, f"{equal:.2%}"])
    header = ["what", "plain / ours, time", "plain: memory added", "ours: memory added", "equal predictions"]
    return {way: [run[:2] for run in of_way] for way, of_way in runs.items()}, {"Protocols": table(header, rows)}


def serve_protocol(task: Mapping[str, Any]) -> None:
    way, n_cells = task["way"], task["n_cells"]
    n_test = n_cells // 5
    features, labels = make_features(n_cells)
    train, test = np.arange(n_test, n_cells), np.arange(n_test)

    def work() -> np.ndarray:
        if way == "knn":
            data = EvaluationData({"cls": features}, labels, [str(i) for i in range(N_CLASSES)], [(train, test)])
            rows = knn.evaluate(data, knn.KnnOptions(k=KS))
            return np.stack([rows[f"knn_{k}"].predictions[test] for k in KS])
        if way == "linear":
            probe = fit_linear_probe(features[train], labels[train], N_CLASSES)
            return probe.predict_proba(features[test]).argmax(axis=1)
        if way == "knn plain":
            models = [KNeighborsClassifier(k).fit(features[train], labels[train]) for k in KS]
            return np.stack([model.predict(features[test]) for model in models])
        limits = {"tol": 1e-7, "max_iter": 100_000} if way.endswith("optimum") else {"max_iter": 1000}
        model = LogisticRegression(C=DIM * N_CLASSES / 100, **limits).fit(features[train], labels[train])
        return model.predict(features[test])

    def run() -> tuple[float, float, list[int]]:
        before = memory_mib()
        seconds, predictions = timed(work)
        return seconds, memory_mib("VmHWM") - before, predictions.tolist()

    serve({"run": run})


def make_features(n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Make features of overlapping classes whose deviations fall from 6 in a few directions to 0.02."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_CLASSES, n_cells)
    centres = 0.6 * rng.standard_normal((N_CLASSES, DIM))
    features = (centres[labels] + rng.standard_normal((n_cells, DIM))) * 6 / (1 + np.arange(DIM) / 8) ** 1.5
    return (features @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]).astype(np.float32), labels


PARTS = {"network": measure_network, "files": measure_files, "protocols": measure_protocols}
SERVERS = {"network": serve_network, "files": serve_files, "protocols": serve_protocol}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("bench"), help="of images and tables (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=["S", "B"])
    parser.add_argument("--ways", nargs="+", default=NETWORK_WAYS, help="of network; also `ours bf16 compiled`")
    parser.add_argument("--batch", type=int, default=32, help="images in one forward (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=Path, help="folder with images for files, instead of drawn cells")
    parser.add_argument("--n-images", type=int, default=320, help="of files (default: %(default)s)")
    parser.add_argument("--n-cells", type=int, default=N_CELLS, help="of protocols (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="S=FILE", help="whatever load_backbone takes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        SERVERS[args.worker["part"]](args.worker)
        return
    args.weights = dict(each.partition("=")[::2] for each in args.weights)
    args.folder.mkdir(parents=True, exist_ok=True)
    for part in args.only:
        numbers, tables = PARTS[part](args)
        finish(args.folder, part, tables, numbers, "scikit-learn")


if __name__ == "__main__":
    main()
