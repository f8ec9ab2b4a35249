"""Extract features of cells into one file, which every protocol reads with `--features`.

    python dinov2/eval/extract_features.py --checkpoint DinoBloom-S.pth --data cells/ --output-dir features/

Cells may have no labels: a plain folder of images, or a CSV without the column Label. What learns from cells, such as
knn.py, does not take their features; explorer.py does, and `abmil.py --apply`.

The same under `torchrun --standalone --nproc_per_node=N` and `srun` uses N processes, one GPU each. A killed extraction
continues from its last finished part when it is started again, with any number of processes.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch

from dinov2 import distributed
from dinov2.data.datasets.bag_layouts import LAYOUTS
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.distributed import Launch
from dinov2.eval.features import DEFAULT_KIND
from dinov2.eval.features.encoders import KINDS_HELP, Kind
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.layouts import extract_one_file, extract_patient_files
from dinov2.eval.features.loop import Fp32Matmul, Precision
from dinov2.eval.features.named_encoders import UNTRAINED, encoder_name
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code, number_between, positive_int
from dinov2.utils.files import user_path
from dinov2.utils.resources import available_cores, keep_freed_memory

logger = logging.getLogger("dinov2")

CELLS_HELP = (
    "a folder with one folder of images per class, a CSV with the columns `Image Path,Label[,patient]`, or a file or "
    "folder of MedMNIST or Hugging Face"
)
# Processes wait for the slowest one at the end, which may have one more part of large images. A process that dies is
# noticed at once: its connections close.
TIMEOUT_SECONDS = 24 * 3600.0


def add_embedder_arguments(parser: argparse.ArgumentParser, checkpoint_required: bool) -> None:
    """Add the flags of the network and of the extraction, which are the same in every command."""
    network = parser.add_mutually_exclusive_group(required=checkpoint_required)
    network.add_argument(
        "--checkpoint",
        metavar="WEIGHTS",
        help="a run's folder (its newest teacher); a .pth or .safetensors file (teacher_checkpoint.pth of a run, "
        "DinoBloom-*.pth, a DINOv2 release); a folder of transformers or timm; or a name (dinobloom_s/b/l/g, "
        "dinov2_vits14, dinov2_vits14_reg, ...) or URL, downloaded once; or hf-hub:<owner>/<name>[/<file>], of the "
        "Hugging Face hub",
    )
    network.add_argument(
        "--encoder",
        type=_checked_by(encoder_name),
        help="another network to compare with: timm:<model>, torchvision:<model>; or a baseline: pixels, histogram",
    )
    add = parser.add_argument
    weights = f"its state dict, if the library cannot download it; or the word {UNTRAINED}; empty: the library's own"
    add("--encoder-weights", default="", metavar="FILE", help=weights)
    kind, kinds = _checked_by(lambda text: Kind.parse(text).name), f"{KINDS_HELP}; protocols take the first one"
    add("--kinds", type=kind, nargs="+", default=[DEFAULT_KIND], metavar="KIND", help=kinds)
    add_extraction_arguments(parser)
    add(
        "--overwrite", action="store_true", help="replace features or fine-tuned networks that are in the output folder"
    )


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a network embeds images; `extraction_options` collects them."""
    add = parser.add_argument
    size = (
        "side of the network's input in pixels, a multiple of its patch size; 0: as in its training run if the file "
        "states it, else 224; networks of other libraries have their own"
    )
    add("--image-size", type=number_between(1, 4096), default=0, help=size)
    add("--batch-size", type=positive_int, default=64, help="images in one forward")
    workers = "processes that decode images; 0: a thread of this process"
    add("--num-workers", type=number_between(0, 1024), default=min(available_cores(), 16), help=workers)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add("--precision", choices=get_args(Precision), default="fp32", help="bf16 is faster on recent GPUs and CPUs")
    matmul = "how a CPU multiplies float32 matrices; fast: by a faster library, if it is as accurate on this machine"
    add("--fp32-matmul", choices=get_args(Fp32Matmul), default="fast", help=matmul)
    compiling = "compile the network on CUDA: a minute at the start, worth it for many thousand images"
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help=compiling)


