"""The flags of protocols: kinds of features, splits, and mistakes that leave nothing."""

import argparse
import hashlib

import h5py
import numpy as np
import pytest
import torch

from dinov2.data.splits import Split, leave_one_dataset_out, write_split
from dinov2.eval.features import read_features
from dinov2.eval.features.extract import Embedder
from dinov2.eval.knn import main
from dinov2.eval.protocol import (
    EvaluationData,
    add_evaluation_arguments,
    baseline_features,
    check_evaluation_arguments,
    runner,
)


def test_a_written_split_can_be_used_again(tmp_path, features_file, run_knn):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i % 20}" for i in range(80)])
    _, report = run_knn("--features", file, "--folds", 4, "--seed", 3)
    split = (tmp_path / "out" / "split.csv").rename(tmp_path / "split.csv")
    _, again = run_knn("--features", file, "--split", split, "--seed", 3)
    assert again["results"] == report["results"]
    assert len(again["hashes"]["split"]) == 64
    assert (tmp_path / "out" / "split.csv").read_bytes() == split.read_bytes()


def test_whole_data_sets_can_be_left_out(tmp_path, features_file, rows_of, run_knn):
    datasets = np.repeat(["acevedo", "matek", "own"], [30, 30, 20])
    paths = [f"/{name}/{i}.png" for i, name in enumerate(datasets)]
    file = features_file(tmp_path / "f.h5", paths=paths)
    folds = leave_one_dataset_out(datasets)
    write_split(tmp_path / "split.csv", paths, Split(list(folds.values())))
    _, report = run_knn("--features", file, "--split", tmp_path / "split.csv", "--k", 5)
    assert report["split"]["test_sizes"] == [30, 30, 20]
    rows = rows_of(tmp_path / "out" / "predictions_knn_5.csv")
    assert {(row["path"].split("/")[1], row["fold"]) for row in rows} == {
        ("acevedo", "0"),
        ("matek", "1"),
        ("own", "2"),
    }


def test_the_kind_of_features_can_be_chosen(tmp_path, features_file, run_knn):
    labels = np.arange(80) % 2
    mean = np.stack([labels, labels], axis=1).astype(np.float32)
    file = features_file(tmp_path / "f.h5", others={"mean": mean})
    _, report = run_knn("--features", file, "--k", 1, "--kind", "mean")
    assert report["results"]["model"]["knn_1"]["accuracy"] == 1.0
    assert report["kinds"] == ["mean"]
    _, report = run_knn("--features", file, "--k", 1)
    assert report["results"]["model"]["knn_1"]["accuracy"] < 1.0
    with pytest.raises(ValueError, match="none of kind 'last4', only cls, mean"):
        run_knn("--features", file, "--kind", "last4")


def test_a_network_is_asked_for_the_kind_to_evaluate(checkpoint, tmp_path, draw_cells, run_knn):
    data = draw_cells(tmp_path / "cells", n=6, seed=0)
    flags = ("--checkpoint", checkpoint, "--data", data, "--image-size", 28, "--k", 1, "--folds", 2)
    _, alone = run_knn(*flags, "--kind", "mean", "--baseline", "untrained")
    assert alone["kinds"] == ["mean"]
    assert read_features(tmp_path / "out" / "features.h5").kinds == ["mean"]
    both = ("--kinds", "cls", "mean", "--overwrite", "--baseline", "untrained")
    _, among = run_knn(*flags, *both, "--kind", "mean")
    assert among["results"] == alone["results"]
    embedder = Embedder(checkpoint, image_size=28, kinds=("cls", "mean"))
    paths = read_features(tmp_path / "out" / "features.h5").paths
    alone, among = (baseline_features("untrained", paths, embedder, 1, kinds) for kinds in (["mean"], ["mean", "cls"]))
    assert (list(alone), list(among)) == (["mean"], ["mean", "cls"])
    np.testing.assert_array_equal(alone["mean"], among["mean"])
    assert not np.allclose(among["mean"], among["cls"])


