"""Decode and resize all images of a dataset once, into a packed cache that training reads without decoding.

Give the same folder to training with `:cache=FOLDER` in train.dataset_path. After a stop the same command resumes. Of
several commands at once, one packs and the others wait for it.
"""

import argparse
import logging
import os
import sys

from dinov2.data.cache import PackedCache
from dinov2.data.datasets.decode import FITS
from dinov2.data.loaders import make_dataset
from dinov2.logging import setup_logging
from dinov2.utils.command import REQUEUE_EXIT_CODE, StopSignals, exit_code
from dinov2.utils.files import user_path

logger = logging.getLogger("dinov2")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="as in train.dataset_path, for instance HemaStandardDataset:root=/data/lists")
    parser.add_argument("--cache", type=user_path, help="folder for the cache, if `dataset` names none (cache=)")
    parser.add_argument("--image-size", type=int, help="side of the packed images in pixels (default: the dataset's)")
    parser.add_argument("--fit", choices=FITS, help="how an image becomes square (default: the dataset's)")
    crop_help = "side of the central square to keep, as a share of the shorter side (default: the dataset's)"
    parser.add_argument("--center-crop", type=float, help=crop_help)
    parser.add_argument("--workers", type=int, help="processes that decode; 0 or 1: this one (default: one a core)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what is left to pack and its size, write nothing")
    what.add_argument(
        "--verify", action="store_true", help="pack nothing, check all stored images; exit code 1 if some are damaged"
    )
    args = parser.parse_args(argv)
    setup_logging()
    code = 0

    def run() -> None:
        nonlocal code
        cache = _open(args)
        if args.verify:
            code = _verify(cache, signals)
        elif args.dry_run:
            plan = cache.plan(lambda: signals.received is not None)
            if signals.received is None:
                print(plan)
            else:
                code = REQUEUE_EXIT_CODE
        else:
            summary = cache.build(args.workers, should_stop=lambda: signals.received is not None)
            code = 0 if summary.is_complete else REQUEUE_EXIT_CODE

    with StopSignals() as signals:
        return exit_code(run) or code


def _open(args: argparse.Namespace) -> PackedCache:
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers {args.workers}: give 0 or more")
    flags = {"cache": args.cache, "image_size": args.image_size, "fit": args.fit}
    flags["center_crop"] = args.center_crop
    given = {name: value for name, value in flags.items() if value is not None}
    dataset = make_dataset(args.dataset, **given)
    if dataset.cache is None:
        raise ValueError("--cache: missing; give the folder for the cache, on a fast disk")
    stated = {"cache": str(dataset.cache.folder.parent), "image_size": dataset.image_size, "fit": dataset.fit}
    stated["center_crop"] = dataset.center_crop
    for name, value in given.items():
        value = os.path.abspath(value) if name == "cache" else value
        if value != stated[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: {args.dataset!r} says {stated[name]}; leave one of the two out")
    return dataset.cache


def _verify(cache: PackedCache, signals: StopSignals) -> int:
    n_checked, damaged = cache.verify(lambda: signals.received is not None)
    print(f"{n_checked:,} stored images checked, {len(damaged)} damaged")
    if damaged:
        print("start the command without --verify to pack the damaged ones again")
        return 1
    return REQUEUE_EXIT_CODE if signals.received is not None else 0


if __name__ == "__main__":
    sys.exit(main())
