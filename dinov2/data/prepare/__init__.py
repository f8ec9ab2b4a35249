"""Prepare public data sets of blood cells: from the unpacked archive to training lists and labels.

Each module of this package with a `DATASET` declares a data set; docs/datasets.md shows how to add one.
"""

import difflib
import importlib
import pkgutil

from dinov2.data.prepare.base import DataSet


def all_datasets() -> dict[str, DataSet]:
    """Return {name: data set} of all modules of this package that declare one, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    datasets = [module.DATASET for module in modules if hasattr(module, "DATASET")]
    by_name = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}
    assert len(by_name) == len(datasets), "two modules declare data sets of the same name"
    return by_name


def get_dataset(name: str) -> DataSet:
    """Return the data set of that name.

    Raises:
        ValueError: if there is none; the message suggests the most similar name.
    """
    datasets = all_datasets()
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"data set {name!r} is unknown; {hint}known are {', '.join(datasets)}")
    return datasets[name]


def overview_table() -> str:
    """Return a Markdown table of all data sets."""
    lines = ["| name | data set | modality | images | cells cut out | licence |", "|---|---|---|---|---|---|"]
    for dataset in all_datasets().values():
        counts = [f"{name} {count:,}" for name, count in dataset.expected.items()] or ["not stated"]
        lines.append(
            f"| `{dataset.name}` | [{dataset.title}]({dataset.origin}) | {dataset.modality} | "
            f"{counts[0].removeprefix('pictures ')} | {'yes' if dataset.cuts else ''} | {dataset.licence} |"
        )
    return "\n".join(lines)
