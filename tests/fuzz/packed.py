"""Files that hold images and labels: MedMNIST's .npz, and parquet and Arrow files of Hugging Face data sets."""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from dinov2.data.datasets.packed import unpack
from tests.fuzz.mutations import ODD_TEXTS, Content, Format, damaged


def read_packed(path: Path) -> object:
    return unpack([path], "labelled cells", path.parent / "output")


def npz_case(rng: random.Random) -> tuple[str, Content]:
    arrays = {}
    sides = rng.choice(((4, 4, 3), (4, 4, 3), (4, 4), (4,), (0, 4, 3), (4, 4, 4)))
    types = [rng.choice(texts) for texts in (("u1", "u1", "u1", "f4"), ("u1", "u1", ">i8", "f4", "U3"))]
    for part in ("train", "val", "test"):
        n = rng.choice((0, 1, 3))
        arrays[f"{part}_images"] = np.zeros((n, *sides), types[0])
        arrays[f"{part}_labels"] = np.arange(n + (rng.random() < 0.1)).astype(types[1])
    for name in rng.sample(sorted(arrays), rng.choice((0, 0, 0, 1, 3))):
        del arrays[name]
    buffer = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(buffer, **arrays)
    return "bloodmnist.npz", damaged(buffer.getvalue(), rng) if rng.random() < 0.7 else buffer.getvalue()


def hub_case(rng: random.Random) -> tuple[str, Content]:
    image = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(image, "PNG")
    n = rng.choice((1, 3))
    data = [rng.choice((*[image.getvalue()] * 8, b"", None)) for _ in range(n)]
    name = rng.choice(ODD_TEXTS).encode("utf-8", "replace").decode()
    images = data if rng.random() < 0.3 else [{"bytes": value, "path": name} for value in data]
    labels = rng.choice(([0] * n, [0] * n, ["a"] * n, ["a"] * n, [None] * n, [0.5] * n, [[1]] * n))
    columns = {"image": pa.array(images), "label": pa.array(labels)}
    table = pa.table(columns if rng.random() < 0.9 else {"label": columns["label"]})
    table = table.replace_schema_metadata({"huggingface": name})
    buffer, suffix = io.BytesIO(), rng.choice(("parquet", "arrow"))
    if suffix == "parquet":
        parquet.write_table(table, buffer)
    else:
        with rng.choice((pa.ipc.new_stream, pa.ipc.new_file))(buffer, table.schema) as writer:
            writer.write_table(table)
    return f"cells.{suffix}", damaged(buffer.getvalue(), rng) if rng.random() < 0.7 else buffer.getvalue()


FORMATS = {"medmnist": Format(npz_case, read_packed), "hub": Format(hub_case, read_packed)}
