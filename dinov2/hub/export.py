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
import json
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dinov2  # before torch: it limits how long OpenMP threads spin

# isort: split
import jinja2
import torch
from omegaconf import OmegaConf

from dinov2.data.loaders import VALUE_READERS
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.backbones import DEFAULT_IMAGE_SIZE, checkpoint_file
from dinov2.hub.classifiers import Network, load_network
from dinov2.hub.export_formats import (
    FORMATS,
    PROCESSOR_ARGUMENTS,
    TIMM_FOLDER,
    WEIGHTS_NAME,
    ExportError,
    Format,
    compare,
    draw_cells,
    exported_size,
    output_names,
    timm_network_arguments,
)
from dinov2.hub.weight_files import read_networks
from dinov2.logging import setup_logging
from dinov2.models import architecture
from dinov2.utils.command import exit_code
from dinov2.utils.config import read_config
from dinov2.utils.files import PathLike, file_sha256, local_path

logger = logging.getLogger("dinov2")

SUMS_FILE = "sha256sums.txt"
EXTRA = "pip install 'dinobloom[export]'"

# keys of a run's config.yaml in the card
_RECIPE = (
    *("student.arch", "student.drop_path_rate", "student.layerscale", "crops.global_crops_size"),
    *("crops.global_crops_scale", "crops.local_crops_number", "crops.local_crops_size", "crops.local_crops_scale"),
    *("data_transform", "train.image_fit", "train.centering", "dino.loss_weight", "dino.head_n_prototypes"),
    *("dino.koleo_loss_weight", "ibot.loss_weight", "ibot.separate_head", "ibot.mask_ratio_min_max"),
)
_SCHEDULE = (
    *("optim.epochs", "train.OFFICIAL_EPOCH_LENGTH", "train.global_batch_size", "optim.lr", "optim.base_lr"),
    *("optim.warmup_epochs", "optim.min_lr", "optim.weight_decay", "optim.weight_decay_end", "optim.clip_grad"),
    *("optim.layerwise_decay", "teacher.momentum_teacher", "teacher.final_momentum_teacher", "train.seed"),
)
_IMAGE_LINE = re.compile(rb"^\s*[^#\s]", re.MULTILINE)  # a line of a path list that is not empty or a comment
_METRICS = ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc")
_DATA_FLAGS = ("data", "train", "test", "features", "test_features", "bags", "names")


