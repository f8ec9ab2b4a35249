"""Export a backbone for other tools: each format is read back and compared with ours; with a model card.

    python dinov2/hub/export.py --checkpoint <file or run folder> --output-dir <folder>

writes the formats of `--formats`:

    backbone.pth            a bare state dict, as DINOv2 releases them
    backbone.safetensors    the same
    huggingface/            for transformers' AutoModel and AutoImageProcessor
    timm/                   for timm.create_model(..., checkpoint_path="timm/model.safetensors")
    backbone.onnx           any number of images at a time (beyond 2 GB, weights in backbone.onnx.data)
    backbone.pt2            torch.export, likewise
    README.md               a model card: the network, how to load each file, differences from ours
    sha256sums.txt          of all these

The weights are the teacher's, in fp32. The folder appears only if every file has reproduced our features of drawn
cells.
"""

import argparse
import importlib
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dinov2  # noqa: F401  # before torch: it limits how long OpenMP threads spin

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.sample_cells import Slide, draw_cell
from dinov2.hub.backbones import ImageTransform, checkpoint_file, load_backbone
from dinov2.hub.export_formats import FORMATS, Format, exported_size, own_tokens
from dinov2.hub.model_card import Origin, files_below, read_results, write_card
from dinov2.hub.weight_files import read_networks
from dinov2.logging import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.command import exit_code
from dinov2.utils.files import PathLike, file_sha256

logger = logging.getLogger("dinov2")

DEFAULT_IMAGE_SIZE = 224
CHECKED_CELLS = ("neutrophil_segmented", "lymphocyte", "platelet")
CHECKED_BATCH_SIZES = (1, len(CHECKED_CELLS))
SUMS_FILE = "sha256sums.txt"
EXTRA = "pip install 'dinobloom[export]'"


class ExportError(RuntimeError):
    """An exported file does not reproduce the network's features."""


