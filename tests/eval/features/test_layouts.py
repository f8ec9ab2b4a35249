"""Features in the layouts of GenBloom, STAMP, CLAM, TRIDENT, torchmil, eva and parquet: written, kept and read."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import LabelledCells
from dinov2.data.datasets.bag_layouts import LAYOUTS
from dinov2.data.datasets.bags import PatientBags
from dinov2.eval.extract_features import main
from dinov2.eval.features import loop, read_features, store
from dinov2.eval.features.extract import Embedder
from dinov2.eval.features.layouts import extract_patient_files
from dinov2.models import build_backbone
from dinov2.utils.files import atomic_write

BAG_LAYOUTS = [name for name, layout in LAYOUTS.items() if not layout.is_one_file]

CLASSES = {"p1": "APL", "p2": "control", "p.3": "APL"}
ROWS = ["p1", "p2", "p1", "p.3", "p2", "p1"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with weights.pth, and six images of three patients in cells.csv."""
    monkeypatch.chdir(tmp_path)
    save_weights(0)
    rng = np.random.default_rng(0)
    for i in range(len(ROWS)):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(f"{i}.png")
    write_table([(f"{i}.png", CLASSES[patient], patient) for i, patient in enumerate(ROWS)])
    return tmp_path


def save_weights(seed):
    torch.manual_seed(seed)
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    torch.save(build_backbone(settings).state_dict(), "weights.pth")


def write_table(rows):
    with open("cells.csv", "w") as file:
        file.write("\n".join(",".join(row) for row in [("Image Path", "Label", "patient"), *rows]) + "\n")


def run_command(*flags, layout="genbloom", out="bags"):
    common = ["--checkpoint", "weights.pth", "--data", "cells.csv", "--image-size", "28", "--num-workers", "0"]
    main([*common, "--device", "cpu", "--layout", layout, "--output-dir", out, *flags])


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_bags_from_the_folder_equal_bags_from_one_file(work, capsys):
    run_command()
    assert "bags: 3 patients, 6 cells, 2 classes" in capsys.readouterr().out
    assert written(work / "bags") == ["APL/p.3.h5", "APL/p1.h5", "control/p2.h5"]
    run_command(layout="file", out="one")
    whole = read_features("one/features.h5")
    names = [whole.class_names[i] for i in whole.labels]
    expected = PatientBags.from_cells(whole.features, whole.patients, whole.paths, names, whole.attributes)
    found = PatientBags.from_path("bags")
    assert found.sha256() == expected.sha256()
    assert found.cells == expected.cells
    assert found.label_of() == CLASSES
    for name in ("checkpoint_sha256", "transform", "model", "precision"):
        assert found.attributes[name] == whole.attributes[name]
    assert found.attributes["kind"] == "cls"


def test_existing_files_are_kept_and_missing_ones_made(work):
    run_command("--kinds", "mean", "cls")
    times = {name: (work / "bags" / name).stat().st_mtime_ns for name in written(work / "bags")}
    run_command("--kinds", "mean")
    assert {name: (work / "bags" / name).stat().st_mtime_ns for name in written(work / "bags")} == times
    (work / "bags" / "control" / "p2.h5").unlink()
    run_command("--kinds", "mean", "cls")
    assert written(work / "bags") == list(times)
    assert PatientBags.from_path("bags").attributes["kind"] == "mean"


def other_weights():
    save_weights(1)


def one_cell_less():
    write_table([(f"{i}.png", CLASSES[patient], patient) for i, patient in enumerate(ROWS[:-1])])


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (other_weights, [], r"p1\.h5' holds other features than asked for \(checkpoint_sha256 is"),
        (one_cell_less, [], r"p1\.h5' holds other features .*the images or their order differ: 3 there and 2 here"),
        (None, ["--precision", "bf16"], "precision is 'fp32' there and 'bf16' here"),
    ],
)
def test_older_files_are_not_mixed_in(change, flags, message, work):
    run_command()
    before = {name: (work / "bags" / name).read_bytes() for name in written(work / "bags")}
    if change:
        change()
    with pytest.raises(ValueError, match=message):
        run_command(*flags)
    assert {name: (work / "bags" / name).read_bytes() for name in written(work / "bags")} == before
    run_command(*flags, "--overwrite")
    run_command(*flags)
    assert len(PatientBags.from_path("bags")) == 3


