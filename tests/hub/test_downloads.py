"""Weights by name and URL: one whole, checked download, from a server on this machine."""

import errno
import fcntl
import hashlib
import http.server
import json
import multiprocessing
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from dinov2.data.datasets import HemaStandardDataset
from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.eval.extract_features import embedder_from, parse_arguments
from dinov2.hub.backbones import load_backbone
from dinov2.hub.sources import RELEASES, resolve_weights
from dinov2.models import build_backbone
from dinov2.utils import files as files_module
from dinov2.utils.command import error_text
from dinov2.utils.config import load_run_config

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Gives CONTENT under every path but /absent; what tests change stands in its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.requests: list[str] = []
        self.statuses: list[int] = []  # answers to the next requests; then it works
        self.cuts: list[int] = []  # bytes after which the next connections are cut
        self.delay = 0.0  # seconds before each answer
        self.version = ""  # the ETag of its content, which can then be asked for in ranges
        self.ranges: list[str] = []  # that were asked for
        self.silence_after: int | None = None  # bytes after which nothing comes until `speak` is set
        self.speak = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that are killed are part of the tests."""


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        time.sleep(server.delay)
        if server.statuses or urlsplit(self.path).path.endswith("/absent"):
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        body, start = server.content, 0
        if server.version and self.headers.get("If-Range") == server.version:
            server.ranges.append(self.headers["Range"])
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        body = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.version:
            self.send_header("ETag", server.version)
        self.end_headers()
        if server.silence_after is not None:
            self.wfile.write(body[: server.silence_after])
            server.speak.wait(30)
            return
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.speak.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty torch hub folder; no proxy between the tests and their server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(files_module, "PAUSES", (0.0, 0.0))
    return tmp_path / "torch" / "hub" / "checkpoints"


def left_behind(cache):
    """Files in the cache, but for locks."""
    return [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


@pytest.fixture
def release(server, monkeypatch):
    """A release without a published checksum, on the test's server."""
    monkeypatch.setenv("DINOV2_RELEASES_URL", f"{server.url}/mirror/")
    return RELEASES["dinov2_vitb14"]


def test_names_are_the_published_files(cache, monkeypatch):
    for variable in ("DINOV2_RELEASES_URL", "DINOBLOOM_RELEASES_URL"):
        monkeypatch.delenv(variable, raising=False)
    assert RELEASES["dinov2_vitl14_reg"].url == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"
    )
    assert RELEASES["dinobloom_g"].url == "https://zenodo.org/records/10908163/files/DinoBloom-G.pth?download=1"
    assert RELEASES["dinobloom_g"].file == cache / "DinoBloom-G.pth"
    assert RELEASES["dinov2_vits14"].file == cache / "dinov2_vits14_pretrain.pth"  # where torch.hub puts it, too
    assert len(RELEASES) == 12


def test_a_name_is_downloaded_once(server, release, cache, capsys):
    file = resolve_weights("dinov2_vitb14")
    assert file == cache / "dinov2_vitb14_pretrain.pth"
    assert file.read_bytes() == CONTENT
    assert re.search(r"dinov2_vitb14_pretrain\.pth\S*: .*0\.98M", capsys.readouterr().err)  # the progress bar
    assert resolve_weights("dinov2_vitb14") == file
    assert server.requests == ["/mirror/dinov2_vitb14/dinov2_vitb14_pretrain.pth"]
    assert resolve_weights(release.url) == file  # the same by its URL
    assert len(server.requests) == 1


def test_urls_with_the_same_last_part_do_not_share_a_file(server):
    first, second = (resolve_weights(f"{server.url}/{run}/teacher_checkpoint.pth?raw=1") for run in "ab")
    assert first != second
    assert first.name == second.name == "teacher_checkpoint.pth"
    assert resolve_weights(Path(f"{server.url}/a/teacher_checkpoint.pth?raw=1")) == first  # pathlib drops a slash
    assert len(server.requests) == 2


def test_paths_are_given_back(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"x")
    assert resolve_weights(tmp_path / "weights.pth") == tmp_path / "weights.pth"
    assert resolve_weights(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    assert resolve_weights("~/weights.pth") == resolve_weights("$CHECKPOINTS/weights.pth") == tmp_path / "weights.pth"


def test_unknown_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no release has that name; perhaps dinobloom_s or"):
        resolve_weights("dinobloom_x")
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder '\S*absent.pth'.*names are dinobloom_tiny_pbc, dinobloom_s, "
    ):
        resolve_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"gs://bucket/file: only http://, https://\S* .*can be read here"):
        resolve_weights("gs://bucket/file")