@dataclass(frozen=True)
class Origin:
    """Checkpoint from which a network was exported."""

    file: Path  # the checkpoint; a folder if its weights are in several files
    sha256: str
    grid: int  # patches along one side of the checkpoint's position embeddings

    @property
    def title(self) -> str:
        """Return the name of the run, else of the file, or of its folder if others share the file's name."""
        if self.run_folder is not None:
            return self.run_folder.name
        return self.file.parent.name if self.file.name in (WEIGHTS_NAME, "finetuned.pth") else self.file.stem

    @property
    def iteration(self) -> int | None:
        """Return the number of training steps from the names of a run's folders; None if unknown."""
        match = re.fullmatch(r"training_(\d+)", self.file.parent.name) or re.fullmatch(
            r"iteration_(\d+)", self.file.name
        )
        return int(match[1]) if match else None

    @property
    def run_folder(self) -> Path | None:
        """Return the run of eval/training_<n>/<file> or checkpoints/iteration_<n>, if it still has its config.yaml."""
        parents = [] if self.iteration is None else self.file.parents
        run = next((parent.parent for parent in parents if parent.name in ("eval", "checkpoints")), None)
        return run if run is not None and (run / "config.yaml").is_file() else None


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
    """Write and check a checkpoint's network in several formats, with a model card; for arguments see `--help`."""
    _check_free(output_dir, overwrite)
    network, origin = _read(checkpoint, image_size)
    quoted = [_quote_results(file, origin) for file in results]
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
        _write_card(folder, network, origin, differences, quoted, left_out)
        lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files_below(folder)]
        (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    logger.info("exported %s to %s: %s", origin.file, output_dir, ", ".join(differences))


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
    n_numbers = read_networks(file).backbone["pos_embed"].numel()
    grid = math.isqrt(n_numbers // model.embed_dim - 1)
    if model.in_chans != 3:
        raise ValueError(f"--checkpoint {file}: has {model.in_chans} channels; only RGB networks are exported")
    return network, Origin(file, file_sha256(file), grid)


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
        for path in _files_below(inner):
            path.chmod(permissions)
        if final.exists():
            final.rename(temporary / "before")
        inner.rename(final)
    finally:
        shutil.rmtree(temporary)


# --- the model card, which is published with the weights: it names files and lists without their folders ------------


def _write_card(
    folder: Path,
    network: Network,
    origin: Origin,
    differences: Mapping[str, Mapping[str, float]],
    results: Sequence[tuple[str, list[str], list[list[str]]]],
    left_out: Mapping[str, str],
) -> None:
    """Write README.md into a folder with exported files, from the template model_card.md.jinja."""
    model = network.backbone
    size = exported_size(model)
    timm_name, timm_options = timm_network_arguments(network)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    card = environment.get_template("model_card.md.jinja").render(
        origin=origin,
        origin_rows=_origin_rows(origin, network),
        model=model,
        classifier=network.classifier,
        output_names=output_names(network),
        known=architecture(model),
        size=size,
        grid_side=size // model.patch_size,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
        n_parameters=sum(value.numel() for value in model.state_dict().values()),
        run=None if origin.run_folder is None else _run_sections(origin.run_folder),
        results=results,
        formats=FORMATS,
        processor_arguments=PROCESSOR_ARGUMENTS,
        timm_name=timm_name,
        timm_arguments={**timm_options, "checkpoint_path": f"{TIMM_FOLDER}/{WEIGHTS_NAME}"},
        differences=differences,
        left_out=left_out,
        files=[
            (path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}", file_sha256(path))
            for path in _files_below(folder)
        ],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _origin_rows(origin: Origin, network: Network) -> dict[str, str]:
    rows = {"checkpoint": origin.file.name, "its sha256": origin.sha256}
    if origin.iteration is not None:
        rows["trained for"] = f"{origin.iteration:,} iterations"
    if origin.run_folder is not None:
        rows["run"] = origin.run_folder.name
        rows["sha256 of its config.yaml"] = file_sha256(origin.run_folder / "config.yaml")
    is_bare = network.classifier is None
    rows["weights"] = "the teacher's backbone, without heads" if is_bare else "fine-tuned with labels"
    rows["exported"] = f"{datetime.now(timezone.utc):%Y-%m-%d}, with dinobloom {dinov2.__version__}"
    return rows


def _run_sections(folder: Path) -> dict[str, Any]:
    """Read recipe, schedule and path lists of a run from its config.yaml, which may lack keys."""
    cfg = read_config(folder / "config.yaml")
    recipe, schedule = (
        {key: value for key in keys if (value := OmegaConf.select(cfg, key)) is not None}
        for keys in (_RECIPE, _SCHEDULE)
    )
    started_from = Path(OmegaConf.select(cfg, "student.pretrained_weights") or "").name
    if {"optim.epochs", "train.OFFICIAL_EPOCH_LENGTH"} <= schedule.keys():
        n_iterations = round(schedule["optim.epochs"] * schedule["train.OFFICIAL_EPOCH_LENGTH"])
        schedule = {"iterations planned": f"{n_iterations:,}", **schedule}
    dataset = str(OmegaConf.select(cfg, "train.dataset_path") or "")
    parts = re.split(rf":(?=(?:{'|'.join(VALUE_READERS)})=)", dataset)
    root = next((Path(part.removeprefix("root=")) for part in parts if part.startswith("root=")), None)
    files = [] if root is None else [root] if root.is_file() else sorted(root.glob("*.txt"))
    return {
        "recipe": {"started from": started_from or "random weights", **recipe},
        "schedule": schedule,
        "lists": [(file.name, f"{len(_IMAGE_LINE.findall(file.read_bytes())):,}", file_sha256(file)) for file in files],
    }


def _quote_results(file: Path, origin: Origin) -> tuple[str, list[str], list[list[str]]]:
    """Return a description of a results.json of this checkpoint, and header and rows of a table of its metrics."""
    if not file.is_file():
        raise FileNotFoundError(f"--results: no file {str(file)!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results: {file} is not JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    accuracies = dict(_iterate_accuracies(content.get("results", content.get("datasets"))))  # training has `datasets`
    if not accuracies:
        raise ValueError(f"--results: {file} holds no accuracies; give the results.json of an evaluation")
    evaluated, iteration = content.get("checkpoint"), content.get("iteration")
    sha256 = evaluated.get("checkpoint_sha256") if isinstance(evaluated, dict) else None
    other = ""
    if sha256 not in (None, origin.sha256):
        other = f"the checkpoint with sha256 {sha256}, not about {origin.file.name} ({origin.sha256})"
    elif None not in (iteration, origin.iteration) and iteration != origin.iteration:
        other = f"the teacher after iteration {iteration}, not {origin.iteration}"
    if other:
        raise ValueError(f"--results: {file} is about {other}; give results of the exported checkpoint")
    about = [f"`{file.name}` ({file_sha256(file)})", f"protocol {content.get('protocol', 'of training')}"]
    for flag in _DATA_FLAGS:
        if value := content.get("settings", {}).get(flag):
            paths = value if isinstance(value, list) else [value]
            about.append(f"{flag} {', '.join(Path(path).name for path in paths)}")
    if content.get("date"):
        about.append(content["date"][:10])
    columns = [name for name in _METRICS if any(name in metrics for metrics in accuracies.values())]
    rows = [
        [label, *(f"{100 * metrics[name]:.1f}" if name in metrics else "" for name in columns)]
        for label, metrics in accuracies.items()
    ]
    return ", ".join(about), ["features and method", *(name.replace("_", " ") for name in columns)], rows


def _iterate_accuracies(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (path of keys, metrics) of each innermost dictionary with an accuracy."""
    if not isinstance(content, Mapping):
        return
    if "accuracy" in content:
        yield " / ".join(path), {name: content[name] for name in _METRICS if content.get(name) is not None}
        return
    for name, value in content.items():
        yield from _iterate_accuracies(value, (*path, name))


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's network for other tools. Each file is read back by its own library and "
        "compared with the network; a model card describes it and how to load it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source_help = "a file with weights in any layout, a folder of a run, of transformers or of timm, a name or a URL"
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
    add("--tolerance", type=float, default=1e-4, help="largest difference from the network's outputs, in fp32")
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
