"""Weights from repositories of the Hugging Face hub, and exports into them: a server on this machine stands for it."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from dinov2.hub import conversions, export, hugging_face
from dinov2.hub.backbones import ENTRY_POINTS, load_backbone, trained_image_size
from dinov2.hub.sources import checkpoint_file, published_name, resolve_weights
from dinov2.models import build_backbone

TINY = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "img_size": 56, "block_chunks": 0}
COMMIT = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Speaks the parts of the hub's interface that downloads need, for the repositories {name: {path: bytes}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}  # {repository: (status, X-Error-Code)}
        self.downloads: list[str] = []
        self.statuses: list[int] = []  # of the next answers

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send(self.server.statuses.pop(0), b"")

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        is_api, repository, kind, revision, file = match.groups()
        content = self.server.repositories.get(repository)
        if self.server.statuses:
            self.send(self.server.statuses.pop(0), b"")
        elif repository in self.server.refused:
            status, code = self.server.refused[repository]
            self.send(status, b"", {"X-Error-Code": code})
        elif content is None:
            self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", "v1", COMMIT):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif is_api and kind == "tree":
            files = [{"type": "file", "path": name, "size": len(v), "oid": sha(v)} for name, v in content.items()]
            self.send(200, json.dumps(files).encode())
        elif is_api:
            siblings = [{"rfilename": name} for name in content]
            about = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
            self.send(200, json.dumps(about).encode())
        else:
            if self.command == "GET":
                self.server.downloads.append(file)
            self.send(200, content[file], {"ETag": f'"{sha(content[file])}"'})

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def sha(content):
    return hashlib.sha1(content).hexdigest()


def use_server(monkeypatch, url):
    """The client reads its environment once, so its constants are replaced."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and an empty cache."""
    monkeypatch.setenv("no_proxy", "*")
    with Hub() as server:
        use_server(monkeypatch, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def weights(tmp_path, name="pytorch_model_b.bin", settings=None):
    """The bytes of a file of a tiny network, in DinoBloom's layout or as safetensors."""
    state = build_backbone({**TINY, **(settings or {})}).state_dict()
    if name.endswith(".safetensors"):
        save_file(conversions.to_timm(state), tmp_path / name)
    else:
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / name)
    return (tmp_path / name).read_bytes()


def test_a_repository_is_a_checkpoint(hub, tmp_path):
    content = weights(tmp_path)
    hub.repositories["lab/cells"] = {"README.md": b"# a", "pytorch_model_b.bin": content, "training.log": b"x" * 9}
    file = checkpoint_file("hf-hub:lab/cells")
    assert file.name == "pytorch_model_b.bin"
    assert file.read_bytes() == content
    assert hub.downloads == ["pytorch_model_b.bin"]  # nothing else
    assert load_backbone("hf-hub:lab/cells", 56).embed_dim == 64
    assert load_backbone(Path("hf-hub:lab/cells@v1"), 56).embed_dim == 64
    assert resolve_weights(f"hf-hub:lab/cells/pytorch_model_b.bin@{COMMIT}") == file
    assert hub.downloads == ["pytorch_model_b.bin"]  # once


def test_weights_of_a_repository_are_chosen_without_downloading_the_others(hub, tmp_path):
    content = weights(tmp_path)
    files = {f"pytorch_model_{letter}.bin": content for letter in "sbl"}
    hub.repositories["MarrLab/DinoBloom"] = files
    with pytest.raises(
        ValueError, match=r"has 3 networks, .*for instance hf-hub:MarrLab/DinoBloom/pytorch_model_b.bin"
    ):
        load_backbone("hf-hub:MarrLab/DinoBloom")
    assert not hub.downloads
    file = checkpoint_file("hf-hub:MarrLab/DinoBloom/pytorch_model_s.bin")
    assert hub.downloads == ["pytorch_model_s.bin"]
    assert published_name(file, "0" * 64) == "dinobloom_s"


