"""Labelled cells in MedMNIST's .npz and in parquet and Arrow files of Hugging Face data sets."""

import io
import json
import random
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from dinov2.data.datasets import LabelledCells
from dinov2.data.datasets.decode import decode_image
from dinov2.data.datasets.packed import unpack
from dinov2.data.splits import read_split


@pytest.fixture(autouse=True)
def hub_folder(tmp_path, monkeypatch):
    """torch.hub's folder, in which files are unpacked."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


def pixels(n: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def save_npz(file, **changes):
    arrays = {}
    for part, n in (("train", 6), ("val", 2), ("test", 4)):
        arrays |= {f"{part}_images": pixels(n), f"{part}_labels": (np.arange(n, dtype=np.uint8) % 2)[:, None]}
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez_compressed(file, **arrays)
    return file


def hub_table(labels, names=None, form: str = "PNG", **more) -> pa.Table:
    """A table as the library `datasets` writes it."""
    images = [{"bytes": encoded(image, form), "path": f"{i}.png"} for i, image in enumerate(pixels(len(labels)))]
    table = pa.table({"image": images, "label": labels, **more})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"} if names else {}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_medmnist_gives_images_labels_and_the_official_split(tmp_path):
    file = save_npz(tmp_path / "bloodmnist_64.npz")
    cells = LabelledCells.from_path(file)
    assert cells.class_names == ["basophil", "eosinophil"]
    assert cells.labels.tolist() == [0, 1] * 6
    np.testing.assert_array_equal(np.stack([decode_image(path) for path in cells.paths[:6]]), pixels(6))
    split = read_split(file, list(map(str, cells.paths)))
    assert [side.tolist() for side in (*split.folds[0], split.validation)] == [[*range(6)], [8, 9, 10, 11], [6, 7]]


def test_an_unpacked_file_is_used_again_and_a_changed_one_is_not(tmp_path, hub_folder):
    file = save_npz(tmp_path / "mine.npz")
    first = LabelledCells.from_path(file)
    assert first.class_names == ["0", "1"]  # of a file whose classes nobody named
    written = first.paths[0].stat().st_mtime_ns
    again = LabelledCells.from_path(file)
    assert again.paths == first.paths
    assert again.paths[0].stat().st_mtime_ns == written
    save_npz(file, train_images=255 - pixels(6))
    changed = LabelledCells.from_path(file)
    assert changed.paths[0] != first.paths[0]
    assert decode_image(changed.paths[0])[0, 0, 0] == 255 - pixels(6)[0, 0, 0, 0]
    assert len([path for path in (hub_folder / "unpacked").iterdir() if path.is_dir()]) == 2


def test_a_killed_unpacking_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    file = save_npz(tmp_path / "mine.npz")
    with monkeypatch.context() as patched:
        patched.setattr(
            "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            LabelledCells.from_path(file)
    assert len(LabelledCells.from_path(file)) == 12


def test_grey_medmnist_images_become_rgb(tmp_path):
    grey = pixels(6)[..., 0]
    cells = LabelledCells.from_path(save_npz(tmp_path / "grey.npz", train_images=grey))
    np.testing.assert_array_equal(decode_image(cells.paths[0]), np.repeat(grey[0][..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": pixels(6) / 255}, "train_images is float64 .*expected uint8"),
        ({"train_images": pixels(6)[..., :2]}, r"train_images is uint8 \[6, 12, 12, 2\]"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "train_labels is uint8 .*expected 6 integers, one an image"),
        ({"val_labels": np.zeros(3, np.uint8)}, "val_labels .*expected 2 integers"),
        ({"test_labels": None}, "no array test_labels"),
        ({"test_labels": np.full(4, 9)}, "test_labels has 9; expected 0 to 7"),
        ({"train_images": np.asfortranarray(pixels(6))}, "stored column by column"),
        ({"train_images": np.array([{}] * 6, dtype=object)}, "holds no numbers"),
    ],
)
def test_arrays_that_are_no_labelled_images(tmp_path, changes, message):
    file = save_npz(tmp_path / "bloodmnist.npz", **changes)
    with pytest.raises(
        ValueError, match=f"labelled cells: .*bloodmnist.npz' cannot be read as a MedMNIST file: .*{message}"
    ):
        LabelledCells.from_path(file)


def test_an_npz_without_images_and_one_that_unpacks_to_gigabytes(tmp_path):
    np.savez(tmp_path / "features.npz", features=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="no array train_images, but features.npy"):
        LabelledCells.from_path(tmp_path / "features.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 64, 64, 3)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_labels.npy", b"x")
        with archive.open("train_images.npy", "w") as stream:
            stream.write(header.getvalue())
            for _ in range(5):
                stream.write(bytes(2**26))
    with pytest.raises(ValueError, match="bomb.npz' cannot be read .*unpacks to more than"):
        LabelledCells.from_path(tmp_path / "bomb.npz")


def test_parquet_of_a_hub_data_set_has_classes_by_name(tmp_path):
    parquet.write_table(
        hub_table([1, 0, 1], names=["blast", "monocyte"], patient=["p1", "p2", "p2"]), tmp_path / "a.parquet"
    )
    cells = LabelledCells.from_path(tmp_path / "a.parquet")
    assert cells.class_names == ["blast", "monocyte"]
    assert cells.labels.tolist() == [1, 0, 1]
    assert cells.patients == ["p1", "p2", "p2"]
    np.testing.assert_array_equal(decode_image(cells.paths[2]), pixels(3)[2])


def test_bytes_of_images_stay_as_they_are(tmp_path):
    table = hub_table(["blast", "monocyte"], form="JPEG")
    parquet.write_table(table, tmp_path / "a.parquet")
    cells = LabelledCells.from_path(tmp_path / "a.parquet")
    assert [path.read_bytes() for path in cells.paths] == [row["bytes"] for row in table["image"].to_pylist()]
    assert cells.paths[0].suffix == ".jpg"


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_with_plain_bytes_and_labels_as_text(tmp_path, kind):
    table = pa.table({"image": [encoded(image) for image in pixels(3)], "label": ["b", "a", "b"]})
    writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink, writer(sink, table.schema) as stream:
        stream.write_table(table)
    cells = LabelledCells.from_path(tmp_path / "data.arrow")
    assert cells.class_names == ["a", "b"]
    assert cells.labels.tolist() == [1, 0, 1]


def test_a_folder_of_shards_has_the_split_of_their_names(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name, labels in (
        ("train-00000-of-00002", [0, 1]),
        ("train-00001-of-00002", [1]),
        ("validation-00000-of-00001", [0]),
        ("test-00000-of-00001", [1, 0]),
    ):
        parquet.write_table(hub_table(labels, names=["blast", "monocyte"]), folder / "data" / f"{name}.parquet")
    (folder / "README.md").write_text("a data set card")
    cells = LabelledCells.from_path(folder)
    assert len(cells) == 6
    split = read_split(folder, list(map(str, cells.paths)))
    assert [len(side) for side in (*split.folds[0], split.validation)] == [3, 2, 1]


def test_a_table_of_paths_in_parquet_is_still_one(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(1)[0]))
    parquet.write_table(
        pa.table({"Image Path": ["a.png"], "Label": ["blast"], "image": ["of Monday"]}), tmp_path / "t.parquet"
    )
    assert LabelledCells.from_path(tmp_path / "t.parquet").paths == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (hub_table([0, 7], names=["a", "b"]), "row 2 has the label 7; expected 0 to 1"),
        (hub_table(["a", None]), "row 2 has the label None"),
        (hub_table([0.5, 1.5]), "row 1 has the label 0.5; expected a number or a text"),
        (pa.table({"image": [{"bytes": None, "path": "1.png"}], "label": [0]}), "row 1 has no bytes of an image"),
        (pa.table({"image": ["1.png"], "label": [0]}), "row 1 has no bytes of an image"),
        (hub_table([0, 1], patient=["p1", None]), "image 2 has no patient, and others have one"),
        (hub_table([0, 1]).slice(0, 0), "holds no image"),
    ],
)
def test_tables_of_images_with_gaps(tmp_path, table, message):
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"labelled cells: .*a.parquet.*{message}"):
        LabelledCells.from_path(tmp_path / "a.parquet")


def test_images_without_labels(tmp_path):
    parquet.write_table(hub_table([0, 1]).drop_columns(["label"]), tmp_path / "a.parquet")
    assert len(LabelledCells.from_path(tmp_path / "a.parquet", needs_labels=False)) == 2
    with pytest.raises(ValueError, match="labelled cells: of .*a.parquet.* lacks the column.s. 'Label'"):
        LabelledCells.from_path(tmp_path / "a.parquet")


def test_an_image_that_is_none_is_left_to_the_reader_of_images(tmp_path):
    table = pa.table({"image": [{"bytes": b"no image"}, {"bytes": encoded(pixels(1)[0])}], "label": ["a", "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="not a known image format"):
        decode_image(LabelledCells.from_path(tmp_path / "a.parquet").paths[0])


@pytest.mark.parametrize("kind", ["npz", "parquet", "arrow"])
def test_damaged_files_are_named(tmp_path, kind):
    good = tmp_path / f"good.{kind}"
    if kind == "npz":
        save_npz(good)
    elif kind == "parquet":
        parquet.write_table(hub_table([0, 1]), good)
    else:
        table = hub_table([0, 1])
        with pa.OSFile(str(good), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    data, rng = good.read_bytes(), random.Random(0)
    file = tmp_path / f"bad.{kind}"
    refused = []
    for case in range(60):
        changed = bytearray(data)
        if case % 3 == 0:
            del changed[rng.randrange(1, len(data)) :]
        for _ in range(rng.choice((0, 1, 8))) if case % 3 else ():
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            unpack([file], "labelled cells", tmp_path / "out")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(text.startswith(f"labelled cells: {str(file)!r}") for text in refused)
