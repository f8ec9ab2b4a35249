"""The experiments on real cells: the split, the tables, and patients made of cells."""

import pandas as pd
import pytest

TINY = [
    *("student.depth=1", "student.embed_dim=32", "student.num_heads=2", "train.batch_size_per_gpu=4"),
    *("crops.global_crops_size=28", "train.image_size=28", "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2"),
    *("optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=1", "teacher.warmup_teacher_temp_epochs=1"),
    *("evaluation.eval_period_iterations=2", "train.tensorboard=false", "train.device=cpu"),
]
STAGES = {"BA": "basophil", "MY": "ig", "ERB": "erythroblast", "PLATELET": "platelet"}


@pytest.fixture
def pbc(tmp_path, write_images):
    """A small data set in PBC's layout: twelve images of four stages, a copy, and one image in two classes."""
    folder = tmp_path / "PBC"
    names = [(kind, f"{stage}_{number}.png") for stage, kind in STAGES.items() for number in range(12)]
    contents = {folder / kind / name: content for content, (kind, name) in enumerate(names)}
    contents[folder / "basophil" / "BA_copy.png"] = contents[folder / "basophil" / "BA_3.png"]
    contents |= dict.fromkeys([folder / "basophil" / "BA_99.png", folder / "ig" / "MY_99.png"], 999)
    write_images(contents)
    return folder


def test_the_split_has_every_image_once(script, pbc, tmp_path):
    learn = script("learn")
    assert learn.write_split(pbc, tmp_path / "split") == {"train": 36, "test": 12}
    listed = (tmp_path / "split" / "lists" / "train.txt").read_text().splitlines()
    tables = {
        name: pd.read_csv(tmp_path / "split" / f"{name}.csv") for name in ("train8", "test8", "train10", "test10")
    }
    assert listed == tables["train8"]["Image Path"].tolist()
    assert not set(listed) & set(tables["test8"]["Image Path"])
    assert not any("_99" in path for path in [*listed, *tables["test8"]["Image Path"]])
    assert tables["test8"]["Label"].value_counts().to_dict() == dict.fromkeys(STAGES.values(), 3)
    assert set(tables["train10"]["Label"]) == {"basophil", "myelocyte", "erythroblast"}  # platelets have no stage
    assert learn.write_split(pbc, tmp_path / "again") == {"train": 36, "test": 12}
    assert (tmp_path / "again" / "test8.csv").read_text() == (tmp_path / "split" / "test8.csv").read_text()


@pytest.mark.slow
def test_learning_writes_scores_and_curves(script, pbc, tmp_path, rows_of):
    flags = ["--pbc", str(pbc), "--output-dir", str(tmp_path / "runs"), "--seeds", "4", "--name", "tiny"]
    script("learn").main([*flags, *TINY])
    header, *rows = rows_of(tmp_path / "runs" / "tiny" / "results.md")
    assert header[1:] == ["accuracy, 8 classes", "accuracy, 10 classes", "balanced accuracy, 10 classes"]
    assert [row[0] for row in rows[:3]] == ["model", "untrained", "histogram"]
    assert all(0 <= float(cell.split(" ")[0]) <= 1 for row in rows[:3] for cell in row[1:])
    assert rows[3] == ["seed", "0", "2", "4", "CLS loss, first 20", "CLS loss, last 20", "minutes"]
    seed, *numbers = rows[4]
    assert seed == "4"
    assert 0 < float(numbers[3]) < 20


def test_patients_have_planted_cells_or_none(script):
    real_cells = script("real_cells")
    labels = ["erythroblast"] * 130 + ["monocyte", "basophil"] * 600
    cells = pd.DataFrame({"Image Path": [f"{number}.png" for number in range(len(labels))], "Label": labels})
    patients = real_cells.make_patients(cells)
    assert patients["Image Path"].is_unique
    assert patients["patient"].value_counts().eq(20).all()
    planted = patients["Image Path"].map(cells.set_index("Image Path")["Label"]).eq("erythroblast")
    assert planted.tolist() == patients["cell"].eq("erythroblast").tolist()
    per_patient = planted.groupby([patients["Label"], patients["patient"]]).sum()
    assert per_patient["without"].eq(0).all()
    assert per_patient["with"].between(2, 4).all()


def test_attention_on_planted_cells_counts_the_patients_that_have_them(script, tmp_path, capsys):
    cells = ["erythroblast", "other", "other", "other"]
    patients = pd.DataFrame({"Image Path": list("abcd"), "patient": ["1", "1", "2", "2"], "cell": cells})
    patients.to_csv(tmp_path / "patients.csv", index=False)
    attention = pd.DataFrame({"source": list("abcd"), "patient": list("1122"), "attention": [0.9, 0.1, 0.5, 0.5]})
    attention.to_csv(tmp_path / "attention.csv", index=False)
    script("real_cells").main(["--output-dir", str(tmp_path), "--attention", str(tmp_path / "attention.csv")])
    assert capsys.readouterr().out == "planted cells get 90% of the attention; they are 50% of the cells\n"


def test_ssl_cells_are_those_that_are_there(script, tmp_path, write_images):
    repository = tmp_path / "segmentation_WBC"
    write_images({repository / "Dataset 1" / "001.bmp": 1, repository / "Dataset 1" / "003.bmp": 3})
    labels = "image ID,class label\n1,1\n2,2\n3,5\n"
    (repository / "Class Labels of Dataset 1.csv").write_text(labels, encoding="utf-8-sig")
    script("real_cells").main(["--ssl", str(repository), "--output-dir", str(tmp_path / "out")])
    cells = pd.read_csv(tmp_path / "out" / "ssl_seg.csv")
    assert cells["Label"].tolist() == ["neutrophil", "basophil"]
    assert [path.rsplit("/", 1)[1] for path in cells["Image Path"]] == ["001.bmp", "003.bmp"]
