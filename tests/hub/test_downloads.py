"""Weights by name and URL: one whole download, resumed and checked, from a server on this machine."""

import hashlib
import http.server
import logging
import multiprocessing
import os
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from dinov2.eval.extract_features import embedder_from, parse_arguments
from dinov2.hub import downloads
from dinov2.hub.backbones import load_backbone
from dinov2.hub.downloads import RELEASES, file_sha256, resolve_weights
from dinov2.models import build_backbone

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Gives CONTENT under every path but /absent; what tests change stands in its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.headers = {"ETag": '"v1"'}
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.statuses: list[int] = []  # answers to the next requests; then it works
        self.cuts: list[int] = []  # bytes after which the next connections are cut
        self.knows_ranges = True
        self.gives_length = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that are killed are part of the tests."""


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.statuses or urlsplit(self.path).path.endswith("/absent"):
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        body, start = server.content, 0
        same = self.headers.get("If-Range") in (None, server.headers.get("ETag"), server.headers.get("Last-Modified"))
        if asked and server.knows_ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.gives_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", server.headers.get("Content-Type", "application/octet-stream"))
        for name in ("ETag", "Last-Modified"):
            if name in server.headers:
                self.send_header(name, server.headers[name])
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty torch hub folder; no proxy between the tests and their server; no waiting."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(downloads, "SECONDS_BETWEEN_TRIES", 0.01)
    return tmp_path / "torch" / "hub" / "checkpoints"


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


def test_a_name_is_downloaded_once_and_its_checksum_recorded(server, release, cache, caplog):
    with caplog.at_level(logging.INFO, "dinov2"):
        file = resolve_weights("dinov2_vitb14")
    assert file == cache / "dinov2_vitb14_pretrain.pth"
    assert file.read_bytes() == CONTENT
    assert (cache / "dinov2_vitb14_pretrain.pth.sha256").read_text() == f"{SHA256}  dinov2_vitb14_pretrain.pth\n"
    assert f"no sha256 is published; recorded {SHA256}" in caplog.text
    assert resolve_weights("dinov2_vitb14") == file
    assert server.requests == [("/mirror/dinov2_vitb14/dinov2_vitb14_pretrain.pth", None)]
    assert resolve_weights(release.url) == file  # the same by its URL
    assert len(server.requests) == 1
    assert sorted(path.name for path in cache.iterdir()) == [
        ".dinov2_vitb14_pretrain.pth.lock",
        "dinov2_vitb14_pretrain.pth",
        "dinov2_vitb14_pretrain.pth.sha256",
    ]


def test_urls_with_the_same_last_part_do_not_share_a_file(server):
    first, second = (resolve_weights(f"{server.url}/{run}/teacher_checkpoint.pth?raw=1") for run in "ab")
    assert first != second
    assert first.name == second.name == "teacher_checkpoint.pth"
    assert resolve_weights(Path(f"{server.url}/a/teacher_checkpoint.pth?raw=1")) == first  # pathlib drops a slash
    assert len(server.requests) == 2


def test_paths_are_given_back(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"x")
    assert resolve_weights(tmp_path / "weights.pth") == tmp_path / "weights.pth"
    assert resolve_weights(str(tmp_path)) == tmp_path


def test_unknown_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no release has that name; perhaps dinobloom_s or"):
        resolve_weights("dinobloom_x")
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder '\S*absent.pth'.*names are dinobloom_s, dinobloom_b"
    ):
        resolve_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"gs://bucket/file: only http://, https://\S* .*can be read here"):
        resolve_weights("gs://bucket/file")


@pytest.mark.parametrize(
    "headers", [{"ETag": '"v1"'}, {"ETag": 'W/"v1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00"}]
)
def test_a_cut_connection_goes_on_where_it_was(headers, server, caplog):
    server.headers = headers
    server.cuts = [300_000, 200_000]
    file = resolve_weights(f"{server.url}/weights.pth")
    assert file.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert "the connection was cut after 300,000 of 1,024,000 bytes; trying again" in caplog.text


def test_a_later_call_goes_on_where_an_earlier_one_failed(server, cache, release):
    server.cuts, server.statuses = [400_000], []
    tries, downloads.TRIES = downloads.TRIES, 1
    try:
        with pytest.raises(ConnectionError, match=r"400,000 bytes are kept, and the next try goes on from there"):
            resolve_weights(release.name)
    finally:
        downloads.TRIES = tries
    assert not (cache / "dinov2_vitb14_pretrain.pth").exists()
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=400000-"


def begun(url, file, n, validator='"v1"'):
    """What a process that was killed after n bytes left behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{file}.part").write_bytes(CONTENT[:n])
    text = f'{{"url": "{url}", "validator": {validator!r}, "total": {len(CONTENT)}}}'.replace("'", '"')
    Path(f"{file}.part.json").write_text(text.replace('""v1""', '"\\"v1\\""'))


def test_a_killed_download_goes_on_and_a_finished_one_needs_no_request(server, release):
    begun(release.url, release.file, 700_000)
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=700000-"]
    release.file.unlink()
    begun(release.url, release.file, len(CONTENT))
    assert resolve_weights(release.name).read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("change", ["content", "no ranges", "shorter", "other URL", "no validator"])
def test_a_part_that_does_not_fit_is_fetched_anew(change, server, release):
    url = release.url
    if change == "content":
        server.content, server.headers = CONTENT[::-1], {"ETag": '"v2"'}
    elif change == "no ranges":
        server.knows_ranges = False
    elif change == "shorter":
        server.content = CONTENT[:5000]
    elif change == "other URL":
        url = "http://127.0.0.1/other"
    begun(url, release.file, 700_000, validator="" if change == "no validator" else '"v1"')
    assert resolve_weights(release.name).read_bytes() == server.content


