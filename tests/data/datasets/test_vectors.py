"""Parquet files with vectors: of this project and of others, and clear errors for broken ones."""

import json

import numpy as np
import pytest

from dinov2.data.datasets.bags import PatientBags
from dinov2.data.datasets.vectors import VectorTable, has_vectors, read_vectors, write_vectors

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
from pyarrow import parquet  # noqa: E402


def write(file, metadata=None, /, **columns):
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), file)
    return file


def test_what_is_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.data.datasets.vectors.ROWS_PER_BATCH", 4)
    rng = np.random.default_rng(0)
    vectors = {"vector": rng.normal(size=(9, 3)), "vector_cls+mean": rng.normal(size=(9, 5))}
    texts = {
        "label": ["a", "b", "c"] * 3,
        "patient": [f"00{i}" for i in range(9)],
        "path": [f"ü/{i}" for i in range(9)],
    }
    write_vectors(tmp_path / "x.parquet", VectorTable(vectors, texts, {"model": "ViT", "list": ["a"], "n": 1}))
    assert has_vectors(tmp_path / "x.parquet", "t")
    found = read_vectors(tmp_path / "x.parquet", "t")
    for name, values in vectors.items():
        assert found.vectors[name].dtype == np.float32
        np.testing.assert_array_equal(found.vectors[name], values.astype(np.float32))
    assert found.texts == texts
    assert found.metadata == {"model": "ViT", "list": ["a"], "n": 1}
    assert found.attributes == {"model": "ViT"}
    assert [
        len(values) for values in read_vectors(tmp_path / "x.parquet", "t", with_values=False).vectors.values()
    ] == [
        9,
        9,
    ]
    texts["path"][3] = "\udce9.png"
    with pytest.raises(ValueError, match="the path '.udce9.png' is not UTF-8, and parquet holds no other text; rename"):
        write_vectors(tmp_path / "y.parquet", VectorTable(vectors, texts))
    assert not (tmp_path / "y.parquet").exists()


@pytest.mark.parametrize("kind", ["list", "large list", "fixed", "float64", "float16", "integers"])
def test_lists_of_any_kind(kind, tmp_path):
    value = {"float64": pyarrow.float64(), "float16": pyarrow.float16(), "integers": pyarrow.int8()}
    of_list = {"large list": pyarrow.large_list, "fixed": lambda item: pyarrow.list_(item, 2)}
    column = of_list.get(kind, pyarrow.list_)(value.get(kind, pyarrow.float32()))
    rows = [np.array(row, np.float16 if kind == "float16" else None) for row in ([1, 2], [3, 4], [5, 6])]
    file = write(tmp_path / "x.parquet", vector=pyarrow.array(rows, column))
    np.testing.assert_array_equal(read_vectors(file, "t").vectors["vector"], [[1, 2], [3, 4], [5, 6]])


def test_bags(tmp_path):
    file = write(tmp_path / "x.parquet", vector=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], patient=["007", "7", "007"])
    bags = PatientBags.from_path(file)
    assert (bags.patients, bags.labels) == (["007", "7"], None)
    np.testing.assert_array_equal(bags.features[0], [[1, 2], [5, 6]])
    assert bags.cells[1] == [f"{file}:1"]
    write(file, vector=[[1.0], [2.0]], patient=["a", "b"], label=["x", "y"], path=["1.png", "2.png"])
    bags = PatientBags.from_path(file)
    assert bags.label_of() == {"a": "x", "b": "y"}
    assert bags.cells == [["1.png"], ["2.png"]]
    with pytest.raises(ValueError, match="x.parquet' has no column 'patient' with the patient of each cell"):
        PatientBags.from_path(write(file, vector=[[1.0], [2.0]]))
    with pytest.raises(ValueError, match="1 patients have two labels, for instance 'a' 'x' and 'y'"):
        PatientBags.from_path(write(file, vector=[[1.0], [2.0]], patient=["a", "a"], label=["x", "y"]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"]}, "has no column 'vector' with a list of numbers in each row; extract_features.py --layout"),
        ({"vector": [1.0, 2.0]}, "a list of as many numbers in each row; it has double: write it again"),
        ({"vector": [["a"], ["b"]]}, "a list of as many numbers in each row; it has list<.*string>"),
        ({"vector": [[1.0], [2.0, 3.0]]}, "of 2 lengths, or gaps"),
        ({"vector": [[1.0, None], [2.0, 3.0]]}, "or gaps"),
        ({"vector": [[1.0], None]}, "or gaps"),
        ({"vector": pyarrow.array([[]], pyarrow.list_(pyarrow.float32()))}, "or gaps"),
        ({"vector": pyarrow.array([], pyarrow.list_(pyarrow.float32()))}, "it has no rows"),
        ({"vector": [[1.0], [2.0]], "patient": ["a", None]}, "has rows without any text or vector"),
        ({"vector": [[1.0]], "patient": [["a"]]}, "column 'patient' of .* holds list<.*string>, not text"),
    ],
)
def test_broken_tables(columns, message, tmp_path):
    file = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=f"^features: .*{message}") as caught:
        read_vectors(file, "features")
    assert str(file) in str(caught.value)


def test_broken_metadata_and_bytes(tmp_path):
    file = write(tmp_path / "x.parquet", {"dinov2": "{"}, vector=[[1.0]])
    with pytest.raises(ValueError, match="has metadata 'dinov2' that is no JSON"):
        read_vectors(file, "features")
    assert read_vectors(write(file, {"dinov2": json.dumps([1])}, vector=[[1.0]]), "features").metadata == {}
    file.write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(ValueError, match="x.parquet' cannot be read as parquet"):
        has_vectors(file, "features")


def test_few_bytes_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.data.datasets.tables.MAX_BYTES", 2**16)
    file = write(tmp_path / "x.parquet", vector=[[0.0] * 2000] * 2000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_vectors(file, "features")


def test_without_pyarrow(tmp_path, monkeypatch):
    file = write(tmp_path / "x.parquet", vector=[[1.0]])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x.parquet' needs pyarrow \(`pip install pyarrow`\), or save it as CSV"):
        read_vectors(file, "features")
    with pytest.raises(ValueError, match=r"y.parquet' needs pyarrow .*, or choose another layout"):
        write_vectors(tmp_path / "y.parquet", VectorTable({"vector": np.zeros((1, 1))}, {}))
