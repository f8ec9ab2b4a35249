"""Features of a batch, of a list and of labelled cells, in one file or a file for each patient."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import LabelledCells, load_image, resize_image
from dinov2.data.datasets.bags import PatientBags
from dinov2.data.transforms import normalize_images
from dinov2.eval.extract_features import main
from dinov2.eval.features import loop, read_features, stored_kinds
from dinov2.eval.features.extract import Embedder, embed_images, extract, extract_patient_files
from dinov2.models import build_backbone

KINDS = ["cls", "mean", "cls+mean", "last1", "last2", "last2+mean", "patches"]


def test_bf16_is_close_and_fp32_comes_out(backbone):
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    exact, fast = embed_images(backbone, images), embed_images(backbone, images, "bf16")
    assert exact.dtype == fast.dtype == torch.float32
    assert not exact.requires_grad
    assert not torch.equal(exact, fast)
    torch.testing.assert_close(fast, exact, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="'fp16' is unknown; choose one of fp32, bf16"):
        embed_images(backbone, images, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_takes_large_batches_in_pieces(precision, backbone, monkeypatch):
    images = torch.randint(0, 256, (21, 3, 28, 28), dtype=torch.uint8)
    seen = []
    backbone.patch_embed.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for kind in ("cls", "patches"):
        found = embed_images(backbone, images, precision, kind)
        alone = torch.cat([embed_images(backbone, image[None], precision, kind) for image in images])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-2 if precision == "bf16" else 1e-3)
    assert seen == [8, 8, 5, *[1] * 21] * 2
    seen.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    embed_images(backbone, images, precision)
    assert seen == [16, 5]


def test_kinds_are_the_backbones_tokens(backbone, images):
    found = extract(backbone, images, image_size=28, batch_size=3, progress=False, kinds=KINDS).by_kind
    batch = torch.stack([resize_image(load_image(path), 28, fit="crop") for path in images])
    tokens = backbone.forward_features(normalize_images(batch))
    cls_token, patches = tokens["x_norm_clstoken"].detach(), tokens["x_norm_patchtokens"].detach()
    mean = patches.mean(dim=1)
    # the first block's CLS token, after the norm of the whole network
    first = backbone.norm(backbone.blocks[0](backbone.prepare_tokens_with_masks(normalize_images(batch))))[:, 0]
    expected = {
        "cls": cls_token,
        "mean": mean,
        "cls+mean": torch.cat([cls_token, mean], dim=1),
        "last1": cls_token,
        "last2": torch.cat([first.detach(), cls_token], dim=1),
        "last2+mean": torch.cat([first.detach(), cls_token, mean], dim=1),
    }
    assert list(found) == KINDS
    for kind, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[kind]), values, rtol=0, atol=1e-5)
    assert found["patches"].dtype == np.float16
    assert found["patches"].shape == (7, 2, 2, 64)
    grid = torch.from_numpy(found["patches"]).float()
    torch.testing.assert_close(grid[:, 1, 0], patches[:, 2], rtol=1e-2, atol=1e-3)  # row by row
    torch.testing.assert_close(embed_images(backbone, batch, kind="last2"), expected["last2"], rtol=0, atol=1e-5)


def test_one_forward_gives_all_kinds(backbone, images):
    calls = []
    backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    extract(backbone, images, image_size=28, batch_size=7, progress=False, kinds=KINDS)
    assert len(calls) == 1


def test_any_size_that_the_patches_fill(backbone, checkpoint, images):
    found = extract(backbone, images[:2], image_size=42, progress=False, kinds=["patches"])
    assert found.features.shape == (2, 3, 3, 64)
    with pytest.raises(ValueError, match="--image-size 30: .* patches of 14 px do not fill it; take 28 or 42"):
        extract(backbone, images, image_size=30)
    with pytest.raises(ValueError, match="30 px .* multiple of the patch size|--image-size 30"):
        Embedder(checkpoint, image_size=30).extract(images)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["last3"], "--kinds last3: ViT with dim 64.* with n up to 2"),
        (["last0"], "'last0' is unknown; there are cls, mean"),
        (["CLS"], "'CLS' is unknown"),
        (["cls", "cls"], "--kinds: one is repeated"),
        (["patches"], "--kinds: protocols take the first one, which must be a vector"),
    ],
)
def test_unknown_kinds_are_refused(kinds, message, checkpoint, cells, tmp_path):
    with pytest.raises(ValueError, match=message):
        Embedder(checkpoint, image_size=28, kinds=kinds).features_of(cells, tmp_path / "out" / "features.h5")
    assert not (tmp_path / "out").exists()


def test_an_embedder_has_one_network(checkpoint):
    for settings in ({}, {"checkpoint": checkpoint, "encoder_name": "pixels"}):
        with pytest.raises(ValueError, match="either --checkpoint or --encoder"):
            Embedder(**settings)
    with pytest.raises(ValueError, match="--encoder-weights belongs to --encoder"):
        Embedder(checkpoint, encoder_weights="untrained")
    with pytest.raises(ValueError, match="it is no checkpoint of this project"):
        _ = Embedder(encoder_name="pixels").file


def test_parts_make_a_file_with_all_kinds(checkpoint, cells, tmp_path, parts_of_two):
    cells.paths[2].write_bytes(b"no image")
    cells.paths[3].write_bytes(b"")  # a part without any readable image
    embedder = Embedder(checkpoint, image_size=28, kinds=["mean", "last2", "patches"], batch_size=8)
    found = embedder.features_of(cells, tmp_path / "features.h5")
    whole = extract(embedder.encoder, cells.paths, batch_size=1, kinds=embedder.kinds, progress=False)
    assert found.kinds == ["mean", "last2"]
    np.testing.assert_allclose(found.features, whole.by_kind["mean"], atol=1e-5)
    np.testing.assert_allclose(found.others["last2"], whole.by_kind["last2"], atol=1e-5)
    with h5py.File(tmp_path / "features.h5") as file:
        np.testing.assert_allclose(file["patch_grid"][:], whole.by_kind["patches"], atol=1e-2)
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.patients == ["p0", "p0", "p1", "p1", "p2"]
    assert found.unreadable == [str(path) for path in cells.paths[2:4]]
    assert found.attributes["image_size"] == "28"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["features.h5", "weights.pth"]


def test_a_file_with_more_kinds_is_kept_and_one_with_fewer_is_refused(checkpoint, cells, tmp_path):
    file = tmp_path / "features.h5"
    several = Embedder(checkpoint, image_size=28, kinds=["cls", "mean", "patches"]).features_of(cells, file)
    time = file.stat().st_mtime_ns
    found = Embedder(checkpoint, image_size=28, kinds=["mean", "patches"]).features_of(cells, file)
    assert found.kinds == ["mean", "cls"]
    np.testing.assert_array_equal(found.features, several.others["mean"])
    assert file.stat().st_mtime_ns == time
    with pytest.raises(ValueError, match=r"it has no features of kind last2\); pass --overwrite"):
        Embedder(checkpoint, image_size=28, kinds=["cls", "last2"]).features_of(cells, file)
    Embedder(checkpoint, image_size=28, kinds=["cls", "last2"]).features_of(cells, file, overwrite=True)
    assert stored_kinds(file) == ["cls", "last2"]


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
        ([("0.png", "APL", "a/b")], "'a/b' cannot be file names"),
        ([("0.png", "..", "p1")], r"'\.\.' cannot be file names"),
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


@pytest.mark.parametrize(
    ("name", "sets", "warning"),
    [
        ("DinoBloom-B.pth", ["bmc", "acevedo", "aml_matek"], "dinobloom_b saw aml_matek, bmc in its pretraining"),
        ("DinoBloom-B.pth", ["acevedo", "", "mine"], None),
        ("DinoBloom-S.pth", ["bmc", "bmc", "bmc"], None),  # its published checksum is another one
        ("weights.pth", ["bmc", "bmc", "bmc"], None),
    ],
)
def test_a_release_that_saw_the_set_in_its_pretraining_is_told(name, sets, warning, work, caplog):
    (work / "weights.pth").rename(work / name)
    rows = [f"{i}.png,APL,{dataset}" for i, dataset in enumerate(sets)]  # as prepare_dataset.py writes
    (work / "cells.csv").write_text("\n".join(["Image Path,Label,dataset", *rows]) + "\n")
    cells = LabelledCells.from_path("cells.csv")
    Embedder(name, image_size=28).features_of(cells, work / "features.h5")
    if warning is None:
        assert "pretraining" not in caplog.text
    else:
        assert warning in caplog.text
