"""Draw a set of sample blood cells: images to train on, labelled cells to probe with, patients for ABMIL."""

import argparse
import logging
import sys

from PIL import Image

from dinov2.data.sample_cells import DEFAULT_SIZE_PX, contact_sheet, write_sample_cells
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write, user_path
from dinov2.utils.resources import available_cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=user_path, help="folder for the set: new, empty, or with this same set in it")
    parser.add_argument("--n-train", type=int, default=1600, help="unlabelled images")
    parser.add_argument("--n-probe-train", type=int, default=400, help="labelled images to fit probes on")
    parser.add_argument("--n-probe-test", type=int, default=400, help="labelled images to test probes on")
    parser.add_argument("--n-patients", type=int, default=30, help="patients, each a bag of cells")
    parser.add_argument(
        "--cells-per-patient", type=int, nargs=2, default=(24, 40), metavar=("MIN", "MAX"), help="size of the bags"
    )
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE_PX, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="decides all that is random")
    parser.add_argument("--n-workers", type=int, default=available_cores(), help="processes that draw")
    parser.add_argument("--contact-sheet", type=user_path, metavar="PNG", help="also draw an overview of the classes")
    args = parser.parse_args()
    if args.output is None and args.contact_sheet is None:
        parser.error("nothing to do: give --output, --contact-sheet, or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def run() -> None:
        if args.contact_sheet is not None:
            with atomic_write(args.contact_sheet) as file:
                Image.fromarray(contact_sheet(seed=args.seed)).save(file, format="PNG", optimize=True)
        if args.output is not None:
            summary = write_sample_cells(
                args.output,
                args.n_train,
                args.n_probe_train,
                args.n_probe_test,
                args.n_patients,
                args.seed,
                size=args.size,
                cells_per_patient=tuple(args.cells_per_patient),
                n_workers=args.n_workers,
            )
            print(f"{args.output}: {summary['pictures']} images, counted in {args.output / 'summary.json'}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
