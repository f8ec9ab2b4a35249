"""The command that embeds labelled cells: what it writes, and when it trusts what is there already."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.distributed import Launch
from dinov2.eval import explorer, knn
from dinov2.eval.extract_features import device_of, embedder_from, has_embedder, main, parse_arguments
from dinov2.eval.features import loop, read_features
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.results import read_predictions
from dinov2.models import build_backbone
from dinov2.utils.command import exit_code
from dinov2.utils.files import file_sha256

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with weights.pth, and cells/ with two classes of three images."""
    monkeypatch.chdir(tmp_path)
    save_weights(0)
    rng = np.random.default_rng(0)
    for name in ("blast", "monocyte"):
        os.makedirs(f"cells/{name}")
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(f"cells/{name}/{i}.png")
    return tmp_path


def save_weights(seed):
    torch.manual_seed(seed)
    settings = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 28, "block_chunks": 0}
    torch.save(build_backbone(settings).state_dict(), "weights.pth")


def extract(*flags):
    required = ["--checkpoint", "weights.pth", "--data", "cells", "--output-dir", "out", "--image-size", "28"]
    args = [*required, "--num-workers", "0", "--device", "cpu", *flags]
    main(args)
    file = parse_arguments(args).output_dir / "features.h5"
    return read_features(file) if file.exists() else None


def test_the_file_says_what_it_holds(work, capsys):
    found = extract("--batch-size", "4")
    assert "6 cells, 2 classes, dim 64" in capsys.readouterr().out
    assert found.features.shape == (6, 64)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.class_names == ["blast", "monocyte"]
    assert found.paths[4] == str(work / "cells" / "monocyte" / "1.png")  # absolute: it is read from other folders
    assert found.patients is None
    assert found.attributes["model"] == "ViT with dim 64, depth 1, 1 heads, patch 14"
    assert found.attributes["checkpoint_sha256"] == file_sha256("weights.pth")
    assert "28 px" in found.attributes["transform"]
    assert found.attributes["date"].startswith("20")


def test_the_same_features_are_not_extracted_again(work):
    first = extract()
    second = extract("--batch-size", "2")  # which changes speed alone
    assert second.attributes["date"] == first.attributes["date"]
    (work / "out" / "features.h5").unlink()
    (work / "cells" / "blast" / "1.png").write_bytes(b"")
    partial = extract()
    assert len(partial) == 5
    assert partial.unreadable == [str(work / "cells" / "blast" / "1.png")]
    time = (work / "out" / "features.h5").stat().st_mtime_ns
    extract()
    assert (work / "out" / "features.h5").stat().st_mtime_ns == time


def other_weights(work):
    save_weights(1)


def one_image_less(work):
    (work / "cells" / "blast" / "0.png").unlink()


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (other_weights, [], "checkpoint_sha256 is"),
        (one_image_less, [], "the images or their order differ: 6 there and 5 here"),
        (None, ["--image-size", "42"], "transform is .*28 px.* there and .*42 px.* here"),
        (None, ["--precision", "bf16"], "precision is 'fp32' there and 'bf16' here"),
    ],
)
def test_a_file_with_other_features_is_refused(change, flags, message, work):
    before = extract()
    if change:
        change(work)
    with pytest.raises(ValueError, match=message):
        extract(*flags)
    assert read_features("out/features.h5").attributes == before.attributes
    after = extract(*flags, "--overwrite")
    assert len(after) != len(before) or not np.array_equal(after.features, before.features)


def test_changed_labels_and_patients_are_noticed(work):
    def table(*columns):
        header = ["Image Path", "Label", "patient"][: 1 + len(columns)]
        rows = [f"cells/blast/{i}.png," + ",".join(c[i] for c in columns) for i in range(3)]
        (work / "cells.csv").write_text("\n".join([",".join(header), *rows]) + "\n")

    table("xxy", "pqr")
    extract("--data", "cells.csv")
    table("xyy", "pqr")
    with pytest.raises(ValueError, match="the labels differ"):
        extract("--data", "cells.csv")
    table("xxy", "pqq")
    with pytest.raises(ValueError, match="the patients differ"):
        extract("--data", "cells.csv")
    table("xxy")
    with pytest.raises(ValueError, match="the patients differ"):
        extract("--data", "cells.csv")


