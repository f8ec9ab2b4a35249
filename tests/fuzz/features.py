"""Features files (.h5 and .parquet), and folders of bags."""

import io
import random
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import torch

from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.vectors import VectorTable, write_vectors
from dinov2.eval.features.loop import Parts
from dinov2.eval.features.store import check_finite, read_features, stored_kinds
from tests.fuzz.mutations import ODD_TEXTS, Content, Format, damaged, folder_of

N_CELLS, N_DIMS = 12, 8


def write_valid(file: h5py.File) -> None:
    file["features"] = np.ones((N_CELLS, N_DIMS), np.float32)
    file["features_patch_mean"] = np.ones((N_CELLS, N_DIMS), np.float32)
    file["labels"] = np.arange(N_CELLS) % 3
    for name, values in {
        "class_names": ["a", "b", "c"],
        "paths": [f"cell_{number}.png" for number in range(N_CELLS)],
        "patients": [f"p{number % 4}" for number in range(N_CELLS)],
    }.items():
        file.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
    file.attrs["kind"] = "cls"


def spoil(file: h5py.File, rng: random.Random) -> None:
    """Replace a part of a features file by something odd."""
    name = rng.choice([*file, "unreadable", "patch_grid"])
    if name in file:
        del file[name]
    kind = rng.randrange(16)
    huge = rng.choice(((10**9, N_DIMS), (10**6, 10**6), (2**40,)))
    if kind == 0:
        file.create_group(name)
    elif kind == 1:
        file.create_dataset(name, huge, np.float32, chunks=(1024,) if len(huge) == 1 else (1024, 8))  # never written
    elif kind == 2:
        file[name] = np.zeros(N_CELLS, np.dtype([("a", "f4"), ("b", "i8")]))
    elif kind == 3:
        file.create_dataset(name, (N_CELLS,), h5py.ref_dtype)
    elif kind == 4:
        file[name] = np.ones(rng.choice(((), (0,), (N_CELLS, 0), (0, 8), (N_CELLS - 1, 8), (12, 2, 2))), np.float32)
    elif kind == 5:
        file[name] = rng.choice((np.full(N_CELLS, -1), np.full(N_CELLS, 2**62), np.full(N_CELLS, np.nan)))
    elif kind == 6:
        file.create_dataset(name, (N_CELLS,), h5py.vlen_dtype(np.int32))
    elif kind == 7:
        file.create_dataset(name, (N_CELLS, N_DIMS), np.float32, external=[("/dev/zero", 0, N_CELLS * N_DIMS * 4)])
    elif kind == 8:
        file[name] = rng.choice(
            (h5py.SoftLink(f"/{name}"), h5py.SoftLink("/none"), h5py.ExternalLink("/etc/passwd", "x"))
        )
    elif kind == 9:
        file[name] = np.array([rng.randbytes(7).replace(b"\0", b"x") for _ in range(N_CELLS)], dtype="S7")
    elif kind == 10:
        file[name] = np.full((N_CELLS, N_DIMS), 1j)
    elif kind == 11:
        values = [text.replace("\0", "") for text in rng.choices(ODD_TEXTS[:-1], k=N_CELLS)]
        data = np.array([value.encode("utf-8", "surrogatepass") for value in values], dtype=object)
        file.create_dataset(name, data=data, dtype=h5py.string_dtype())
    elif kind == 12:
        file[name] = h5py.Empty("f4")
    elif kind == 13:
        file.attrs[rng.choice(("kind", "odd"))] = rng.choice((np.zeros(9), 7, h5py.Empty("f4"), "x"))
    elif kind == 14:
        file[name] = np.ones((N_CELLS, N_DIMS), rng.choice(("f2", "f8", "i1", "u8", "?", ">f4")))


def features_bytes(rng: random.Random | None = None) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_valid(file)
        for _ in range(rng.choice((1, 1, 2)) if rng else 0):
            spoil(file, rng)
    return buffer.getvalue()


@cache
def valid_bytes() -> bytes:
    return features_bytes()


def h5_bytes(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged(valid_bytes(), rng)
    data = features_bytes(rng)
    return damaged(data, rng) if rng.random() < 0.1 else data


def features_case(rng: random.Random) -> tuple[str, Content]:
    return "features.h5", h5_bytes(rng)


def read_features_file(path: Path) -> None:
    check_finite(read_features(path), path)
    stored_kinds(path)


def bags_case(rng: random.Random) -> tuple[str, Content]:
    files = {name: valid_bytes() for name in ("a/p0.h5", "a/p1.h5", "b/p2.h5", "b/p3.h5")}
    return "bags", folder_of({**files, "b/p3.h5": h5_bytes(rng)})


def arrays_case(rng: random.Random) -> tuple[str, Content]:
    buffer, is_npy = io.BytesIO(), rng.random() < 0.5
    values = np.ones((N_CELLS, N_DIMS), rng.choice(("f2", "f4", "f8", "i8", ">f4", "c8") if is_npy else ("f4", "c8")))
    if is_npy:
        np.save(buffer, values)
    else:
        tensor = torch.from_numpy(values)
        odd = ([tensor, 1], {"a": tensor}, tensor[:, :1].expand(N_CELLS, 10**6), list(tensor), tensor[None, None])
        torch.save(rng.choice((tensor, tensor, tensor, *odd)), buffer)
    name, folder = ("p.npy", "features") if is_npy else ("p.pt", "pt_files")
    table = {"manifest.csv": b"embeddings,wsi_id,target\n%b/%b,007,1\n" % (folder.encode(), name.encode())}
    content = {f"{folder}/{name}": damaged(buffer.getvalue(), rng), **(table if rng.random() < 0.5 else {})}
    return "bags", folder_of(content)


def vectors_case(rng: random.Random) -> tuple[str, Content]:
    def write(path: Path) -> None:
        vectors = {"vector": np.ones((N_CELLS, N_DIMS)), "vector_mean": np.zeros((N_CELLS, 2))}
        texts = {"patient": [f"p{i % 4}" for i in range(N_CELLS)], "path": [f"{i}.png" for i in range(N_CELLS)]}
        write_vectors(path, VectorTable(vectors, texts, {"kind": "cls", "class_names": rng.choice(([], 1, ["a"]))}))
        path.write_bytes(damaged(path.read_bytes(), rng))

    return "features.parquet", write


def read_vectors_file(path: Path) -> None:
    read_features_file(path)
    PatientBags.from_path(path)


def part_case(rng: random.Random) -> tuple[str, Content]:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["kept"] = np.arange(N_CELLS)
        file.attrs["unreadable"] = "{}"
        file["kinds/cls"] = np.ones((N_CELLS, N_DIMS), np.float32)
        if rng.random() < 0.5:
            spoil(file, rng)
    return "part.h5", damaged(buffer.getvalue(), rng)


def read_part(path: Path) -> None:
    parts = Parts(path.parent, {}, [path] * N_CELLS, [range(N_CELLS)])
    parts.files = [path]
    parts.read(0, ["cls"])


FORMATS = {
    "h5": Format(features_case, read_features_file),
    "bags": Format(bags_case, PatientBags.from_path),
    "arrays": Format(arrays_case, PatientBags.from_path),
    "vectors": Format(vectors_case, read_vectors_file),
    "part": Format(part_case, read_part),
}
