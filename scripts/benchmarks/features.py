"""Measure embedding, kNN and the linear probe against the plain way.

    python scripts/benchmarks/features.py --folder bench [--only network files protocols] [--rounds 7]

  network    a batch of uint8 images in memory to CLS features. `plain` is plain.py's ViT with the same weights, eager
             and with PyTorch's own settings; `exact` is --fp32-matmul exact
  files      image files to features.h5; `plain` is a loader with one worker, Pillow and torchvision's transforms
  protocols  kNN (k = 1 and 20) and the linear probe of 40,000 x 384 features, 10,000 to test, ten classes. `plain` is
             scikit-learn: a KNeighborsClassifier for each k, and LogisticRegression with its defaults, which stops
             early, or with a tolerance that reaches the optimum

Each way to embed has a process of its own. Weights are random with layer scale 1 unless --weights is given.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import harness
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from plain import embed
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from dinov2.data.datasets import LabelledCells
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.eval import knn
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.extract import Embedder, embed_images
from dinov2.eval.linear import fit_linear_probe
from dinov2.eval.protocol import EvaluationData
from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, vision_transformer
from dinov2.utils.command import exit_code
from dinov2.utils.numerics import fast_matmul_within
from dinov2.utils.resources import keep_freed_memory

ARCHS = {"Ti": "vit_tiny", "S": "vit_small", "B": "vit_base", "L": "vit_large"}
REFERENCE = "plain fp32"
WAYS = ("ours fp32", "ours fp32 exact", "ours bf16", REFERENCE, "plain bf16")
DIM, N_CLASSES, KS = 384, 10, (1, 20)


class Way:
    """One way to embed: a batch of blurred noise, or image files."""

    def __init__(self, way: str, weights: str, paths: Sequence[Path], size: int, batch: int, device: str) -> None:
        self.is_ours, self.precision, self.device = way.startswith("ours"), way.split()[1], device
        self.matmul: Any = "exact" if way.endswith("exact") else "fast"
        self.paths, self.size, self.batch, self.file = paths, size, batch, Path(weights).with_name("features.h5")
        if self.is_ours and device == "cpu":
            keep_freed_memory()  # as the commands do
        self.model = load_backbone(weights, size).to(device).eval()
        if way.endswith("compiled"):
            DinoEncoder(self.model, size).compile()
        options: Any = {"image_size": size, "device": device, "batch_size": batch}
        options |= {"precision": self.precision, "fp32_matmul": self.matmul}
        self.embedder = Embedder(checkpoint=weights, **options)
        noise = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = (F.interpolate(noise, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8).to(device)

    def features(self) -> np.ndarray:
        return self.embed().float().cpu().numpy()

    def embed(self) -> Tensor:
        if self.is_ours:
            return embed_images(self.model, self.images, self.precision, fp32_matmul=self.matmul)
        return self.embed_plainly(normalize_images(self.images))

    def embed_files(self) -> object:
        if self.is_ours:
            cells = LabelledCells(list(self.paths), np.zeros(len(self.paths), dtype=np.int64), ["cell"])
            return self.embedder.features_of(cells, self.file, overwrite=True)
        # this process was spawned, and its own processes would be, too; upstream forks
        workers: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
        loader = DataLoader(self.paths, self.batch, collate_fn=partial(load_plainly, size=self.size), **workers)
        return [self.embed_plainly(batch.to(self.device)).cpu() for batch in loader]

    @torch.no_grad()
    def embed_plainly(self, images: Tensor) -> Tensor:
        is_bf16 = self.precision == "bf16"
        with fast_matmul_within(False), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_bf16):
            return embed(self.model, [images], [None])[0][0]

    def seconds(self) -> float:
        return harness.seconds_of(self.embed_files if self.paths else self.embed)


def load_plainly(paths: Sequence[Path], size: int) -> Tensor:
    """Prepare image files as upstream's loader does."""
    resize = tv.Resize(size, tv.InterpolationMode.LANCZOS)
    prepare = tv.Compose([resize, tv.CenterCrop(size), tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])


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


