"""The one reader of tables: delimiters, marks, quotes and gaps of CSV files, and parquet."""

import os

import pytest

from dinov2.data.datasets import tables
from dinov2.data.datasets.tables import open_table, read_list, read_table


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimiters_and_byte_order_marks(tmp_path, delimiter, mark):
    lines = ["Image Path,Label,note", "1.png,band,a b", "2.png,eos,"]
    file = write(tmp_path / "t.csv", mark + "\r\n".join(lines).replace(",", delimiter))
    table = open_table(file, "split")
    assert table.columns == ["Image Path", "Label", "note"]
    assert list(table.rows()) == [(2, ["1.png", "band", "a b"]), (3, ["2.png", "eos", ""])]
    assert list(table.rows("note", "Label")) == [(2, ["a b", "band"]), (3, ["", "eos"])]


def test_quoted_fields_hold_delimiters_quotes_and_line_breaks(tmp_path):
    text = '"a;b, c", "d"\n"1,2;3"," say ""x"" "\n"two\nlines",3\n4,5\n'
    rows = list(open_table(write(tmp_path / "t.csv", text), "split").rows())
    assert rows == [(2, ["1,2;3", 'say "x"']), (4, ["two\nlines", "3"]), (5, ["4", "5"])]


def test_values_stay_as_they_are_written(tmp_path):
    text = "id,n,m\n007,1.50,NA\n1e5,,null\n"
    rows = read_table(write(tmp_path / "t.csv", text), "split", ("id", "m"))
    assert rows == [{"id": "007", "m": "NA"}, {"id": "1e5", "m": "null"}]


