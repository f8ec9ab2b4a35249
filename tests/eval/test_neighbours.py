"""The search for neighbours: what float64 finds by brute force, however the work is cut up, in little memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.eval import neighbours
from dinov2.eval.neighbours import nearest_neighbours

REPOSITORY = Path(__file__).parents[2]


def brute_force(train, test, k, is_cosine=False):
    train, test = (x.astype(np.float64) for x in (train, test))
    if is_cosine:
        train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    squared = np.stack([np.square(train - cell).sum(axis=1) for cell in test])  # [M, N]
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return nearest, np.take_along_axis(squared, nearest, axis=1)


def draw(n=3000, dim=24, offset=0.0, n_test=40, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, dim)) + offset).astype(np.float32) for size in (n, n_test)]


@pytest.fixture
def compared_with_all(monkeypatch):
    """Numbers of test cells that were compared with all training cells in float64."""
    numbers, compare = [], neighbours._nearest_of_all

    def spy(frame, train, cells, k):
        numbers.append(len(cells))
        return compare(frame, train, cells, k)

    monkeypatch.setattr(neighbours, "_nearest_of_all", spy)
    return numbers


@pytest.mark.parametrize("is_cosine", [False, True])
@pytest.mark.parametrize(
    ("k", "settings"),
    [
        (1, {}),
        (20, {"offset": 50}),  # float32 keeps five digits of what differs
        (5, {"offset": 1e3, "dim": 8, "n": 6000}),
        (7, {"n": 50}),
        (50, {"n": 50}),
    ],
)
def test_it_is_what_brute_force_finds(k, settings, is_cosine):
    train, test = draw(**settings)
    found = nearest_neighbours(train, test, k, is_cosine)
    positions, distances = brute_force(train, test, k, is_cosine)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-9)


def test_float32_decides_for_most_cells(compared_with_all):
    train, test = draw(n=5000, dim=48)
    nearest_neighbours(train, test, 20)
    assert sum(compared_with_all) < 4


@pytest.mark.parametrize("n_distinct", [1, 40, 400])
def test_copies_are_found_in_order_in_any_chunks(n_distinct, monkeypatch, compared_with_all):
    """With 40 distinct cells among 3,000 there are more copies than candidates."""
    pool, others = draw(n=n_distinct, dim=33, offset=50, n_test=10)
    train = pool[np.random.default_rng(1).integers(0, n_distinct, 3000)]
    test = np.concatenate([train[:20], others])
    expected = brute_force(train, test, 20)[0]
    for size in (1 << 12, 33 * 500, 1 << 22):
        monkeypatch.setattr(neighbours, "NUMBERS_PER_CHUNK", size)
        for chunk_size in (1, 7, None):
            found = nearest_neighbours(train, test, 20, chunk_size=chunk_size)
            np.testing.assert_array_equal(found.positions, expected, err_msg=f"{size} {chunk_size}")
    assert bool(compared_with_all) == (n_distinct < 400)


@pytest.mark.parametrize("exponent", [-18, 0, 18])
def test_scale_and_an_outlier_do_not_matter(exponent):
    train, test = draw()
    expected = brute_force(train, test, 5)[0]
    train, test = (x * np.float32(10.0**exponent) for x in (train, test))
    train[-1] = train[-1] * 1e6
    np.testing.assert_array_equal(nearest_neighbours(train, test, 5).positions, expected)


def test_coarser_products_than_float32_are_not_relied_on(compared_with_all):
    train, test = draw(n=5000)
    try:
        torch.set_float32_matmul_precision("medium")
        found = nearest_neighbours(train, test, 3)
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found.positions, brute_force(train, test, 3)[0])
    assert sum(compared_with_all) == len(test)


def test_inputs_are_left_as_they_are():
    for dtype in (np.float16, np.float32, np.float64):
        train, test = (x.astype(dtype) for x in draw(n=100))
        before = train.copy(), test.copy()
        nearest_neighbours(train, test, 3, is_cosine=True)
        np.testing.assert_array_equal(train, before[0])
        np.testing.assert_array_equal(test, before[1])


def test_no_test_cell_has_no_neighbours():
    train, test = draw(n=100)
    assert nearest_neighbours(train, test[:0], 3).positions.shape == (0, 3)


def test_what_makes_no_sense_is_refused():
    train, test = draw(n=10)
    with pytest.raises(ValueError, match="11 neighbours asked of 10 training cells; choose k between 1 and 10"):
        nearest_neighbours(train, test, 11)
    with pytest.raises(
        ValueError, match=r"\[10, 24\] \(train\) and \[40, 3\] \(test\): expected \[N, D\] and \[M, D\]"
    ):
        nearest_neighbours(train, test[:, :3], 1)
    test[3] = 0
    nearest_neighbours(train, test, 1)
    with pytest.raises(ValueError, match="all numbers of 1 cells are 0"):
        nearest_neighbours(train, test, 1, is_cosine=True)
    for value in (np.nan, np.inf):
        test[3, 2] = value
        with pytest.raises(ValueError, match="some are infinite or NaN"):
            nearest_neighbours(train, test, 1)


def test_no_copy_of_the_training_features_is_made():
    """400 MiB of float32: a float64 copy, or one of all distances, would show."""
    program = """
        import resource, torch
        from dinov2.eval.neighbours import nearest_neighbours
        torch.set_num_threads(1)
        train, test = torch.rand(400_000, 256), torch.rand(400, 256)
        nearest_neighbours(train[:4000], test[:40], 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nearest_neighbours(train, test, 20, is_cosine=True)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    lines = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


@pytest.mark.gpu
@pytest.mark.parametrize("is_cosine", [False, True])
def test_a_gpu_finds_the_same(is_cosine):
    train, test = draw(n=20_000, dim=64, offset=3)
    here = nearest_neighbours(train, test, 20, is_cosine)
    there = nearest_neighbours(torch.from_numpy(train).cuda(), test, 20, is_cosine)
    np.testing.assert_array_equal(there.positions, here.positions)