def test_a_folder_with_several_networks(tmp_path):
    content = weights(tmp_path)
    (tmp_path / "notes.bin").write_bytes(content)
    assert checkpoint_file(tmp_path) == tmp_path / "pytorch_model_b.bin"
    (tmp_path / "pytorch_model_s.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"2 networks, .*; choose one, .*{tmp_path}/pytorch_model_b\.bin"):
        checkpoint_file(tmp_path)


def test_the_preferred_file_and_its_description_are_downloaded(hub, tmp_path):
    content = weights(tmp_path, "model.safetensors")
    config = json.dumps({"architecture": "vit", "pretrained_cfg": {"input_size": [3, 56, 56]}}).encode()
    files = {"model.safetensors": content, "config.json": config, "pytorch_model.bin": b"x"}
    hub.repositories["lab/cells"] = {**files, **{f"timm/{name}": value for name, value in files.items()}}
    assert load_backbone("hf-hub:lab/cells").transform.image_size == 56
    assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    assert load_backbone("hf-hub:lab/cells/timm/").transform.image_size == 56
    assert load_backbone("hf-hub:lab/cells/timm/model.safetensors").transform.image_size == 56


def test_weights_in_several_files(hub, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.repositories["lab/cells"] = {**files, "model-of-others.safetensors": b""}
    assert load_backbone("hf-hub:lab/cells", 56).n_blocks == 2
    assert sorted(hub.downloads) == sorted(files)


def test_the_cache_serves_without_a_network(hub, tmp_path, monkeypatch):
    hub.repositories["lab/cells"] = {"pytorch_model_b.bin": weights(tmp_path), "README.md": b"# a"}
    file = checkpoint_file("hf-hub:lab/cells")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert checkpoint_file("hf-hub:lab/cells") == file
        with pytest.raises(ConnectionError, match=r"hf-hub:lab/others: not in the cache .*[Oo]ffline.*pass the path"):
            checkpoint_file("hf-hub:lab/others")
    use_server(monkeypatch, "http://127.0.0.1:9")  # where nobody answers
    assert checkpoint_file("hf-hub:lab/cells/pytorch_model_b.bin") == file
    with pytest.raises(ConnectionError, match=r"not in the cache .* cannot be downloaded \(.*refused\)"):
        checkpoint_file("hf-hub:lab/others")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("hf-hub:lab/absent", FileNotFoundError, r"http://\S+/lab/absent does not exist, or it is private"),
        (
            "hf-hub:lab/gated",
            ConnectionError,
            r"open only to accounts that were granted access; ask for it on that page",
        ),
        ("hf-hub:lab/closed", ConnectionError, r"refuses access \(403\); run `hf auth login`"),
        ("hf-hub:lab/cells@v9", FileNotFoundError, "has no such revision"),
        ("hf-hub:lab/cells/small.bin", FileNotFoundError, r"lab/cells has no 'small.bin'; it has cells.pth, notes.txt"),
        ("hf-hub:lab/cells", FileNotFoundError, "no file of a known name .*for instance hf-hub:lab/cells/cells.pth"),
        ("hf-hub:cells", ValueError, r"have the form hf-hub:<owner>/<name>\[/<file or folder>\]"),
        ("hf-hub:lab/..cells--", ValueError, r"checkpoint hf-hub:lab/..cells--: "),
    ],
)
def test_errors_in_one_sentence(source, kind, message, hub):
    hub.repositories["lab/cells"] = {"cells.pth": b"x", "notes.txt": b"y"}
    hub.refused = {"lab/gated": (403, "GatedRepo"), "lab/closed": (403, "")}
    with pytest.raises(kind, match=message):
        load_backbone(source)


def test_a_gated_repository_lists_its_files(hub, monkeypatch):
    hub.repositories["lab/gated"] = {"pytorch_model_b.bin": b"x"}
    listed = hugging_face.HfApi().model_info("lab/gated")
    monkeypatch.setattr(hugging_face.HfApi, "model_info", lambda *_, **__: listed)
    hub.refused = {"lab/gated": (401, "GatedRepo")}
    with pytest.raises(ConnectionError, match="open only to accounts that were granted access"):
        checkpoint_file("hf-hub:lab/gated")


def test_a_server_that_fails(hub):
    hub.repositories["lab/cells"] = {"pytorch_model_b.bin": b"x"}
    hub.statuses = [500] * 20
    with pytest.raises(ConnectionError, match=r"cannot be downloaded \(.*500.*try again, or download it elsewhere"):
        checkpoint_file("hf-hub:lab/cells")


def test_the_clients_environment_is_used(hub, tmp_path):
    """As it is at the start of a command."""
    hub.repositories["lab/cells"] = {"pytorch_model_b.bin": weights(tmp_path)}
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    code = "from dinov2.hub import resolve_weights; print(resolve_weights('hf-hub:lab/cells'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(str(tmp_path / "home")), run.stderr


def test_torch_hub_takes_such_names(hub, tmp_path):
    hub.repositories["lab/cells"] = {"pytorch_model_b.bin": weights(tmp_path)}
    with pytest.raises(ValueError, match=r"dinobloom_b: .*holds a ViT with dim 64"):
        ENTRY_POINTS["dinobloom_b"](weights="hf-hub:lab/cells")


