"""The list check on planted faults, on real images, and on hashes in bulk."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from dinov2.data.check import check_lists, scan
from dinov2.data.check.scan import TURNS, perceptual_hash, similar_hashes, turned_hashes
from dinov2.data.sample_cells import CELL_CLASSES, Slide, draw_cell

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "check_lists.py"
INLINE = {"n_workers": 1}


@pytest.fixture(scope="session")
def drawn_cells(tmp_path_factory):
    """A folder with twelve sound and different cells, c00.png to c11.png."""
    folder = tmp_path_factory.mktemp("drawn")
    for i in range(12):
        rng = np.random.default_rng(i)
        slide = Slide(rng)
        Image.fromarray(draw_cell(CELL_CLASSES[i % len(CELL_CLASSES)], slide, rng, 64)).save(folder / f"c{i:02d}.png")
    return folder


@pytest.fixture
def cells(tmp_path, drawn_cells):
    """The same in a folder of the test's own, whose name has a space and an umlaut."""
    return Path(shutil.copytree(drawn_cells, tmp_path / "Zellen für Test"))


def write_list(file: Path, names) -> Path:
    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return file


def write_csv(file: Path, header: str, rows: list[str]) -> Path:
    return write_list(file, [header, *rows])


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """Turn an image [H, W, 3] by one of `TURNS`."""
    transposes, mirrors_x, mirrors_y = TURNS[turn]
    if transposes:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1])


def found(folder: Path) -> set[tuple[str, str, str]]:
    with open(folder / "findings.csv", encoding="utf-8", newline="") as stream:
        return {(r["kind"], Path(r["path"]).name, Path(r["other path"]).name) for r in csv.DictReader(stream)}


def test_sound_cells_have_no_finding(cells, tmp_path):
    files = write_list(cells / "all.txt", [f"c{i:02d}.png" for i in range(12)])
    summary = check_lists([files], tmp_path / "out", **INLINE)
    assert summary["faults"] == 0
    assert found(tmp_path / "out") == set()


def test_every_planted_fault_is_found_and_nothing_else(cells, tmp_path):
    image = Image.open(cells / "c00.png").convert("RGB")
    (cells / "fake.jpg").write_bytes(b"not an image at all")
    (cells / "zero.png").touch()
    image.resize((61, 61)).save(cells / "cut.bmp")
    (cells / "cut.bmp").write_bytes((cells / "cut.bmp").read_bytes()[:5000])
    shutil.copy(cells / "c02.png", cells / "copy.png")
    Image.new("RGB", (64, 64), "white").save(cells / "blank.png")
    Image.open(cells / "c04.png").convert("RGB").save(cells / "near.jpg", quality=60)
    names = ["fake.jpg", "zero.png", "cut.bmp", "copy.png", "blank.png", "near.jpg"]
    names += [f"c{i:02d}.png" for i in range(12)]
    files = write_list(cells / "all.txt", ["# a comment", "", *names, "gone.png", str(cells / "c05.png")])
    labels = write_csv(
        cells / "labels.csv",
        "Image Path,Label",
        ["c02.png,a", "copy.png,b", "c06.png,a", "c06.png,b", ",a", "c07.png,a"],
    )
    before = files.read_bytes(), labels.read_bytes()
    summary = check_lists([files], tmp_path / "out", labels=[labels], **INLINE)
    expected = {
        ("unreadable", "fake.jpg", ""),
        ("unreadable", "zero.png", ""),
        ("unreadable", "cut.bmp", ""),
        ("missing", "gone.png", ""),
        ("same_path", "c05.png", ""),
        ("same_path", "c06.png", ""),
        ("same_bytes", "c02.png", "copy.png"),
        ("two_labels", "c02.png", "copy.png"),
        ("two_labels", "c06.png", "c06.png"),
        ("near_duplicate", "near.jpg", "c04.png"),
        ("empty_value", "", ""),
        ("blank", "blank.png", ""),
    }
    assert found(tmp_path / "out") == expected
    assert (files.read_bytes(), labels.read_bytes()) == before
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["findings"]) == len(expected)
    assert report["faults"] == summary["faults"] == 10
    assert "fake.jpg" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    cleaned = tmp_path / "out" / "cleaned"
    kept = {Path(line).name for line in (cleaned / "all.txt").read_text(encoding="utf-8").splitlines() if "/" in line}
    gone = {"fake.jpg", "zero.png", "cut.bmp", "copy.png", "c02.png", "c06.png"}
    assert kept == set(names) - gone
    again = check_lists([cleaned / "all.txt"], tmp_path / "again", labels=[cleaned / "labels.csv"], **INLINE)
    assert again["faults"] == 0


