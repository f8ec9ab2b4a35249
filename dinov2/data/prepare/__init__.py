"""Public data sets of blood cells: from the unpacked archive to training lists and labels.

A data set is a module of this package that has a `DATASET`; docs/datasets.md shows how to add one.
"""

import difflib
import importlib
import pkgutil

from dinov2.data.prepare.base import DataSet


def all_datasets() -> dict[str, DataSet]:
    """{name: data set} of every module of this package that declares one, by name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    datasets = [module.DATASET for module in modules if hasattr(module, "DATASET")]
    by_name = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}
    assert len(by_name) == len(datasets), "two modules declare data sets of the same name"
    return by_name


def get_dataset(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        ValueError: if there is none; the message names the nearest.
    """
    datasets = all_datasets()
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"data set {name!r} is unknown; {hint}known are {', '.join(datasets)}")
    return datasets[name]


def overview_table() -> str:
    """All data sets as a Markdown table."""
    lines = ["| name | data set | modality | images | cells cut out | licence |", "|---|---|---|---|---|---|"]
    for dataset in all_datasets().values():
        counts = [f"{name} {count:,}" for name, count in dataset.expected.items()] or ["not stated"]
        lines.append(
            f"| `{dataset.name}` | [{dataset.title}]({dataset.origin}) | {dataset.modality} | "
            f"{counts[0].removeprefix('pictures ')} | {'yes' if dataset.cuts else ''} | {dataset.licence} |"
        )
    return "\n".join(lines)
