"""Tar shards, and the packed cache of images."""

import io
import os
import random
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from dinov2.data.cache import PackedCache
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.datasets.sources import ImageSource
from tests.fuzz.images import encoded
from tests.fuzz.mutations import Content, Format, damaged

BLOCK = tarfile.BLOCKSIZE
# start and length of the fields of a tar header
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "time": (136, 12),
    "kind": (156, 1),
    "link": (157, 100),
}
FIELDS |= {"magic": (257, 8), "prefix": (345, 155)}
ODD_FIELDS = (
    b"",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"-0000000001\0",
    b"77777777777\0",
    b"../../x.png",
    b"/etc/x.png",
)
ODD_FIELDS += (b"\xe9.png", b"a" * 155, b"00000000000\0", b"\x80" + bytes(10) + b"\x01")
KINDS = b"0123456789gxSLKDV\0"


@cache
def shard_bytes(form: int) -> tuple[bytes, tuple[int, ...]]:
    """Return a tar file, and where its headers begin."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(5):
            data = encoded(".png", "RGB")
            info = tarfile.TarInfo(f"{'long/' * (30 * (number == 3))}cell_{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        starts = tuple(member.offset for member in tar.getmembers())
    return buffer.getvalue(), starts


def with_odd_header(data: bytes, start: int, rng: random.Random) -> bytes:
    """Return the tar file with an odd field in the header at `start`, whose checksum is right."""
    header = bytearray(data[start : start + BLOCK])
    name = rng.choice(list(FIELDS))
    first, length = FIELDS[name]
    value = bytes([rng.choice(KINDS)]) if name == "kind" else rng.choice(ODD_FIELDS)[:length]
    header[first : first + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + BLOCK :]


def shard_case(rng: random.Random) -> tuple[str, Content]:
    data, starts = shard_bytes(rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)))
    if rng.random() < 0.6:
        for _ in range(rng.choice((1, 1, 2))):
            data = with_odd_header(data, rng.choice(starts), rng)
    else:
        data = damaged(data, rng)
    return "cells.tar", data


def read_shard(path: Path) -> None:
    source = ImageSource.from_root(path)
    for position in range(len(source)):
        with suppress(UnreadableImageError):  # training counts it
            decode_image(source.read(position), source.path(position))


def cache_case(rng: random.Random) -> tuple[str, Content]:
    action, seed = rng.random(), rng.random()

    def write(folder: Path) -> None:
        """Write images and their cache, one file of which is damaged or missing."""
        (folder / "images").mkdir(parents=True)
        for number in range(4):
            data = encoded(".png", "RGB")
            (folder / "images" / f"cell_{number}.png").write_bytes(data[: 60 if number == 3 else len(data)])
        open_cache(folder).build(1)
        file = rng.choice([path for path in sorted((folder / "output").rglob("*")) if path.is_file()])
        if action < 0.1:
            file.unlink()
        elif action < 0.2:
            os.truncate(file, random.Random(seed).randrange(100_000))
        else:
            file.write_bytes(damaged(file.read_bytes(), random.Random(seed)))

    return "cells", write


def open_cache(folder: Path) -> PackedCache:
    return PackedCache(folder / "output", ImageSource.from_root(folder / "images"), 28)


def read_cache(path: Path) -> None:
    """Build what is missing, read all, and check all."""
    open_cache(path).build(1)
    packed = open_cache(path)
    for position in range(4):
        with suppress(UnreadableImageError):
            packed.fetch(position)
    packed.verify()


FORMATS = {"tar": Format(shard_case, read_shard), "cache": Format(cache_case, read_cache)}
