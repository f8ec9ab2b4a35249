"""Write a training list: the path of every image below some folders, one a line."""

import argparse
import sys
from pathlib import Path

from dinov2.data.datasets import find_images
from dinov2.utils.files import atomic_write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="searched with all their subfolders")
    parser.add_argument("--output", type=Path, required=True, help="the list, for instance lists/my_cells.txt")
    args = parser.parse_args()
    absent = [str(folder) for folder in args.folders if not folder.is_dir()]
    if absent:
        parser.error(f"not a folder: {', '.join(absent)}")
    paths = [path.resolve() for folder in args.folders for path in find_images(folder)]
    if not paths:
        parser.error(f"no images below {', '.join(map(str, args.folders))}")
    with atomic_write(args.output, "w") as file:
        file.writelines(f"{path}\n" for path in paths)
    print(f"{args.output}: {len(paths)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
