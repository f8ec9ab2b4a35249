"""Copies of test images among training images."""

import shutil

import numpy as np
import pytest

from dinov2.data.copies import without_copies


def test_one_file_on_both_sides_is_an_error(tmp_path):
    (tmp_path / "cell.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to(tmp_path / "cell.png")
    shutil.copy(tmp_path / "cell.png", tmp_path / "copy.png")
    fold = np.array([0]), np.array([1])
    with pytest.raises(ValueError, match="share 1 image files, for instance .*cell.png"):
        without_copies([str(tmp_path / "cell.png"), str(tmp_path / "link.png")], [fold])
    with pytest.raises(ValueError, match="every image is a copy"):
        without_copies([str(tmp_path / "cell.png"), str(tmp_path / "copy.png")], [fold])


def test_copies_are_dropped_from_the_folds_that_test_them(tmp_path):
    for name, content in {"a": b"same", "b": b"same", "c": b"else", "d": b"othr", "e": b"longer"}.items():
        (tmp_path / name).write_bytes(content)
    folds = [(np.array([2, 3, 4, 1]), np.array([0])), (np.array([0, 1, 4]), np.array([2, 3]))]
    kept, counts = without_copies([str(tmp_path / name) for name in "abcde"], folds)
    assert [fold[0].tolist() for fold in kept] == [[2, 3, 4], [0, 1, 4]]  # in the second both copies are trained on
    assert [fold[1].tolist() for fold in kept] == [[0], [2, 3]]
    assert counts == {"dropped_identical_bytes": 1, "not_checked": 0}
    _, counts = without_copies(
        [str(tmp_path / name) for name in ("a", "gone", "b")], [(np.array([0, 1]), np.array([2]))]
    )
    assert counts == {"dropped_identical_bytes": 1, "not_checked": 1}
