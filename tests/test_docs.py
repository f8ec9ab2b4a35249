"""docs/python.md: its code runs on weights and pictures made here, and gives what its comments say."""

import contextlib
import http.server
import io
import json
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinov2.hub import load_backbone
from dinov2.hub.conversions import hugging_face_config, to_hugging_face
from dinov2.models import architecture, build_backbone

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
N_PICTURES = 5  # one more than the page takes for its batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page's reader has: pictures, a DinoBloom file, a run, a Hugging Face folder, a hub folder."""
    folder = tmp_path_factory.mktemp("reader")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = build_backbone({"arch": "dinov2_vits14", "layerscale": 1.0, "block_chunks": 0, "img_size": 224})
        tiny = build_backbone(
            {"arch": "vit_tiny", "depth": 1, "patch_size": 14, "layerscale": 1.0, "block_chunks": 0, "img_size": 28}
        )
    torch.save({"teacher": {f"backbone.{k}": v for k, v in small.state_dict().items()}}, folder / "DinoBloom-S.pth")
    rng = np.random.default_rng(0)
    for n in range(N_PICTURES):
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
        assert stored["features"].shape == (N_PICTURES, 384)
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
                    wanted = tuple(N_PICTURES if side == "N" else int(side) for side in shape.split(", "))
                    assert tuple(page[name].shape) == wanted, line
                    n_checked += 1
    assert n_checked >= 9


def test_comments_tell_what_is_printed(after):
    for text in ("model.transform.mean", "img_size=448"):
        page = after(text)
        told = [line.partition("# ")[2] for line in page["code"] if line.startswith("print(")]
        assert page["printed"].splitlines() == told


def test_the_attention_is_that_of_the_network(after):
    page = after("cls_attention")
    attended = []
    hook = page["attn"].proj.register_forward_hook(lambda module, inputs, output: attended.append(inputs[0]))
    with torch.inference_mode():
        page["model"](page["batch"])
    hook.remove()
    torch.testing.assert_close((page["attention"] @ page["value"]).transpose(1, 2).flatten(2), attended[0])


def test_weights_from_elsewhere_are_the_same_network(after):
    page = after("by_url")
    assert page["by_name"].embed_dim == 384
    for other in ("by_url", "from_hub"):
        assert torch.equal(page["trained"].blocks[0].attn.qkv.weight, page[other].blocks[0].attn.qkv.weight)
    assert after("torch.hub.load")["model"].transform.image_size == 518


def test_lower_precision_and_many_pictures(after):
    page = after("autocast")
    with torch.inference_mode():
        exact = page["model"](page["batch"])
    deviation = (page["features"] - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < deviation.max() < 0.03  # the page says up to about 1 %
    found = after("extract(")
    assert found["kept_paths"] == found["paths"]
    assert found["features"].shape == found["found"].of_kinds["mean"].shape == (N_PICTURES, 384)
    np.testing.assert_allclose(found["features"][:4], page["features"].numpy(), atol=0.2)
