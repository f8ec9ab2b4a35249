"""Turn a public data set's unpacked archive into a training list, labels, splits and cells cut out of smears.

Nothing is downloaded: `--list` prints where each archive is, `--table` prints the table of the documentation.
"""

import argparse
import logging
import sys

from dinov2.data.prepare import all_datasets, get_dataset, overview_table
from dinov2.data.prepare.write import Options, describe, prepare
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import user_path

logger = logging.getLogger("dinov2")


def main(argv: list[str] | None = None) -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="of the data set, see --list")
    parser.add_argument("--source", type=user_path, help="the unpacked archive, or a folder that it lies in")
    parser.add_argument("--output", type=user_path, help="folder for the lists, labels and cells")
    parser.add_argument("--margin", type=float, help="around a cell, in its longer sides (default: the data set's)")
    parser.add_argument("--size", type=int, help="scale cut cells to this side in pixels (default: leave them)")
    parser.add_argument("--keep", nargs="+", default=(), metavar="CLASS", help="classes to cut out; all for all")
    parser.add_argument("--whole", action="store_true", help="list whole images, cut nothing out")
    parser.add_argument("--drop-duplicates", action="store_true", help="list byte-identical images once")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="decode and compare all images"
    )
    parser.add_argument("--overwrite", action="store_true", help="cut cells again that are there")
    parser.add_argument("--n-workers", type=int, default=defaults.n_workers, help="threads that read images")
    parser.add_argument("--list", action="store_true", help="print the known data sets and end")
    parser.add_argument("--table", action="store_true", help="print them as a Markdown table and end")
    args = parser.parse_args(argv)
    if args.table:
        print(overview_table())
        return 0
    if args.list:
        for dataset in all_datasets().values():
            print(f"{dataset.name:28} {dataset.origin}\n{'':28} {dataset.layout}")
        return 0
    if not args.name or not args.source or not args.output:
        parser.error("give NAME --source DIR --output DIR, or --list")
    setup_logging()

    def run() -> None:
        names = ("margin", "size", "whole", "check", "drop_duplicates", "overwrite", "n_workers")
        options = Options(keep=tuple(args.keep), **{name: getattr(args, name) for name in names})
        print(describe(prepare(get_dataset(args.name), args.source, args.output, options), args.output))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
