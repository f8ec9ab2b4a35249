"""The device with what it lacks, and what the start of the log says about the data."""

from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from dinov2.train.setup import describe_sets, set_up_device
from dinov2.utils.config import load_run_config


def lines(sizes, n_seen, weights=(), temperature=1.0):
    names = [f"set{i}" for i in range(len(sizes))]
    cfg = OmegaConf.create({"train": {"balance": {"weights": dict(weights), "temperature": temperature}}})
    source = SimpleNamespace(set_names=names, set_sizes=np.array(sizes))
    return list(describe_sets(cfg, SimpleNamespace(source=source), n_seen))


def test_one_set_needs_no_lines():
    assert lines([100], 1000) == []


def test_how_often_each_set_is_seen():
    title, *rows = lines([75_000, 25_000, 0], 1_000_000)
    assert title == "sets      3, seen as many as there are:"
    assert [" ".join(row.split()) for row in rows] == [
        "set0 75,000 images, 75.00% of the run's images, 10.0 passes over it",
        "set1 25,000 images, 25.00% of the run's images, 10.0 passes over it",
        "set2 0 images, 0.00% of the run's images, 0.0 passes over it",
    ]
    title, *rows = lines([75_000, 25_000, 0], 1_000_000, temperature=float("inf"))
    assert title == "sets      3, seen as balanced:"
    assert "50.00% of the run's images, 6.7 passes" in rows[0]
    assert "50.00% of the run's images, 20.0 passes" in rows[1]


@pytest.mark.parametrize("n_sets", [12, 13, 60])
def test_of_many_sets_the_most_seen_have_lines(n_sets):
    _, *rows = lines([1000 * (i + 1) for i in range(n_sets)], 10**6, weights={"set0": 50})
    assert len(rows) == min(n_sets, 13)
    assert any(row.split()[0] == "set0" for row in rows)
    assert any(row.split()[0] == f"set{n_sets - 1}" for row in rows)
    if n_sets > 12:
        assert rows[-1].strip().startswith(f"and {n_sets - 12} more: ")
        shown = [float(row.split("images, ")[1].split("%")[0]) for row in rows]
        assert sum(shown) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("key", ["train.compile_blocks", "train.compile_loss"])
def test_a_missing_compiler_is_named_with_the_setting(key, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cfg = load_run_config(None, [f"{key}=true", "train.device=cpu"])
    with pytest.raises(ValueError, match=rf"{key}=true: no C\+\+ compiler was found; install g\+\+.*set it to false"):
        set_up_device(cfg, None)
