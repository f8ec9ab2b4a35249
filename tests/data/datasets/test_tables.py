"""The one reader of tables: delimiters, marks, quotes and gaps of CSV files, and parquet."""

import pytest

from dinov2.data.datasets.tables import open_table, read_table


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
    text = "\n a , b \n1\n\n,,\n2,3,4\n  ,\n"
    table = open_table(write(tmp_path / "t.csv", text), "split")
    assert list(table.records()) == [(3, {"a": "1", "b": ""}), (6, {"a": "2", "b": "3"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"t\.csv' lacks the column\(s\) 'path', 'label'; its first line has nothing, expected path,label\[,fold\]",
        ),
        ("path,Label\n1,2\n", r"lacks the column\(s\) 'label'; its first line has \['path', 'Label'\]"),
        ("path,label\n", "has no rows under its first line"),
        ("path,label\n1,2\n3,\n", "line 3: no value for 'label'; fill it in or drop the row"),
        ("path,label,fold\n1,2,\n", "line 2: no value for 'fold'"),
        ("path,label,path\n1,2,3\n", r"has the column\(s\) 'path' twice; keep one"),
        ("path,label\n" + "x" * 200_000 + ",1\n", "line 2, is not CSV .*save it as CSV UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^split: .*{message}"):
        read_table(write(tmp_path / "t.csv", text), "split", ("path", "label"), ("fold",))


def test_another_encoding_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="labels: .*t.csv' is not UTF-8 text .*save it as CSV UTF-8"):
        read_table(write(tmp_path / "t.csv", "path\nStäbchen\n", "latin-1"), "labels", ("path",))
    with pytest.raises(FileNotFoundError, match="labels: no file .*gone.csv"):
        read_table(tmp_path / "gone.csv", "labels", ("path",))


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
