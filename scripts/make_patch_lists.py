"""Write a training list: the path of every image below some folders, one a line."""

import argparse
import os
import sys

from dinov2.data.datasets import find_images
from dinov2.logging import setup_logging
from dinov2.utils.command import exit_code
from dinov2.utils.files import atomic_write, user_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=user_path, nargs="+", help="searched with all their subfolders")
    parser.add_argument("--output", type=user_path, required=True, help="the list, for instance lists/my_cells.txt")
    args = parser.parse_args(argv)
    absent = [str(folder) for folder in args.folders if not folder.is_dir()]
    if absent:
        parser.error(f"not a folder: {', '.join(absent)}")
    setup_logging()

    def run() -> None:
        paths = [os.path.realpath(path) for folder in args.folders for path in find_images(folder)]
        if not paths:
            raise ValueError(f"no images below {', '.join(map(str, args.folders))}")
        if odd := [path for path in paths if "\n" in path or "\r" in path]:
            raise ValueError(f"{odd[0]!r}: a list has no place for a line break; rename this file")
        with atomic_write(args.output, "w") as file:
            file.writelines(f"{path}\n" for path in paths)
        print(f"{args.output}: {len(paths)} images")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