def export_backbone(
    checkpoint: PathLike,
    output_dir: Path,
    formats: Sequence[str] | None = None,
    *,
    image_size: int = 0,
    results: Sequence[Path] = (),
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> None:
    """Write and check a checkpoint's backbone in several formats, with a model card; for arguments see `--help`."""
    _check_free(output_dir, overwrite)
    model, origin = _read(checkpoint, image_size)
    quoted = {file: read_results(file, origin) for file in results}
    left_out = {name: reason for name in formats or FORMATS if (reason := _find_obstacle(FORMATS[name], model))}
    if formats is not None and left_out:
        raise ValueError("; ".join(f"--formats {name}: {reason}" for name, reason in left_out.items()))
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)

    cells = draw_cells()
    with _written_as_whole(output_dir, overwrite) as folder, torch.no_grad():
        differences = {}
        for name in dict.fromkeys(formats or FORMATS):
            if name not in left_out:
                FORMATS[name].write(model, folder)
                differences[name] = compare(name, model, folder, cells, tolerance)
        write_card(folder, model, origin, differences, quoted, left_out)
        lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_below(folder)]
        (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    logger.info("exported %s to %s: %s", origin.file, output_dir, ", ".join(differences))


def _find_obstacle(form: Format, model: DinoVisionTransformer) -> str:
    """Return why a format cannot be written; empty if it can."""
    for package in form.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"it needs {package}, which cannot be imported here ({error}); {EXTRA} installs it"
    try:
        form.check(model)
    except ValueError as error:
        return str(error)
    return ""


def _read(checkpoint: PathLike, image_size: int) -> tuple[DinoVisionTransformer, Origin]:
    file = checkpoint_file(checkpoint)
    stored = read_networks(file)
    size = image_size or int(stored.recorded.get("img_size", DEFAULT_IMAGE_SIZE))
    n_numbers = stored.backbone["pos_embed"].numel() if "pos_embed" in stored.backbone else 0
    del stored  # two copies of the largest network may not fit into memory
    model = load_backbone(checkpoint, size)
    grid = math.isqrt(n_numbers // model.embed_dim - 1)
    if model.in_chans != 3:
        raise ValueError(f"--checkpoint {file}: has {model.in_chans} channels; only RGB networks are exported")
    return model, Origin(file, file_sha256(file), grid)


# --- comparing ------------------------------------------------------------------------------------------------------


def draw_cells() -> list[Image.Image]:
    """Draw the cells on which exported networks are compared, always the same."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(draw_cell(name, Slide(rng), rng)) for name in CHECKED_CELLS]


def compare(
    name: str, model: DinoVisionTransformer, folder: Path, cells: Sequence[Image.Image], tolerance: float
) -> dict[str, float]:
    """Compare the features of a written format with ours, for one and several cells, and its own preprocessing.

    Returns {output: largest difference}; ExportError if one is above the tolerance or the file cannot be read.
    """
    form, transform = FORMATS[name], ImageTransform(exported_size(model))
    images = torch.stack([transform(cell) for cell in cells])  # [B, 3, S, S]
    expected = own_tokens(model, images)
    try:
        embed = form.read(model, folder)
        outputs = [(expected, images[:n], embed(images[:n])) for n in CHECKED_BATCH_SIZES]
        if form.prepare is not None:
            prepared = form.prepare(folder, cells)
            outputs.append(({**expected, "pixels": images}, prepared, {**embed(prepared), "pixels": prepared}))
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # from libraries that cannot read a file
        raise ExportError(f"{name}: what was written cannot be used: {' '.join(str(error).split())}") from error
    differences: dict[str, float] = {}
    for ours, given, theirs in outputs:
        for output, value in theirs.items():
            largest = _largest_difference(ours[output][: len(given)], value)
            differences[output] = max(differences.get(output, 0.0), largest)
    text = ", ".join(f"{output} {value:.2g}" for output, value in differences.items())
    logger.info("%s: largest difference %s", name, text)
    if any(value > tolerance for value in differences.values()):
        raise ExportError(
            f"{name}: what was written differs from the network by more than --tolerance {tolerance:g}: {text}; "
            "nothing is exported"
        )
    return differences


def _largest_difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference; infinite if shapes differ or a value is not finite."""
    if expected.shape != actual.shape:
        return math.inf
    largest = (expected - actual).abs().max().item()
    return largest if math.isfinite(largest) else math.inf


# --- the folder -----------------------------------------------------------------------------------------------------


def _check_free(output_dir: Path, overwrite: bool) -> None:
    """Raise an error if the folder is not empty, unless it is an earlier export and `overwrite` is set."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise NotADirectoryError(f"--output-dir: {output_dir} is a file; choose another folder")
    if not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--output-dir: {output_dir} is not empty; choose another folder, or pass --overwrite")
    if not (output_dir / SUMS_FILE).is_file():
        raise ValueError(
            f"--overwrite: {output_dir} has no {SUMS_FILE}, so it is no export; choose another folder, or empty it"
        )


@contextmanager
def _written_as_whole(final: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; rename it to `final` at the end, or remove it after an error."""
    final = final.absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp"))
    try:
        inner = temporary / "export"  # with the usual permissions, unlike a temporary folder
        inner.mkdir()
        yield inner
        permissions = inner.stat().st_mode & 0o666  # some libraries write files that only their owner can read
        for path in files_below(inner):
            path.chmod(permissions)
        _check_free(final, overwrite)
        if final.exists():
            final.rename(temporary / "before")
        inner.rename(final)
    finally:
        shutil.rmtree(temporary)


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's backbone for other tools. Each file is read back by its own library and "
        "compared with the network; a model card describes it and how to load it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source_help = "a file with weights in any layout, a folder of a run, of transformers or of timm, a name or a URL"
    add("--checkpoint", required=True, help=source_help)
    add("--output-dir", type=Path, required=True, help="folder for the files; made by this command")
    formats_help = f"out of {', '.join(FORMATS)}; without it, all that the installed packages and the network allow"
    add("--formats", nargs="+", choices=tuple(FORMATS), metavar="FORMAT", help=formats_help)
    size_help = (
        "side in pixels, a multiple of the patch size, of the images for which position embeddings are written; "
        f"0: that of its training if the file records it, else {DEFAULT_IMAGE_SIZE}"
    )
    add("--image-size", type=int, default=0, help=size_help)
    results_help = "results.json files to quote in the card"
    add("--results", type=Path, nargs="+", default=[], metavar="FILE", help=results_help)
    add("--tolerance", type=float, default=1e-4, help="largest difference from the network's features, in fp32")
    add("--overwrite", action="store_true", help="replace an earlier export in the output folder")
    args = parser.parse_args(argv)
    if args.image_size < 0:
        parser.error(f"--image-size: {args.image_size} is negative")
    if not args.tolerance > 0:
        parser.error(f"--tolerance: {args.tolerance} is not above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if an export differs from the network, 2 for a user's mistake."""
    args = parse_arguments(argv)
    setup_logging()
    try:
        return exit_code(lambda: export_backbone(**vars(args)))
    except ExportError as error:
        logger.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