def test_test_images_that_the_checkpoint_learned_from_are_counted(
    checkpoint, tmp_path, draw_cells, run_knn, caplog, monkeypatch
):
    monkeypatch.setattr(runner, "setup_logging", lambda: None)  # which takes messages from caplog
    learned, others = (draw_cells(tmp_path / name, n=6, seed=seed) for seed, name in enumerate(("learned", "others")))
    digests = [list(hashlib.sha256(path.read_bytes()).digest()[:16]) for path in learned.rglob("*.png")]
    torch.save({**torch.load(checkpoint), "seen": torch.tensor(digests, dtype=torch.uint8)}, checkpoint)
    flags = ("--checkpoint", checkpoint, "--image-size", 28, "--k", 1, "--overwrite")
    run_knn(*flags, "--train", learned, "--test", others)
    assert "fine-tuned" not in caplog.text
    run_knn(*flags, "--train", others, "--test", learned)
    assert f"--checkpoint {checkpoint} was fine-tuned with 18 of these 18 test images" in caplog.text


def test_a_baseline_needs_all_images(tmp_path, draw_cells):
    paths = [*map(str, draw_cells(tmp_path / "cells", n=1, seed=0).rglob("*.png")), str(tmp_path / "gone.png")]
    with pytest.raises(ValueError, match=r"--baseline histogram: 1 images can no longer be read, .*gone\.png"):
        baseline_features("histogram", paths, None, 0, ["cls"])


def test_sets_that_make_no_sense_are_refused_and_leave_nothing(tmp_path, features_file, expect_nothing):
    good = features_file(tmp_path / "good.h5")
    other = features_file(tmp_path / "other.h5", prefix="/o", attributes={"checkpoint_sha256": "cd"})
    flags = ("--features", good, "--test-features", other)
    expect_nothing("checkpoint_sha256 differs, 'ab' and 'cd'", *flags)
    mean = features_file(tmp_path / "mean.h5", prefix="/o", kind="mean")
    flags = ("--features", good, "--test-features", mean)
    expect_nothing("kind of features differs, 'cls' and 'mean'", *flags)
    one = features_file(tmp_path / "one.h5", labels=np.ones(80, dtype=np.int64))
    expect_nothing("all 80 cells are of class 'monocyte'", "--features", one)
    broken = features_file(tmp_path / "broken.h5", features=np.full((80, 12), np.nan, dtype=np.float32))
    expect_nothing("80 of 80 in '.*broken.h5' are infinite or NaN", "--features", broken)
    broken = features_file(tmp_path / "broken.h5", others={"mean": np.full((80, 2), np.inf, dtype=np.float32)})
    flags = ("--features", broken, "--kind", "mean")
    expect_nothing("80 of 80 in '.*broken.h5' are infinite or NaN", *flags)
    twice = features_file(tmp_path / "twice.h5", paths=["/cells/a.png"] * 80)
    expect_nothing("'/cells/a.png' is listed twice", "--features", twice)
    message = "65 neighbours asked of 64 training cells; choose k between 1 and 64"
    expect_nothing(message, "--features", good, "--k", 1, 65)
    expect_nothing("40 cells in its largest class, fewer than the 41", "--features", good, "--folds", 41)
    unlabelled = features_file(tmp_path / "new.h5", class_names=["unlabelled"], labels=np.zeros(80, dtype=np.int64))
    expect_nothing("labels: the cells of '.*new.h5' have none", "--features", unlabelled)
    expect_nothing("labels: the cells of '.*new.h5' have none", "--features", good, "--test-features", unlabelled)
    expect_nothing("33 cells a class asked", "--features", good, "--few-shot", 33)
    expect_nothing("gone.csv: no such file", "--features", good, "--split", "gone.csv", error=OSError)


@pytest.mark.parametrize("labels", [[0, 1, 1], [0, 1, 2, 0], [0, -1, 1, 0]])
def test_arrays_that_do_not_fit_are_refused(labels):
    with pytest.raises(
        ValueError, match=rf"\[4\] cells, {len(labels)} labels from .* give each cell features and a label"
    ):
        EvaluationData({"cls": np.zeros((4, 3))}, np.array(labels), ["a", "b"], [])


def test_features_without_labels_are_refused(tmp_path, expect_nothing):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.zeros((4, 3), dtype=np.float32)
    expect_nothing("f.h5' has no dataset labels; extract again", "--features", tmp_path / "f.h5")


