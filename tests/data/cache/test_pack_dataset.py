"""scripts/pack_dataset.py: what it says, how it ends, and that nothing is left when it is stopped or killed."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.cache import PackedCache
from dinov2.data.loaders import make_dataset

SCRIPT = Path(__file__).parents[3] / "scripts" / "pack_dataset.py"


@pytest.fixture(scope="module")
def pack():
    """The script's main function."""
    spec = importlib.util.spec_from_file_location("pack_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def arguments(image_list, tmp_path):
    """A dataset of eight images, one of them broken, and where to pack it."""
    folder = image_list(8)
    (folder / "images" / "003.png").write_bytes(b"no image")
    return [f"HemaStandardDataset:root={folder}", "--cache", str(tmp_path / "cache"), "--workers", "0"]


def test_help_names_the_key_that_training_takes(pack, capsys):
    with pytest.raises(SystemExit) as ended:
        pack(["--help"])
    assert ended.value.code == 0
    assert ":cache=FOLDER" in capsys.readouterr().out


def test_training_reads_what_was_packed(pack, arguments, capsys, tmp_path):
    assert pack([*arguments, "--image-size", "20"]) == 0
    said = capsys.readouterr().err
    assert "8 images, 8 to pack" in said
    assert "7 packed now, 1 unreadable" in said
    assert "003.png: not a known image format" in said

    dataset = make_dataset(f"{arguments[0]}:cache={tmp_path / 'cache'}", image_size=20)
    plain = make_dataset(arguments[0], image_size=20)
    assert len(dataset.cache.plan().todo) == 0
    for index in range(8):
        sample, expected = dataset[index], plain[index]
        np.testing.assert_array_equal(sample.image, expected.image)
        assert sample.failures == expected.failures

    assert pack([*arguments, "--image-size", "20"]) == 0
    assert "8 were there, 0 packed now" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(pack, arguments, capsys, tmp_path):
    assert pack([*arguments, "--dry-run"]) == 0
    assert "8 images, 8 to pack, 0 without a file; 1.1 MiB needed" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_verify_ends_with_1_after_damage_and_the_next_start_mends_it(pack, arguments, capsys, tmp_path):
    assert pack(arguments) == 0
    assert pack([*arguments, "--verify"]) == 0
    assert "8 stored images checked, 0 damaged" in capsys.readouterr().out
    (pixels,) = tmp_path.glob("cache/*/pixels.bin")
    with open(pixels, "r+b") as file:
        file.write(b"other pixels")
    assert pack([*arguments, "--verify"]) == 1
    said = capsys.readouterr()
    assert "start the command without --verify" in said.out
    assert "000.png" in said.err
    assert pack(arguments) == 0
    assert pack([*arguments, "--verify"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:1], "--cache: missing"),
        (lambda a: ["HemaStandardDataset:root=/nowhere/at/all", *a[1:]], "/nowhere/at/all"),
        (lambda a: [f"{a[0]}:image_size=30", *a[1:], "--image-size", "20"], "leave one of the two out"),
        (lambda a: [f"{a[0]}:cache=/another", *a[1:]], "leave one of the two out"),
        (lambda a: [*a[:-1], "-1"], "--workers -1: give 0 or more"),
    ],
    ids=["no cache", "no data", "two sizes", "two caches", "workers"],
)
def test_a_mistake_ends_with_2_and_its_explanation(pack, arguments, capsys, change, message):
    assert pack(change(arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs the list of processes that Linux shows")
def test_stopped_or_killed_nothing_goes_on(tmp_path, until):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (900, 900), "red").save(tmp_path / "large.png")
    for i in range(3000):  # some time for all of them
        (tmp_path / "images" / f"{i}.png").symlink_to(tmp_path / "large.png")
    caches = {number: tmp_path / f"cache{number}" for number in (signal.SIGTERM, signal.SIGKILL)}
    runs = {}
    for number, cache in caches.items():
        command = [sys.executable, SCRIPT, f"HemaStandardDataset:root={tmp_path / 'images'}", "--cache", cache]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BUILDER_OF_TEST": str(cache)}
        runs[number] = subprocess.Popen([*command, "--workers", "2"], env=environment, start_new_session=True)
    for number, cache in caches.items():
        until(
            lambda cache=cache: any(np.fromfile(file, np.uint8, 1000).any() for file in cache.glob("*/pixels.bin")),
            seconds=120,
        )
        # a batch system tells all processes, the kernel kills one
        os.killpg(runs[number].pid, number) if number == signal.SIGTERM else runs[number].kill()
    assert runs[signal.SIGTERM].wait(30) == 75
    assert runs[signal.SIGKILL].wait(30) == -signal.SIGKILL
    until(lambda: not any(processes_of(cache) for cache in caches.values()))


def processes_of(cache: Path) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"BUILDER_OF_TEST={cache}".encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:
            continue  # it ended just now
    return found


def test_what_a_loader_gives_does_not_depend_on_the_cache(arguments, pack, tmp_path):
    assert pack([*arguments, "--image-size", "16"]) == 0
    dataset = make_dataset(f"{arguments[0]}:image_size=16:cache={tmp_path / 'cache'}")
    assert isinstance(dataset.cache, PackedCache)
    plain = make_dataset(f"{arguments[0]}:image_size=16")
    for sample, expected in ((dataset[index], plain[index]) for index in (0, 3, 5)):
        np.testing.assert_array_equal(sample.image, expected.image)
        assert sample.failures == expected.failures


def test_the_centre_is_packed_for_training(pack, arguments, capsys, tmp_path):
    assert pack([*arguments, "--center-crop", "0.5"]) == 0
    cached = f"{arguments[0]}:cache={tmp_path / 'cache'}"
    dataset, plain = (make_dataset(text, center_crop=0.5) for text in (cached, arguments[0]))
    assert len(dataset.cache.plan().todo) == 0
    np.testing.assert_array_equal(dataset[0].image, plain[0].image)
    assert not np.array_equal(plain[0].image, make_dataset(arguments[0])[0].image)
    assert pack([f"{cached}:center_crop=0.6", "--center-crop", "0.5"]) != 0
    assert "--center-crop 0.5" in capsys.readouterr().err
