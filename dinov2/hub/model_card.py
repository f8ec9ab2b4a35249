"""Write the model card of an export: README.md with metadata for the Hugging Face hub, from model_card.md.jinja.

It is published with the weights, so it names files and lists without their folders.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

import dinov2
from dinov2.data.exposure import pretrained_on
from dinov2.data.loaders import VALUE_READERS
from dinov2.data.prepare import all_datasets
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.classifiers import Network
from dinov2.hub.descriptions import repository_name
from dinov2.hub.export_formats import (
    FORMATS,
    PROCESSOR_ARGUMENTS,
    TIMM_FOLDER,
    WEIGHTS_NAME,
    exported_size,
    output_names,
    timm_network_arguments,
)
from dinov2.hub.sources import PACKAGED, RELEASES
from dinov2.models import architecture
from dinov2.utils.config import read_config
from dinov2.utils.files import file_sha256

# keys of a run's config.yaml in the card
_RECIPE = (
    *("student.arch", "student.drop_path_rate", "student.layerscale", "crops.global_crops_size"),
    *("crops.global_crops_scale", "crops.local_crops_number", "crops.local_crops_size", "crops.local_crops_scale"),
    *("data_transform", "train.image_fit", "train.center_crop"),
)
_OF_AUGMENTATION = ("background_probability", "background_radius", "stain")  # in the block of data_transform
# and of each objective that is on: its weight or file is neither 0 nor null
_OBJECTIVES = (
    ("dino.loss_weight", "dino.head_n_prototypes", "train.centering"),
    ("dino.koleo_loss_weight",),
    ("ibot.loss_weight", "ibot.separate_head", "ibot.mask_ratio_min_max"),
    ("lejepa.loss_weight", "lejepa.sigreg_weight"),
    ("teacher.pretrained_weights", "teacher.distillation_loss_weight"),
    ("train.metadata.column", "train.metadata.mode", "train.metadata.weight"),
)
_SELF_DISTILLATION = "self-distillation (DINOv2, arXiv 2304.07193)"
_LEJEPA = "LeJEPA (arXiv 2511.08544)"
_WEIGHTS = ("student.pretrained_weights", "MODEL.WEIGHTS", "teacher.pretrained_weights")
_SCHEDULE = (
    *("optim.epochs", "train.OFFICIAL_EPOCH_LENGTH", "train.global_batch_size", "optim.lr", "optim.base_lr"),
    *("optim.warmup_epochs", "optim.min_lr", "optim.weight_decay", "optim.weight_decay_end", "optim.clip_grad"),
    *("optim.layerwise_decay", "teacher.momentum_teacher", "teacher.final_momentum_teacher", "train.seed"),
)
_IMAGE_LINE = re.compile(rb"^\s*[^#\s]", re.MULTILINE)  # a line of a path list that is not empty or a comment
# our metrics -> those of the Hugging Face hub
_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "weighted_f1": "f1",
    "macro_f1": "f1",
    "auroc": "roc_auc",
}
OWN_LICENCE = "apache-2.0"  # of networks that this project trained, and of DINOv2's and DinoBloom's releases
LIBRARY = "dinov2"  # the package that loads them
_BASELINES = {"untrained", "histogram", "pixels"}  # of evaluations; their results are not the network's
_DATA_FLAGS = ("data", "train", "test", "features", "test_features", "bags", "names")


@dataclass(frozen=True)
class Origin:
    """Checkpoint from which a network was exported."""

    file: Path  # the checkpoint; a folder if its weights are in several files
    sha256: str
    grid: int  # patches along one side of the checkpoint's position embeddings
    recorded_size: int | None  # side in pixels of the images of its training, if it is known
    published: str  # name of the network of this package or the release that the file holds; "" if none

    @property
    def title(self) -> str:
        """Return the name of the run or repository, else of the file, or of its folder if others share that name."""
        if self.run_folder is not None:
            return self.run_folder.name
        if repository := repository_name(self.file):
            return repository
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


@dataclass(frozen=True)
class Quote:
    """What a results.json says about a network: a table of metrics in percent."""

    about: str
    header: list[str]
    rows: list[list[str]]
    for_hub: list[EvalResult]  # the same as shares, 0-1, without baselines


def write_card(
    folder: Path,
    network: Network,
    origin: Origin,
    differences: Mapping[str, Mapping[str, float]],
    results: Sequence[Quote],
    left_out: Mapping[str, str],
    licence: str = "",
    datasets: Sequence[str] = (),
) -> None:
    """Write README.md into a folder with exported files; the last two arguments replace what the origin says."""
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
    run = None if origin.run_folder is None else _run_sections(origin.run_folder)
    card = environment.get_template("model_card.md.jinja").render(
        metadata=_metadata(network, origin, run, results, licence, datasets).to_yaml(),
        origin=origin,
        origin_rows=_origin_rows(origin, network),
        objective=_objective_of(origin.published) if run is None else run["objective"],
        model=model,
        classifier=network.classifier,
        output_names=output_names(network),
        known=architecture(model),
        size=size,
        grid_side=size // model.patch_size,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
        n_parameters=sum(value.numel() for value in model.state_dict().values()),
        run=run,
        results=results,
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
    """Return all files in a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _metadata(
    network: Network,
    origin: Origin,
    run: Mapping[str, Any] | None,
    results: Sequence[Quote],
    licence: str,
    datasets: Sequence[str],
) -> ModelCardData:
    """Return what the Hugging Face hub reads at the top of a card."""
    is_ours = run["has_our_licence"] if run is not None else bool(origin.published)
    known: Sequence[str] = pretrained_on(origin.published)
    if run is not None:
        known = sorted({Path(name).stem for name, *_ in run["lists"]} & all_datasets().keys())
    is_classifier = network.classifier is not None
    return ModelCardData(
        license=licence or (OWN_LICENCE if is_ours else None),
        library_name=LIBRARY,
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        tags=["vision-transformer", "self-supervised", "hematology", "cytology", "dinov2"],
        datasets=list(datasets or known) or None,
        model_name=origin.title,
        eval_results=[result for quote in results for result in quote.for_hub] or None,
    )


