"""README.md and docs/: links and names lead somewhere, commands take their arguments, examples give what they say."""

import contextlib
import http.server
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestCentroid

from dinov2.configs import dinov2_default_config
from dinov2.data.sample_cells import write_sample_cells
from dinov2.data.splits import make_folds
from dinov2.eval.features import Features, write_features
from dinov2.hub import load_backbone
from dinov2.hub.conversions import hugging_face_config, to_hugging_face
from dinov2.models import architecture, build_backbone
from dinov2.run.train import train as submit_train
from dinov2.train import train as train_command
from dinov2.utils.config import load_run_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
N_IMAGES = 5  # one more than the page takes for its batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page's reader has: images, a DinoBloom file, a run, a Hugging Face folder, a hub folder."""
    folder = tmp_path_factory.mktemp("reader")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = build_backbone({"arch": "dinov2_vits14", "layerscale": 1.0, "block_chunks": 0, "img_size": 224})
        tiny = build_backbone(
            {"arch": "vit_tiny", "depth": 1, "patch_size": 14, "layerscale": 1.0, "block_chunks": 0, "img_size": 28}
        )
    torch.save({"teacher": {f"backbone.{k}": v for k, v in small.state_dict().items()}}, folder / "DinoBloom-S.pth")
    rng = np.random.default_rng(0)
    for n in range(N_IMAGES):
        file = folder / "cells" / f"type{n % 2}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + n, 60, 3), dtype=np.uint8)).save(file)
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    # as if downloaded before
    shutil.copy(folder / "DinoBloom-S.pth", folder / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth")

    state, description = tiny.state_dict(), architecture(tiny)
    run = folder / "runs" / "first" / "eval" / "training_7"
    run.mkdir(parents=True)
    backbone = {f"backbone.{k}": v for k, v in state.items()}
    torch.save({"teacher": backbone, "architecture": description}, run / "teacher_checkpoint.pth")
    torch.save(state, folder / "cells.pth")
    (folder / "dinov2-small").mkdir()
    save_file(to_hugging_face(state), folder / "dinov2-small" / "model.safetensors")
    config = {"model_type": "dinov2", **hugging_face_config(description)}
    (folder / "dinov2-small" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The URL of the folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def after(folder, server):
    """Runs the page from top to bottom, as it stands but for places, the GPU and a network too large to make here.

    Gives a function: of a text that one block alone has, to all names as that block left them, with what it printed
    under "printed" and its lines under "code".
    """
    text = PAGE.read_text(encoding="utf-8")
    replacements = {
        "https://example.org": server,
        "path/to/clone": str(ROOT),
        "dinobloom_b": "dinov2_vits14",
        '"cuda"': '"cpu"',
        "num_workers=8": "num_workers=0",
    }
    assert [there for there in replacements if there not in text] == []
    names: dict = {}
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.hub, "_hub_dir", str(folder / "hub"))
        patch.setenv("no_proxy", "*")
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            code = "\n" * text.count("\n", 0, block.start(1)) + block[1]  # a traceback then names the page's line
            for there, here in replacements.items():
                code = code.replace(there, here)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, str(PAGE), "exec"), names)
            results.append({**names, "printed": printed.getvalue(), "code": block[1].strip().splitlines()})

    def find(having: str) -> dict:
        (found,) = [result for result in results if having in "\n".join(result["code"])]
        return found

    find.all = results
    return find


def test_the_ten_lines_embed_a_folder(after, folder):
    page = after("np.savez")
    assert len([line for line in page["code"] if line and not line.startswith(("import", "from"))]) <= 10
    assert [path.name for path in page["paths"]] == [f"{n}.png" for n in (0, 2, 4, 1, 3)]
    with np.load(folder / "features.npz") as stored:
        assert stored["features"].shape == (N_IMAGES, 384)
        assert stored["features"].dtype == np.float32
        assert stored["paths"].tolist() == [str(path) for path in page["paths"]]
        model = load_backbone(folder / "DinoBloom-S.pth")
        with torch.inference_mode():
            alone = model(model.transform(folder / stored["paths"][3])[None])[0]
        np.testing.assert_allclose(stored["features"][3], alone.numpy(), atol=1e-4)


def test_comments_tell_the_shapes(after):
    n_checked = 0
    for page in after.all:
        for line in page["code"]:
            if match := re.match(r"(\w+(?:, \w+)*) = .*#(.*)", line):
                shapes = re.findall(r"\[([\dN, ]+)\]", match[2])
                for name, shape in zip(match[1].split(", "), shapes, strict=False):
                    wanted = tuple(N_IMAGES if side == "N" else int(side) for side in shape.split(", "))
                    assert tuple(page[name].shape) == wanted, line
                    n_checked += 1
    assert n_checked >= 8


