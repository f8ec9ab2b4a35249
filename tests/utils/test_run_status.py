"""status.json of a run: what cannot be read counts as missing."""

import os

import pytest

from dinov2.utils.run_status import read_status


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 3000, None])
def test_a_status_that_cannot_be_read_is_none(tmp_path, content):
    if content is None:
        os.mkfifo(tmp_path / "status.json")  # to open it would wait for ever
    else:
        (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) is None


def test_known_keys_of_a_status_are_read(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "finished", "unknown": 1}')
    assert read_status(tmp_path).state == "finished"