def test_short_long_and_empty_rows(tmp_path):
    text = "\n a , b \n1\n\n,,\n2,3, ,\n  ,\n"
    table = open_table(write(tmp_path / "t.csv", text), "split")
    assert list(table.records()) == [(3, {"a": "1", "b": ""}), (6, {"a": "2", "b": "3"})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # each of these once gave fewer or other rows without a word
        ('1.png,a,"7\n2.png,b,8\n3.png,b,9\n', "line 2, is not CSV .*is a quotation mark open there"),
        ('1.png,a,7\n2.png,a,"8\n3.png,b,9"\n4.png,b,10\n', "line 3, is not CSV .*holds whole lines"),
        ('1.png,"a,7\n2.png,b",8\n', "line 2, is not CSV .*holds whole lines"),
        ('1.png,a,"7\n2.png,b,"8\n', "line 2, is not CSV"),
        ('1.png,a,"7\n' + "2.png,b,8\n" * 20_000, "line 2, is not CSV"),
        ("1.png,a,7\n2.png,b, large,8\n", "line 3, has 4 values and the first line 3"),
    ],
)
def test_stray_quotation_marks_and_delimiters_are_named_with_their_line(tmp_path, rows, message):
    table = open_table(write(tmp_path / "t.csv", "path,label,patient\n" + rows), "split")
    for columns in ((), ("path",)):
        with pytest.raises(ValueError, match=f"split: .*t.csv', {message}"):
            list(table.rows(*columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv is empty \(0 bytes\)"),
        (
            "\n",
            r"t\.csv' lacks the column\(s\) 'path', 'label'; its first line has nothing, expected path,label\[,fold\]",
        ),
        ("path,Label\n1,2\n", r"lacks the column\(s\) 'label'; its first line has \['path', 'Label'\]"),
        ("path,label\n", "has no rows under its first line"),
        ("path,label\n1,2\n3,\n", "line 3: no value for 'label'; fill it in or drop the row"),
        ("path,label,fold\n1,2,\n", "line 2: no value for 'fold'"),
        ("path,label,path\n1,2,3\n", r"has the column\(s\) 'path' twice; keep one"),
        ("path,label\n" + "x" * 200_000 + ",1\n", "line 2, is not CSV"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^split: .*{message}"):
        read_table(write(tmp_path / "t.csv", text), "split", ("path", "label"), ("fold",))


def test_another_encoding_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="labels: .*t.csv', line 2, is not UTF-8 text.* as CSV UTF-8"):
        read_table(write(tmp_path / "t.csv", "path\nStäbchen\n", "latin-1"), "labels", ("path",))
    with pytest.raises(FileNotFoundError, match="labels: .*gone.csv: no such file"):
        read_table(tmp_path / "gone.csv", "labels", ("path",))


def test_names_of_files_may_have_any_bytes(tmp_path):
    name = b"caf\xe9.png"
    (tmp_path / os.fsdecode(name)).touch()
    (tmp_path / "t.csv").write_bytes(b"path,label\n" + name + b",a\n")
    (tmp_path / "list.txt").write_bytes(b"1.png\n" + name + b"\n")
    assert read_table(tmp_path / "t.csv", "split", ("path",)) == [{"path": os.fsdecode(name)}]
    assert read_list(tmp_path / "list.txt") == ["1.png", os.fsdecode(name)]
    (tmp_path / os.fsdecode(name)).unlink()
    with pytest.raises(ValueError, match="list.txt', line 2, is not UTF-8 text, and there is no file"):
        read_list(tmp_path / "list.txt")


def test_a_readme_is_no_list(tmp_path):
    text = "PBC data set\n\nCite: Acevedo 2020\n"
    with pytest.raises(ValueError, match="README.txt' is read as a list of images, and its first line 'PBC data set'"):
        read_list(write(tmp_path / "README.txt", text))
    write(tmp_path / "PBC data set", "an image whose name has no suffix")
    assert len(read_list(tmp_path / "README.txt")) == 2


@pytest.mark.parametrize("read", [read_list, lambda file: open_table(file, "split")])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").touch()
    os.truncate(tmp_path / "zeros", 2**33)  # sparse: it takes no room
    for name, message in (
        ("zeros", "a line of 1,048,576 letters or more"),
        ("pipe", "a named pipe"),
        (".", "a folder"),
        ("/dev/zero", "a device"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def test_a_parquet_file_that_unpacks_to_far_more(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
    from pyarrow import parquet

    monkeypatch.setattr(tables, "MAX_BYTES", 2**20)
    code = pyarrow.DictionaryArray.from_arrays
    for number, column in enumerate(
        [
            code(pyarrow.array([0] * 5000), ["x" * 10_000]),
            code(pyarrow.array([0] * 500_000), ["x"]),
            pyarrow.array([f"{i}" + "x" * 100_000 for i in range(100)]),
        ]
    ):
        file = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"path": column}), file, compression="zstd")
        with pytest.raises(ValueError, match=f"split: .*{number}.parquet' unpacks to more than"):
            read_table(file, "split", ("path",))


def test_a_column_that_stands_twice_matters_only_where_it_is_wanted(tmp_path):
    file = write(tmp_path / "t.csv", "path,x,x\n1,2,3\n")
    assert read_table(file, "split", ("path",)) == [{"path": "1"}]
    with pytest.raises(ValueError, match="'x' twice"):
        list(open_table(file, "split").rows())


def test_other_names_of_columns(tmp_path):
    names = {"patient": ("patient_id", "patient_name"), "label": ("Label",)}
    file = write(tmp_path / "t.csv", "patient_name,Label,patient_id\na,x,b\n")
    assert read_table(file, "bags", ("patient",), ("label",), names) == [{"patient": "b", "label": "x"}]


def test_parquet_gives_what_csv_gives(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
    from pyarrow import parquet

    columns = {"path": ["1.png", " 2.png "], "fold": [1, 2], "label": ["007", "b"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    expected = [{"path": "1.png", "fold": "1", "label": "007"}, {"path": "2.png", "fold": "2", "label": "b"}]
    assert read_table(tmp_path / "t.parquet", "split", ("path", "fold", "label")) == expected
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'x'"):
        read_table(tmp_path / "t.parquet", "split", ("x",))


def test_parquet_names_that_are_not_utf8_are_an_error_with_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
    from pyarrow import parquet

    file = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"patient": ["p1"]}), file)
    file.write_bytes(file.read_bytes().replace(b"patient", b"patien\xff"))
    with pytest.raises(ValueError, match=r"t\.parquet.*cannot be read as parquet"):
        read_table(file, "labels", ("patient",))
