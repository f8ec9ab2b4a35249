"""Embedding against a plain PyTorch rendering of upstream's way: the network alone, and from files to features.

    python scripts/bench_features.py --folder bench [--only network files] [--rounds 7] [--weights S=DinoBloom-S.pth]

`ours` is what `extract_features.py` computes for the kind `cls`. `plain` is the same weights in scripts/plain_vit.py:
eager, all tokens through all blocks, attention written out on a CPU, PyTorch's own settings.

  network  a batch that is in memory already, as uint8 pixels; how near features come to those of plain fp32
  files    pictures on disk to features.h5; plain is a loader with one
           worker, Pillow and torchvision's transforms, and a list of features. Time counts from when libraries and
           weights are loaded to when the file is there.

Each way has a process of its own, and all take turns; ratios are those of the medians, the range is over rounds.
Weights are random with layer scale 1 unless files are given, pictures are made up. Tables go to the terminal, all
numbers to results.json in the folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from benchmarking import ProcessOfItsOwn, answer_questions, machine, ratio, take_turns
from plain_vit import PlainViT
from torch import Tensor

from dinov2 import distributed
from dinov2.data.datasets import LabelledCells, find_images
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from dinov2.eval import embedding
from dinov2.eval.embedding import Embedder, embed_images
from dinov2.eval.encoders import DinoEncoder
from dinov2.hub.backbones import load_backbone
from dinov2.models import architecture, vision_transformer
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import atomic_write
from dinov2.utils.matmul import fast_matmul_within
from dinov2.utils.memory import keep_freed_memory
from dinov2.utils.parallel import available_cores

ARCHS = {"Ti": "vit_tiny", "S": "vit_small", "B": "vit_base", "L": "vit_large"}
REFERENCE = "plain fp32"
NETWORK_WAYS = ("ours fp32", "ours fp32 exact", "ours bf16", "ours bf16 compiled", REFERENCE, "plain bf16")
N_PARTS = 4  # that the pictures of a file are cut into, so that a few hundred can be shared; usual are 2048 each


@dataclass(frozen=True)
class FileWay:
    """How files become features: plain, or ours with so many processes, each with so many that decode (0: a thread)."""

    is_ours: bool
    precision: str
    n_processes: int = 1
    n_workers: int = 0

    @property
    def name(self) -> str:
        who = "process" if self.n_processes == 1 else "processes"
        decoded = f"{self.n_workers} decoding" if self.n_workers else "a thread decoding"
        return f"{'ours' if self.is_ours else 'plain'} {self.precision}, {self.n_processes} {who}, {decoded}"


PLAIN_FILES = FileWay(False, "fp32", n_workers=1)
FILE_WAYS = [
    *(
        FileWay(True, precision, n, workers)
        for precision in ("fp32", "bf16")
        for n, workers in ((1, 0), (1, 2), (2, 0))
    ),
    PLAIN_FILES,
]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.child:
        settings = json.loads(args.child)
        (_serve_network if "way" in settings else _measure_files)(settings)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = f"{machine('torch')}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        name = f"{torch.cuda.get_device_name(args.device)}; {name}"
    results: dict[str, Any] = {"machine": name, "batch": args.batch, "network": {}, "files": {}}
    for part in args.only:
        for arch in args.archs:
            results[part][arch], lines = PARTS[part](args, arch)
            print("\n".join(["", *lines]), flush=True)
            with atomic_write(args.folder / "results.json", "w") as file:
                json.dump(results, file, indent=1)
    print(f"\nMachine: {name}.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of results.json and pictures (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=["S", "B"])
    parser.add_argument("--batch", type=int, default=32, help="pictures in one forward (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=1, help="forwards that are timed as one (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=NETWORK_WAYS, help="of network; default: all, compiled on a GPU")
    parser.add_argument("--n-pictures", type=int, default=320, help="of files (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="a folder with pictures, instead of drawn ones")
    parser.add_argument("--weights", nargs="+", default=[], metavar="S=FILE", help="whatever load_backbone takes")
    parser.add_argument("--threads", type=int, help="of PyTorch, in network (default: its own choice)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one measurement, in processes of its own
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_cuda = args.device.type == "cuda"
    args.ways = args.ways or [way for way in NETWORK_WAYS if is_cuda or "compiled" not in way]
    args.weights = dict(each.partition("=")[::2] for each in args.weights)
    if not args.weights.keys() <= ARCHS.keys() or not all(args.weights.values()):
        parser.error(f"--weights: each must read like S=FILE, with one of {', '.join(ARCHS)} before the sign")
    return args


def backbone(args: argparse.Namespace, arch: str) -> DinoVisionTransformer:
    """That of the weights given, else a random one, the same each time."""
    if arch in args.weights:
        return load_backbone(args.weights[arch], args.image_size)
    torch.manual_seed(0)
    build = getattr(vision_transformer, ARCHS[arch])
    # with the usual 1e-5 the blocks of a random network add nothing, and no precision would make a difference
    return build(patch_size=14, img_size=args.image_size, init_values=1.0, block_chunks=0).eval()


def save_backbone(args: argparse.Namespace, arch: str) -> Path:
    """A file with the weights of `backbone`, for processes of their own."""
    weights, model = args.folder / f"weights_{arch}.pth", backbone(args, arch)
    with atomic_write(weights) as file:
        torch.save({"model": model.state_dict(), "architecture": architecture(model)}, file)
    return Path(weights)


# --- the network alone ----------------------------------------------------------------------------------------------


def network(args: argparse.Namespace, arch: str) -> tuple[dict[str, Any], list[str]]:
    weights = save_backbone(args, arch)
    with ExitStack() as stack:
        processes = {way: stack.enter_context(_process(args, way, weights)) for way in args.ways}
        features = {way: torch.tensor(each.ask("features")) for way, each in processes.items()}
        runs = {way: partial(each.ask, "run") for way, each in processes.items()}
        seconds = take_turns(runs, args.rounds, f"network {arch}")
    found: dict[str, Any] = {"seconds": seconds, "n_pictures": args.batch * args.batches, "agreement": {}}
    if REFERENCE in features:
        wanted = features[REFERENCE]
        found["agreement"] = {way: _agreement(mine, wanted) for way, mine in features.items() if way != REFERENCE}
    return found, [f"ViT-{arch}/14, {args.image_size} px, batch {args.batch}:", "", *network_table(found)]


def _process(args: argparse.Namespace, way: str, weights: Path) -> ProcessOfItsOwn:
    settings = {
        **{"way": way, "weights": str(weights), "device": str(args.device), "threads": args.threads},
        **{"image_size": args.image_size, "batch": args.batch, "batches": args.batches},
    }
    return ProcessOfItsOwn([sys.executable, __file__, "--child", json.dumps(settings)])


def _serve_network(settings: Mapping[str, Any]) -> None:
    """The child's part: embed the same pictures when asked to."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device, way = torch.device(settings["device"]), settings["way"]
    if way.startswith("ours") and device.type == "cpu":
        keep_freed_memory()  # as the commands do
    model = load_backbone(settings["weights"], settings["image_size"]).to(device)
    images = made_up_pictures(settings["batch"], settings["image_size"]).to(device)
    compute = _computes(way, model, images)

    def run() -> None:
        for _ in range(settings["batches"]):
            compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    answer_questions({"run": run, "features": lambda: compute().float().cpu().tolist()})


