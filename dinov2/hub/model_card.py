"""Write the model card (README.md) of exported weights from the template model_card.md.jinja.

A card is published with the weights, so it names files and lists without their folders.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

import dinov2
from dinov2.data.loaders import VALUE_READERS
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.conversions import timm_arguments
from dinov2.hub.export_formats import FORMATS, PROCESSOR_ARGUMENTS, TIMM_FOLDER, WEIGHTS_NAME, exported_size
from dinov2.models import architecture
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import file_sha256

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
        """Return the name of the run, else of the file, or of its folder if all exports share the file's name."""
        if self.run_folder is not None:
            return self.run_folder.name
        return self.file.parent.name if self.file.name == WEIGHTS_NAME else self.file.stem

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


def write_card(
    folder: Path,
    model: DinoVisionTransformer,
    origin: Origin,
    differences: Mapping[str, Mapping[str, float]],
    results: Mapping[Path, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    """Write README.md into a folder with exported files."""
    size = exported_size(model)
    timm_name, timm_options = timm_arguments(architecture(model))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    card = environment.get_template("model_card.md.jinja").render(
        origin=origin,
        origin_rows=_origin_rows(origin),
        model=model,
        known=architecture(model),
        size=size,
        grid_side=size // model.patch_size,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
        n_parameters=sum(value.numel() for value in model.state_dict().values()),
        run=None if origin.run_folder is None else _run_sections(origin.run_folder),
        results=[_quote_results(file, content) for file, content in results.items()],
        formats=FORMATS,
        processor_arguments=PROCESSOR_ARGUMENTS,
        timm_name=timm_name,
        timm_arguments={**timm_options, "checkpoint_path": f"{TIMM_FOLDER}/{WEIGHTS_NAME}"},
        differences=differences,
        left_out=left_out,
        files=[
            (path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}", file_sha256(path))
            for path in files_below(folder)
        ],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _origin_rows(origin: Origin) -> dict[str, str]:
    rows = {"checkpoint": origin.file.name, "its sha256": origin.sha256}
    if origin.iteration is not None:
        rows["trained for"] = f"{origin.iteration:,} iterations"
    if origin.run_folder is not None:
        rows["run"] = origin.run_folder.name
        rows["sha256 of its config.yaml"] = file_sha256(origin.run_folder / "config.yaml")
    rows["weights"] = "the teacher's backbone, without heads"
    rows["exported"] = f"{datetime.now(timezone.utc):%Y-%m-%d}, with dinobloom {dinov2.__version__}"
    return rows


def _run_sections(folder: Path) -> dict[str, Any]:
    """Read recipe, schedule and path lists of a run from its config.yaml, which may lack keys."""
    cfg = OmegaConf.load(folder / "config.yaml")
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


# --- results --------------------------------------------------------------------------------------------------------


def read_results(file: Path, origin: Origin) -> dict[str, Any]:
    """Read a results.json of this checkpoint."""
    if not file.is_file():
        raise FileNotFoundError(f"--results: no file {str(file)!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results: {file} is not JSON ({error})") from error
    if not isinstance(content, dict) or not list(_iterate_accuracies(_numbers_of(content))):
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
    return content


def _numbers_of(content: Mapping[str, Any]) -> Any:
    """Return the part with metrics of an evaluation's or a training's results.json."""
    return content.get("results", content.get("datasets"))


def _quote_results(file: Path, content: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return a description of a results.json, and header and rows of a table of its metrics."""
    settings = content.get("settings", {})
    about = [f"`{file.name}` ({file_sha256(file)})", f"protocol {content.get('protocol', 'of training')}"]
    for flag in _DATA_FLAGS:
        if value := settings.get(flag):
            paths = value if isinstance(value, list) else [value]
            about.append(f"{flag} {', '.join(Path(path).name for path in paths)}")
    if content.get("date"):
        about.append(content["date"][:10])
    accuracies = dict(_iterate_accuracies(_numbers_of(content)))
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
