"""Everything that may name images: lists, tables, folders and tar shards."""

import io
import multiprocessing
import os
import pickle
import re
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from PIL import Image

from dinov2.data.bad_images import BadImages
from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.datasets.sources import ImageSource, read_image


def png(value):
    data = io.BytesIO()
    Image.new("RGB", (12, 12), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def write(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def paths(images):
    return [images.path(i) for i in range(len(images))]


def sets(images):
    return [images.set_names[i] for i in images.set_ids()]


# --- lists ----------------------------------------------------------------------------------------------------------


def test_each_list_is_a_set(tmp_path):
    (tmp_path / "b.txt").write_text("1.png\n")
    (tmp_path / "a.txt").write_text("2.png\n3.png")
    (tmp_path / "c.txt").write_text("# later\n")
    images = ImageSource.from_root(tmp_path)
    assert paths(images) == [str(tmp_path / name) for name in ("2.png", "3.png", "1.png")]
    assert sets(images) == ["a", "a", "b"]
    assert images.set_ids().tolist() == [0, 0, 1]
    assert (images.set_names, images.set_sizes.tolist()) == (["a", "b", "c"], [2, 1, 0])
    assert images.kind == "3 .txt lists"


@pytest.mark.parametrize("seed", range(4))
def test_lines_are_those_that_reading_them_one_by_one_gives(tmp_path, seed):
    rng = np.random.default_rng(seed)
    alphabet = [b"a", b"b/", b" ", b"\t", b"\n", b"\r\n", b"\r", b"#", "ü".encode(), b"\x0b", b"\n#", b"  \n"]
    text = b"first.png\n" + b"".join(alphabet[i] for i in rng.integers(0, len(alphabet), 3000)) + b"last"
    lines = [line.strip().decode() for line in text.splitlines()]
    expected = [str(tmp_path / line) for line in lines if line and not line.startswith("#")]
    write(tmp_path / "list.txt", text)
    images = ImageSource.from_root(tmp_path / "list.txt")
    assert paths(images) == [os.path.join(tmp_path, line) for line in lines if line and not line.startswith("#")]
    assert len(images) == len(expected)


def test_lists_win_over_what_lies_beside_them(tmp_path, caplog):
    write(tmp_path / "sub" / "1.png")
    write(tmp_path / "2.png")
    write_tar(tmp_path / "3.tar", [("3.png", b"x")])
    with caplog.at_level("INFO", "dinov2"):
        assert ImageSource.from_root(tmp_path).kind == "1 tar shard"
        assert "the 1 images beside them are not read" in caplog.text
        (tmp_path / "list.txt").write_text("2.png\n")
        assert paths(ImageSource.from_root(tmp_path)) == [str(tmp_path / "2.png")]
    assert "holds lists: its 1 tar files are not read" in caplog.text


def test_many_paths_are_shared_with_workers_and_not_copied(tmp_path):
    names = [f"images/slide_{i // 1000:04d}/cell_{i:07d}.png" for i in range(100_000)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    images = ImageSource.from_root(tmp_path)
    assert len(ForkingPickler.dumps(images)) < 10_000
    assert images.path(99_999) == str(tmp_path / names[-1])  # also after its memory was moved to be shared
    assert pickle.loads(pickle.dumps(images)).path(50_000) == str(tmp_path / names[50_000])


def send_path(images, position, pipe):
    pipe.send(images.path(position))


def test_a_spawned_process_sees_the_same_images(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.png" for i in range(1000)))
    ours, theirs = multiprocessing.Pipe()
    arguments = (ImageSource.from_root(tmp_path), 777, theirs)
    process = multiprocessing.get_context("spawn").Process(target=send_path, args=arguments)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == str(tmp_path / "777.png")
    process.join()


def test_reading_and_stamps_of_files(tmp_path):
    image = write(tmp_path / "a.png", b"12345")
    (tmp_path / "list.txt").write_bytes(b"a.png\ngone.png\nnul\0l.png\nsub\n")
    (tmp_path / "sub").mkdir()
    images = ImageSource.from_root(tmp_path)
    assert images.read(0) == b"12345"
    assert images.stamp(0) == (5, image.stat().st_mtime_ns)
    for position, reason in ((1, "^No such file or directory$"), (2, "null"), (3, "^is a folder, not a file")):
        with pytest.raises(UnreadableImageError) as error:
            images.read(position)
        assert re.search(reason, error.value.reason)
    for position in (1, 2):
        with pytest.raises(OSError, match="No such file|null"):
            images.stamp(position)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_csv_as_the_preparers_write_it(tmp_path):
    text = (
        '\ufeffImage Path,Label,dataset\r\ncells/1.png,a,bmc\r\n"cells/2, b.png",b,apl\r\n,,\r\n\r\n/x/ü.png,b,bmc\r\n'
    )
    file = write(tmp_path / "labels.csv", text.encode() + b" 4.png ,c,\r\n")
    images = ImageSource.from_root(file)
    expected = [tmp_path / "cells/1.png", tmp_path / "cells/2, b.png", "/x/ü.png", tmp_path / "4.png"]
    assert paths(images) == [str(path) for path in expected]
    assert sets(images) == ["bmc", "apl", "bmc", "labels"]
    assert images.set_sizes.tolist() == [2, 1, 1]
    assert images.kind == "the column 'Image Path' of labels.csv"


def values(images):
    return [images.metadata.names[n] if (n := images.metadata[i]) >= 0 else None for i in range(len(images))]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_of_values_beside_the_paths(tmp_path, suffix):
    names, slides, sets_ = ["1.png", "2.png", "3.png", "4.png"], ["s2", "", "s10", "s2"], ["x", "y", "", "x"]
    rows = zip(names, slides, sets_, strict=True)
    text = "path,slide,dataset\n" + "".join(f"{','.join(row)}\n" for row in rows)
    if suffix == "csv":
        file = write(tmp_path / "t.csv", text.encode())
    else:
        file = write_parquet(tmp_path / "t.parquet", path=names, slide=slides, dataset=sets_)
    images = ImageSource.from_root(file, metadata="slide")
    assert values(images) == ["s2", None, "s10", "s2"]
    assert images.metadata.describe() == "2 values of slide, 1 images without"
    assert values(ImageSource.from_root(file, metadata="dataset")) == ["x", "y", None, "x"]
    assert sets(images) == ["x", "y", "t", "x"]  # a set's name, in the place of an empty one
    assert ImageSource.from_root(file).metadata is None
    assert ImageSource.from_root(file).fingerprint() in images.fingerprint()
    with pytest.raises(ValueError, match=r"metadata.column: .*no column 'Slide'; it has 'path', 'slide', 'dataset'"):
        ImageSource.from_root(file, metadata="Slide")


def test_another_column_or_value_is_another_fingerprint(tmp_path):
    def fingerprint(value, column="slide"):
        file = write(tmp_path / "t.csv", f"path,slide,scanner\n1.png,a,a\n2.png,{value},b\n".encode())
        return ImageSource.from_root(file, metadata=column).fingerprint()

    assert len({fingerprint("b"), fingerprint("c"), fingerprint("b", "scanner")}) == 3


def test_lists_have_one_column_and_one_value_is_nothing_to_tell_apart(tmp_path):
    (tmp_path / "a.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match="'dataset' has 1 value.* nothing to tell apart"):
        ImageSource.from_root(tmp_path, metadata="dataset")
    (tmp_path / "b.txt").write_text("2.png\n")
    assert values(ImageSource.from_root(tmp_path, metadata="dataset")) == ["a", "b"]
    with pytest.raises(ValueError, match="2 .txt lists .* have no column 'slide', but only 'dataset'.*csv"):
        ImageSource.from_root(tmp_path, metadata="slide")


def test_which_column_has_the_paths(tmp_path):
    file = write(tmp_path / "t.csv", b"path,file\n1.png,2.png\n")
    assert paths(ImageSource.from_root(file)) == [str(tmp_path / "1.png")]
    dataset = ImageSource.from_root(file, column="file")
    assert paths(dataset) == [str(tmp_path / "2.png")]
    assert dataset.set_names == ["t"]
    with pytest.raises(ValueError, match=r"has no column 'Pfad'.*it has 'path', 'file'; .*:column="):
        ImageSource.from_root(file, column="Pfad")
    with pytest.raises(ValueError, match=r"no column 'Image Path' or 'path'.*it has 'name'"):
        ImageSource.from_root(write(tmp_path / "u.csv", b"name\n1.png\n"))
    (tmp_path / "list.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match="column='path' is for a .csv or .parquet file"):
        ImageSource.from_root(tmp_path, column="path")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n", "it has no columns"),
        (b"", "train.dataset_path: .*t.csv is empty"),
        (b"path\n", "name no image"),
        (b"path,Label\n1.png,a\n,b\n", "line 3: no image path in column 'path'; fill it in"),
        ("path\nü.png\n".encode("latin-1"), "is not UTF-8 text"),
        (b"path\n" + b"x" * 200_000, "line 2, is not CSV"),
    ],
)
def test_csv_files_that_cannot_be_used(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        ImageSource.from_root(write(tmp_path / "t.csv", data))


def write_parquet(path, /, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes parquet")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_parquet(tmp_path):
    names = [f"cells/ü {i}.png" for i in range(7)]
    file = write_parquet(tmp_path / "t.parquet", path=names, dataset=["a", "b", None, "a", "", "b", "b"], label=[1] * 7)
    images = ImageSource.from_root(file)
    assert paths(images) == [str(tmp_path / name) for name in names]
    assert sets(images) == ["a", "b", "t", "a", "t", "b", "b"]
    assert ImageSource.from_root(write_parquet(tmp_path / "u.parquet", path=names)).set_names == ["u"]


def test_parquet_files_that_cannot_be_used(tmp_path):
    file = write_parquet(
        tmp_path / "t.parquet", path=["1.png", "2.png", "3.png", None], n=[b"\xff"] * 4, names=[["a"]] * 4
    )
    with pytest.raises(ValueError, match="line 4: no image path in column 'path'"):
        ImageSource.from_root(file)
    with pytest.raises(ValueError, match="no column 'x'.*it has 'path', 'n', 'names'"):
        ImageSource.from_root(file, column="x")
    for column, kind in (("n", "binary"), ("names", "list")):
        with pytest.raises(ValueError, match=f"column '{column}' of .* holds {kind}.*not text"):
            ImageSource.from_root(file, column=column)
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        ImageSource.from_root(write(tmp_path / "u.parquet", b"path\n1.png\n"))
    with pytest.raises(ValueError, match="name no image"):
        ImageSource.from_root(write_parquet(tmp_path / "v.parquet", path=[]), column="path")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        ImageSource.from_root(write(tmp_path / "t.parquet"))


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    root = tmp_path / "cells"
    names = ["z.png", "acevedo/1.JPG", "acevedo/deep/er/2.tif", "bmc/3.png", "bmc-2/4.bmp"]
    for name in [*names, ".hidden/5.png", "bmc/.6.png", "bmc/notes.md", "bmc/.git/7.png", "empty/readme"]:
        write(root / name)
    (root / "linked").symlink_to(write(tmp_path / "else" / "8.png").parent)
    (root / "bmc" / "linked").symlink_to(write(tmp_path / "more" / "9.png").parent)
    images = ImageSource.from_root(root)
    assert sorted(paths(images)) == sorted(str(root / name) for name in [*names, "linked/8.png", "bmc/linked/9.png"])
    assert dict(zip(images.set_names, images.set_sizes.tolist(), strict=True)) == {
        ".": 1,
        "acevedo": 2,
        "bmc": 2,
        "bmc-2": 1,
        "linked": 1,
    }
    assert paths(images) == paths(ImageSource.from_root(root))


def test_the_fingerprint_follows_names_and_order_and_not_the_place(tmp_path):
    for place in ("old", "new"):
        for name in ("a/1.png", "a/2.png"):
            write(tmp_path / place / name)
    old, new = (ImageSource.from_root(tmp_path / place).fingerprint() for place in ("old", "new"))
    assert old == new
    assert old.startswith("2 images, names sha256 ")
    write(tmp_path / "new" / "a" / "3.png")
    assert ImageSource.from_root(tmp_path / "new").fingerprint().startswith("3 images")
    lists = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate((b"1.png\n2.png\n", b"2.png\n1.png\n"))]
    assert len({ImageSource.from_root(file).fingerprint() for file in lists}) == 2


def test_file_names_that_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/s/caf\xe9.png"
    (tmp_path / "s").mkdir()
    try:
        with open(name, "wb") as file:
            file.write(b"123")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    assert ImageSource.from_root(tmp_path).read(0) == b"123"


def test_a_folder_without_anything_known(tmp_path):
    write(tmp_path / "labels.csv", b"path\n1.png\n")
    with pytest.raises(FileNotFoundError, match="no image .*to read labels.csv, give this file; root must be a folder"):
        ImageSource.from_root(tmp_path)
    write(tmp_path / "cells-000.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"no \.tar shard.*\.tar shards, not compressed"):
        ImageSource.from_root(tmp_path)


# --- tar shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    long = "folder/" * 13 + "größe" * 10 + ".png"  # more than 100 and less than 256 bytes
    members = [
        ("a/1.jpg", b"one"),
        ("a/1.json", b"{}"),
        ("empty.png", b""),
        ("a/._1.jpg", b"a Mac's note"),
        (long, b"x" * 513),
        ("größe 2.PNG", b"two" * 512),
    ]
    file = write_tar(tmp_path / "cells.tar", members, format)
    with tarfile.open(file, "a", format=format) as tar:
        tar.add(tmp_path, "folder.png", recursive=False)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x" * 150 if format != tarfile.USTAR_FORMAT else "a/1.jpg"
        tar.addfile(link)
        last = tarfile.TarInfo("last.webp")
        last.size = 4
        tar.addfile(last, io.BytesIO(b"last"))
    images = ImageSource.from_root(file)
    kept = [members[i] for i in (0, 2, 4, 5)] + [("last.webp", b"last")]
    assert paths(images) == [f"{file}::{name}" for name, _ in kept]
    assert [images.read(i) for i in range(len(images))] == [data for _, data in kept]
    assert [read_image(path) for path in paths(images)] == [data for _, data in kept]
    assert images.stamp(0) == (file.stat().st_size, file.stat().st_mtime_ns)


def test_sets_of_shards(tmp_path):
    for name in ("bmc-000", "bmc-001", "apl_00", "000"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", b"x"), (f"{name}b.png", b"x")])
    images = ImageSource.from_root(tmp_path)
    assert (images.set_names, images.set_sizes.tolist()) == (["000", "apl", "bmc"], [2, 2, 4])
    assert images.kind == "4 tar shards"
    assert sets(images)[2:] == ["apl"] * 2 + ["bmc"] * 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("c-{000..002}.tar", ["c-000", "c-001", "c-002"]),
        ("c-{002..001}.tar", ["c-002", "c-001"]),
        ("c-{000,002}.tar", ["c-000", "c-002"]),
        ("{c,d}-00{1..2}.tar", ["c-001", "c-002", "d-001", "d-002"]),
        ("c-*.tar", ["c-000", "c-001", "c-002"]),
        ("{d,c}-00?.tar", ["d-001", "d-002", "c-000", "c-001", "c-002"]),
        ("x{y}.tar", ["x{y}"]),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    for name in ("c-000", "c-001", "c-002", "d-001", "d-002", "x{y}"):
        write_tar(tmp_path / f"{name}.tar", [("1.png", b"x")])
    found = paths(ImageSource.from_root(str(tmp_path / pattern)))
    assert found == [f"{tmp_path / name}.tar::1.png" for name in expected]


def test_patterns_that_cannot_be_used(tmp_path):
    write_tar(tmp_path / "c-0.tar", [("1.png", b"x")])
    with pytest.raises(FileNotFoundError, match="means '.*c-1.tar', too, which does not exist"):
        ImageSource.from_root(str(tmp_path / "c-{0..1}.tar"))
    for pattern in ("d-*.tar", "c-{0.tar"):
        with pytest.raises(FileNotFoundError, match="does not exist.* it must be a folder"):
            ImageSource.from_root(str(tmp_path / pattern))
    many = ("c-{0..9999999999}.tar", "c-{0..999}{0..999}.tar", "c-" + "{0,1}" * 40 + ".tar", "{" * 5000 + "}" * 5000)
    for pattern in many:
        with pytest.raises((ValueError, FileNotFoundError), match="means more than 100,000 files|does not exist"):
            ImageSource.from_root(pattern)
    write(tmp_path / "c-0.txt")
    for pattern in ("c-0.t*", "*.txt"):
        with pytest.raises(ValueError, match=r"c-0.txt' is a file of another kind; it must be"):
            ImageSource.from_root(str(tmp_path / pattern))
    write(tmp_path / "c-0.tar.zst")
    with pytest.raises(ValueError, match="another kind.*not compressed"):
        ImageSource.from_root(str(tmp_path / "*.zst"))


def test_tar_files_that_cannot_be_used(tmp_path, caplog):
    file = tmp_path / "c.tar"
    for mode in ("gz", "bz2", "xz"):
        with tarfile.open(file, f"w:{mode}") as tar:
            tar.add(__file__, "1.png")
        with pytest.raises(ValueError, match=r"c\.tar' is not a tar file, or is compressed.*unpack it"):
            ImageSource.from_root(file)
    with pytest.raises(ValueError, match=r"c\.tar\.gz' is a file of another kind.*not compressed"):
        ImageSource.from_root(write(tmp_path / "c.tar.gz"))
    for data, message in ((b"", "not a tar file"), (b"hello", "not a tar file"), (b"y" * 4096, "not a tar file")):
        with pytest.raises(ValueError, match=message):
            ImageSource.from_root(write(file, data))
    write_tar(file, [("1.txt", b"x")])
    with pytest.raises(ValueError, match="name no image"):
        ImageSource.from_root(file)

    whole = write_tar(tmp_path / "d.tar", [("1.png", b"x" * 1000), ("2.png", b"y" * 1000)]).read_bytes()
    for length in (512 + 100, 512 + 1024 + 512 + 10):
        with pytest.raises(
            ValueError,
            match=r"c\.tar' is not a tar file, or is compressed, damaged or truncated \(unexpected end of data\)",
        ):
            ImageSource.from_root(write(file, whole[:length]))
    with pytest.raises(ValueError, match="is damaged at byte 1536"):
        ImageSource.from_root(write(file, whole[: 1536 + 100]))
    assert not caplog.records
    assert len(ImageSource.from_root(write(file, whole[:1536]))) == 1
    assert "without a tar file's closing blocks; was it cut there?" in caplog.text


def test_headers_that_would_lead_back_or_name_more_than_there_is(tmp_path):
    data = bytearray(write_tar(tmp_path / "c.tar", [("1.png", b"x" * 1000), ("2.png", b"y")]).read_bytes())
    for size in (b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11, b"\x80\x00\x00\x00" + b"\xff" * 8):
        data[1536 + 124 : 1536 + 136] = size
        data[1536 + 148 : 1536 + 156] = b" " * 8
        data[1536 + 148 : 1536 + 156] = b"%06o\0 " % sum(data[1536:2048])
        with pytest.raises(ValueError, match=r"c\.tar' is not a tar file, or is .*damaged"):
            ImageSource.from_root(write(tmp_path / "c.tar", bytes(data)))
        with pytest.raises(UnreadableImageError, match="damaged"):
            read_image(f"{tmp_path / 'c.tar'}::2.png")


def test_a_shard_that_is_replaced_is_not_read_at_old_offsets(tmp_path):
    file = write_tar(tmp_path / "c.tar", [("1.png", png(1)), ("2.png", png(2))])
    images = ImageSource.from_root(file)
    write_tar(tmp_path / "new.tar", [("0.png", png(0) + b"longer"), ("1.png", png(1))]).replace(file)
    with pytest.raises(UnreadableImageError, match="was changed after this run"):
        images.read(0)
    file.unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        images.read(1)
    with pytest.raises(OSError, match="No such file"):
        images.stamp(0)


def test_bad_members_are_recorded_replaced_and_looked_at_again(tmp_path):
    members = [(f"{i}.png", png(i)) for i in range(6)]
    members[2] = ("2.png", b"junk")
    file = write_tar(tmp_path / "cells.tar", members)
    dataset = HemaStandardDataset(root=file, image_size=8)
    sample = dataset[2]
    assert sample.failures == ((f"{file}::2.png", "not a known image format"),)
    assert sample.image.unique().item() != 2
    assert dataset[5].image.unique().item() == 5

    record = BadImages(tmp_path / "bad_images.csv", n_listed=6, max_fraction=0.5)
    record.record(sample.failures)
    record.settle()
    assert BadImages(record.path, 6, 0.5).reasons == dict(sample.failures)
    write_tar(file, [(f"{i}.png", png(i)) for i in range(6)])
    assert BadImages(record.path, 6, 0.5).reasons == {}


def test_what_a_record_may_name(tmp_path):
    odd = write(tmp_path / "a.tar::b.png", b"a file")
    assert read_image(str(odd)) == b"a file"
    file = write_tar(tmp_path / "c.tar", [("1.png", b"x")])
    for path, reason in ((f"{file}::2.png", "'2.png' not found"), (f"{tmp_path}/gone.tar::1.png", "no such file")):
        with pytest.raises(UnreadableImageError, match=reason) as error:
            read_image(path)
        assert error.value.path == path