def has_embedder(args: argparse.Namespace) -> bool:
    """Return whether the flags of `add_embedder_arguments` name a network."""
    return bool(args.checkpoint or args.encoder)


def embedder_from(args: argparse.Namespace, launch: Launch | None = None) -> Embedder:
    """Build the embedder from the flags of `add_embedder_arguments`."""
    return Embedder(
        args.checkpoint,
        image_size=args.image_size,
        kinds=args.kinds,
        encoder_name=args.encoder or "",
        encoder_weights=args.encoder_weights,
        **extraction_options(args, launch),
    )


def extraction_options(args: argparse.Namespace, launch: Launch | None = None) -> dict[str, Any]:
    """Return fields of `ExtractOptions` from the flags of `add_extraction_arguments`.

    On a CPU, freed memory is kept from now on.
    """
    device = device_of(args, launch)
    if device == "cpu":
        keep_freed_memory()
    return {
        "precision": args.precision,
        "device": device,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "fp32_matmul": args.fp32_matmul,
        "compiled": args.compile,
    }


def device_of(args: argparse.Namespace, launch: Launch | None = None) -> str:
    """Return the device for this process; several processes on a node take one GPU each."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; pass --device cpu, or install a CUDA build")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if launch is None or device == "cpu":
        return device
    n_devices = torch.cuda.device_count()
    # a SLURM step may show each of its processes only its own GPU
    index = 0 if n_devices == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= n_devices:
        raise ValueError(
            f"this process needs CUDA device {index}, but there are only {n_devices}; start as many processes a node "
            f"as it has GPUs, or pass --device cpu"
        )
    return f"cuda:{index}"


def _checked_by(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Let argparse print the message of a ValueError of `parse`."""

    def checked(text: str) -> str:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Extract features of cells with a network and write <output-dir>/features.h5, or files "
        "of another layout. An existing file with the same features is kept; one with others is an error. A killed "
        "command continues when it is started again. torchrun and srun share the work between processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=True)
    parser.add_argument("--data", type=user_path, required=True, help=f"{CELLS_HELP}; or both without labels")
    parser.add_argument("--output-dir", type=user_path, required=True, help="of the files; made if missing")
    layout = (
        "file: one features.h5; parquet: one features.parquet; genbloom: <class>/<patient>.h5; the others are files of "
        "each patient for the tool of this name, see docs/evaluation.md"
    )
    parser.add_argument("--layout", choices=list(LAYOUTS), default="file", help=layout)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    launch = distributed.read_launch()
    setup_logging(rank=launch.rank if launch else 0)
    try:
        if launch is not None:
            n_cores = max(1, available_cores() // launch.local_world_size)
            if args.num_workers > n_cores:
                logger.info("--num-workers %d becomes %d, the number of cores per process", args.num_workers, n_cores)
                args.num_workers = n_cores
            distributed.enable(launch, torch.device(device_of(args, launch)), TIMEOUT_SECONDS)
        _extract(args, launch)
    finally:
        distributed.disable()


def _extract(args: argparse.Namespace, launch: Launch | None) -> None:
    cells = LabelledCells.from_path(args.data, needs_labels=False)
    embedder = embedder_from(args, launch)
    if LAYOUTS[args.layout].is_one_file:
        file, features = extract_one_file(embedder, cells, args.output_dir, args.overwrite, args.layout)
        dim = features.features.shape[1]
        summary = f"{file}: {len(features)} cells, {len(features.class_names)} classes, dim {dim}"
    else:
        n_patients = extract_patient_files(embedder, cells, args.output_dir, args.overwrite, args.layout)
        summary = f"{args.output_dir}: {n_patients} patients, {len(cells)} cells, {len(cells.class_names)} classes"
    if distributed.is_main_process():
        print(summary)


if __name__ == "__main__":
    sys.exit(exit_code(main))