def _origin_rows(origin: Origin, network: Network) -> dict[str, str]:
    rows = {"checkpoint": origin.file.name, "its sha256": origin.sha256}
    size = origin.recorded_size
    rows["trained at"] = f"{size} x {size} px" if size else "a size that the checkpoint does not record"
    if origin.iteration is not None:
        rows["trained for"] = f"{origin.iteration:,} iterations"
    if origin.run_folder is not None:
        rows["run"] = origin.run_folder.name
        rows["sha256 of its config.yaml"] = file_sha256(origin.run_folder / "config.yaml")
    is_bare = network.classifier is None
    rows["weights"] = "the teacher's backbone, without heads" if is_bare else "fine-tuned with labels"
    rows["exported"] = f"{datetime.now(timezone.utc):%Y-%m-%d}, with dinobloom {dinov2.__version__}"
    return rows


def _objective_of(published: str) -> str:
    """Return how a published network was pre-trained; empty if it is none."""
    return _LEJEPA if published in PACKAGED else _SELF_DISTILLATION if published else ""


def _run_sections(folder: Path) -> dict[str, Any]:
    """Read objective, recipe, schedule and path lists of a run from its config.yaml, which may lack keys."""
    cfg = read_config(folder / "config.yaml")
    value_of = partial(OmegaConf.select, cfg)
    augmentation = [f"augmentation.{value_of('data_transform')}.{key}" for key in _OF_AUGMENTATION]
    of_objectives = [key for keys in _OBJECTIVES if value_of(keys[0]) for key in keys]
    recipe, schedule = (
        {key: value for key in keys if (value := value_of(key)) is not None}
        for keys in ((*_RECIPE, *augmentation, *of_objectives), _SCHEDULE)
    )
    weights = {key: value for key in _WEIGHTS if (value := value_of(key))}
    names = {key: Path(value).name for key, value in weights.items()}
    recipe |= {key: names[key] for key in recipe.keys() & names.keys()}
    objectives = {
        _SELF_DISTILLATION: value_of("dino.loss_weight") or value_of("ibot.loss_weight"),
        _LEJEPA: value_of("lejepa.loss_weight"),
        f"distillation of {names.get('teacher.pretrained_weights')}": "teacher.pretrained_weights" in names,
        "metadata guidance (FINO, arXiv 2606.05107)": value_of("train.metadata.column"),
    }
    started_from = names.get("student.pretrained_weights") or names.get("MODEL.WEIGHTS")
    if {"optim.epochs", "train.OFFICIAL_EPOCH_LENGTH"} <= schedule.keys():
        n_iterations = round(schedule["optim.epochs"] * schedule["train.OFFICIAL_EPOCH_LENGTH"])
        schedule = {"iterations planned": f"{n_iterations:,}", **schedule}
    dataset = str(OmegaConf.select(cfg, "train.dataset_path") or "")
    parts = re.split(rf":(?=(?:{'|'.join(VALUE_READERS)})=)", dataset)
    root = next((Path(part.removeprefix("root=")) for part in parts if part.startswith("root=")), None)
    files = [] if root is None else [root] if root.is_file() else sorted(root.glob("*.txt"))
    return {
        "objective": ", ".join(name for name, is_on in objectives.items() if is_on),
        "has_our_licence": {*RELEASES, *PACKAGED}.issuperset(weights.values()),
        "recipe": {"started from": started_from or "random weights", **recipe},
        "schedule": schedule,
        "lists": [(file.name, f"{len(_IMAGE_LINE.findall(file.read_bytes())):,}", file_sha256(file)) for file in files],
    }