def test_a_cut_download_is_never_taken_for_whole(server, release, cache):
    server.cuts = [300_000, 400_000, 300_000]
    with pytest.raises(ConnectionError, match=r"cannot be downloaded \(.*got only 300000 out of 1024000 bytes"):
        resolve_weights(release.name)
    assert not left_behind(cache)
    assert len(server.requests) == 3
    server.cuts = [5000]
    server.statuses = [503]
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert len(server.requests) == 6


def test_a_cut_download_goes_on_where_it_ended(server, release, cache):
    server.version = '"one"'
    server.cuts = [300_000]
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]
    assert left_behind(cache) == [release.file]


def test_the_next_command_goes_on_unless_the_file_changed(server, release, cache):
    for version, content in (('"one"', CONTENT), ('"two"', CONTENT[::-1])):
        release.file.unlink(missing_ok=True)
        server.version, server.content = '"one"', CONTENT
        server.cuts = [200_000, *[100_000] * 5]
        with pytest.raises(ConnectionError, match="got only"):
            resolve_weights(release.name)
        kept = left_behind(cache)
        assert [file.name.endswith(".part") for file in kept] == [True]
        server.cuts, server.version, server.content, server.ranges = [], version, content, []
        assert resolve_weights(release.name).read_bytes() == content
        assert bool(server.ranges) == (version == '"one"')
        assert left_behind(cache) == [release.file]


def test_a_disk_without_room_is_known_before(server, release, cache, monkeypatch):
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(OSError, match="needs 1,024,000 bytes, and 5,000 are free") as caught:
        resolve_weights(release.name)
    assert caught.value.errno == errno.ENOSPC
    assert error_text(caught.value).endswith("are free; make room on this disk and run the same command again")
    assert not left_behind(cache)


@pytest.mark.parametrize("version", ["", '"one"'])
def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(version, server, release, cache, monkeypatch):
    server.version = version
    answers = iter([CONTENT[:300_000]])

    def full(answer):
        yield next(answers)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_blocks", full)
        with pytest.raises(OSError, match="No space left") as caught:
            resolve_weights(release.name)
    assert caught.value.filename.startswith(str(release.file))
    assert len(left_behind(cache)) == bool(version)
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert server.ranges == (["bytes=300000-"] if version else [])
    assert left_behind(cache) == [release.file]


def test_a_folder_in_place_of_the_temporary_file_is_named(release, cache):
    (cache / f"{release.file.name}.part").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        resolve_weights(release.name)
    assert caught.value.filename == str(cache / f"{release.file.name}.part")


