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

The weights are the teacher's, in fp32, or those of a fine-tuned network with its classifier. The folder appears only if
every file has reproduced our outputs for drawn cells.
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

import dinov2  # noqa: F401 - before torch: it limits how long OpenMP threads spin

# isort: split
import torch

from dinov2.hub.backbones import DEFAULT_IMAGE_SIZE, checkpoint_file
from dinov2.hub.classifiers import Network, load_network
from dinov2.hub.export_formats import (
    FORMATS,
    ExportError,
    Format,
    compare,
    draw_cells,
)
from dinov2.hub.hugging_face import HUB_PREFIX, check_upload, upload_to_hub
from dinov2.hub.model_card import Origin, files_below, quote_results, write_card
from dinov2.hub.sources import RELEASES, published_name
from dinov2.hub.weight_files import read_networks
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import PathLike, file_sha256, local_path

logger = logging.getLogger("dinov2")

SUMS_FILE = "sha256sums.txt"
EXTRA = "pip install 'dinobloom[export]'"


def export_backbone(
    checkpoint: PathLike,
    output_dir: Path,
    formats: Sequence[str] | None = None,
    *,
    image_size: int = 0,
    results: Sequence[Path] = (),
    licence: str = "",
    datasets: Sequence[str] = (),
    tolerance: float = 1e-4,
    overwrite: bool = False,
    push_to_hub: str = "",
    public: bool = False,
) -> None:
    """Write and check a checkpoint's network in several formats, with a model card; for arguments see `--help`."""
    _check_free(output_dir, overwrite)
    if push_to_hub:
        check_upload(push_to_hub)
    network, origin = _read(checkpoint, image_size)
    quoted = [quote_results(file, origin) for file in results]
    left_out = {name: reason for name in formats or FORMATS if (reason := _find_obstacle(FORMATS[name], network))}
    if formats is not None and left_out:
        raise ValueError("; ".join(f"--formats {name}: {reason}" for name, reason in left_out.items()))
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)

    cells = draw_cells()
    with _written_as_whole(output_dir) as folder, torch.no_grad():
        differences = {}
        for name in dict.fromkeys(formats or FORMATS):
            if name not in left_out:
                FORMATS[name].write(network, folder)
                differences[name] = compare(name, network, folder, cells, tolerance)
        write_card(folder, network, origin, differences, quoted, left_out, licence, datasets)
        lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_below(folder)]
        (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    logger.info("exported %s to %s: %s", origin.file, output_dir, ", ".join(differences))
    if push_to_hub:
        logger.info("uploaded to %s", upload_to_hub(output_dir, push_to_hub, public))


def _find_obstacle(form: Format, network: Network) -> str:
    """Return why a format cannot be written; empty if it can."""
    for package in form.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"it needs {package}, which cannot be imported here ({error}); {EXTRA} installs it"
    try:
        form.check(network.backbone)
    except ValueError as error:
        return str(error)
    return ""


def _read(checkpoint: PathLike, image_size: int) -> tuple[Network, Origin]:
    file = checkpoint_file(checkpoint)
    network = load_network(file, image_size or None)
    model = network.backbone
    stored, sha256 = read_networks(file), file_sha256(file)
    grid = math.isqrt(stored.backbone["pos_embed"].numel() // model.embed_dim - 1)
    if model.in_chans != 3:
        raise ValueError(f"--checkpoint {file}: has {model.in_chans} channels; only RGB networks are exported")
    published = published_name(file, sha256)
    trained_size = stored.recorded.get("img_size") or (RELEASES[published].img_size if published in RELEASES else None)
    return network, Origin(file, sha256, grid, trained_size, published)


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
def _written_as_whole(final: Path) -> Iterator[Path]:
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
        if final.exists():
            final.rename(temporary / "before")
        inner.rename(final)
    finally:
        shutil.rmtree(temporary)


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's network for other tools. Each file is read back by its own library and "
        "compared with the network; a model card describes it and how to load it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source_help = (
        f"a file with weights in any layout, a folder of a run, of transformers or of timm, a name, a URL or "
        f"{HUB_PREFIX}<owner>/<name>"
    )
    add("--checkpoint", required=True, help=source_help)
    add("--output-dir", type=local_path, required=True, help="folder for the files; made by this command")
    formats_help = f"out of {', '.join(FORMATS)}; without it, all that the installed packages and the network allow"
    add("--formats", nargs="+", choices=tuple(FORMATS), metavar="FORMAT", help=formats_help)
    size_help = (
        "side in pixels, a multiple of the patch size, of the images for which position embeddings are written; "
        f"0: that of its training if the file records it, else {DEFAULT_IMAGE_SIZE}"
    )
    add("--image-size", type=int, default=0, help=size_help)
    results_help = "results.json files to quote in the card"
    add("--results", type=local_path, nargs="+", default=[], metavar="FILE", help=results_help)
    licence_help = (
        "of the weights, for the card, as the Hugging Face hub names it (cc-by-nc-4.0, ...); without it apache-2.0 for "
        "a run of this project from random or published weights, and for published networks, none for other files"
    )
    add("--licence", default="", help=licence_help)
    datasets_help = (
        "data sets of the training, for the card; without it those that are known: public ones after which a path list "
        "of the run is named, or DinoBloom's"
    )
    add("--datasets", nargs="+", default=[], metavar="NAME", help=datasets_help)
    hub_help = "upload the export to this repository on the Hugging Face hub, which is made if it does not exist"
    add("--push-to-hub", default="", metavar="OWNER/NAME", help=hub_help)
    add("--public", action="store_true", help="make a new repository public; without it, it is private")
    add("--tolerance", type=float, default=1e-4, help="largest difference from the network's outputs, in fp32")
    add("--overwrite", action="store_true", help="replace an earlier export in the output folder")
    args = parser.parse_args(argv)
    if args.image_size < 0:
        parser.error(f"--image-size: {args.image_size} is negative")
    if args.public and not args.push_to_hub:
        parser.error("--public: it is for a repository; add --push-to-hub <owner>/<name>")
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
