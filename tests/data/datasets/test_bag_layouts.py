"""Bags as other tools store them, names of files, and clear errors for broken files."""

import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch

from dinov2.data.datasets.bag_layouts import file_name, original_name
from dinov2.data.datasets.bags import PatientBags, read_patient_labels


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A/1", "A%2F1"),
        (r"a\b", "a%5Cb"),
        (".x", "%2Ex"),
        ("..", "%2E."),
        ("50%", "50%25"),
        ("a%2Fb", "a%252Fb"),
        ("a\nb", "a%0Ab"),
        ("007", "007"),
        ("Grün 患者.2", "Grün 患者.2"),
    ],
)
def test_names_of_files_are_reversible(text, name):
    assert file_name(text) == name
    assert original_name(name) == text


def test_names_of_other_origin_stay():
    for name in ("50%", "a%20b", "%zz", "a%2fb"):
        assert original_name(name) == name


def cells(n, offset=0.0):
    return np.arange(4 * n, dtype=np.float32).reshape(n, 4) + offset


def test_stamp_files_without_a_table(tmp_path):
    for name, n in (("b", 3), ("007", 1)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:  # as `stamp preprocess` writes
            file["feats"] = cells(n).astype(np.float16)
            file["coords"] = np.zeros((n, 2), np.float32)
            file.attrs["extractor"] = "dino-bloom"
            file.attrs["tile_size_um"] = 256.0
    bags = PatientBags.from_path(tmp_path)
    assert bags.patients == ["007", "b"]
    np.testing.assert_array_equal(bags.features[1], cells(3))
    assert bags.features[1].dtype == np.float32
    assert bags.attributes["extractor"] == "dino-bloom"
    # the slide table beside them: a patient has two files
    (tmp_path / "bags.csv").write_text("PATIENT,FILENAME\n007,b.h5\n007,007.h5\n")
    assert len(PatientBags.from_path(tmp_path).features[0]) == 4
    (tmp_path / "clini.csv").write_text("PATIENT,label\n007,APL\n")
    assert read_patient_labels(tmp_path / "clini.csv") == {"007": "APL"}


def test_clam_folders(tmp_path):
    for folder in ("h5_files", "pt_files"):
        (tmp_path / folder).mkdir()
    torch.save(torch.from_numpy(cells(3)), tmp_path / "pt_files" / "b.pt")
    bags = PatientBags.from_path(tmp_path)  # CLAM itself needs no more
    assert (bags.patients, bags.labels) == (["b"], None)
    np.testing.assert_array_equal(bags.features[0], cells(3))
    with h5py.File(tmp_path / "h5_files" / "a.h5", "w") as file:
        file["features"] = cells(2)
    assert PatientBags.from_path(tmp_path).patients == ["a"]


def test_torchmil_folders(tmp_path):
    for folder in ("features", "labels", "coords"):
        (tmp_path / folder).mkdir()
    for name, label in (("b", 1), ("a", 0)):
        np.save(tmp_path / "features" / f"{name}.npy", cells(2))
        np.save(tmp_path / "labels" / f"{name}.npy", np.array(label))
    assert PatientBags.from_path(tmp_path).label_of() == {"a": "0", "b": "1"}
    np.save(tmp_path / "labels" / "b.npy", np.array([0, 1]))
    with pytest.raises(ValueError, match=r"b.npy' has labels of shape \[2\] .* give the patients' classes as --labels"):
        PatientBags.from_path(tmp_path)


def test_eva_manifest(tmp_path):
    torch.save(list(torch.from_numpy(cells(3))), tmp_path / "one.pt")  # eva's writer makes lists
    torch.save(torch.from_numpy(cells(1)[0]), tmp_path / "two.pt")
    torch.save(torch.from_numpy(cells(2)).bfloat16(), tmp_path / "three.pt")
    rows = ["x.png,one.pt,1,train,007", "y.png,two.pt,1,train,007", "z.png,three.pt,0,val,8"]
    (tmp_path / "manifest.csv").write_text("\n".join(["origin,embeddings,target,split,wsi_id", *rows]) + "\n")
    for path in (tmp_path, tmp_path / "manifest.csv"):
        bags = PatientBags.from_path(path)
        assert bags.label_of() == {"007": "1", "8": "0"}
        np.testing.assert_array_equal(bags.features[0], np.concatenate([cells(3), cells(1)]))
    (tmp_path / "manifest.csv").write_text("origin,embeddings,target,split\nx.png,one.pt,1,train\n")
    with pytest.raises(ValueError, match=r"manifest.csv' lacks the column\(s\) 'patient'"):
        PatientBags.from_path(tmp_path)


class Code:
    def __reduce__(self):
        return print, ("code of the file was run",)


def write_pt(content):
    return lambda path: torch.save(content, path)


def write_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
        archive.writestr("archive/data/0", bytes(2**24))


def write_header_only(path):
    np.save(path, cells(1))
    path.write_bytes(path.read_bytes().replace(b"(1, 4)", b"(9, 4)"))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("p.pt", lambda path: path.write_bytes(b"x" * 99), "is no tensor of torch.save or is damaged"),
        ("p.pt", lambda path: path.write_bytes(pickle.dumps(1)), "is no tensor of torch.save or is damaged"),
        ("p.pt", write_pt({"a": 1}), "it holds a dict"),
        ("p.pt", write_pt([]), "it holds a list"),
        ("p.pt", write_pt(Code()), "is no tensor of torch.save or is damaged .Weights only load failed"),
        ("p.pt", write_pt(torch.zeros(1).expand(10**6, 4)), "it declares more numbers than it stores"),
        ("p.pt", write_pt(torch.zeros(2, 3, 4)), r"has an array of shape \[2, 3, 4\] and type float32"),
        ("p.pt", write_pt(torch.zeros(2, 4, dtype=torch.complex64)), "type complex64; expected numbers"),
        ("p.pt", write_pt([torch.zeros(4), torch.zeros(5)]), "is no tensor of torch.save or is damaged"),
        ("p.pt", write_bomb, "it unpacks to 16,777,221 bytes"),
        ("p.npy", lambda path: path.write_bytes(b""), "is empty"),
        ("p.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "is no array of numpy.save or is damaged"),
        ("p.npy", lambda path: np.save(path, np.array([Code()])), "is no array of numpy.save or is damaged"),
        ("p.npy", write_header_only, "is no array of numpy.save or is damaged"),
        ("p.npy", lambda path: np.save(path, np.array(["a"])), "type <U1; expected numbers"),
        ("p.npy", lambda path: np.save(path, np.array(1.0)), r"has an array of shape \[\]"),
        ("p.npy", lambda path: np.save(path, np.zeros((0, 4))), "not a bag without cells"),
        ("p.npz", lambda path: np.savez(path, cells(2)), "is none of .h5, .npy, .pt; name such files"),
        ("p.h5", lambda path: h5py.File(path, "w").close(), "has no dataset features"),
    ],
)
def test_broken_files(name, write, message, tmp_path, capsys):
    write(tmp_path / name)
    (tmp_path / "bags.csv").write_text(f"patient,file\np,{name}\n")
    with pytest.raises(ValueError, match=message) as caught:
        PatientBags.from_path(tmp_path)
    assert name in str(caught.value) or "patient 'p'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code of the file" not in capsys.readouterr().out


def test_a_folder_with_the_features_of_all_patients_is_not_one_patient(tmp_path):
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = cells(3)
    with pytest.raises(ValueError, match=r"has one features\.h5, .*; give this file as --features"):
        PatientBags.from_path(tmp_path)