@pytest.mark.parametrize("fit", ["quality 60", "scaled", "brighter", "copy as bmp"])
def test_copies_that_look_the_same_are_near_duplicates(cells, tmp_path, fit):
    image = Image.open(cells / "c04.png").convert("RGB")
    file = cells / {"quality 60": "n.jpg", "copy as bmp": "n.bmp"}.get(fit, "n.png")
    if fit == "scaled":
        image = image.resize((51, 51), Image.Resampling.LANCZOS)
    elif fit == "brighter":
        image = ImageEnhance.Brightness(image).enhance(1.05)
    image.save(file, quality=60)
    check_lists([cells], tmp_path / "out", **INLINE)
    assert found(tmp_path / "out") == {("near_duplicate", "c04.png", file.name)}


@pytest.mark.parametrize("turn", range(1, 8))
def test_turned_copies_are_found_if_asked_for(cells, tmp_path, turn):
    image = np.asarray(Image.open(cells / "c04.png").convert("RGB"))
    Image.fromarray(turned(image, turn)).save(cells / "n.png")
    check_lists([cells], tmp_path / "out", **INLINE)
    assert found(tmp_path / "out") == set()
    check_lists([cells], tmp_path / "out", near_duplicates="turned", **INLINE)
    assert found(tmp_path / "out") == {("near_duplicate", "c04.png", "n.png")}


def test_each_way_to_leak_is_told_apart(cells, tmp_path):
    shutil.copy(cells / "c01.png", cells / "bytes.png")
    Image.open(cells / "c02.png").convert("RGB").save(cells / "near.png", compress_level=1, dpi=(72, 72))
    train = write_csv(
        cells / "train.csv",
        "Image Path,Label,patient,dataset",
        ["c00.png,a,p1,x", "c01.png,a,p2,x", "c02.png,a,p3,x", "c03.png,a,p4,x", "c04.png,a,p5,x"],
    )
    test = write_csv(
        cells / "test.csv",
        "Image Path,Label,patient,dataset",
        ["c00.png,a,p1,x", "bytes.png,a,q2,x", "near.png,a,q3,x", "c06.png,a,p4,x", "c07.png,a,p5,y"],
    )
    options = {"n_workers": 1, "drop_near_duplicates": True}
    check_lists([train], tmp_path / "out", evaluation=[test], **options)
    leaks = {one for one in found(tmp_path / "out") if one[0].startswith("leak")}
    assert leaks == {
        ("leak_path", "c00.png", ""),
        ("leak_bytes", "c01.png", "bytes.png"),
        ("leak_near", "c02.png", "near.png"),
        ("leak_patient", "c00.png", "c00.png"),
        ("leak_patient", "c03.png", "c06.png"),
    }
    cleaned = tmp_path / "out" / "cleaned"
    assert [line.split("/")[-1] for line in (cleaned / "train.csv").read_text(encoding="utf-8").splitlines()[1:]] == [
        "c04.png,a,p5,x"
    ]
    again = check_lists([cleaned / "train.csv"], tmp_path / "b", evaluation=[cleaned / "test.csv"], **options)
    assert again["faults"] == 0


def test_what_comes_out_dark_or_is_only_a_part_is_noticed(cells, tmp_path):
    rng = np.random.default_rng(0)
    for name, n_bits in (("dark", 12), ("bright", 16)):
        Image.fromarray(rng.integers(0, 2**n_bits, (40, 40)).astype(np.uint16)).save(cells / f"{name}.tif")
    channels = [Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)) for _ in range(3)]
    channels[0].save(cells / "channels.tif", save_all=True, append_images=channels[1:])
    summary = check_lists([cells], tmp_path / "out", **INLINE)
    assert found(tmp_path / "out") == {("dark", "dark.tif", ""), ("pages", "channels.tif", "")}
    assert summary["faults"] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "3 pages, the first is used" in report
    assert re.search(r"the largest value is 40\d\d of 65535", report)


