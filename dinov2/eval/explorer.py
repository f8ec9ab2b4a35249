"""Write a page to look around in features: cells as points of a plane, with images, neighbours, filters and a lasso.

    python dinov2/eval/explorer.py --features features.h5 --predictions predictions.csv --output explorer.html

The page is one file and needs no network. What it exports is CSV (RFC 4180) in UTF-8 with a byte order mark, which
Excel needs. Text that a spreadsheet would take for a formula gets an apostrophe before it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import read_features
from dinov2.eval.pages.cell_table import join_sets, read_columns
from dinov2.eval.pages.explorer import ExplorerSettings, Metric, explorer_section
from dinov2.eval.pages.page import write_page
from dinov2.eval.pages.projection import UMAP_MISSING, has_umap
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.parallel import available_cores

THUMBNAIL_SIZES = (8, 256)


def _named_file(text: str) -> tuple[str, Path]:
    """Parse NAME=FILE or FILE into a name ("" if there is none) and a file."""
    name, sign, file = text.partition("=")
    if not sign or Path(text).is_file():
        return "", Path(text)
    return name, Path(file)


def _data_set_names(named_files: Sequence[tuple[str, Path]]) -> list[str]:
    """Return a name for each data set: the given one, else the file's, or its folder's if files share a name."""
    stems = [path.stem for _, path in named_files]
    folders = [path.resolve().parent.name for _, path in named_files]
    defaults = stems if len(set(stems)) == len(stems) else folders
    names = [name or default for (name, _), default in zip(named_files, defaults, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: data sets would be called {', '.join(names)}; name each, as NAME=FILE")
    return names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = ExplorerSettings()
    parser = argparse.ArgumentParser(
        description="Write a page to look around in features: PCA and UMAP of the cells, their images, neighbours, "
        "filters, and a lasso whose cells can be exported.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--features",
        type=_named_file,
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="features.h5 files of one network; each is a data set; its name is the file's unless NAME is given",
    )
    parser.add_argument(
        "--predictions", type=Path, help="a predictions.csv of knn.py, linear.py or abmil.py, or its folder"
    )
    parser.add_argument(
        "--columns", type=Path, help="a CSV of more to colour by: image paths first, other columns beside them"
    )
    parser.add_argument("--kind", help="kind of features (default: the file's first one)")
    parser.add_argument("--metric", choices=get_args(Metric), default=defaults.metric, help="of neighbours and UMAP")
    parser.add_argument(
        "--max-cells",
        type=positive_int,
        default=defaults.max_cells,
        help="the most cells to show, sampled by class",
    )
    parser.add_argument("--thumbnail-size", type=int, default=defaults.thumbnail_size, help="side in pixels")
    parser.add_argument(
        "--umap", action=argparse.BooleanOptionalAction, help="UMAP beside PCA (default: where umap-learn is installed)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of UMAP and of the sampling")
    parser.add_argument(
        "--num-workers", type=positive_int, default=min(available_cores(), 16), help="threads that read images"
    )
    parser.add_argument("--title", default="Embedding explorer", help="title of the page")
    parser.add_argument("--output", type=Path, required=True, help="the .html file")
    args = parser.parse_args(argv)
    smallest, largest = THUMBNAIL_SIZES
    if not smallest <= args.thumbnail_size <= largest:
        parser.error(f"--thumbnail-size {args.thumbnail_size} is not between {smallest} and {largest}")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative; give 0 or more")
    if args.umap and not has_umap():
        parser.error(f"--umap: {UMAP_MISSING}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    sets = {
        name: read_features(file) for name, (_, file) in zip(_data_set_names(args.features), args.features, strict=True)
    }
    if args.kind is not None:
        sets = {name: features.of_kind(args.kind) for name, features in sets.items()}
    features, data_sets = join_sets(sets)
    settings = ExplorerSettings(
        max_cells=args.max_cells,
        thumbnail_size=args.thumbnail_size,
        metric=args.metric,
        with_umap=args.umap,
        seed=args.seed,
        n_workers=args.num_workers,
    )
    columns = read_columns(args.columns, features.paths) if args.columns else None
    section = explorer_section(features, args.predictions, data_sets, columns, settings)
    write_page(args.output, args.title, [section], ", ".join(sets))
    n_cells, n_megabytes = min(len(features), args.max_cells), args.output.stat().st_size / 1e6
    print(f"{args.output}: {n_cells:,} cells, {n_megabytes:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))