def _computes(way: str, model: DinoVisionTransformer, images: Tensor) -> Callable[[], Tensor]:
    precision: Any = way.split()[1]
    if way.startswith("plain"):
        plain = PlainViT(model).eval()

        @torch.no_grad()
        def compute() -> Tensor:
            is_bf16 = precision == "bf16"
            with (
                fast_matmul_within(False),
                torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_bf16),
            ):
                return plain(normalize_images(images))[0]

        return compute
    if way.endswith("compiled"):
        DinoEncoder(model, images.shape[-1]).compile()
    return lambda: embed_images(model, images, precision, fp32_matmul="exact" if way.endswith("exact") else "fast")


def _agreement(ours: Tensor, wanted: Tensor) -> dict[str, float]:
    cosines = F.cosine_similarity(ours.double(), wanted.double())
    difference, largest = (ours - wanted).abs().max(), wanted.abs().max()
    return {
        "least_cosine": cosines.min().item(),
        "largest_difference": difference.item(),
        "of_largest": (difference / largest).item(),
    }


def network_table(found: Mapping[str, Any]) -> list[str]:
    seconds, agreement = found["seconds"], found["agreement"]
    lines = [
        f"| way | images/s | {REFERENCE} / it | range | same type / it | least cosine to {REFERENCE} | "
        f"largest difference, of the largest feature |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, each in seconds.items():
        rate = found["n_pictures"] / statistics.median(each)
        to_reference, spread = _ratio_cells(seconds.get(REFERENCE), each)
        same_type, _ = _ratio_cells(seconds.get(f"plain {way.split()[1]}"), each)
        near = agreement.get(way)
        cosine, difference = (f"{near['least_cosine']:.6f}", f"{near['of_largest']:.1e}") if near else ("", "")
        lines.append(f"| {way} | {rate:.1f} | {to_reference} | {spread} | {same_type} | {cosine} | {difference} |")
    return lines


def _ratio_cells(slow: Sequence[float] | None, fast: Sequence[float]) -> tuple[str, str]:
    if slow is None:
        return "", ""
    middle, least, most = ratio(slow, fast)
    return f"{middle:.2f}", f"{least:.2f} to {most:.2f}"


def made_up_pictures(n: int, size: int) -> Tensor:
    """uint8 [n, 3, size, size] of soft spots, each picture another."""
    generator = torch.Generator().manual_seed(0)
    spots = torch.rand(n, 3, 8, 8, generator=generator)
    smooth = F.interpolate(spots, size=(size, size), mode="bicubic").clamp(0, 1)
    grain = 0.05 * torch.randn(n, 3, size, size, generator=generator)
    return ((smooth + grain).clamp(0, 1) * 255).to(torch.uint8)


# --- from files to features -----------------------------------------------------------------------------------------


def files(args: argparse.Namespace, arch: str) -> tuple[dict[str, Any], list[str]]:
    pictures = args.pictures or draw_pictures(args)
    weights = save_backbone(args, arch)
    n_devices = torch.cuda.device_count() if args.device.type == "cuda" else available_cores()
    ways = [way for way in FILE_WAYS if way.n_processes <= max(1, n_devices)]
    said: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}

    def runner(way: FileWay) -> Callable[[], None]:
        settings = {
            **asdict(way),
            "weights": str(weights),
            "pictures": str(pictures),
            "n_pictures": args.n_pictures,
            "image_size": args.image_size,
            "batch": args.batch,
            "device": str(args.device),
            "output": str(args.folder / "features.h5"),
        }
        return lambda: said[way.name].append(_in_processes(way, settings))

    take_turns({way.name: runner(way) for way in ways}, args.rounds, f"files {arch}")
    n_pictures = int(said[PLAIN_FILES.name][0]["n_pictures"])
    # without the round that warms up
    seconds = {name: [each["seconds"] for each in runs[-args.rounds :]] for name, runs in said.items()}
    found = {"n_pictures": n_pictures, "seconds": seconds}
    return found, [f"ViT-{arch}/14, {args.image_size} px, {n_pictures} files:", "", *files_table(found)]


