"""Published numbers beside ours, and rank correlations of encoders."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from dinov2.eval.protocol.transfer_report import (
    PUBLISHED_FILE,
    compare_encoders,
    format_correlations,
    published_rows,
    rank_correlations,
)


def test_published_numbers_are_those_of_the_same_encoder_and_sets():
    sets = ["acevedo", "aml_matek"]
    rows = published_rows({"checkpoint": "/weights/dinobloom-l.pth", "model": "ViT with dim 1024"}, sets)
    assert [(row["target"], row["value"]) for row in rows] == [("acevedo", 0.997), ("aml_matek", 0.648)]
    assert all(row["paper"] == "arXiv 2608.25148" and row["metric"] == "macro_f1" for row in rows)
    (row,) = published_rows({"model": "timm:vit_small_patch14_dinov2.lvd142m"}, ["acevedo"])
    assert (row["encoder"], row["value"]) == ("DINOv2-S", 0.988)
    assert published_rows({"checkpoint": "/runs/teacher_checkpoint.pth", "model": "ViT"}, sets) == []
    assert published_rows({}, sets) == []  # an encoder without other names must not match one without any
    assert published_rows({"checkpoint": "DinoBloom-L.pth"}, ["pbc", "matek"]) == []


def test_the_table_of_published_numbers_is_whole():
    table = pd.read_csv(PUBLISHED_FILE, keep_default_na=False)
    assert not table.duplicated(["encoder", "target", "note"]).any()
    assert table["value"].between(0, 1).all()
    assert table.groupby("encoder")["target"].nunique().eq(4).all()
    assert table["encoder"].nunique() == 9
    assert (table[["source", "metric", "paper", "note"]] != "").all(axis=None)


def test_rank_correlations_equal_scipys():
    scores = np.random.default_rng(0).random((7, 3))
    found = rank_correlations(pd.DataFrame(scores, columns=list("abc")))
    np.testing.assert_allclose(found, spearmanr(scores).statistic)
    assert rank_correlations(pd.DataFrame(scores[:2])).isna().all(axis=None)


def write_results(folder, scores, protocol="cross"):
    folder.mkdir()
    matrix = {"a": {target: {"macro_f1": score} for target, score in scores.items()}}
    report = {"protocol": protocol, "results": {"matrix": matrix}, "settings": {"protocol": "transfer"}}
    (folder / "results.json").write_text(json.dumps(report))
    return folder


def test_encoders_are_ranked_by_their_results(tmp_path):
    scores = [{"b": 0.1, "c": 0.9, "d": None}, {"b": 0.2, "c": 0.8, "d": 0.4}, {"b": 0.3, "c": 0.1, "d": 0.5}]
    folders = [write_results(tmp_path / str(i), of_one) for i, of_one in enumerate(scores)]
    correlations = compare_encoders([folders[0] / "results.json", *folders[1:]])
    assert correlations["a"].loc["b", "c"] == pytest.approx(-1.0)
    assert np.isnan(correlations["a"].loc["b", "d"])  # two encoders alone
    assert "-1.00" in format_correlations(correlations)
    other = write_results(tmp_path / "knn", {"b": 0.1}, "knn")
    with pytest.raises(ValueError, match="--compare: .* is of knn; give results.json of cross.py"):
        compare_encoders([*folders, other])
    with pytest.raises(FileNotFoundError, match="absent"):
        compare_encoders([tmp_path / "absent"])