# --- uploads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def export_to(tmp_path, monkeypatch):
    """Exports a tiny network to tmp_path/out with a token and these flags; returns the exit code."""
    weights(tmp_path, "net.bin")
    flags = ["--checkpoint", str(tmp_path / "net.bin"), "--output-dir", str(tmp_path / "out"), "--formats", "pth"]
    monkeypatch.setattr(hugging_face, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(export, "setup_logging", lambda: None)  # so that pytest sees the log
    return lambda *more: export.main([*flags, "--image-size", "56", *more])


def test_an_export_is_uploaded_whole_and_privately(export_to, tmp_path, monkeypatch, caplog):
    calls = []

    class Api:
        def create_repo(self, name, **settings):
            calls.append((name, settings))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(hugging_face, "HfApi", Api)
    caplog.set_level("INFO", logger="dinov2")
    assert export_to("--push-to-hub", "lab/cells") == 0
    files = ["README.md", "backbone.pth", "sha256sums.txt"]
    assert calls == [("lab/cells", {"private": True, "exist_ok": True}), ("lab/cells", files)]
    assert "uploaded to https://huggingface.co/lab/cells" in caplog.text
    assert export_to("--push-to-hub", "lab/cells", "--public", "--overwrite") == 0
    assert calls[2] == ("lab/cells", {"private": False, "exist_ok": True})


def test_an_export_that_was_uploaded_is_a_checkpoint(export_to, hub, tmp_path):
    assert export_to() == 0
    hub.repositories["lab/cells"] = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert load_backbone("hf-hub:lab/cells").transform.image_size == 56
    assert hub.downloads == ["backbone.pth"]


@pytest.mark.parametrize("status", [403, 500, None])
def test_the_export_is_kept_if_the_upload_fails(status, export_to, hub, tmp_path, monkeypatch, caplog):
    hub.statuses = [status] * 20
    if status is None:
        use_server(monkeypatch, "http://127.0.0.1:9")
    assert export_to("--push-to-hub", "lab/cells") == 2
    assert re.search(r"--push-to-hub lab/cells: not uploaded \(.+\); the export is whole in", caplog.text)
    assert "hf_secret" not in caplog.text
    assert load_backbone(tmp_path / "out").embed_dim == 64


def test_an_upload_that_cannot_work_is_an_error_before_the_export(export_to, tmp_path, monkeypatch, caplog):
    assert export_to("--push-to-hub", "cells") == 2
    monkeypatch.setattr(hugging_face, "get_token", lambda: None)
    assert export_to("--push-to-hub", "lab/cells") == 2
    assert "--push-to-hub cells: it is no repository on the Hugging Face hub; give <owner>/<name>" in caplog.text
    assert "no access token of the Hugging Face hub here; run `hf auth login` or set HF_TOKEN" in caplog.text
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        export_to("--public")


# --- networks of timm -----------------------------------------------------------------------------------------------


def timm_folder(folder, grid, stated, tag="", **settings):
    """A folder of timm with position embeddings for a grid of patches, whose config.json states a size in pixels."""
    folder.mkdir(parents=True)
    weights(folder, "model.safetensors", {"img_size": grid * 14, **settings})
    config = {"architecture": "vit_small_patch14_dinov2", "pretrained_cfg": {"input_size": [3, stated, stated]}}
    config["pretrained_cfg"]["tag"] = tag
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CACHED = "models--1aurent--vit_base_patch14_224.dinobloom/snapshots/0123"


@pytest.mark.parametrize(
    ("name", "grid", "stated", "tag", "expected", "reason"),
    [
        ("timm", 16, 224, "", 224, ""),
        ("timm", 37, 518, "lvd142m", 518, ""),
        ("dinobloom/timm", 37, 518, "", 518, ""),  # a folder above says nothing
        ("timm", 16, 518, "", 224, "for images of 224 px, for which its position embeddings are, not of 518 px"),
        ("timm", 18, 256, "", 256, ""),  # 18 patches of 14 px fit into 256
        ("dinobloom-b", 37, 518, "", 224, "for images of 224 px, at which DinoBloom was trained, not of 518 px"),
        (CACHED, 37, 518, "", 224, "at which DinoBloom was trained"),
        ("timm", 37, 518, "dinobloom", 224, "at which DinoBloom was trained"),
        ("timm", 37, 224, "dinobloom", 224, ""),
        ("dinobloom-448", 32, 448, "", 448, ""),
    ],
)
@pytest.mark.parametrize("n_registers", [0, 4])
def test_the_size_of_a_timm_network(name, grid, stated, tag, expected, reason, n_registers, tmp_path, caplog):
    folder = timm_folder(tmp_path / name, grid, stated, tag, num_register_tokens=n_registers)
    assert trained_image_size(folder) == expected
    if expected % 14 == 0:
        with caplog.at_level("INFO", logger="dinov2"):
            assert load_backbone(folder).pos_embed.shape[1] == 1 + (expected // 14) ** 2
        assert reason in caplog.text
        assert ("config.json says" in caplog.text) == bool(reason)