def test_cells_without_labels(work, capsys):
    rows = [f"cells/blast/{i}.png,p{i // 2}\n" for i in range(3)]
    (work / "new.csv").write_text("Image Path,patient\n" + "".join(rows))
    found = extract("--data", "new.csv")
    assert (len(found), found.has_labels, found.patients) == (3, False, ["p0", "p0", "p1"])
    extract("--data", "cells/blast", "--output-dir", "plain")
    same = read_features("plain/features.h5")
    assert (same.has_labels, same.patients) == (False, None)
    np.testing.assert_array_equal(same.features, found.features)
    extract("--data", "new.csv", "--layout", "genbloom", "--output-dir", "bags")
    assert sorted(path.name for path in Path("bags").glob("*.h5")) == ["p0.h5", "p1.h5"]
    command = ["--features", "plain/features.h5", "--output"]
    explorer.main([*command, "page.html", "--no-umap", "--num-workers", "1"])
    assert Path("page.html").is_file()
    assert exit_code(lambda: knn.main(["--features", "plain/features.h5", "--output-dir", "results"])) == 2
    assert "labels: the cells of 'plain/features.h5' have none" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_kept_to_the_end(work):
    name = os.fsdecode(b"cells/blast/f\xfcr.png")
    os.rename("cells/blast/0.png", name)
    found = extract("--output-dir", os.fsdecode(b"\xfc"))
    assert str(work / name) in found.paths
    features = os.fsdecode(b"\xfc/features.h5")
    knn.main(["--features", features, "--folds", "2", "--k", "1", "--output-dir", "results"])
    assert str(work / name) in read_predictions(Path("results/predictions_knn_1.csv")).keys
    explorer.main(["--features", features, "--predictions", "results/predictions_knn_1.csv", "--output", "page.html"])
    assert Path("page.html").is_file()


def test_after_a_full_disk_the_same_command_goes_on(work, monkeypatch):
    """A limit on the size of files stands for a full disk. The images are not embedded again."""
    for i in range(300):
        os.link("cells/blast/0.png", f"cells/blast/copy_{i}.png")
    monkeypatch.setattr(loop, "PART_SIZE", 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*out/features.h5"):
            extract()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(DinoEncoder, "embed", None)
    assert len(extract()) == 306
    assert not list(Path("out").glob(".*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
def test_cuda_that_is_not_there_is_named(work):
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        extract("--device", "cuda")


def launch_of(local_rank, launcher="torchrun"):
    return Launch(local_rank, 4, local_rank, 4, "localhost", 1234, launcher)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    args = parse_arguments(["--checkpoint", "c", "--data", "d", "--output-dir", "o"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(args) == "cuda"
    assert [device_of(args, launch_of(rank)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match="needs CUDA device 2, but there are only 2"):
        device_of(args, launch_of(2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of(args, launch_of(3, "slurm")) == "cuda:0"
    args.device = "cpu"
    assert device_of(args, launch_of(3)) == "cpu"


def test_other_encoders_and_kinds(work):
    extract("--kinds", "cls+mean", "mean")
    assert read_features("out/features.h5").kinds == ["cls+mean", "mean"]
    main(["--encoder", "pixels", "--data", "cells", "--output-dir", "pixels", "--num-workers", "0"])
    found = read_features("pixels/features.h5")
    assert found.features.shape == (6, 32 * 32 * 3)
    assert found.attributes["model"] == "pixels"
    assert found.attributes["image_size"] == "32"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --checkpoint --encoder is required"),
        (["--checkpoint", "c", "--encoder", "pixels"], "--encoder: not allowed with argument --checkpoint"),
        (["--encoder", "resnet50"], "'resnet50' is unknown; there are timm:<model>"),
        (["--checkpoint", "c", "--kinds", "cls", "pooled"], "'pooled' is unknown; there are cls, mean"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*flags, "--data", "d", "--output-dir", "o"])
    assert message in capsys.readouterr().err


def test_the_flags_name_a_network(work):
    required = ["--data", "d", "--output-dir", "o"]
    args = parse_arguments(["--encoder", "histogram", *required])
    assert has_embedder(args)
    assert embedder_from(args).encoder_name == "histogram"
    args.encoder = None
    assert not has_embedder(args)
    args.checkpoint = Path("weights.pth")
    assert has_embedder(args)
    assert embedder_from(args).image_size == 224
    assert (embedder_from(args).fp32_matmul, embedder_from(args).compiled) == ("fast", False)
    other = parse_arguments(["--encoder", "pixels", "--fp32-matmul", "exact", "--compile", *required])
    assert (embedder_from(other).fp32_matmul, embedder_from(other).compiled) == ("exact", True)
    args.encoder_weights = "untrained"
    with pytest.raises(ValueError, match="--encoder-weights belongs to --encoder"):
        embedder_from(args)


def test_help_as_a_script(tmp_path):
    script = REPOSITORY / "dinov2" / "eval" / "extract_features.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flags = "--checkpoint --data --output-dir --batch-size --num-workers --device --precision --image-size --overwrite "
    flags += "--encoder --encoder-weights --kinds --layout --fp32-matmul --compile"
    for flag in flags.split():
        assert flag in done.stdout
