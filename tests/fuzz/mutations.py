"""The interface of a fuzzed format, and random damages to bytes, to trees of values and to files."""

import copy
import json
import math
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Content = bytes | Callable[[Path], None]  # the bytes of a file, or a function that writes a file or folder


class Format(NamedTuple):
    """A format that the project reads.

    `case` draws the name and the content of one input from a generator of random numbers. `read` reads an input by the
    functions that the commands call. It may write to a folder named `output` beside or in the input.
    """

    case: Callable[[random.Random], tuple[str, Content]]
    read: Callable[[Path], object]
    is_file: bool = True  # False: the input is a text of the command line, which a file holds here


EXTREME_INTEGERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes after one to four random damages."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(DAMAGES)(data, rng)
    return data


def block(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Return the start and end of a random block, which is mostly short."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512, len(data))))


def cut_short(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bits_of_header(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data[:256], rng) + data[256:]


def replace_integer(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a place, mostly near the start, by an extreme integer of 1 to 8 bytes."""
    n_bytes = rng.choice((1, 2, 4, 8))
    value = (rng.choice(EXTREME_INTEGERS) % 256**n_bytes).to_bytes(n_bytes, rng.choice(("little", "big")))
    start = rng.randrange(min(len(data), rng.choice((64, 1024, len(data) + 1))) + 1)
    return data[:start] + value + data[start + n_bytes :]


def remove_block(data: bytes, rng: random.Random) -> bytes:
    start, end = block(data, rng)
    return data[:start] + data[end:]


def repeat_block(data: bytes, rng: random.Random) -> bytes:
    start, end = block(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def zero_block(data: bytes, rng: random.Random) -> bytes:
    start, end = block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 7, 300))) + data[start:]


def append_bytes(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 512, 5000)))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(cut_short, flip_bits, flip_bits_of_header, replace_integer, replace_integer, remove_block, repeat_block),
    *(zero_block, insert_bytes, append_bytes),
)


# --- texts and trees of values, such as JSON and YAML -----------------------------------------------------------------

ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\n",
        '"',
        "'",
        ",",
        ";;;;",
        "=1+1",
        "#",
        "~",
        "~nobody_of_this_name/x",
        "$HOME",
        "../..",
        "/",
        ".",
    ),
    *("/dev/zero", "/proc/self/mem", "{a,b}{1..99}", "{1..99999999}", "\udce9", "\ufeff", "\u2028", "\u202ex", "中文"),
    *("<script>", "a" * 300, "x" * 200_000, "http://[::1", "file:///etc/passwd", "s3://x", "???", "${oc.env:HOME}"),
    *("${x}", "-1", "nan", "1e999", "0x10", "9" * 5000, "true", "null", "[", "{}", "!!python/object:os.system x"),
)


def nested(depth: int, kind: type = list) -> Any:
    """Return lists or mappings within each other."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def odd_value(rng: random.Random) -> Any:
    """Return a value that hardly any setting takes."""
    return rng.choice(
        (
            *(None, True, False, [], {}, [[]], {"a": 1}, {"": None}, list(range(300)), "text", b"bytes"),
            *(0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan),
            nested(rng.choice((5, 100, 3000)), rng.choice((list, dict))),
            rng.choice(ODD_TEXTS),
        )
    )


def with_odd_values(tree: Any, rng: random.Random, draw: Callable[[random.Random], Any] = odd_value) -> Any:
    """Return a copy of mappings and lists with one to three places replaced, removed or added; `draw` draws a value."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, here = None, tree
        while isinstance(here, dict | list) and here and (node is None or rng.random() < 0.7):
            node = here
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            here = node[key]
        if node is None:
            return draw(rng)
        action = rng.random()
        if action < 0.7:
            node[key] = draw(rng)
        elif action < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice((*ODD_TEXTS[:9], 7, "new"))] = draw(rng)
        else:
            node.append(draw(rng))
    return tree


# --- things that are no regular file ---------------------------------------------------------------------------------


def odd_file(rng: random.Random) -> Content:
    """Return a writer of something that is no regular file with data, for which any reader may be asked."""
    return rng.choice((b"", os.mkfifo, Path.mkdir, _socket, _sparse, *map(_link, ODD_TARGETS)))


ODD_TARGETS = ("/dev/zero", "/dev/full", "/proc/self/mem", "/nowhere", "/dev/tty", ".", "..", "itself")


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path.name if target == "itself" else target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def _sparse(path: Path) -> None:
    """Write a file of 8 GiB that takes no room on the disk."""
    path.write_bytes(struct.pack("<Q", 2**32) + b"{")
    os.truncate(path, 8 << 30)


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_of(files: dict[str, bytes]) -> Callable[[Path], None]:
    """Return a writer of a folder with these files, by their names relative to it."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    return write


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, by their names relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damaged_folder(files: dict[str, bytes], rng: random.Random) -> Callable[[Path], None]:
    """Return a writer of these files, one of which is missing, damaged, odd, or has odd values if it is JSON."""
    name = rng.choice(list(files))
    action = rng.random()
    if action < 0.05:
        return folder_of({other: data for other, data in files.items() if other != name})
    if action < 0.1:
        write_others, odd = folder_of({other: data for other, data in files.items() if other != name}), odd_file(rng)

        def write(folder: Path) -> None:
            write_others(folder)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _ = (folder / name).write_bytes(odd) if isinstance(odd, bytes) else odd(folder / name)

        return write
    if name.endswith(".json") and action < 0.8:
        return folder_of({**files, name: json_with_odd_values(files[name], rng)})
    return folder_of({**files, name: damaged(files[name], rng)})


def json_with_odd_values(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with odd values; what JSON cannot hold becomes text."""
    try:
        return json.dumps(with_odd_values(json.loads(data), rng), default=str).encode()
    except RecursionError:
        return b'{"a":' * 3000 + b"0" + b"}" * 3000
    except ValueError:  # a file with a line of JSON for each step
        return damaged(data, rng)