@pytest.mark.parametrize("foreign", ["features.h5", "APL/p9.h5", "old/p1.h5", "APL/p9/cell.h5"])
def test_files_of_other_patients_are_refused(foreign, work):
    run_command()
    (work / "bags" / foreign).parent.mkdir(exist_ok=True)
    shutil.copy("bags/APL/p1.h5", f"bags/{foreign}")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="1 files in 'bags' are of no patient in --data, for instance"):
            run_command(*flags)


def test_unreadable_images_are_listed_in_the_file_of_their_patient(work):
    (work / "2.png").write_bytes(b"no image")
    run_command()
    assert read_features("bags/APL/p1.h5").unreadable == [str(work / "2.png")]
    assert read_features("bags/control/p2.h5").unreadable == []
    assert len(PatientBags.from_path("bags").features[1]) == 2
    run_command()  # they are what was asked for


def test_a_patient_without_a_readable_image_is_refused_and_parts_are_kept(work, monkeypatch):
    monkeypatch.setattr(loop, "PART_SIZE", 3)
    (work / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 patients have no readable image \('p\.3'\), so bags without cells"):
        run_command()
    assert all(name.startswith(".patients.parts/") for name in written(work / "bags"))
    shutil.copy("0.png", "3.png")
    cells = LabelledCells.from_path("cells.csv")
    embedder = Embedder("weights.pth", image_size=28)
    seen, embed = [], embedder.encoder.embed

    def counting(images, kinds):
        seen.append(len(images))
        return embed(images, kinds)

    monkeypatch.setattr(embedder.encoder, "embed", counting)
    assert extract_patient_files(embedder, cells, work / "bags") == 3
    assert seen == [3]  # the part with the image that was repaired
    assert written(work / "bags") == ["APL/p.3.h5", "APL/p1.h5", "control/p2.h5"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("0.png", "APL"), ("1.png", "control")], "the cells name no patients; give --data as a CSV with the columns"),
        ([("0.png", "APL", "p1"), ("1.png", "control", "p1")], "1 patients have two labels, for instance 'p1'"),
    ],
)
def test_cells_without_valid_patients_are_refused(rows, message, work):
    header = ("Image Path", "Label", "patient")[: len(rows[0])]
    (work / "cells.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    with pytest.raises(ValueError, match=message):
        run_command()
    assert not (work / "bags").exists()


def test_patient_files_have_no_patch_grids(work):
    with pytest.raises(ValueError, match="--layout genbloom: it has no place for patch grids"):
        run_command("--kinds", "cls", "patches")


# --- layouts of other tools -----------------------------------------------------------------------------------------

# leading zeros, a slash, letters of any script, a dot at the beginning, percent signs, a comma and quotation marks, and
# a name that the layouts use themselves
ODD_IDS = ["007", "7", "A/1", "Grün 患者", ".x", "50%", "a%2Fb", 'p,"1"', "cells"]


@pytest.fixture
def features():
    """Cells of odd patients in mixed order; the first has one cell, and a class has none."""
    rng = np.random.default_rng(1)
    patients = rng.permutation([name for number, name in enumerate(ODD_IDS) for _ in range(number + 1)]).tolist()
    return store.Features(
        features=rng.normal(size=(len(patients), 4)).astype(np.float32),
        labels=np.array([ODD_IDS.index(name) % 2 for name in patients]),
        class_names=["APL/x", "control", "empty"],
        paths=[f"/images/{i}.png" for i in range(len(patients))],
        patients=patients,
        attributes={"model": "ViT", "checkpoint_sha256": "aa", "transform": "crop", "image_size": "28"},
        kind="mean",
    )


class Embedded(Embedder):
    """Features that need no network."""

    def __init__(self, features):
        self.features, self.kinds, self.checkpoint = features, [features.kind], None
        names = ("checkpoint_sha256", "transform")
        self.identity = {name: features.attributes[name] for name in names}
        paths = [Path(path) for path in features.paths]
        self.cells = LabelledCells(paths, features.labels, features.class_names, features.patients)

    def make_parts(self, folder, paths):
        folder.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(remove=lambda: shutil.rmtree(folder), folder=folder)

    def collect(self, cells, parts):
        return self.features


def write(features, layout, folder, **options):
    embedder = Embedded(features)
    return extract_patient_files(embedder, embedder.cells, folder, layout=layout, **options)


def bags_of(features):
    labels = [features.class_names[i] for i in features.labels]
    attributes = {**features.attributes, "kind": features.kind}
    return PatientBags.from_cells(features.features, features.patients, features.paths, labels, attributes)


def assert_same_bags(found, expected):
    assert found.sha256() == expected.sha256()  # patients, labels and features
    assert found.cells == expected.cells
    for name in ("checkpoint_sha256", "transform", "kind"):
        assert found.attributes[name] == expected.attributes[name]


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
def test_bags_come_back_from_each_layout(layout, features, tmp_path):
    assert write(features, layout, tmp_path / "bags") == len(ODD_IDS)
    assert_same_bags(PatientBags.from_path(tmp_path / "bags"), bags_of(features))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write(features, layout, tmp_path / "bags")  # nothing is written again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
def test_the_names_of_files_alone_tell_the_patients(layout, features, tmp_path):
    write(features, layout, tmp_path / "bags")
    for name in ("bags.csv", "manifest.csv", *(["cells.h5"] if layout in ("torchmil", "eva") else [])):
        (tmp_path / "bags" / name).unlink(missing_ok=True)
    found, expected = PatientBags.from_path(tmp_path / "bags"), bags_of(features)
    assert found.patients == sorted(ODD_IDS)
    assert found.bag_hashes() == expected.bag_hashes()
    if layout == "genbloom":
        assert found.label_of() == expected.label_of()
    elif layout == "torchmil":  # it has numbers of classes
        assert found.label_of() == {name: str(number % 2) for number, name in enumerate(ODD_IDS)}
    else:
        assert found.labels is None


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
def test_bags_without_labels_and_of_many_cells(layout, tmp_path):
    rng = np.random.default_rng(0)
    patients = ["one", *["many"] * 20_000]
    features = store.Features(
        features=rng.normal(size=(len(patients), 4)).astype(np.float32),
        labels=np.zeros(len(patients), dtype=np.int64),
        class_names=["unlabelled"],
        paths=[f"/{i}.png" for i in range(len(patients))],
        patients=patients,
        attributes={"model": "ViT", "checkpoint_sha256": "aa", "transform": "crop", "image_size": "28"},
    )
    write(features, layout, tmp_path)
    found = PatientBags.from_path(tmp_path)
    assert found.labels is None
    assert [len(cells) for cells in found.features] == [20_000, 1]
    assert found.sha256() == replace(bags_of(features), labels=None).sha256()
    write(features, layout, tmp_path)


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
def test_other_files_are_not_mixed_in(layout, features, tmp_path):
    folder = tmp_path / "bags"
    write(features, layout, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = replace(features, attributes={**features.attributes, "checkpoint_sha256": "bb"})
    with pytest.raises(ValueError, match="holds other features than asked for .checkpoint_sha256 is 'aa' there"):
        write(other, layout, folder)
    for foreign in ("p9.h5", "features/p9.npy", "pt_files/p9.pt"):
        (folder / foreign).parent.mkdir(exist_ok=True)
        (folder / foreign).write_bytes(b"")
        with pytest.raises(ValueError, match=f"--layout {layout}: 1 files in .* are of no patient in --data, for .*p9"):
            write(features, layout, folder, overwrite=True)
        (folder / foreign).unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    write(other, layout, folder, overwrite=True)
    assert PatientBags.from_path(folder).attributes["checkpoint_sha256"] == "bb"


@pytest.mark.parametrize("layout", ["torchmil", "eva"])
def test_files_that_nothing_describes_are_kept(layout, features, tmp_path):
    write(features, layout, tmp_path)
    (tmp_path / "cells.h5").unlink()
    with pytest.raises(ValueError, match=f"--layout {layout}: nothing says of which cells the .* files .* are"):
        write(features, layout, tmp_path)
    write(features, layout, tmp_path, overwrite=True)


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
@pytest.mark.parametrize("n_files", [0, 5, 8])
def test_a_killed_command_goes_on(layout, n_files, features, tmp_path, monkeypatch):
    left = [None] * n_files

    def fail_after_some(path, *mode):
        if not left:
            raise OSError("the disk is full")
        left.pop()
        return atomic_write(path, *mode)

    with monkeypatch.context() as patch:
        for module in ("layouts", "store"):
            patch.setattr(f"dinov2.eval.features.{module}.atomic_write", fail_after_some)
        with contextlib.suppress(OSError):
            write(features, layout, tmp_path)
    write(features, layout, tmp_path)
    assert_same_bags(PatientBags.from_path(tmp_path), bags_of(features))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_writes_each_layout(work, capsys):
    run_command(layout="file", out="file")
    expected = bags_of(read_features("file/features.h5"))
    for layout in ["parquet", *BAG_LAYOUTS]:
        run_command(layout=layout, out=layout)
        run_command(layout=layout, out=layout)
        found = f"{layout}/features.parquet" if layout == "parquet" else layout
        assert_same_bags(PatientBags.from_path(found), expected)
        written_as = "features.parquet: 6 cells, 2 classes, dim 64" if layout == "parquet" else ": 3 patients, 6 cells"
        assert f"{layout}/{written_as}".replace("/:", ":") in capsys.readouterr().out
    for layout in ("torchmil", "eva"):
        with pytest.raises(ValueError, match=f"--layout {layout}: it has place for one kind of features"):
            run_command("--kinds", "cls", "mean", layout=layout, out="several")
    with pytest.raises(ValueError, match="--layout parquet: it has no place for patch grids"):
        run_command("--kinds", "cls", "patches", layout="parquet", out="several")


# --- what the tools read --------------------------------------------------------------------------------------------


def test_stamp_reads_its_datasets_attributes_and_table(features, tmp_path):
    write(features, "stamp", tmp_path)
    # slide_table and clini_table, which STAMP reads as text; FILENAME counts from feature_dir
    table = pd.read_csv(tmp_path / "bags.csv", dtype=str).set_index("FILENAME")
    assert table.index.is_unique
    assert set(table["PATIENT"]) == set(ODD_IDS)
    assert set(table["label"]) == {"APL/x", "control"}
    assert all(name.endswith(".h5") for name in table.index)
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == sorted(table.index)
    expected = bags_of(features)
    for name, patient in table["PATIENT"].items():
        with h5py.File(tmp_path / name) as file:
            np.testing.assert_array_equal(file["feats"][:], expected.features[expected.patients.index(patient)])
            assert file["coords"].shape == (len(file["feats"]), 2)
            assert file["coords"].dtype == np.float32
            assert not file["coords"][:].any()
            assert (file.attrs["unit"], file.attrs["feat_type"], file.attrs["extractor"]) == ("um", "tile", "ViT")
            assert file.attrs["tile_size_px"] == 28
            assert file.attrs["tile_size_um"]  # neither missing nor 0: STAMP refuses both
            assert np.isnan(file.attrs["tile_size_um"])
            assert file.attrs["stamp_version"] == "2.1.0"


def test_clam_and_trident_read_their_datasets_and_table(features, tmp_path):
    for layout in ("clam", "trident"):
        write(features, layout, tmp_path / layout)
    # CLAM's Generic_MIL_Dataset: case_id is a patient, slide_id the name of a file without its suffix
    table = pd.read_csv(tmp_path / "clam" / "bags.csv", dtype=str)
    expected = bags_of(features)
    for case, slide, label in zip(table["case_id"], table["slide_id"], table["label"], strict=True):
        cells = expected.features[expected.patients.index(case)]
        assert label == expected.label_of()[case]
        np.testing.assert_array_equal(torch.load(tmp_path / "clam" / "pt_files" / f"{slide}.pt").numpy(), cells)
        for file_of in (tmp_path / "clam" / "h5_files", tmp_path / "trident"):
            with h5py.File(file_of / f"{slide}.h5") as file:
                np.testing.assert_array_equal(file["features"][:], cells)
                assert file["coords"].shape == (len(cells), 2)
                assert file["coords"].dtype.kind == "i"


def test_torchmil_reads_its_folders(features, tmp_path):
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil reads its own layout")
    write(features, "torchmil", tmp_path)
    folders = {f"{name}_path": str(tmp_path / name) for name in ("features", "labels")}
    dataset = datasets.ProcessedMILDataset(**folders, bag_keys=["X", "Y"], verbose=False)
    table = pd.read_csv(tmp_path / "bags.csv", dtype=str)
    assert dataset.get_bag_names() == sorted(Path(name).stem for name in table["file"])
    expected = bags_of(features)
    for name, bag in zip(dataset.get_bag_names(), dataset, strict=True):
        row = table.set_index("file").loc[f"features/{name}.npy"]
        np.testing.assert_array_equal(bag["X"].numpy(), expected.features[expected.patients.index(row["patient"])])
        assert bag["Y"].tolist() == [int(row["label_id"])]
        assert features.class_names[bag["Y"]] == row["label"] == expected.label_of()[row["patient"]]


def test_eva_reads_its_manifest(features, tmp_path):
    write(features, "eva", tmp_path)
    # MultiEmbeddingsDataset: pandas without types, files from the manifest's folder, rows grouped by wsi_id
    manifest = pd.read_csv(tmp_path / "manifest.csv")
    assert manifest.columns[:5].tolist() == ["origin", "embeddings", "target", "split", "wsi_id"]
    assert manifest["wsi_id"].is_unique  # "007" and "7" are two patients
    expected = bags_of(features)
    texts = pd.read_csv(tmp_path / "manifest.csv", dtype=str)
    for row, patient in zip(manifest.itertuples(), texts["patient"], strict=True):
        cells = torch.load(tmp_path / row.embeddings, map_location="cpu", weights_only=True)
        np.testing.assert_array_equal(cells.numpy(), expected.features[expected.patients.index(patient)])
        assert features.class_names[np.asarray(row.target, dtype=np.int64)] == expected.label_of()[patient]


def test_parquet_opens_in_pandas_and_duckdb(features, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow writes parquet")
    store.write_features(tmp_path / "features.parquet", features)
    table = pd.read_parquet(tmp_path / "features.parquet")
    assert table.columns.tolist() == ["vector", "label", "patient", "path"]
    np.testing.assert_array_equal(np.stack(table["vector"]), features.features)
    assert np.stack(table["vector"]).dtype == np.float32
    assert table["patient"].tolist() == features.patients
    assert table["label"].tolist() == [features.class_names[i] for i in features.labels]
    duckdb = pytest.importorskip("duckdb", reason="DuckDB reads the file, too")
    query = f"select vector, patient from '{tmp_path / 'features.parquet'}' where patient = '007'"
    [(vector, patient)] = duckdb.sql(query).fetchall()
    assert patient == "007"
    np.testing.assert_array_equal(np.float32(vector), features.features[features.patients.index("007")])
