"""scripts/gpu_check.py on the pretend GPU: values fall short there, and the report is complete."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPT = f"""
import json
import sys
from pathlib import Path

import stub  # in each process of a check, too: it turns cuDNN off

sys.path.insert(0, {str(FOLDER)!r})
import gpu_check

if __name__ == "__main__":
    folder, checks = sys.argv[1:]
    code = gpu_check.main(["--output", folder, "--tiny", "--checks", checks])
    stub.report([code, json.loads(Path(folder, "report.json").read_text())])
"""


@pytest.fixture
def check(run_on_stub, tmp_path):
    """Run some checks; return the exit code and the report."""
    script = tmp_path / "check.py"
    script.write_text(SCRIPT)
    return lambda names: run_on_stub(script, str(tmp_path / "report"), names)


def test_the_report_is_complete(check):
    code, report = check("environment,losses")
    assert code == 1
    facts = {row["what"]: row["value"] for row in report["environment"]["rows"]}
    assert facts["GPU"] == "Stub GPU sm_90"
    assert facts["attention in fp32"] == "ScaledDotProductEfficientAttention"
    assert facts["attention in bf16"] == "ScaledDotProductFlashAttention"
    assert len(report["losses"]["problems"]) == len(report["losses"]["rows"]) == 6


@pytest.mark.slow
def test_steps_are_measured_without_a_wait(check):
    code, report = check("speed_S")
    assert (code, report["speed_S"]["problems"]) == (0, [])
    rows = {row["way"]: row for row in report["speed_S"]["rows"]}
    assert list(rows) == ["plain, bf16", "ours, bf16", "ours compiled, bf16"]
    assert all(row["waits a step"] == 0 and row["peak memory, GiB"] > 0 for row in rows.values())
