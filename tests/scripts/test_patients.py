"""The experiment on patients made of cells: what the planted rules plant, and that no image is on both sides."""

from dataclasses import replace

import numpy as np
import pytest

from dinov2.eval.solvers.mil_training import TrainingSettings


@pytest.fixture
def patients(script):
    return script("patients")


def cells_of(patients):
    """Each class has cells of its own number in the first column; the second is the part, the third the image."""
    names = [*patients.SHARES, patients.RARE, "changed"]
    return {
        name: [np.array([[i, part, image] for image in range(9)], dtype=np.float32) for part in range(patients.N_PARTS)]
        for i, name in enumerate(names)
    }, names


@pytest.mark.parametrize("rule", ["rare class", "ratio", "morphology"])
def test_a_rule_is_planted_in_one_class_of_patients_only(patients, rule):
    cells, names = cells_of(patients)
    data = patients.make_patients(cells, rule, seed=3)
    bags = data.bags
    assert bags.per_class(np.arange(len(bags))) == {"with": 75, "without": 75}
    shares = np.array([np.bincount(bag[:, 0].astype(int), minlength=len(names)) / len(bag) for bag in bags.features])
    share_of = {name: shares[:, i] for i, name in enumerate(names)}
    is_with = np.array([bags.class_names[label] == "with" for label in data.labels])
    rare, changed = share_of[patients.RARE], share_of["changed"]
    assert (rare[is_with] > 0).all() == (rule == "rare class")
    assert (changed[is_with] > 0).any() == (rule == "morphology")
    assert not rare[~is_with].any()
    assert not changed[~is_with].any()
    difference = share_of["lymphocyte"][is_with].mean() - share_of["lymphocyte"][~is_with].mean()
    assert (difference > 0.05) == (rule == "ratio")
    for fold in data.folds:
        parts = [{part for i in side for part in bags.features[i][:, 1]} for side in (fold.train, fold.val, fold.test)]
        assert [len(part) for part in parts] == [3, 1, 1]
        assert len(set.union(*parts)) == 5


def test_shuffled_labels_keep_the_patients_and_their_numbers(patients):
    cells, _ = cells_of(patients)
    plain, shuffled = (patients.make_patients(cells, "ratio", 0, is_shuffled) for is_shuffled in (False, True))
    assert plain.bags.bag_hashes() == shuffled.bags.bag_hashes()
    assert sorted(plain.labels) == sorted(shuffled.labels)
    assert 0.3 < np.mean(plain.labels == shuffled.labels) < 0.7


def test_the_curve_is_measured_once_and_read_again(patients, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patients, "CURVE_PATIENTS", (20,))
    monkeypatch.setattr(patients, "CURVE_CELLS", 5)
    monkeypatch.setattr(patients, "CURVE_DIM", 4)
    short = replace(patients.RECIPES["dinobloom"], runs=1, training=TrainingSettings(epochs=2))
    monkeypatch.setitem(patients.RECIPES, "dinobloom", short)
    flags = ["--curve", "--output-dir", str(tmp_path), "--seeds", "0", "1", "--recipes", "dinobloom"]
    patients.main(flags)
    table = (tmp_path / "curve.md").read_text()
    assert "| ABMIL classwise, dinobloom | 0." in table
    assert "| mean_sd_logistic | 0." in table
    monkeypatch.setattr(patients.abmil, "evaluate", None)
    patients.main(flags)
    assert (tmp_path / "curve.md").read_text() == table
    assert capsys.readouterr().out.count("method") == 2