def test_names_that_are_not_utf8_are_checked_and_kept(cells, tmp_path):
    os.rename(cells / "c00.png", odd := os.fsencode(cells) + b"/f\xfcr.png")
    shutil.copy(odd, os.fsencode(cells) + b"/\xe4.png")
    names = sorted(os.listdir(os.fsencode(cells)))
    (tmp_path / "list.txt").write_bytes(b"".join(os.fsencode(cells) + b"/" + name + b"\n" for name in names))
    table = b"Image Path,Label\n" + b"".join(os.fsencode(cells) + b"/" + name + b",a\n" for name in names)
    (tmp_path / "table.csv").write_bytes(table)
    for source in (tmp_path / "list.txt", tmp_path / "table.csv", cells):
        summary = check_lists([source], tmp_path / "out", **INLINE)
        assert summary["counts"]["same_bytes"] == 1
        (cleaned,) = (tmp_path / "out" / "cleaned").iterdir()
        assert (b"\xfc" in cleaned.read_bytes()) != (b"\xe4" in cleaned.read_bytes())
        assert r"\udcfcr.png" in (tmp_path / "out" / "findings.csv").read_text(encoding="utf-8")


def test_hidden_files_are_noticed(cells, tmp_path):
    (cells / ".DS_1.jpg").write_bytes(b"\0\5\x16\7 Mac OS X")
    (cells / ".ipynb_checkpoints").mkdir()
    shutil.copy(cells / "c00.png", cells / ".ipynb_checkpoints" / "c00-checkpoint.png")
    check_lists([cells], tmp_path / "out", **INLINE)
    assert found(tmp_path / "out") == {("unreadable", ".DS_1.jpg", ""), ("hidden", "c00-checkpoint.png", "")}


def test_a_name_that_no_list_can_hold_is_left_out(cells, tmp_path):
    os.rename(cells / "c01.png", cells / "two\nlines.png")
    summary = check_lists([cells], tmp_path / "out", **INLINE)
    assert summary["faults"] == summary["counts"]["unreadable"] == 1
    cleaned = (tmp_path / "out" / "cleaned" / f"{cells.name}.txt").read_text(encoding="utf-8").splitlines()
    assert [Path(line).name for line in cleaned] == [f"c{i:02d}.png" for i in range(12) if i != 1]


def test_fine_classes_do_not_contradict_coarse_ones(cells, tmp_path):
    coarse = write_csv(cells / "coarse.csv", "Image Path,Label", ["c00.png,n", "c01.png,n", "c02.png,m"])
    fine = write_csv(cells / "fine.csv", "Image Path,Label", ["c00.png,band", "c01.png,segmented", "c02.png,m"])
    summary = check_lists([cells], tmp_path / "out", labels=[coarse, fine], **INLINE)
    assert summary["faults"] == 0


def test_only_changed_images_are_looked_at_again(cells, tmp_path, monkeypatch):
    check_lists([cells], tmp_path / "out", **INLINE)
    (cells / "c03.png").write_bytes(b"now broken")
    looked = []
    read_facts = scan.read_facts
    monkeypatch.setattr(scan, "read_facts", lambda job: looked.append(Path(job[0]).name) or read_facts(job))
    check_lists([cells], tmp_path / "out", **INLINE)
    assert looked == ["c03.png"]
    assert found(tmp_path / "out") == {("unreadable", "c03.png", "")}


def test_a_killed_check_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(1500):
        Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(folder / f"{i:04d}.bmp")
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, folder, "--output-dir", out, "--workers", "1", "--near-duplicates", "off"]
    process = subprocess.Popen(list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    lines: list[str] = []
    while len(lines) < 110 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        lines = [line for file in out.glob("scan/*.jsonl") for line in file.read_text().splitlines()]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (file,) = out.glob("scan/*.jsonl")
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("]\n")]
    assert 100 <= len(whole) < 1500
    whole[5] = whole[5].replace("readable", "readably")  # damaged
    file.write_text("".join(whole)[:-20])  # cut off in the middle of a line
    looked = []
    read_facts = scan.read_facts
    monkeypatch.setattr(scan, "read_facts", lambda job: looked.append(job) or read_facts(job))
    summary = check_lists([folder], out, near_duplicates="off", **INLINE)
    assert summary["faults"] == 0
    assert len(looked) == 1500 - (len(whole) - 2)
    check_lists([folder], out, near_duplicates="off", **INLINE)
    assert len(looked) == 1500 - (len(whole) - 2)


def test_two_processes_give_the_facts_of_one(cells, tmp_path):
    paths = sorted(map(str, cells.glob("*.png"))) * 25
    one = scan.scan_images(paths, tmp_path / "a", n_workers=1)
    two = scan.scan_images(paths, tmp_path / "b", n_workers=2)
    assert len(one) == 300
    pd.testing.assert_frame_equal(one, two)


