import numpy as np
import pytest
from PIL import Image

from dinov2.eval import explorer
from dinov2.eval.explorer import main, parse_arguments
from dinov2.eval.features import Features, write_features


def test_the_command_writes_one_page_of_several_files(tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cells = Features(
            np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32),
            np.arange(9) % 3,
            ["a", "b", "c"],
            [str(tmp_path / "red.png")] * 9,
            others={"mean": np.ones((9, 2), np.float32)},
        )
        write_features(tmp_path / name / "features.h5", cells)
    files = [str(tmp_path / "first" / "features.h5"), f"Zweite={tmp_path / 'second' / 'features.h5'}"]
    output = tmp_path / "out" / "explorer.html"
    main(["--features", *files, "--kind", "mean", "--no-umap", "--title", "Two sets", "--output", str(output)])
    assert "18 cells" in capsys.readouterr().out
    html = output.read_text(encoding="utf-8")
    assert "<h1>Two sets</h1>" in html
    assert '"name": "first"' in html  # the folder, as both files have one name
    assert '"name": "Zweite"' in html
    assert "features of kind mean with 2 numbers" in html
    assert "cannot be read" not in html


@pytest.mark.parametrize("flags", [["--thumbnail-size", "4"], ["--seed", "-1"], ["--max-cells", "0"]])
def test_wrong_flags_end_the_command(flags):
    with pytest.raises(SystemExit):
        parse_arguments(["--features", "x.h5", "--output", "x.html", *flags])


def test_umap_without_umap_learn_ends_the_command(monkeypatch, capsys):
    monkeypatch.setattr(explorer, "has_umap", lambda: False)
    with pytest.raises(SystemExit):
        parse_arguments(["--features", "x.h5", "--umap", "--output", "x.html"])
    assert "pip install umap-learn" in capsys.readouterr().err
