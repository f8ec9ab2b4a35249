"""The contention benchmark, with a tiny network: a rate for each spin count and load."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_contention.py"
TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=1", "student.num_heads=2"),
    *("student.patch_size=14", "crops.global_crops_size=28", "crops.local_crops_size=14"),
    *("dino.head_n_prototypes=16", "ibot.head_n_prototypes=16", "dino.head_hidden_dim=16", "ibot.head_hidden_dim=16"),
]


def test_each_spin_count_has_a_rate_under_each_load(tmp_path):
    output = tmp_path / "contention.md"
    options = ["--batch", "2", "--rounds", "2", "--loads", "0", "1", "--spin-counts", "300000", "0"]
    command = [sys.executable, str(SCRIPT), *options, "--output", str(output), *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| ([\d,]+).*? \| ([\d.]+) \(.*?\) \| ([\d.]+) \(.*?\) \|$", output.read_text(), re.MULTILINE)
    assert [row[0].strip(",") for row in rows] == ["300,000", "0"]
    assert all(float(rate) > 0 for row in rows for rate in row[1:])