def measure_embedding(args: argparse.Namespace, *, from_files: bool) -> harness.Measured:
    """Measure each way, of a batch in memory or of files, and compare the features of a batch."""
    paths = harness.choose_images(args, args.n_images) if from_files else []
    n_images = len(paths) or args.batch
    numbers, tables = {}, {}
    for arch in args.archs:
        settings = save_weights(args, arch), paths, args.image_size, args.batch, args.device
        seconds, features = harness.measure_ways(Way, args.ways, settings, args.rounds, arch, "features")
        rows = []
        for way, times in seconds.items():
            row = [way, f"{n_images / statistics.median(times):.1f}", harness.ratio(seconds.get(REFERENCE), times)]
            row.append(harness.ratio(seconds.get(f"plain {way.split()[1]}"), times))
            if REFERENCE in features:
                ours, wanted = features[way], features[REFERENCE]
                cosines = (ours * wanted).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(wanted, axis=1)
                row += [f"{cosines.min():.6f}", f"{abs(ours - wanted).max() / abs(wanted).max():.1e}"]
            rows.append(row)
        header = ["way", "images/s", f"{REFERENCE} / it", "same type / it", "least cosine", "largest difference"]
        name = f"ViT-{arch}/14, {args.image_size} px, {f'{n_images} files, ' if paths else ''}batch {args.batch}"
        numbers[name], tables[name] = seconds, harness.table(header, rows)
    return numbers, tables


def measure_protocols(args: argparse.Namespace) -> harness.Measured:
    """Measure protocols on features of overlapping classes whose deviations fall from 6 in a few directions to 0.02."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_CLASSES, args.n_cells)
    centres = 0.6 * rng.standard_normal((N_CLASSES, DIM))
    scattered = (centres[labels] + rng.standard_normal((args.n_cells, DIM))) * 6 / (1 + np.arange(DIM) / 8) ** 1.5
    features = (scattered @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]).astype(np.float32)
    test, train = np.split(np.arange(args.n_cells), [args.n_cells // 5])
    data = EvaluationData({"cls": features}, labels, list(map(str, range(N_CLASSES))), [(train, test)])
    known, tested = (features[train], labels[train]), features[test]

    def our_knn() -> np.ndarray:
        rows = knn.evaluate(data, knn.KnnOptions(k=KS))
        return np.stack([rows[f"knn_{k}"].predictions[test] for k in KS])

    def plain_knn() -> np.ndarray:
        return np.stack([KNeighborsClassifier(k).fit(*known).predict(tested) for k in KS])

    def our_probe() -> np.ndarray:
        return fit_linear_probe(*known, N_CLASSES).predict_proba(tested).argmax(axis=1)

    def plain_probe(**limits: Any) -> np.ndarray:
        return LogisticRegression(C=DIM * N_CLASSES / 100, **limits).fit(*known).predict(tested)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "kNN, k = 1 and 20": (our_knn, plain_knn),
        "linear probe, scikit-learn's defaults": (our_probe, partial(plain_probe, max_iter=1000)),
        "linear probe, both to the optimum": (our_probe, partial(plain_probe, max_iter=100_000, tol=1e-7)),
    }
    numbers, rows = {}, []
    for name, (ours, plain) in pairs.items():
        ways = {"ours": partial(harness.seconds_of, ours), "plain": partial(harness.seconds_of, plain)}
        seconds = numbers[name] = harness.take_turns(ways, args.rounds, name)
        rows.append([name, harness.ratio(seconds["plain"], seconds["ours"]), f"{np.mean(ours() == plain()):.2%}"])
    return numbers, {"Protocols": harness.table(["what", "plain / ours, time", "equal predictions"], rows)}


PARTS: dict[str, harness.Part] = {
    "network": partial(measure_embedding, from_files=False),
    "files": partial(measure_embedding, from_files=True),
    "protocols": measure_protocols,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, PARTS, list(PARTS))
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=["S", "B"])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="also `ours bf16 compiled`")
    parser.add_argument("--batch", type=int, default=32, help="images in one forward (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=Path, help="folder with images for files, instead of drawn cells")
    parser.add_argument("--n-images", type=int, default=320, help="of files (default: %(default)s)")
    parser.add_argument("--n-cells", type=int, default=50_000, help="of protocols (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="S=FILE", help="whatever load_backbone takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.weights = dict(each.partition("=")[::2] for each in args.weights)
    harness.run_parts(args, PARTS, "scikit-learn")


if __name__ == "__main__":
    sys.exit(exit_code(main))