def test_a_server_that_always_starts_anew_is_given_up(server):
    server.knows_ranges = False
    server.cuts = [1000] * 100
    with pytest.raises(ConnectionError, match="cut after 1,000 of 1,024,000"):
        resolve_weights(f"{server.url}/weights.pth")
    assert len(server.requests) == downloads.TRIES


def test_a_length_that_is_not_told_is_the_servers_word(server):
    server.gives_length = False
    assert resolve_weights(f"{server.url}/weights.pth").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server):
    server.statuses = [503, 429]
    assert resolve_weights(f"{server.url}/weights.pth").read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_missing_file_is_asked_for_once(server, cache):
    with pytest.raises(FileNotFoundError, match=r"/absent: the server has no such file \(404\)"):
        resolve_weights(f"{server.url}/absent")
    server.statuses = [403]
    with pytest.raises(ConnectionError, match="the server says 403"):
        resolve_weights(f"{server.url}/weights.pth")
    assert len(server.requests) == 2
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_web_page_is_no_file(server, cache):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(ValueError, match="gives a web page, not a file"):
        resolve_weights(f"{server.url}/weights.pth")
    assert not list(cache.rglob("weights.pth*"))


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


def test_a_wrong_checksum_is_not_kept(server, cache, monkeypatch):
    monkeypatch.setenv("DINOBLOOM_RELEASES_URL", server.url)
    published = "c2f7990b003e89bcece80e379fb8fe0ba2ec392ce19b286e8a294abd99568e44"
    with pytest.raises(ValueError, match=f"has the sha256 {SHA256} instead of {published} and is not kept"):
        resolve_weights("dinobloom_s")
    assert not list(cache.glob("DinoBloom-S*"))
    (cache / "DinoBloom-S.pth").write_bytes(CONTENT)  # by hand
    with pytest.raises(ValueError, match=rf"DinoBloom-S\.pth: has the sha256 {SHA256}, and {published} is published"):
        resolve_weights("dinobloom_s")
    assert not (cache / "DinoBloom-S.pth.sha256").exists()


def test_a_url_can_bring_its_checksum(server):
    assert resolve_weights(f"{server.url}/weights.pth#sha256={SHA256.upper()}").read_bytes() == CONTENT
    with pytest.raises(ValueError, match=f"and {'0' * 64} is published"):
        resolve_weights(f"{server.url}/weights.pth#sha256={'0' * 64}")
    with pytest.raises(ValueError, match=f"instead of {'0' * 64}"):
        resolve_weights(f"{server.url}/another.pth#sha256={'0' * 64}")


def test_a_file_that_changes_in_the_cache_is_noticed(release, cache, monkeypatch):
    file = resolve_weights(release.name)
    hashed = []
    monkeypatch.setattr(downloads, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    resolve_weights(release.name)
    assert not hashed  # once is enough for a file that stays as it is
    time.sleep(0.05)  # file systems tell times apart by a few milliseconds
    os.utime(file)
    resolve_weights(release.name)
    resolve_weights(release.name)
    assert hashed == [file]
    damaged = cache / "damaged"
    damaged.write_bytes(CONTENT[:-1] + b"x")
    os.utime(damaged, (1, 1))  # an old file, put in its place
    damaged.replace(file)
    with pytest.raises(ValueError, match=rf"and {SHA256} is recorded in {file.name}\.sha256: it is damaged"):
        resolve_weights(release.name)


def test_a_folder_that_others_keep_is_only_read(release, server, monkeypatch):
    file = resolve_weights(release.name)
    Path(f"{file}.sha256").unlink()

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(downloads, "atomic_write", refuse)
    assert resolve_weights(release.name) == file
    assert len(server.requests) == 1


def fetch_together(name, barrier, found):
    barrier.wait()
    found.put(str(resolve_weights(name)))


def test_two_processes_download_once(server, release, monkeypatch):
    monkeypatch.setattr(downloads, "SECONDS_BETWEEN_TRIES", 0.3)
    server.cuts = [100_000]  # the first one has to try again, while the second waits
    context = multiprocessing.get_context("fork")  # an import takes longer than the test
    barrier, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_together, args=(release.name, barrier, found)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [str(release.file)] * 2
    for process in processes:
        process.join()
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-"]
    assert release.file.read_bytes() == CONTENT


def test_threads_download_once(server, release):
    threads = [threading.Thread(target=resolve_weights, args=(release.name,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_long_downloads_say_how_far_they_are(server, monkeypatch, caplog):
    monkeypatch.setattr(downloads, "SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr(downloads, "BLOCK_BYTES", 512_000)
    with caplog.at_level(logging.INFO, "dinov2"):
        resolve_weights(f"{server.url}/weights.pth")
    assert re.search(r"weights\.pth: 0\.5 of 1\.0 MB, [\d.]+ MB/s, 0 s to go", caplog.text)


def test_the_checksum_of_a_folder_is_that_of_its_files(tmp_path):
    for folder, name, content in (("a", "x", b"1"), ("b", "x", b"1"), ("c", "y", b"1"), ("d", "x", b"2")):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / name).write_bytes(content)
    sums = [file_sha256(tmp_path / folder) for folder in "abcd"]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3


def test_file_sha256(tmp_path):
    content = CONTENT * 3  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


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
