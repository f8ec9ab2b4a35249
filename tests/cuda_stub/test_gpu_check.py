"""scripts/gpu_check.py on the pretend GPU: values fall short there, and the report is complete."""

from pathlib import Path

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


def test_the_report_is_complete(run_on_stub, tmp_path):
    script = tmp_path / "check.py"
    script.write_text(SCRIPT)
    code, report = run_on_stub(script, str(tmp_path / "report"), "environment,losses,speed_S")
    assert code == 1
    facts = {row["what"]: row["value"] for row in report["environment"]["rows"]}
    assert facts["GPU"] == "Stub GPU sm_90"
    assert facts["attention in fp32"] == "ScaledDotProductEfficientAttention"
    assert facts["attention in bf16"] == "ScaledDotProductFlashAttention"
    assert len(report["losses"]["problems"]) == len(report["losses"]["rows"]) == 6
    assert report["speed_S"]["problems"] == []
    rows = {row["way"]: row for row in report["speed_S"]["rows"]}
    assert list(rows) == ["plain, bf16", "ours, bf16", "ours compiled, bf16"]
    assert all(row["waits a step"] == 0 and row["peak memory, GiB"] > 0 for row in rows.values())