def test_comments_tell_what_is_printed(after):
    for text in ("model.transform.mean", "img_size=448"):
        page = after(text)
        told = [line.partition("# ")[2] for line in page["code"] if line.startswith("print(")]
        assert page["printed"].splitlines() == told


def test_the_attention_is_a_share_of_what_the_network_reads(after):
    page = after("cls_attention")
    for maps in (page["maps"], page["routes"]):
        assert (maps >= 0).all()
        assert (maps.sum(dim=(-2, -1)) < 1).all()  # the rest is the CLS token's own


def test_weights_from_elsewhere_are_the_same_network(after):
    page = after("by_url")
    assert page["by_name"].embed_dim == 384
    for other in ("by_url", "from_hub"):
        assert torch.equal(page["trained"].blocks[0].attn.qkv.weight, page[other].blocks[0].attn.qkv.weight)
    assert after("torch.hub.load")["model"].transform.image_size == 518


def test_lower_precision_and_many_images(after):
    page = after("autocast")
    with torch.inference_mode():
        exact = page["model"](page["batch"])
    deviation = (page["features"] - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < deviation.max() < 0.03  # the page says up to about 1 %
    many = after("extract(")
    assert many["kept_paths"] == many["paths"]
    assert many["features"].shape == many["extraction"].by_kind["mean"].shape == (N_IMAGES, 384)
    np.testing.assert_allclose(many["features"][:4], page["features"].numpy(), atol=0.2)


# --- all pages ------------------------------------------------------------------------------------------------------

PAGES = sorted((ROOT / "docs").rglob("*.md"))
READERS_PAGES = [ROOT / "README.md", *(page for page in PAGES if page.parent.name != "benchmarks")]
# commands of the examples that are made by the reader, or by others
OWN_FILES = ("train_with_agreement.py", "nearest_mean.py")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub and MkDocs give to headings without punctuation but hyphens."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^()\s]+)\)", without_blocks(page)):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def test_the_site_is_built_and_fetches_nothing(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', html)
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="(?:https?:)?//', html)


def commands(page: Path) -> list[list[str]]:
    """Every command line in a page's blocks of bash, as words."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
            elif words[:1] == ["sbatch"]:
                batch = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
                assert (ROOT / words[batch]).is_file(), line
                words = ["python", "dinov2/train/train.py", *words[batch + 1 :]]
            if words:
                found.append(words)
    return found


def options(script: str) -> set[str]:
    """The flags in a script's --help."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])  # as `python <script>` has it
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", told.getvalue()))


@pytest.mark.parametrize("page", READERS_PAGES, ids=name_of)
def test_commands_take_what_the_page_gives_them(page):
    for words in commands(page):
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        if words[0] != "python":
            assert words[0] in ("bash", "git", "hf", "pip", "source"), words
            continue
        script, arguments = words[1], words[2:]
        if script in OWN_FILES:
            script = {"nearest_mean.py": "dinov2/eval/knn.py"}.get(script, "dinov2/train/train.py")
        assert (ROOT / script).is_file(), words
        if script.endswith("train/train.py"):
            check_training(script, arguments)
        else:
            known = options(script)
            if script.startswith("dinov2/run/eval/"):  # which passes the other flags to the evaluation
                known |= options(script.replace("dinov2/run/", "dinov2/"))
            assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known, words


def check_training(script: str, arguments: list[str]) -> None:
    if script.startswith("dinov2/run/"):
        arguments = submit_train.build_parser().parse_known_args(arguments)[1]
    args = train_command.parse_arguments(arguments)
    cfg = load_run_config(str(ROOT / args.config_file), args.overrides)
    assert cfg.train.dataset_path.startswith("HemaStandardDataset:root=")


def test_keys_and_files_that_pages_name_exist():
    defaults = OmegaConf.to_container(dinov2_default_config)
    sections = "|".join(key for key, value in defaults.items() if isinstance(value, dict))
    n_keys = 0
    for page in READERS_PAGES:
        for code in re.findall(r"`([^`\n]+)`", without_blocks(page)):
            for word in re.findall(rf"(?<![\w./-])(?:{sections})\.[A-Za-z_][\w.]*", code):
                if word.endswith((".py", ".yaml", ".md")):
                    continue
                value = defaults
                for part in word.split("."):
                    assert part in value, (page.name, word)
                    value = value[part]
                n_keys += 1
            if re.fullmatch(r"(?:dinov2|scripts|tests|notebooks)/[\w./-]+", code):
                assert (ROOT / code).exists(), (page.name, code)
    assert n_keys > 60


@pytest.mark.parametrize("name", ["evaluation.md", "design.md"])
def test_short_examples_run(name, capsys):
    for block in blocks(ROOT / "docs" / name, "python"):
        told = [line.partition("  # ")[2] for line in block.splitlines() if line.startswith("print(")]
        exec(compile(block, name, "exec"), {})
        assert capsys.readouterr().out.splitlines() == told


def test_the_walk_names_each_file_once():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walk = page.split("<!-- walk: begin -->")[1].split("<!-- walk: end -->")[0]
    files = re.findall(r"^\d+\. `([\w/.]+)`: ", walk, re.MULTILINE)
    assert files[0] == "dinov2/train/train.py"
    assert len(files) == len(set(files)) == len(walk.split("\n")) - 2 <= 15
    assert all((ROOT / file).is_file() for file in files)


def test_the_example_of_a_loss_trains(tmp_path):
    """A copy of the package with the page's three edits, and nothing else, trains with the new loss."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    loss, on_top, line = blocks(ROOT / "docs" / "extending.md", "python")[:3]
    (key,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "dinov2", tmp_path / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dinov2/loss/view_distance_loss.py").write_text(loss)
    defaults = tmp_path / "dinov2/configs/ssl_default_config.yaml"
    defaults.write_text(defaults.read_text().replace("\ndino:\n", f"\ndino:\n{key}", 1))
    step = tmp_path / "dinov2/train/ssl_meta_arch.py"
    step.write_text(
        step.read_text()
        .replace("from dinov2.models import", f"{on_top}from dinov2.models import", 1)
        .replace("        return terms\n", f"{line}        return terms\n", 1)
    )
    write_sample_cells(tmp_path / "cells", n_train=16, n_probe_train=0, n_probe_test=0, n_patients=0, size=64)
    small = ["student.depth=1", "train.batch_size_per_gpu=4", "crops.global_crops_size=28", "train.image_size=32"]
    subprocess.run(
        [
            *(sys.executable, "dinov2/train/train.py", "--output-dir", str(tmp_path), "--name", "run"),
            *("--config-file", "dinov2/configs/train/small_with_prototypes.yaml"),
            *(*small, "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=2", "dino.view_distance_loss_weight=0.1"),
            *("optim.warmup_epochs=0", "train.num_workers=0", "train.log_period=1"),
            f"train.dataset_path=HemaStandardDataset:root={tmp_path}/cells/lists",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        timeout=300,
    )
    rows = [json.loads(row) for row in (tmp_path / "run/training_metrics.json").read_text().splitlines()]
    assert rows
    assert all(0 < row["view_distance_loss"] <= 4 for row in rows)
    weighted = {"dino_global_crops_loss", "dino_local_crops_loss", "koleo_loss", "ibot_loss", "view_distance_loss"}
    assert weighted <= rows[0].keys() | {"dino_local_crops_loss"}
    names: dict = {}
    exec(compile(loss, "view_distance_loss.py", "exec"), names)
    apart = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, -1.0]])  # views equal; opposite: distance 4
    assert names["ViewDistanceLoss"]()(apart).item() == pytest.approx(2.0)


def test_the_example_of_a_protocol_runs_as_one_of_all_and_alone(tmp_path):
    """A copy of the package with the page's file and its lines in evaluate.py, and nothing else."""
    code, on_top, line = blocks(ROOT / "docs" / "extending.md", "python")[-3:]
    name = re.match("# (.*)", code)[1]
    shutil.copytree(ROOT / "dinov2", tmp_path / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / name).write_text(code)
    command = tmp_path / "dinov2/eval/evaluate.py"
    text = command.read_text().replace("from dinov2.eval import", f"{on_top}from dinov2.eval import", 1)
    command.write_text(text.replace("PROTOCOLS = {\n", f"PROTOCOLS = {{\n{line}", 1))
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 10)
    stored = Features(
        (rng.normal(size=(30, 4)) + 5 * np.eye(3, 4)[labels]).astype(np.float32),
        labels,
        ["blast", "lymphocyte", "monocyte"],
        [f"/cells/{n}.png" for n in range(30)],
    )
    write_features(tmp_path / "features.h5", stored)

    def run(*command):
        subprocess.run(
            [sys.executable, *command, "--features", "features.h5", "--output-dir", "results", "--few-shot", "2"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            check=True,
            timeout=300,
        )
        return json.loads((tmp_path / "results" / "results.json").read_text())["results"]

    reference = NearestCentroid()
    right = sum(
        (reference.fit(stored.features[train], labels[train]).predict(stored.features[test]) == labels[test]).sum()
        for train, test in make_folds(labels, None, 5, 0)
    )
    among_all = run("dinov2/eval/evaluate.py", "--protocols", "nearest-mean", "knn")
    assert list(among_all) == ["nearest-mean", "knn_1", "knn_20"]
    assert among_all["nearest-mean"]["model"]["accuracy"] == pytest.approx(right / 30)
    assert right > 27
    assert run(name)["model"]["nearest-mean_euclidean"] == among_all["nearest-mean"]["model"]