def test_near_pairs_of_many_hashes_equal_those_by_brute_force():
    rng = np.random.default_rng(0)
    n, n_planted = 200_000, 300
    hashes = rng.integers(0, 2**64, (n, 4), dtype=np.uint64)
    sources, targets = np.split(rng.permutation(n)[: 2 * n_planted], 2)
    bits = np.unpackbits(hashes[sources].view(np.uint8), axis=1)
    for row, n_bits in zip(bits, rng.integers(0, 16, n_planted), strict=True):
        row[rng.permutation(256)[:n_bits]] ^= 1
    hashes[targets] = np.packbits(bits, axis=1).view(np.uint64)
    pairs = similar_hashes(hashes)
    expected = {tuple(sorted(pair)) for pair in zip(sources.tolist(), targets.tolist(), strict=True)}
    assert set(map(tuple, pairs.tolist())) == expected
    subset = np.concatenate([sources, targets])
    distances = np.bitwise_count(hashes[subset, None] ^ hashes[None, subset]).sum(axis=2)
    brute = {tuple(sorted(subset[[a, b]].tolist())) for a, b in np.argwhere(np.triu(distances <= 32, 1))}
    assert brute == expected


def test_a_crowd_of_like_hashes_is_not_quadratic():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (20_000, 4), dtype=np.uint64)
    hashes[:, 0] = 7
    hashes[19_999] = hashes[3]
    hashes[19_998] = hashes[5] ^ np.array([0, 0, 1, 0], dtype=np.uint64)
    pairs = similar_hashes(hashes)
    assert pairs.tolist() == [[3, 19_999], [5, 19_998]]


@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_turned_hash_is_the_hash_of_the_turned_image(cells, turn):
    image = np.asarray(Image.open(cells / "c04.png").convert("RGB"))
    expected = perceptual_hash(turned(image, turn))
    assert np.bitwise_count(turned_hashes(perceptual_hash(image)[None], *TURNS[turn])[0] ^ expected).sum() <= 8


def test_command_ends_with_what_it_found(cells, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [str(cells), "--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    assert "12 images, 0 faults" in capsys.readouterr().out
    shutil.copy(cells / "c00.png", cells / "d.png")
    assert main([*arguments, "--no-pixels"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{cells}", "--workers", "0"], "--workers 0"),
        (["{cells}", "--no-pixels", "--drop-near-duplicates"], "--drop-near-duplicates"),
        (["nowhere.txt"], "nowhere.txt: no such file"),
        (["{cells}/c00.png"], "unknown kind"),
        (["{cells}/empty.txt"], "name no image"),
        (["{cells}", "--labels", "{cells}/bad.csv"], "expected Image Path,Label"),
        (["{cells}/latin.txt"], "line 2, is not UTF-8"),
    ],
)
def test_wrong_arguments_end_with_2(cells, tmp_path, capsys, arguments, message):
    (cells / "empty.txt").write_text("# nothing\n")
    (cells / "bad.csv").write_text("a,b\n1,2\n")
    (cells / "latin.txt").write_bytes(b"a.png\nk\xe4se.png\n")
    main = runpy.run_path(str(SCRIPT))["main"]
    given = [argument.format(cells=cells) for argument in arguments]
    if given[0] == str(cells):
        (cells / "empty.txt").unlink()
        (cells / "latin.txt").unlink()
    assert main([*given, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_real_images_have_their_known_faults_and_no_other(shared_data, tmp_path):
    pbc = shared_data / "acevedo_pbc" / "PBC_dataset_normal_DIB"
    bitmaps = sorted((shared_data / "segmentation_WBC" / "Dataset 1").glob("*.bmp"))
    ssl = write_list(tmp_path / "ssl.txt", bitmaps)
    sources = [pbc, ssl, shared_data / "BCCD_Dataset", shared_data / "blood-cell-detection-dataset"]
    summary = check_lists(sources, tmp_path / "out", labels=[pbc], **INLINE)
    counts = {kind: count for kind, count in summary["counts"].items() if count}
    assert counts == {"unreadable": 1, "same_bytes": 18, "two_labels": 1}
    (conflict,) = (
        f for f in json.loads((tmp_path / "out" / "report.json").read_text())["findings"] if "labels" in f["kind"]
    )
    assert conflict["detail"] == f"'eosinophil' in {pbc.name} and 'neutrophil' in {pbc.name}"
    everything = found(tmp_path / "out")
    assert ("unreadable", ".DS_169665.jpg", "") in everything
    assert ("two_labels", "EO_225902.jpg", "BNE_191112.jpg") in everything
    assert ("same_bytes", "139.bmp", "112.bmp") in everything
    cleaned = tmp_path / "out" / "cleaned"
    again = check_lists([cleaned / f"{pbc.name}.txt", cleaned / "ssl.txt"], tmp_path / "b", **INLINE)
    assert again["faults"] == 0
