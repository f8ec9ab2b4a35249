"""The README's command for several GPUs, as it stands there but for sizes and places."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_torchrun_command(tmp_path, image_list, tiny_overrides, readme_command):
    command = readme_command("torchrun")
    for there, here in (
        ("--nproc_per_node=8", "--nproc_per_node=2"),
        ("train.global_batch_size=960", "train.global_batch_size=8"),
        ("/data/lists", str(image_list())),
    ):
        assert there in " ".join(command)
        command = [word.replace(there, here) for word in command]
    program, *arguments = command
    assert program == "torchrun"
    tiny = [text for text in tiny_overrides("") if not text.startswith("train.dataset_path")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, *tiny, "--output-dir", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "first" / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]
    assert "processes 2 x 4 images at a time" in (tmp_path / "first" / "logs" / "log.txt").read_text()
