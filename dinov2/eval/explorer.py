"""Write a page to look around in features: cells as points of a plane, with images, neighbours, filters and a lasso.

    python dinov2/eval/explorer.py --features features.h5 --predictions predictions.csv --output explorer.html

The page is one file and needs no network. What it exports is CSV (RFC 4180) in UTF-8 with a byte order mark, which
Excel needs. Text that a spreadsheet would take for a formula gets an apostrophe before it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2.eval.extract_features import positive_int
from dinov2.eval.features import Features, read_features
from dinov2.eval.pages.explorer import MAX_CELLS, METRICS, explorer_section
from dinov2.eval.pages.page import write_page
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.resources import available_cores


def read_sets(given: Sequence[str]) -> dict[str, Features]:
    """Read features from FILE or NAME=FILE; without NAME it is the file's, or the folder's if files share a name."""
    pairs = [("", text) if Path(text).is_file() else re.findall("(?:([^=]*)=)?(.*)", text)[0] for text in given]
    paths = [Path(file) for _, file in pairs]
    has_file_names = len({path.stem for path in paths}) == len(paths)
    defaults = [path.stem if has_file_names else path.resolve().parent.name for path in paths]
    names = [name or default for (name, _), default in zip(pairs, defaults, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: data sets would be called {', '.join(names)}; name each, as NAME=FILE")
    return {name: read_features(file) for name, (_, file) in zip(names, pairs, strict=True)}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a page to look around in features: PCA and UMAP of the cells, their images, neighbours, "
        "filters, and a lasso whose cells can be exported.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    features_help = "features.h5 files of one network, each a data set that has the file's name unless NAME is given"
    flag("--features", nargs="+", required=True, metavar="[NAME=]FILE", help=features_help)
    flag("--predictions", type=Path, help="a predictions.csv of knn.py, linear.py or abmil.py, or its folder")
    flag("--columns", type=Path, help="a CSV of more to colour by: image paths first, other columns beside them")
    flag("--kind", help="kind of features (default: the file's first one)")
    flag("--metric", choices=METRICS, default="euclidean", help="of neighbours and UMAP")
    flag("--max-cells", type=positive_int, default=MAX_CELLS, help="the most cells to show, sampled by class")
    flag("--thumbnail-size", type=int, default=40, help="side in pixels, 8 to 256")
    flag("--umap", action=argparse.BooleanOptionalAction, help="UMAP too (default: where umap-learn is installed)")
    flag("--seed", type=int, default=0, help="of UMAP and of the sampling")
    flag("--num-workers", type=positive_int, default=min(available_cores(), 16), help="threads that read images")
    flag("--title", default="Embedding explorer", help="title of the page")
    flag("--output", type=Path, required=True, help="the .html file")
    args = parser.parse_args(argv)
    if not 8 <= args.thumbnail_size <= 256:
        parser.error(f"--thumbnail-size {args.thumbnail_size} is not between 8 and 256")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative; give 0 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    sets = read_sets(args.features)
    if args.kind is not None:
        sets = {name: features.of_kind(args.kind) for name, features in sets.items()}
    section = explorer_section(
        sets,
        args.predictions,
        args.columns,
        max_cells=args.max_cells,
        thumbnail_size=args.thumbnail_size,
        metric=args.metric,
        with_umap=args.umap,
        seed=args.seed,
        n_workers=args.num_workers,
    )
    write_page(args.output, args.title, [section], ", ".join(sets))
    print(f"{args.output}: {sum(map(len, sets.values())):,} cells, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(exit_code(main))