def quote_results(file: Path, origin: Origin) -> Quote:
    """Read the metrics of a results.json, which must be about this checkpoint."""
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
    protocol = content.get("protocol", "of training")
    about = [f"`{file.name}` ({file_sha256(file)})", f"protocol {protocol}"]
    data: dict[str, list[str]] = {}
    for flag in _DATA_FLAGS:
        if value := content.get("settings", {}).get(flag):
            data[flag] = [Path(path).name for path in (value if isinstance(value, list) else [value])]
            about.append(f"{flag} {', '.join(data[flag])}")
    if content.get("date"):
        about.append(content["date"][:10])
    columns = [name for name in _METRICS if any(name in metrics for metrics in accuracies.values())]
    rows = [
        [label, *(f"{100 * metrics[name]:.1f}" if name in metrics else "" for name in columns)]
        for label, metrics in accuracies.items()
    ]
    tested_data = " and ".join(data.get("test") or data.get("test_features") or sum(data.values(), []))
    for_hub = []
    for label, metrics in accuracies.items():
        if not _BASELINES.isdisjoint(label.split(" / ")):
            continue
        tested, method = label, protocol
        if "results" not in content:  # of training, whose labels begin with the name of the data
            tested, _, method = label.partition(" / ")
        elif tested_data:
            tested, method = tested_data, f"{protocol}, {label}"
        for_hub += [
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w.-]+", "-", tested).lower(),
                dataset_name=tested,
                metric_type=_METRICS[name],
                metric_name=f"{name.replace('_', ' ')} ({method})",
                metric_value=round(float(metrics[name]), 4),
            )
            for name in columns
            if name in metrics
        ]
    header = ["features and method", *(name.replace("_", " ") for name in columns)]
    return Quote(", ".join(about), header, rows, for_hub)


def _iterate_accuracies(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (path of keys, metrics) of each innermost dictionary with an accuracy."""
    if not isinstance(content, Mapping):
        return
    if "accuracy" in content:
        yield " / ".join(path), {name: content[name] for name in _METRICS if content.get(name) is not None}
        return
    for name, value in content.items():
        yield from _iterate_accuracies(value, (*path, name))
