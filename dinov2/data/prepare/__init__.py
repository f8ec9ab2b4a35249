"""Prepare public data sets of blood cells: from the unpacked archive to training lists and labels.

Each `DataSet` in a module of this package is known by its name; docs/datasets.md shows how to add one.
"""

import difflib
import importlib
import pkgutil

from dinov2.data.prepare.base import DataSet


def all_datasets() -> dict[str, DataSet]:
    """Return {name: data set} of all that the modules of this package declare, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    datasets = [value for module in modules for value in vars(module).values() if isinstance(value, DataSet)]
    by_name = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}
    assert len(by_name) == len(datasets), "two data sets have the same name"
    return by_name


def get_dataset(name: str) -> DataSet:
    """Return the data set of that name; a ValueError for an unknown one suggests the most similar name."""
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
