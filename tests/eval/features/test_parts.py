"""Parts: a killed extraction continues, alone or with several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval import extract_features
from dinov2.eval.features.extract import Embedder

REPOSITORY = Path(__file__).parents[3]


class Killed(BaseException):
    """An error that no code handles."""


def kill_in_batch(embedder, n, monkeypatch):
    """The embedder's network fails in its n-th batch; returns the list of batch sizes that it saw."""
    seen, embed = [], embedder.encoder.embed

    def counting(images, kinds):
        if len(seen) + 1 == n:
            raise Killed
        seen.append(len(images))
        return embed(images, kinds)

    monkeypatch.setattr(embedder.encoder, "embed", counting)
    return seen


def test_a_killed_extraction_goes_on(checkpoint, cells, tmp_path, parts_of_two, monkeypatch):
    def embedder():
        return Embedder(checkpoint, image_size=28, batch_size=2)

    file = tmp_path / "out" / "features.h5"
    expected = embedder().features_of(cells, tmp_path / "whole.h5")
    first = embedder()
    seen = kill_in_batch(first, 4, monkeypatch)
    with pytest.raises(Killed):
        first.features_of(cells, file)
    assert seen == [2, 2, 2]
    assert not file.exists()
    assert [path.name for path in file.parent.iterdir()] == [".features.h5.parts"]
    second = embedder()
    seen = kill_in_batch(second, None, monkeypatch)
    found = second.features_of(cells, file)
    assert seen == [1]  # the seventh image
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.paths == expected.paths
    assert [path.name for path in file.parent.iterdir()] == ["features.h5"]


def other_weights(checkpoint, cells):
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["norm.bias"] += 1
    torch.save(content, checkpoint)


def other_image(checkpoint, cells):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(cells.paths[1])


def other_order(checkpoint, cells):
    cells.paths.reverse()


@pytest.mark.parametrize(
    ("change", "settings", "n_again"),
    [
        (None, {}, 1),
        (None, {"precision": "bf16"}, 7 + 2 * 2),  # the first batch is compared with fp32
        (None, {"image_size": 42}, 7),
        (None, {"kinds": ["mean"]}, 7),
        (other_weights, {}, 7),
        (other_order, {}, 7),
        (other_image, {}, 3),  # its part of two, and the one that was missing
    ],
)
def test_parts_of_something_else_are_not_used(
    change, settings, n_again, checkpoint, cells, tmp_path, parts_of_two, monkeypatch
):
    first = Embedder(checkpoint, image_size=28, batch_size=2)
    kill_in_batch(first, 4, monkeypatch)
    with pytest.raises(Killed):
        first.features_of(cells, tmp_path / "features.h5")
    if change:
        change(checkpoint, cells)
    second = Embedder(checkpoint, **{"image_size": 28, **settings})
    seen = kill_in_batch(second, None, monkeypatch)
    found = second.features_of(cells, tmp_path / "features.h5")
    assert sum(seen) == n_again
    fresh = second.extract(cells.paths)
    np.testing.assert_allclose(found.features, fresh.features, atol=1e-1 if "precision" in settings else 1e-5)


def test_a_damaged_part_is_named(checkpoint, cells, tmp_path, parts_of_two, monkeypatch):
    embedder = Embedder(checkpoint, image_size=28)
    kill_in_batch(embedder, 3, monkeypatch)
    with pytest.raises(Killed):
        embedder.features_of(cells, tmp_path / "features.h5")
    part = next((tmp_path / ".features.h5.parts").iterdir())
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="is missing or damaged .* remove the folder and start again"):
        Embedder(checkpoint, image_size=28).features_of(cells, tmp_path / "features.h5")
    assert not (tmp_path / "features.h5").exists()


WORKER = """
import json, sys
from dinov2 import distributed
from dinov2.eval import extract_features
from dinov2.eval.features import encoders, loop
from dinov2.utils.command import exit_code

loop.PART_SIZE = 2
enable, disable, embed = distributed.enable, distributed.disable, encoders.DinoEncoder.embed
distributed.disable = lambda: None  # one group serves both commands

def counting(self, images, kinds):
    if len(seen) == stop_after:
        raise ValueError("out of luck")
    seen.append(len(images))
    return embed(self, images, kinds)

encoders.DinoEncoder.embed = counting
results = []
for arguments, stop_after in json.loads(sys.argv[1]):
    seen = []
    results.append((exit_code(lambda: extract_features.main(arguments)), sum(seen)))
    distributed.enable = lambda *_: None
with open(f"results.{distributed.get_rank()}.json", "w") as file:
    json.dump(results, file)
disable()
"""


def test_two_processes_write_what_one_writes(checkpoint, images, tmp_path, parts_of_two, monkeypatch):
    """Up to rounding, which depends on the number of threads; what they had finished is not embedded again."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{path},{path.stem > '3'},p{i % 3}" for i, path in enumerate(images))
    Path("cells.csv").write_text(f"Image Path,Label,patient\n{rows}\n")
    images[3].write_bytes(b"no image")
    common = ["--checkpoint", str(checkpoint), "--data", "cells.csv", "--image-size", "28", "--device", "cpu"]
    common += ["--num-workers", "1", "--batch-size", "2", "--kinds", "cls", "last2+mean"]
    extract_features.main([*common, "--output-dir", "alone"])

    Path("worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    commands = [([*common, "--output-dir", "shared"], stop_after) for stop_after in (1, None)]
    done = subprocess.run(
        [*torchrun, "worker.py", json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(Path(f"results.{rank}.json").read_text()) for rank in range(2)]
    assert [first for first, _ in results] == [[2, 2], [2, 1]]  # both failed, after a part each
    assert "out of luck" in done.stderr
    # parts 2 and 3 were left, with two images and one
    assert [code for _, (code, _) in results] == [0, 0]
    assert sorted(n for _, (_, n) in results) == [1, 2]
    assert done.stdout.count("6 cells, 2 classes") == 1  # said by one of them
    with h5py.File("alone/features.h5") as alone, h5py.File("shared/features.h5") as shared:
        assert set(alone) == set(shared)
        for name in alone:
            if alone[name].dtype.kind == "f":
                np.testing.assert_allclose(alone[name][:], shared[name][:], atol=1e-5)
            else:
                np.testing.assert_array_equal(alone[name][:], shared[name][:])
        described = [{name: value for name, value in f.attrs.items() if name != "date"} for f in (alone, shared)]
        assert described[0] == described[1]
    assert os.listdir("shared") == ["features.h5"]
