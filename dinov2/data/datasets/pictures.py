"""Where the pictures of a dataset lie, whatever names them: lists, a table, a folder, or tar shards.

Letters: N pictures, in S sets.
"""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from dinov2.data.datasets.cells import PICTURE_SUFFIXES, is_picture_name
from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.data.datasets.path_tables import PathBlock, RunLengths, read_list, read_table
from dinov2.data.datasets.tar_shards import MEMBER_MARK, ShardIndex, read_member
from dinov2.utils.paths import local_path

logger = logging.getLogger("dinov2")

TABLE_SUFFIXES = (".csv", ".parquet")
LOOSE_SET = "."  # pictures that lie in the folder itself, beside those that are sets
KINDS = (
    "a folder with *.txt lists or one list (one picture path per line; scripts/make_patch_lists.py writes one), a .csv "
    "or .parquet file with a column of paths, a folder of pictures, or .tar shards (one, a folder with some, or a "
    "pattern such as cells-{000..015}.tar)"
)

_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)


class Pictures:
    """N pictures by number: their bytes, their paths, and the sets that they belong to.

    A million of them take some 100 MB once, not once a worker: the arrays behind are shared by forked workers, and
    travel to spawned ones as shared memory.

    Attributes:
        kind: what was read, for people, as in "3 .txt lists".
        set_names: S names: of lists without the suffix, of a table's column `dataset`, of the folders at the first
            level, or of shards without the suffix and the number at the end.
        set_sizes: int64 [S], pictures in each; a list may be empty.
    """

    def __init__(
        self, names: PathBlock | ShardIndex, folder: str, set_names: Sequence[str], set_ids: np.ndarray, kind: str
    ) -> None:
        """
        Args:
            names: paths, or what is in shards.
            folder: absolute; relative paths count from it.
            set_names: S names, each once.
            set_ids: [N], the set of each picture.
            kind: see above.
        """
        self._names = names
        self._folder = folder
        self._sets = RunLengths(set_ids)
        self.kind = kind
        self.set_names = list(set_names)
        self.set_sizes = np.bincount(set_ids, minlength=len(set_names))

    @classmethod
    def from_root(cls, root: str | os.PathLike[str], column: str | None = None) -> "Pictures":
        """Read lists, tables and shard headers; no picture is looked at.

        Args:
            root: one of `KINDS`. Of a folder that holds several kinds, lists win, then shards, then pictures.
            column: of a table, the column with the paths; None: "Image Path", or else "path".

        Raises:
            FileNotFoundError: nothing is at `root`, or nothing that is known.
            ValueError: what is there cannot be read (parquet needs pyarrow), names no picture, or has no such column.
        """
        root = str(local_path(root))
        pictures = _from_table(Path(root), column) if _is_table(root) else None
        if pictures is None and column is not None:
            raise ValueError(
                f"train.dataset_path: column={column!r} is for a .csv or .parquet file, and root={root!r} is none; "
                f"leave it out"
            )
        if pictures is None:
            pictures = _from_folder(Path(root)) if os.path.isdir(root) else _from_files(root)
        if len(pictures) == 0:
            raise ValueError(f"train.dataset_path: {pictures.kind} in {root!r} name no picture; it must be {KINDS}")
        return pictures

    def __len__(self) -> int:
        return len(self._names)

    def path(self, position: int) -> str:
        """The absolute path of one picture; `<shard>.tar::<member>` of one in a shard."""
        if isinstance(self._names, ShardIndex):
            return self._names.path(position)
        return os.path.join(self._folder, self._names[position])  # which leaves an absolute path as it is

    def read(self, position: int) -> bytes:
        """The bytes of one picture, as they are on disk.

        Raises:
            UnreadableImageError: it is missing or cannot be read.
        """
        if isinstance(self._names, ShardIndex):
            return self._names.read(position)
        return _read_file(self.path(position))

    def stamp(self, position: int) -> tuple[int, int]:
        """Size in bytes and time of the last change in ns, of the file that holds the picture.

        Raises:
            OSError: there is no such file.
        """
        held_by = self._names.shard(position) if isinstance(self._names, ShardIndex) else self.path(position)
        try:
            status = os.stat(held_by)
        except ValueError as error:  # a null character in the path
            raise FileNotFoundError(f"{held_by!r}: {error}") from error
        return status.st_size, status.st_mtime_ns

    def set_of(self, position: int) -> int:
        """The set that one picture belongs to, as a position in `set_names`."""
        return self._sets[position]

    def all_sets(self) -> np.ndarray:
        """`set_of` of every picture, int32 [N]."""
        return self._sets.all()


def read_picture(path: str) -> bytes:
    """The bytes of the picture that a `Pictures.path` names.

    Raises:
        UnreadableImageError: it is missing or cannot be read.
    """
    shard, mark, member = path.partition(MEMBER_MARK)
    if not mark or os.path.exists(path):
        return _read_file(path)
    try:
        return read_member(shard + MEMBER_MARK[:4], member)
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise UnreadableImageError(path, str(error)) from error


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    except ValueError as error:  # a null character in the path
        raise UnreadableImageError(path, str(error)) from error