def test_splits_that_make_no_sense_are_refused_and_leave_nothing(tmp_path, features_file, expect_nothing):
    file = features_file(tmp_path / "f.h5", patients=[f"p{i // 2}" for i in range(80)])

    def split(parts):
        lines = [f"/cells/{i}.png,{part}" for i, part in enumerate(parts)]
        (tmp_path / "split.csv").write_text("\n".join(["path,part", *lines]) + "\n")
        return "--features", file, "--split", tmp_path / "split.csv"

    expect_nothing("40 of 40 patients have cells on two sides", *split(["train", "test"] * 40))
    without = ["train" if i < 40 and i % 2 else "unused" if i < 40 else "test" for i in range(80)]
    message = "1 classes are tested without a training cell, for instance 'blast' in fold 0"
    expect_nothing(message, *split(without))


def test_mistakes_in_lists_show_before_anything_is_embedded(checkpoint, tmp_path, draw_cells, expect_nothing):
    data = draw_cells(tmp_path / "cells", n=2, seed=0)
    network = ("--checkpoint", checkpoint, "--image-size", 28)

    def listed(*lines):
        (tmp_path / "cells.csv").write_text("\n".join(lines) + "\n")
        return *network, "--data", tmp_path / "cells.csv"

    message = r"lacks the column\(s\) 'Label'; its first line has \['Image Path', 'Class'\]"
    expect_nothing(message, *listed("Image Path,Class", "cells/basophil/00.png,basophil"))
    flags = listed("Image Path,Label", "cells/basophil/00.png,basophil", "gone.png,eosinophil")
    expect_nothing("1 of the 2 images in .* do not exist", *flags, error=FileNotFoundError)
    flags = listed("Image Path,Label", "cells/basophil/00.png,basophil", "cells/basophil/01.png,")
    expect_nothing("line 3: no value for 'Label'", *flags)
    flags = listed("Image Path,Label", *(f"cells/basophil/{i:02d}.png,basophil" for i in range(2)))
    expect_nothing("all 2 cells are of class 'basophil'", *flags)
    message = "2 cells in its largest class, fewer than the 5 parts"
    expect_nothing(message, *network, "--data", data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "got no cells"),
        (["--checkpoint", "c", "--train", "t"], "got --checkpoint --train; give"),
        (["--checkpoint", "c", "--features", "f"], "got --checkpoint --features; give"),
        (["--features", "f", "--baseline", "untrained"], "untrained needs --checkpoint"),
        (["--features", "f", "--k", "0"], "'0' is not a whole number from 1"),
        (["--features", "f", "--k", "9" * 5000], "is not a whole number from 1 to 2,147,483,647"),
        (["--features", "f", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--features", "f", "--seed", str(2**32)], "is not a whole number from 0 to 4,294,967,295"),
        (["--features", "f", "--folds", "1e3"], "'1e3' is not a whole number"),
        (["--features", "f", "--test-fraction", "0.7"], "'0.7' is not a number from 1e-06 to 0.5"),
        (["--features", "f", "--test-fraction", "nan"], "'nan' is not a number"),
        (["--features", "f", "--protocol", "dino", "--temperature", "inf"], "'inf' is not a number"),
        (["--features", "f", "--temperature", "-1"], "'-1' is not a number"),
        (["--features", "f", "--num-workers", "-1"], "'-1' is not a whole number from 0"),
        (["--features", "f", "--image-size", "100000"], "is not a whole number from 1 to 4,096"),
        (["--features", "f", "--folds", "3", "--split", "s"], "not allowed with argument --folds"),
        (["--features", "f", "--test-features", "g", "--split", "s"], "--split divides one set"),
        (["--features", "f", "--test-features", "g", "--test-fraction", "0.2"], "--test-fraction divides one set"),
        (["--checkpoint", "c", "--data", "d", "--kinds", "cls", "--kind", "mean"], "mean is not among --kinds cls"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--output-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_asked_for_the_kinds_of_the_protocol(tmp_path):
    def kinds(*flags, of_protocol=("cls",)):
        parser = argparse.ArgumentParser()
        add_evaluation_arguments(parser)
        args = parser.parse_args([*flags, "--data", "d", "--output-dir", str(tmp_path)])
        check_evaluation_arguments(parser, args, of_protocol)
        return args.kinds

    network, several = ("--checkpoint", "c"), ("cls", "cls+mean", "last4", "last4+mean")
    assert kinds(*network, of_protocol=several) == list(several)
    assert kinds(*network, "--kinds", "mean", "cls", of_protocol=several) == ["mean", "cls"]
    assert kinds(*network, "--kind", "cls+mean", of_protocol=several) == ["cls+mean"]
    assert kinds("--encoder", "histogram", of_protocol=several) == kinds(*network) == ["cls"]