def test_a_file_system_without_locks(server, release, cache, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert left_behind(cache) == [release.file]


def test_weights_that_begin_with_a_less_than_sign_are_no_web_page(server):
    """A header of 60 bytes: its length, with which safetensors files begin, is the byte of <."""
    save = {"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}
    header = json.dumps(save).encode().ljust(60)
    server.content = len(header).to_bytes(8, "little") + header + bytes(2)
    assert server.content.startswith(b"<")
    assert resolve_weights(f"{server.url}/model.safetensors").read_bytes() == server.content


def test_what_a_killed_download_left_is_replaced(server, release, cache):
    cache.mkdir(parents=True)
    (cache / f"{release.file.name}.part").write_bytes(b"x" * 2_000_000)
    (cache / f"{release.file.name}.lock").touch()
    assert resolve_weights(release.name).read_bytes() == CONTENT


def test_a_missing_file_is_asked_for_once(server, cache):
    with pytest.raises(FileNotFoundError, match=r"/absent: the server has no such file \(404\)"):
        resolve_weights(f"{server.url}/absent")
    server.statuses = [403]
    with pytest.raises(ConnectionError, match="the server says 403"):
        resolve_weights(f"{server.url}/weights.pth")
    assert len(server.requests) == 2
    assert not left_behind(cache)


def test_a_web_page_is_no_file(server, cache):
    server.content = b"\n<!DOCTYPE html><html>Please log in</html>"
    with pytest.raises(ValueError, match="holds a web page, not what was asked for"):
        resolve_weights(f"{server.url}/weights.pth")
    assert not left_behind(cache)


def test_no_server(cache, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DINOBLOOM_RELEASES_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ConnectionError) as caught:
        resolve_weights("dinobloom_b")
    for part in (
        "DinoBloom-B.pth?download=1 cannot be downloaded ([Errno",
        f"fetch it elsewhere and put it at {cache / 'DinoBloom-B.pth'}, or pass the path of your copy",
    ):
        assert part in str(caught.value)
    (cache / "DinoBloom-B.pth").write_bytes(CONTENT)  # what the message says
    assert resolve_weights("dinobloom_b") == cache / "DinoBloom-B.pth"


@pytest.mark.parametrize("n_bytes", [0, 1000])
def test_a_server_that_falls_silent_is_given_up(n_bytes, server, release, cache, monkeypatch):
    monkeypatch.setattr(files_module, "SILENCE_SECONDS", 0.3)
    server.silence_after = n_bytes
    with pytest.raises(
        ConnectionError, match=r"cannot be downloaded \(the server sent nothing for 0\.3 s\); .* put it"
    ):
        resolve_weights(release.name)
    assert left_behind(cache) == []
    server.silence_after = None
    assert resolve_weights(release.name).read_bytes() == CONTENT


def test_a_wrong_checksum_is_not_kept(server, cache, monkeypatch):
    monkeypatch.setenv("DINOBLOOM_RELEASES_URL", server.url)
    published = "c2f7990b003e89bcece80e379fb8fe0ba2ec392ce19b286e8a294abd99568e44"
    with pytest.raises(ValueError, match=f"has the sha256 {SHA256} instead of {published}; it came from"):
        resolve_weights("dinobloom_s")
    assert not left_behind(cache)
    (cache / "DinoBloom-S.pth").write_bytes(CONTENT)  # by hand
    with pytest.raises(
        ValueError, match=rf"DinoBloom-S\.pth: has the sha256 {SHA256} instead of {published}; remove it"
    ):
        resolve_weights("dinobloom_s")
    assert (cache / "DinoBloom-S.pth").read_bytes() == CONTENT  # it may be the only copy


def test_a_url_can_bring_its_checksum(server):
    assert resolve_weights(f"{server.url}/weights.pth#sha256={SHA256.upper()}").read_bytes() == CONTENT
    with pytest.raises(ValueError, match=f"instead of {'0' * 64}; remove it"):
        resolve_weights(f"{server.url}/weights.pth#sha256={'0' * 64}")
    with pytest.raises(ValueError, match=f"instead of {'0' * 64}; it came from"):
        resolve_weights(f"{server.url}/another.pth#sha256={'0' * 64}")


def fetch_together(name, barrier, found):
    barrier.wait()
    found.put(str(resolve_weights(name)))


def test_two_processes_download_once(server, release):
    server.delay = 0.5
    context = multiprocessing.get_context("fork")  # an import takes longer than the test
    barrier, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_together, args=(release.name, barrier, found)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [str(release.file)] * 2
    for process in processes:
        process.join()
    assert len(server.requests) == 1
    assert release.file.read_bytes() == CONTENT


def test_threads_download_once(server, release):
    threads = [threading.Thread(target=resolve_weights, args=(release.name,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_commands_take_a_url(server, tmp_path):
    network = build_backbone({"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 14, "block_chunks": 0})
    torch.save({"teacher": network.state_dict()}, tmp_path / "weights.pth")
    server.content = (tmp_path / "weights.pth").read_bytes()
    url = f"{server.url}/runs/5/teacher_checkpoint.pth?raw=1"
    args = parse_arguments(["--checkpoint", url, "--data", "cells", "--output-dir", "features"])
    embedder = embedder_from(args)
    assert embedder.identity["checkpoint_sha256"] == hashlib.sha256(server.content).hexdigest()
    assert torch.equal(embedder.encoder.network.cls_token, network.cls_token)
    assert torch.equal(load_backbone(url).cls_token, network.cls_token)
    assert len(server.requests) == 1


def test_files_of_users_may_be_urls_and_have_a_tilde(server, tmp_path, monkeypatch):
    """A configuration, an image list, labelled cells and a split: each path that a user gives is opened by one door."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "cell.png")
    files = {
        "run.yaml": "train: {seed: 5}",
        "list.txt": f"{tmp_path}/cell.png\n",
        "cells.csv": f"Image Path,Label\n{tmp_path}/cell.png,monocyte\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        server.content = text.encode()
        for source in (f"~/{name}", f"{server.url}/{name}"):
            if name == "run.yaml":
                assert load_run_config(source).train.seed == 5
            elif name == "list.txt":
                assert len(HemaStandardDataset(root=source)) == 1
            else:
                assert LabelledCells.from_path(source).class_names == ["monocyte"]
