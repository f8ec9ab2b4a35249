"""Progress bars and durations."""

import pytest

from dinov2.utils.progress import duration_text, progress_bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0m00s"), (61, "1m01s"), (3599.6, "1h00m"), (3 * 3600 + 300, "3h05m"), (93_600, "1d02h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration_text(seconds) == text


def test_a_bar_counts_images(capsys):
    with progress_bar(total=3, desc="reading") as bar:
        bar.update(3)
    line = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert line.startswith("reading: 100%")
    assert "3/3" in line
    assert "images/s" in line
