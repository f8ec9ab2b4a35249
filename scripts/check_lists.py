"""Find broken, duplicate, contradictory and leaking images in training lists; write a report and cleaned lists.

A source is a .txt list, a folder with lists, a folder of images (searched with all folders in it; hidden files with an
image's suffix are reported), or a CSV with the columns `Image Path[,Label][,patient][,dataset]`. The input files are
never changed. After a stop the same command resumes.
"""

import argparse
import logging
import sys

from dinov2.data.check import NEAR_CHOICES, check_lists, describe
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import user_path

logger = logging.getLogger("dinov2")

EXIT_CODES = "exit code: 0 no fault, 1 faults were found, 2 a wrong argument or unusable file, 130 stopped by Ctrl-C"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES)
    parser.add_argument("sources", type=user_path, nargs="+", metavar="LIST_OR_FOLDER", help="what to train on")
    parser.add_argument(
        "--labels", type=user_path, nargs="+", default=(), help="CSVs or folders per class that label images"
    )
    parser.add_argument(
        "--eval-splits",
        type=user_path,
        nargs="+",
        default=(),
        help="CSVs, lists or folders not to train on",
    )
    parser.add_argument("--output-dir", type=user_path, required=True, help="folder for report, cleaned lists, scan")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument(
        "--pixels", action=argparse.BooleanOptionalAction, default=True, help="decode; else only bytes are compared"
    )
    parser.add_argument("--near-duplicates", choices=NEAR_CHOICES, default="on", help="turned: mirrored ones too")
    parser.add_argument(
        "--drop-near-duplicates", action="store_true", help="leave near-duplicates out of the cleaned lists"
    )
    args = parser.parse_args(argv)
    setup_logging()
    n_faults = 0

    def run() -> None:
        nonlocal n_faults
        summary = check_lists(
            args.sources,
            args.output_dir,
            args.labels,
            args.eval_splits,
            pixels=args.pixels,
            near_duplicates=args.near_duplicates,
            drop_near_duplicates=args.drop_near_duplicates,
            n_workers=args.workers,
        )
        n_faults = summary["faults"]
        print(describe(summary, args.output_dir))

    try:
        code = exit_code(run)
    except KeyboardInterrupt:
        logger.error("stopped; the scan is kept: the same command resumes there")
        return 130
    return code or int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
