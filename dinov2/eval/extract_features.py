"""Embed labelled cells and keep the features in one file, which every protocol reads with `--features`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from dinov2.data.datasets.cells import LabelledCells
from dinov2.eval.features import Embedder, Precision
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.cores import available_cores

CELLS_HELP = "a folder with one folder of pictures per class, or a CSV with the columns `Image Path,Label[,patient]`"


def add_embedder_arguments(parser: argparse.ArgumentParser, checkpoint_required: bool) -> None:
    """The flags that say which network embeds the pictures, and how; the same in every command."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=checkpoint_required,
        help="weights: a run's folder (its newest teacher), or a .pth or .safetensors file (teacher_checkpoint.pth of "
        "a run, DinoBloom-*.pth, a DINOv2 release)",
    )
    parser.add_argument(
        "--image-size",
        type=positive_int,
        default=0,
        help="side of the network's input in pixels; 0: as in its training run where the file says so, else 224",
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="pictures in one forward")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=_default_workers(),
        help="processes that decode pictures; 0: none of their own",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="bf16 is faster on recent GPUs"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="extract again even if the output folder has features already"
    )


def embedder_from(args: argparse.Namespace) -> Embedder:
    """What `add_embedder_arguments` describes.

    Raises:
        ValueError: as `device_of`.
    """
    return Embedder(
        args.checkpoint,
        image_size=args.image_size,
        precision=args.precision,
        device=device_of(args),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )


def device_of(args: argparse.Namespace) -> str:
    """The device that `--device` means.

    Raises:
        ValueError: for `--device cuda` on a machine without one.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; pass --device cpu, or install a CUDA build")
    return ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device


def positive_int(text: str) -> int:
    """For argparse: a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _default_workers() -> int:
    return min(available_cores(), 16)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Embed labelled cells with a backbone and write <output-dir>/features.h5. A file that is there "
        "already is kept if it holds just these features, and is an error otherwise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_embedder_arguments(parser, checkpoint_required=True)
    parser.add_argument("--data", type=Path, required=True, help=CELLS_HELP)
    parser.add_argument("--output-dir", type=Path, required=True, help="where features.h5 goes; made if missing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    cells = LabelledCells.from_path(args.data)
    file = args.output_dir / "features.h5"
    features = embedder_from(args).features_of(cells, file, overwrite=args.overwrite)
    print(f"{file}: {len(features)} cells, {len(features.class_names)} classes, dim {features.features.shape[1]}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
