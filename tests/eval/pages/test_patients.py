"""The page of an ABMIL result: its numbers are the result's, planted cells come first, and odd files are named."""

import csv
import html
import json
import re

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from dinov2.eval.abmil import main as abmil
from dinov2.eval.features import Features, write_features
from dinov2.eval.pages import patients as module
from dinov2.eval.pages.page import PLACEHOLDER, page_html
from dinov2.eval.pages.patients import patients_section, read_patients

NAMES = ["APL", "control"]
DELETION_HEADER = "patient,share,most_attended,random\n"
NASTY = '<script>alert(1)</script>"&, \u2028é'
COLOURS = {"planted": (200, 20, 20), "other": (20, 20, 200)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A result on patients whose class is decided by one kind of cell, and its features; images show the kind."""
    folder = tmp_path_factory.mktemp("evaluated")
    for kind, colour in COLOURS.items():
        Image.new("RGB", (20, 24), colour).save(folder / f"{kind}.png")
    rng = np.random.default_rng(0)
    rows, labels, paths, patients = [], [], [], []
    for i in range(24):
        label = i % 2
        n_cells = 10 + i % 5
        is_planted = np.arange(n_cells) < (3 if label == 0 else 0)
        cells = rng.normal(size=(n_cells, 6)) * 0.3
        cells[is_planted, 0] += 3
        rows.append(cells)
        labels += [label] * n_cells
        paths += [str(folder / f"{'planted' if planted else 'other'}.png") for planted in is_planted]
        patients += [f"p{i:02d}"] * n_cells
    attributes = {"checkpoint_sha256": "aa", "transform": "crop", "model": "vit"}
    features = Features(
        np.concatenate(rows).astype(np.float32), np.array(labels), NAMES, paths, patients, attributes=attributes
    )
    write_features(folder / "features.h5", features)
    quick = ["--epochs", "12", "--learning-rate", "0.03", "--folds", "4", "--runs", "2", "--protocol", "crossval"]
    abmil(["--features", str(folder / "features.h5"), "--output-dir", str(folder / "out"), *quick])
    return folder / "out", features


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def cards_of(section):
    cards = re.findall(r'<details class="card patients-card"(.*?)</details>', section.html, re.S)
    return {html.unescape(re.search(r"<b>(.*?)</b>", card)[1]): card for card in cards}


def values_of(card):
    """The numbers of a card, in order."""
    return [float(value) for value in re.findall(r'<data value="([^"]*)"', card)]


def cells_of(card, title):
    """The positions of the cells under a heading."""
    groups = re.findall(r"<h3>([^<]*)</h3>(.*?)</ol>", card, re.S)
    return [int(cell) for cell in re.findall(r'<li data-cell="(\d+)">', dict(groups)[title])]


def write_result(folder, patients, names=NAMES, with_networks=True, with_attention=True):
    """A result as abmil.py leaves it; patients: (id, label or None, probabilities, sources)."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name, header, rows):
        with open(folder / name, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([header, *rows])

    columns = [f"p_{name}" for name in names]
    has_labels = all(label is not None for _, label, _, _ in patients)
    write(
        "predictions.csv",
        ["patient", *(["label"] if has_labels else []), "prediction", *columns],
        [[i, *([label] if has_labels else []), names[int(np.argmax(p))], *p] for i, label, p, _ in patients],
    )
    if with_networks:
        networks = [
            [n, i, *[min(1, max(0, value + (n - 0.5) / 10 * (1 - 2 * c))) for c, value in enumerate(p)]]
            for i, _, p, _ in patients
            for n in range(2)
        ]
        write("predictions_of_networks.csv", ["network", "patient", *columns], networks)
    if with_attention:
        cells = []
        for i, _, _, sources in patients:
            weights = np.arange(len(sources), 0, -1) / np.arange(len(sources) + 1).sum()
            cells += [[i, n, s, w, *[w] * len(names)] for n, (s, w) in enumerate(zip(sources, weights, strict=True))]
        write("attention.csv", ["patient", "cell", "source", "attention", *[f"attention_{n}" for n in names]], cells)
    (folder / "results.json").write_text(json.dumps({"protocol": "abmil"}))
    return folder


def test_the_most_attended_cells_are_the_planted_ones(evaluated):
    output, _ = evaluated
    right = [patient for patient in read_patients(output) if patient.label == patient.prediction == "APL"]
    assert len(right) >= 10
    cards = cards_of(patients_section(output))
    for patient in right:
        column = patient.attention[:, patient.class_names.index("APL")]
        assert column.sum() == pytest.approx(1, abs=1e-4)
        best = np.argsort(-column)[:3]
        assert ["planted" in patient.sources[cell] for cell in best] == [True] * 3
        assert set(cells_of(cards[patient.id], "Most attended")[:3]) == {0, 1, 2}
        assert not set(cells_of(cards[patient.id], "Least attended")) & {0, 1, 2}


def test_numbers_are_those_of_the_result(evaluated):
    output, _ = evaluated
    cards = cards_of(patients_section(output))
    predictions, networks = rows_of(output / "predictions.csv"), rows_of(output / "predictions_of_networks.csv")
    weights = rows_of(output / "attention.csv")
    assert set(cards) == {row["patient"] for row in predictions}
    for row in predictions:
        card = cards[row["patient"]]
        ranges = {}
        for name in NAMES:
            alone = [float(n[f"p_{name}"]) for n in networks if n["patient"] == row["patient"]]
            assert len(alone) == 2
            ranges[name] = [float(row[f"p_{name}"]), min(alone), max(alone)]
        assert values_of(card)[:9] == [*ranges[row["prediction"]], *ranges[NAMES[0]], *ranges[NAMES[1]]]
        assert f"label {row['label']}" in card
        own = {cell["cell"]: cell for cell in weights if cell["patient"] == row["patient"]}
        most = [float(own[str(cell)][f"attention_{row['prediction']}"]) for cell in cells_of(card, "Most attended")]
        assert (
            most == sorted((float(cell[f"attention_{row['prediction']}"]) for cell in own.values()), reverse=True)[:6]
        )
        assert values_of(card)[10 : 10 + len(most)] == most


def test_each_class_shows_what_it_attends_to(evaluated):
    card = next(iter(cards_of(patients_section(evaluated[0])).values()))
    assert [len(cells_of(card, f"Most attended for {name}")) for name in NAMES] == [6, 6]
    for name in NAMES:
        assert re.search(rf'<th scope="row">{name}</th>(<td><data.*?</td>){{3}}', card, re.S)


def test_an_applied_aggregator_has_ranges_and_attention_too(evaluated, tmp_path):
    output, _ = evaluated
    features = output.parent / "features.h5"
    abmil(["--features", str(features), "--apply", str(output / "aggregator.pth"), "--output-dir", str(tmp_path)])
    patients = read_patients(tmp_path)
    assert {patient.of_networks.shape for patient in patients} == {(8, 2)}
    for patient in patients:
        np.testing.assert_allclose(patient.of_networks.mean(axis=0), patient.probabilities, atol=1e-7)
        assert len(patient.sources) == len(patient.attention)


def test_wrong_ones_come_first_and_then_unsure_ones(tmp_path):
    sure = [("a", "APL", (0.9, 0.1), ["x"]), ("b", "APL", (0.6, 0.4), ["x"]), ("c", "control", (0.8, 0.2), ["x"])]
    section = patients_section(write_result(tmp_path, [*sure, ("d", "control", (0.7, 0.3), ["x"])]))
    assert list(cards_of(section)) == ["d", "c", "b", "a"]
    assert "2 of 4 with a known label called right" in section.html
    assert 'class="wrong">wrong<' in cards_of(section)["d"]
    assert "2 of 2 networks agree" in cards_of(section)["a"]


def test_text_from_files_stays_text(tmp_path):
    names = [NASTY, "b"]
    section = patients_section(write_result(tmp_path, [(NASTY, NASTY, (0.2, 0.8), [f"/{NASTY}.png"])], names))
    page = page_html("patients", [section])
    assert "<script>alert(1)" not in page
    assert list(cards_of(section)) == [NASTY]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_bags_of_one_cell_and_one_class(tmp_path):
    section = patients_section(write_result(tmp_path, [("a", "APL", (1.0,), ["x.png"])], ["APL"]))
    card = cards_of(section)["a"]
    assert "Least attended" not in card, "the one cell is among the most attended already"
    assert '<data value="1.0">100.0</data>' in card
    assert "1.0 x" in card


def test_patients_without_labels(tmp_path):
    section = patients_section(write_result(tmp_path, [("a", None, (0.3, 0.7), ["x"])]))
    assert "label unknown" in section.html
    assert "called right" not in section.html


def test_missing_images_have_a_placeholder_that_says_why(tmp_path, evaluated):
    there = evaluated[0].parent / "planted.png"
    section = patients_section(write_result(tmp_path, [("a", "APL", (0.9, 0.1), [str(there), "/gone/cell.png"])]))
    card = cards_of(section)["a"]
    assert card.count("<img ") == 6  # most, and each class
    assert card.count(f'src="{escape(PLACEHOLDER)}"') == 3
    assert "cell 1 of a: /gone/cell.png; no image: No such file or directory" in card


def test_a_result_of_an_older_version_says_how_to_get_attention(tmp_path):
    patients = [("a", "APL", (0.9, 0.1), ["x"]), ("b", "control", (0.1, 0.9), ["x"])]
    section = patients_section(write_result(tmp_path, patients, with_networks=False, with_attention=False))
    assert "Run dinov2/eval/abmil.py again" in section.html
    assert "No ranges" in section.html
    assert "Most attended" not in section.html


def test_one_attention_for_all_classes(tmp_path):
    folder = write_result(tmp_path, [("a", "APL", (0.9, 0.1), ["x", "y"])])
    rows = rows_of(folder / "attention.csv")
    with open(folder / "attention.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["patient", "cell", "source", "attention"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    section = patients_section(folder)
    assert "Most attended for" not in section.html
    assert cells_of(cards_of(section)["a"], "Most attended") == [0, 1]


SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def write_deletion(folder, curves):
    """The file as abmil.py leaves it; curves: {patient: (without the most attended cells, without random ones)}."""
    with open(folder / "deletion.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        stream.write(DELETION_HEADER)
        for patient, (most_attended, random) in curves.items():
            writer.writerows(zip([patient] * 7, SHARES, most_attended, random, strict=True))
    return folder


def lines_of(card):
    """Each drawn line as points (share of cells, probability), by the places of the axes' labels 0 and 100."""
    x_0, _, x_100 = map(float, re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle"', card))
    y_0, _, y_100 = map(float, re.findall(r'<path d="M[\d.]+ ([\d.]+)h', card))
    return [
        [
            ((float(x) - x_0) / (x_100 - x_0), (float(y) - y_0) / (y_100 - y_0))
            for x, y in (point.split(",") for point in points.split())
        ]
        for points in re.findall(r'<polyline [^>]*points="([^"]*)"', card)
    ]


def test_a_patient_has_both_deletion_curves(tmp_path):
    folder = write_result(tmp_path, [("a", "APL", (0.9, 0.1), ["x", "y"]), (NASTY, "control", (0.2, 0.8), ["x"])])
    most, random = (0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0), (0.9, 0.9, 0.88, 0.85, 0.8, 0.7, 0.6)
    section = patients_section(write_deletion(folder, {"a": (random, (1.0000001, *most[1:])), NASTY: (most, random)}))
    cards = cards_of(section)
    for line, values in zip(lines_of(cards[NASTY]), (most, random), strict=True):
        np.testing.assert_allclose(line, list(zip(SHARES, values, strict=True)), atol=0.002)
    assert "Probability of control in %, by the share of removed cells" in cards[NASTY]
    assert "Without 40 %: 10.0 (most attended cells), 80.0 (random cells)." in cards[NASTY]
    assert re.findall(r"</span>([^<]*)</li>", cards["a"]) == ["without the most attended cells", "without random cells"]
    assert "attention can be trusted" in section.html
    assert "<script>alert" not in section.html


def test_a_result_without_deletion_curves_looks_as_before(tmp_path):
    section = patients_section(write_result(tmp_path, [("a", "APL", (0.9, 0.1), ["x"])]))
    assert "<svg" not in section.html
    assert "deletion curve" not in section.html


def test_the_page_stays_small_with_many_patients(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(200):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    patients = [
        (
            f"p{n}",
            NAMES[n % 2],
            (0.5 + n / 1000, 0.5 - n / 1000),
            [f"{tmp_path}/{(n + i) % 200}.png" for i in range(40)],
        )
        for n in range(150)
    ]
    folder = write_result(tmp_path / "result", patients)
    write_deletion(folder, {patient: (np.linspace(0.9, 0, 7), [0.9] * 7) for patient, *_ in patients})
    section = patients_section(folder)
    assert len(cards_of(section)) == 150
    assert section.html.count("<polyline") == 300
    assert len(section.html) < 6e6
    monkeypatch.setattr(module, "MOST_PATIENTS", 20)
    monkeypatch.setattr(module, "MOST_THUMBNAILS", 160)
    section = patients_section(folder)
    assert len(cards_of(section)) == 20
    assert "Shown are 20: those called wrong" in section.html
    assert section.html.count("<img ") == 160
    assert set(cards_of(section)) <= {f"p{n}" for n in range(1, 150, 2)}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("predictions.csv", "path,prediction,p_APL\na,APL,1\n", "needs the column patient"),
        ("predictions.csv", "patient,prediction,p_APL\n", "has no rows"),
        ("predictions.csv", "patient,prediction\na,APL\n", "a probability of each predicted class"),
        ("predictions.csv", "patient,prediction,p_APL\na,APL,high\n", "a probability that is no number .*'high'"),
        ("predictions.csv", "patient,prediction,p_APL\na,AML,1\n", "a probability of each predicted class"),
        ("predictions.csv", "patient,prediction,p_APL\na,APL,1\na,APL,1\n", "one patient stands in several"),
        ("predictions_of_networks.csv", "patient,p_APL,p_control\na,1,0\na,x,0\n", "no number in the column p_APL"),
        ("predictions_of_networks.csv", "patient,p_APL\na,1\n", "has no column p_control"),
        ("attention.csv", "patient,source,attention\nz,x,1\n", "attention.csv and predictions.csv .* different runs"),
        ("deletion.csv", "patient,share,random\na,0,1\n", "deletion.csv' has no column most_attended"),
        ("deletion.csv", DELETION_HEADER + "a,0,x,1\n", "deletion.csv' has no number in the column most_attended"),
        (
            "deletion.csv",
            DELETION_HEADER + "a,0,0.9,nan\n",
            "deletion.csv' has values outside 0 to 1 in the columns share, most_",
        ),
        ("deletion.csv", DELETION_HEADER + "b,0,0.9,0.9\n", "deletion.csv and predictions.csv .* different runs"),
        ("results.json", '{"protocol": "knn"}', "is of protocol 'knn'; give the folder of an ABMIL result"),
        ("results.json", "[]", "no JSON object"),
        ("results.json", "{", "not readable as JSON"),
    ],
)
def test_files_that_are_wrong(tmp_path, file, content, message):
    folder = write_result(tmp_path, [("a", "APL", (0.9, 0.1), ["x"])])
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        patients_section(folder)


def test_a_folder_without_a_result(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"predictions.csv: no such file"):
        patients_section(tmp_path)