def _in_processes(way: FileWay, settings: Mapping[str, Any]) -> dict[str, float]:
    """What the child says; each process of it has its share of the cores."""
    command = [sys.executable]
    if way.n_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={way.n_processes}"]
    command += [__file__, "--child", json.dumps(settings)]
    threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // way.n_processes))}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **threads})
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


def _measure_files(settings: Mapping[str, Any]) -> None:
    """The child's part: print how long it took."""
    launch = distributed.read_launch()
    device = torch.device(settings["device"])
    if launch is not None:
        device = torch.device("cuda", launch.local_rank) if device.type == "cuda" else device
        distributed.enable(launch, device, timeout_seconds=600.0)
    if settings["is_ours"] and device.type == "cpu":
        keep_freed_memory()  # as the commands do
    cells = _first_cells(Path(settings["pictures"]), settings["n_pictures"])
    embed = (_ours_from_files if settings["is_ours"] else _plain_from_files)(settings, cells, device)
    distributed.on_main_process(lambda: None)  # all of them are ready
    started = time.perf_counter()
    embed()
    seconds = time.perf_counter() - started
    if distributed.is_main_process():
        print(json.dumps({"seconds": seconds, "n_pictures": len(cells)}))
    distributed.disable()


def _first_cells(folder: Path, n: int) -> LabelledCells:
    paths = find_images(folder)[:n]
    return LabelledCells(paths, np.zeros(len(paths), dtype=np.int64), ["cell"])


def _ours_from_files(settings: Mapping[str, Any], cells: LabelledCells, device: torch.device) -> Callable[[], object]:
    embedding.PART_SIZE = -(-len(cells) // N_PARTS)
    embedder = Embedder(
        settings["weights"],
        image_size=settings["image_size"],
        precision=settings["precision"],
        device=str(device),
        batch_size=settings["batch"],
        num_workers=settings["n_workers"],
    )
    _ = embedder.encoder.sha256, embedder.identity  # reads the weights
    return lambda: embedder.features_of(cells, Path(settings["output"]), overwrite=True)


def _plain_from_files(settings: Mapping[str, Any], cells: LabelledCells, device: torch.device) -> Callable[[], object]:
    from PIL import Image
    from torchvision import transforms  # type: ignore[import-untyped]

    size = settings["image_size"]
    model = PlainViT(load_backbone(settings["weights"], size)).to(device).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    class Pictures(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return len(cells)

        def __getitem__(self, index: int) -> Tensor:
            image: Tensor = transform(Image.open(cells.paths[index]).convert("RGB"))
            return image

    @torch.no_grad()
    def embed() -> Tensor:
        loader = torch.utils.data.DataLoader(Pictures(), settings["batch"], num_workers=settings["n_workers"])
        return torch.cat([model(images.to(device))[0].cpu() for images in loader])

    return embed


def draw_pictures(args: argparse.Namespace) -> Path:
    from dinov2.data.sample_cells import write_sample_cells

    cells = args.folder / f"cells_{args.n_pictures}"
    if not cells.is_dir():
        write_sample_cells(cells, args.n_pictures, 10, 10, 2, seed=0, size=360, n_workers=available_cores())
    return cells


def files_table(found: Mapping[str, Any]) -> list[str]:
    lines = [f"| way | images/s | {PLAIN_FILES.name} / it | range |", "|---|---|---|---|"]
    for name, each in found["seconds"].items():
        middle, spread = _ratio_cells(found["seconds"].get(PLAIN_FILES.name), each)
        lines.append(f"| {name} | {found['n_pictures'] / statistics.median(each):.1f} | {middle} | {spread} |")
    return lines


PARTS = {"network": network, "files": files}


if __name__ == "__main__":
    main()