def _from_folder(root: Path) -> Pictures:
    entries = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    lists = [entry for entry in entries if entry.suffix.lower() == ".txt" and entry.is_file()]
    shards = [entry for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file()]
    if lists:
        if shards:
            logger.info("%s holds lists: its %d tar files are not read", root, len(shards))
        return _from_lists(lists)
    loose = sum(is_picture_name(entry.name) for entry in entries)
    if shards:
        if loose:
            logger.info("%s holds tar shards: the %d pictures beside them are not read", root, loose)
        return _from_shards([str(shard) for shard in shards])
    pictures = _from_tree(root, entries)
    if len(pictures) == 0:
        _check_not_compressed(entries)
        tables = [entry.name for entry in entries if _is_table(entry)]
        hint = f"; to read {tables[0]}, give this file" if tables else ""
        raise FileNotFoundError(
            f"train.dataset_path: no *.txt list, no .tar shard and no picture ({', '.join(PICTURE_SUFFIXES)}) in "
            f"{str(root)!r}{hint}; root must be {KINDS}"
        )
    return pictures


def _from_files(root: str) -> Pictures:
    if not os.path.exists(root):
        files = _expanded(root)
        if files is None:
            raise FileNotFoundError(f"train.dataset_path: root={root!r} does not exist; it must be {KINDS}")
        return _from_shards(files)
    if root.lower().endswith(".txt"):
        return _from_lists([Path(root)])
    if root.lower().endswith(".tar"):
        return _from_shards([root])
    _check_not_compressed([Path(root)])
    raise ValueError(f"train.dataset_path: root={root!r} is a file of another kind; it must be {KINDS}")


def _from_lists(files: list[Path]) -> Pictures:
    blocks = [read_list(file) for file in files]
    names, ids = _numbered([file.stem for file in files], [len(block) for block in blocks])
    kind = f"{len(files)} .txt list{'s' if len(files) > 1 else ''}"
    return Pictures(PathBlock.joined(blocks), os.path.abspath(files[0].parent), names, ids, kind)


def _is_table(root: str | os.PathLike[str]) -> bool:
    return os.fspath(root).lower().endswith(TABLE_SUFFIXES) and os.path.isfile(root)


def _from_table(file: Path, column: str | None) -> Pictures:
    block, names, ids, column = read_table(file, column)
    return Pictures(block, os.path.abspath(file.parent), names, ids, f"the column {column!r} of {file.name}")


def _from_tree(root: Path, entries: list[Path]) -> Pictures:
    """Pictures in `root` and the folders inside it; links to folders are followed at the first level only."""
    folders = [entry.name for entry in entries if entry.is_dir()]
    blocks = [PathBlock.of(entry.name for entry in entries if is_picture_name(entry.name) and not entry.is_dir())]
    blocks += [PathBlock.of(_walk(root, folder)) for folder in folders]
    held = [(name, block) for name, block in zip([LOOSE_SET, *folders], blocks, strict=True) if len(block)]
    names, ids = _numbered([name for name, _ in held], [len(block) for _, block in held])
    block = PathBlock.joined([block for _, block in held] or [PathBlock.of([])])
    return Pictures(block, os.path.abspath(root), names, ids, f"the pictures in {str(root)!r}")


def _walk(root: Path, name: str) -> Iterator[str]:
    """Paths of pictures in a folder and those inside it, sorted within each, relative to `root`."""
    for parent, folders, files in os.walk(root / name):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        relative = os.path.relpath(parent, root)
        yield from (os.path.join(relative, file) for file in sorted(files) if is_picture_name(file))


def _from_shards(shards: list[str]) -> Pictures:
    index = ShardIndex([os.path.abspath(shard) for shard in shards])
    stems = [os.path.basename(shard)[: -len(".tar")] for shard in shards]
    names, ids = _numbered([re.sub(r"[-_.]?\d+$", "", stem) or stem for stem in stems], index.counts)
    return Pictures(index, "", names, ids, f"{len(shards)} tar shard{'s' if len(shards) > 1 else ''}")


def _numbered(names: Sequence[str], counts: Sequence[int] | np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names, each once, and the position in these for so many pictures of each: int32 [N]."""
    once = list(dict.fromkeys(names))
    return once, np.repeat(np.array([once.index(name) for name in names], dtype=np.int32), counts)


def _expanded(pattern: str) -> list[str] | None:
    """The tar files that a pattern with braces (`{000..015}`, `{a,b}`) or wildcards (`*`, `?`) means.

    Returns:
        them, in the order of the braces, sorted for wildcards; None if `pattern` has neither.

    Raises:
        FileNotFoundError: one of those that the braces name is missing, or wildcards find nothing.
        ValueError: they are no .tar files.
    """
    texts = list(_without_braces(pattern))
    if len(texts) == 1 and not glob.has_magic(pattern):
        return None
    found: list[str] = []
    for text in texts:
        files = sorted(glob.glob(text)) if glob.has_magic(text) else [text] * os.path.exists(text)
        if not files:
            raise FileNotFoundError(
                f"train.dataset_path: root={pattern!r} means {text!r}, too, which does not exist; mend the pattern or "
                f"fetch the file"
            )
        found += files
    others = [file for file in found if not file.lower().endswith(".tar")]
    if others:
        _check_not_compressed([Path(file) for file in others])
        raise ValueError(
            f"train.dataset_path: root={pattern!r} means {others[0]!r}, too; a pattern is for .tar files only"
        )
    return found


def _without_braces(pattern: str) -> Iterator[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text, braces, text, braces, ..., text
    choices = [[part] if i % 2 == 0 else _alternatives(part) for i, part in enumerate(parts)]
    return map("".join, product(*choices))


def _alternatives(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _check_not_compressed(files: Sequence[Path]) -> None:
    compressed = [file for file in files if _COMPRESSED_TAR.search(file.name)]
    if compressed:
        raise ValueError(
            f"train.dataset_path: {str(compressed[0])!r} is compressed, and pictures are read from anywhere in a "
            f"shard; unpack it to a plain .tar"
        )
