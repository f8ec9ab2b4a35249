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
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from harness import Part, Worker, make_parser, memory_mib, ratio, run_parts, seconds_of, table, take_turns, time_workers
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
DIM, N_CLASSES, KS = 384, 10, (1, 20)


def save_weights(args: argparse.Namespace, arch: str) -> str:
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
    return str(file)


@torch.no_grad()
def embed_plainly(model: DinoVisionTransformer, images: Tensor, precision: str) -> Tensor:
    kind, is_bf16 = images.device.type, precision == "bf16"
    with fast_matmul_within(False), torch.autocast(kind, dtype=torch.bfloat16, enabled=is_bf16):
        return embed(model, [images], [None])[0][0]


# --- the network alone -----------------------------------------------------------------------------------------------


class Network:
    """One way to embed a batch of blurred noise."""

    def __init__(self, way: str, weights: str, image_size: int, batch: int, device: str) -> None:
        self.way, self.precision = way, way.split()[1]
        if way.startswith("ours") and device == "cpu":
            keep_freed_memory()  # as the commands do
        self.model = load_backbone(weights, image_size).to(device).eval()
        noise = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = (F.interpolate(noise, image_size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8).to(device)
        if way.endswith("compiled"):
            DinoEncoder(self.model, image_size).compile()

    def embed(self) -> Tensor:
        if self.way.startswith("plain"):
            return embed_plainly(self.model, normalize_images(self.images), self.precision)
        matmul: Any = "exact" if self.way.endswith("exact") else "fast"
        return embed_images(self.model, self.images, self.precision, fp32_matmul=matmul)

    def seconds(self) -> float:
        return seconds_of(self.embed)

    def features(self) -> np.ndarray:
        return self.embed().float().cpu().numpy()


def measure_network(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    numbers, tables = {}, {}
    for arch in args.archs:
        settings = save_weights(args, arch), args.image_size, args.batch, args.device
        workers = {way: Worker(Network, way, *settings) for way in args.ways}
        features = {way: worker.call("features") for way, worker in workers.items()}
        seconds = time_workers(workers, args.rounds, arch)
        for worker in workers.values():
            worker.close()
        rows = []
        for way, times in seconds.items():
            same_type, near = seconds.get(f"plain {way.split()[1]}"), ["", ""]
            if REFERENCE in features and way != REFERENCE:
                ours, wanted = features[way], features[REFERENCE]
                cosines = (ours * wanted).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(wanted, axis=1)
                near = [f"{cosines.min():.6f}", f"{abs(ours - wanted).max() / abs(wanted).max():.1e}"]
            rate = f"{args.batch / statistics.median(times):.1f}"
            rows.append([way, rate, ratio(seconds.get(REFERENCE), times), ratio(same_type, times), *near])
        header = ["way", "images/s", f"{REFERENCE} / it", "same type / it", "least cosine", "largest difference"]
        name = f"ViT-{arch}/14, {args.image_size} px, batch {args.batch}"
        numbers[name], tables[name] = seconds, table(header, rows)
    return numbers, tables


# --- from files to features ------------------------------------------------------------------------------------------


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


class Files:
    """One way to embed image files."""

    def __init__(self, way: str, paths: Sequence[Path], weights: str, size: int, batch: int, device: str) -> None:
        self.paths, self.size, self.batch, self.device = paths, size, batch, device
        self.precision, self.n_workers = way.split()[1].strip(","), int(way.split()[2])
        self.file = Path(weights).with_name("features.h5")
        self.is_ours = way.startswith("ours")
        self.model = load_backbone(weights, size).to(device).eval()
        if self.is_ours and device == "cpu":
            keep_freed_memory()
        options: dict[str, Any] = {"image_size": size, "device": device, "batch_size": batch}
        options |= {"num_workers": self.n_workers, "precision": self.precision}
        self.embedder = Embedder(checkpoint=weights, **options)
        _ = self.embedder.encoder.sha256, self.embedder.identity  # loads the weights

    def seconds(self) -> float:
        return seconds_of(self.ours if self.is_ours else self.plain)

    def ours(self) -> object:
        cells = LabelledCells(list(self.paths), np.zeros(len(self.paths), dtype=np.int64), ["cell"])
        return self.embedder.features_of(cells, self.file, overwrite=True)

    def plain(self) -> object:
        loader = DataLoader(Images(self.paths, self.size), self.batch, num_workers=self.n_workers)
        return [embed_plainly(self.model, images.to(self.device), self.precision).cpu() for images in loader]


def measure_files(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    images = args.images or args.folder / f"cells_{args.n_images}"
    if args.images is None:
        write_sample_cells(images, args.n_images, 10, 10, 2, seed=0, size=360, n_workers=os.cpu_count() or 1)
    paths = find_images(images)[: args.n_images]
    numbers, tables = {}, {}
    for arch in args.archs:
        settings = save_weights(args, arch), args.image_size, args.batch, args.device
        workers = {way: Worker(Files, way, paths, *settings) for way in FILE_WAYS}
        seconds = time_workers(workers, args.rounds, arch)
        for worker in workers.values():
            worker.close()
        rows = [
            [way, f"{len(paths) / statistics.median(times):.1f}", ratio(seconds[PLAIN_FILES], times)]
            for way, times in seconds.items()
        ]
        name = f"ViT-{arch}/14, {args.image_size} px, {len(paths)} files"
        numbers[name], tables[name] = seconds, table(["way", "images/s", f"{PLAIN_FILES} / it"], rows)
    return numbers, tables


# --- kNN and the linear probe ----------------------------------------------------------------------------------------


class Protocol:
    """One way to predict the classes of the first fifth of the cells from the others."""

    def __init__(self, way: str, n_cells: int) -> None:
        self.way = way
        self.features, self.labels = make_features(n_cells)
        self.train, self.test = np.arange(n_cells // 5, n_cells), np.arange(n_cells // 5)
        self.predictions: Any = None

    def costs(self) -> tuple[float, float, list[Any]]:
        """Return the seconds, the MiB that were added, and the predictions."""
        before = memory_mib()
        seconds = seconds_of(self.predict)
        return seconds, memory_mib("VmHWM") - before, self.predictions.tolist()

    def predict(self) -> None:
        tested, known, labels = self.features[self.test], self.features[self.train], self.labels[self.train]
        if self.way == "knn":
            split = [(self.train, self.test)]
            data = EvaluationData({"cls": self.features}, self.labels, list(map(str, range(N_CLASSES))), split)
            rows = knn.evaluate(data, knn.KnnOptions(k=KS))
            self.predictions = np.stack([rows[f"knn_{k}"].predictions[self.test] for k in KS])
        elif self.way == "knn plain":
            self.predictions = np.stack([KNeighborsClassifier(k).fit(known, labels).predict(tested) for k in KS])
        elif self.way == "linear":
            self.predictions = fit_linear_probe(known, labels, N_CLASSES).predict_proba(tested).argmax(axis=1)
        else:
            limits: Any = {"tol": 1e-7, "max_iter": 100_000} if "optimum" in self.way else {"max_iter": 1000}
            self.predictions = LogisticRegression(C=DIM * N_CLASSES / 100, **limits).fit(known, labels).predict(tested)


def make_features(n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Make features of overlapping classes whose deviations fall from 6 in a few directions to 0.02."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_CLASSES, n_cells)
    centres = 0.6 * rng.standard_normal((N_CLASSES, DIM))
    features = (centres[labels] + rng.standard_normal((n_cells, DIM))) * 6 / (1 + np.arange(DIM) / 8) ** 1.5
    return (features @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]).astype(np.float32), labels


def measure_protocols(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Each measurement has a process of its own: the memory that it adds is its own, too."""
    runs: dict[str, list[Any]] = {way: [] for pair in PROTOCOLS.values() for way in pair}

    def measure(way: str) -> float:
        worker = Worker(Protocol, way, args.n_cells)
        runs[way].append(worker.call("costs"))
        worker.close()
        return float(runs[way][-1][0])

    seconds = take_turns({way: partial(measure, way) for way in runs}, args.rounds, "protocols")
    rows = []
    for name, (ours, plain) in PROTOCOLS.items():
        added = [f"{statistics.median(run[1] for run in runs[way]):.0f} MiB" for way in (plain, ours)]
        equal = np.mean(np.array(runs[ours][0][2]) == np.array(runs[plain][0][2]))
        rows.append([name, ratio(seconds[plain], seconds[ours]), *added, f"{equal:.2%}"])
    header = ["what", "plain / ours, time", "plain: memory added", "ours: memory added", "equal predictions"]
    numbers = {way: [run[:2] for run in of_way] for way, of_way in runs.items()}
    return numbers, {"kNN and linear probe": table(header, rows)}


PARTS: dict[str, Part] = {"network": measure_network, "files": measure_files, "protocols": measure_protocols}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, PARTS, list(PARTS))
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=["S", "B"])
    parser.add_argument("--ways", nargs="+", default=NETWORK_WAYS, help="of network; also `ours bf16 compiled`")
    parser.add_argument("--batch", type=int, default=32, help="images in one forward (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=Path, help="folder with images for files, instead of drawn cells")
    parser.add_argument("--n-images", type=int, default=320, help="of files (default: %(default)s)")
    parser.add_argument("--n-cells", type=int, default=50_000, help="of protocols (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="S=FILE", help="whatever load_backbone takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.weights = dict(each.partition("=")[::2] for each in args.weights)
    run_parts(args, PARTS, "scikit-learn")


if __name__ == "__main__":
    main()
