"""The check of a GPU: each of its checks on a CPU with a tiny network, its report, and checks that fail."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
N_ROWS = {"losses": 4, "sinkhorn": 3, "training": 5, "resume": 4, "extraction": 4, "trace": 1}


@pytest.fixture
def settings(script, tmp_path):
    return script("gpu_checks").Settings(tmp_path, "cpu", is_tiny=True)


@pytest.fixture
def gpu_check(script, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return script("gpu_check")


@pytest.mark.parametrize("name", ["losses", "sinkhorn", "batches", "training", "resume", "extraction", "trace"])
def test_a_cpu_agrees_with_itself(name, script, settings):
    outcome = getattr(script("gpu_checks"), f"check_{name}")(settings)
    assert outcome.problems == []
    assert len(outcome.rows) >= N_ROWS.get(name, 2)
    numbers = [value for row in outcome.rows for value in row.values() if isinstance(value, float)]
    assert numbers
    assert all(map(math.isfinite, numbers))


def test_an_error_above_its_tolerance_and_nan_fall_short(script):
    outcome = script("gpu_checks").compare({"a": (0.1, 0.2), "b": (0.3, 0.2), "c": (math.nan, 0.2), "d": (0.0, 0.0)})
    assert outcome.problems == ["b: error 3.0e-01 above 0.2", "c: error nan above 0.2"]
    assert [row["what"] for row in outcome.rows] == ["a", "b", "c", "d"]


def test_a_training_that_learns_nothing_falls_short(script, tmp_path, monkeypatch):
    checks = script("gpu_checks")
    settings = checks.Settings(tmp_path, "cpu", is_tiny=False)
    for n_steps, accuracy in ((0, 0.3), (2, 0.25)):
        folder = tmp_path / "eval" / f"training_{n_steps}"
        folder.mkdir(parents=True)
        knn = {"knn_1": {"balanced_accuracy": 0.0}, "knn_20": {"balanced_accuracy": accuracy}}
        (folder / "results.json").write_text(json.dumps({"datasets": {"drawn": {"knn": knn}}}))
    steps = [{"ibot_loss": 2.0, "lr": 0.1}, {"ibot_loss": math.nan, "lr": 0.1}]
    monkeypatch.setattr(checks, "run_training", lambda *_: (tmp_path, steps))
    monkeypatch.setattr(checks.Settings, "draw_cells", lambda _: tmp_path)
    assert checks.check_training(settings).problems == [
        "1 of 2 steps have a loss that is not finite",
        "kNN did not rise in 2 steps: 0.300, then 0.250",
    ]


def test_a_resumed_run_with_other_losses_falls_short(script, settings, monkeypatch):
    checks, n_runs = script("gpu_checks"), []

    def run_training(*_):
        n_runs.append(1)
        (settings.output / "checkpoints" / "iteration_8").mkdir(parents=True, exist_ok=True)
        return settings.output, [{"ibot_loss": 2.0 + (len(n_runs) == 2 and step == 5)} for step in range(8)]

    monkeypatch.setattr(checks, "run_training", run_training)
    assert checks.check_resume(settings).problems == ["resumed, losses of step 5: error 5.0e-01 above 0.0001"]


def test_results_of_the_tests_marked_gpu(script, tmp_path, monkeypatch):
    checks = script("gpu_checks")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    bodies = {"good": "pass", "bad": "assert False", "other": "pytest.skip('no kernel')"}
    tests = [f"@pytest.mark.gpu\ndef test_{name}():\n    {body}\n" for name, body in bodies.items()]
    (tmp_path / "tests" / "test_x.py").write_text(
        "\n".join(["import pytest", *tests, "def test_cpu():\n    assert False"])
    )
    outcome = checks.check_tests(checks.Settings(tmp_path, "cuda", is_tiny=False))
    assert outcome.problems == ["tests.test_x::test_bad failed"]
    assert [row["number"] for row in outcome.rows] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("gpu", "problems"),
    [
        (
            "NVIDIA H100 80GB HBM3",
            ["share of bf16 peak is 0.40; the goal is 0.5", "plain / it is 2.00; the goal is 2.5"],
        ),
        ("NVIDIA A100-SXM4-80GB", []),
    ],
)
def test_goals_are_those_of_the_gpu(gpu, problems, script, tmp_path, monkeypatch):
    checks = script("gpu_checks")

    def measure_step(way, _device, overrides, _n_steps):
        seconds = 2.0 if way.startswith("plain") else 1.0
        if "train.compile_blocks=true" in overrides:
            raise torch.OutOfMemoryError("full")
        return {"seconds": seconds, "waits": 0, "flops": 0.4 * 989e12, "rate": 8e14, "peak": 1024.0}

    monkeypatch.setattr(checks, "measure_step", measure_step)
    monkeypatch.setattr(checks, "resolve_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    outcome = checks.check_speed(checks.Settings(tmp_path, "cuda", is_tiny=False), "B")
    assert outcome.problems == ["ours compiled: batch 120 does not fit into the memory", *problems]
    assert [(row["way"], row["images/s"], row["plain / it"]) for row in outcome.rows] == [
        ("plain, bf16", 60.0, 1.0),
        ("ours, bf16", 120.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("check", "argument", "reason"),
    [(int, "x", "ValueError: invalid literal"), (os._exit, 3, "exit code 3; see"), (time.sleep, 60, "more than 1 s")],
)
def test_a_check_that_fails_has_a_reason(check, argument, reason, gpu_check, tmp_path):
    assert reason in gpu_check.run_apart(check, argument, tmp_path / "log", 1 if check is time.sleep else 60)


def test_a_full_report(tmp_path, rows_of):
    flags = ["--device", "cpu", "--tiny", "--checks", "environment,speed_S"]
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing fell short." in done.stdout
    assert "2/2 speed_S: ok; about 0 s to go" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == {"environment", "speed_S"}
    assert [row["way"] for row in report["speed_S"]["rows"]] == ["plain, fp32", "ours, fp32"]
    assert {row["what"] for row in report["environment"]["rows"]} >= {"torch", "attention in bf16"}
    cells = rows_of(tmp_path / "report.md")
    assert ["environment", "ok"] in [row[:2] for row in cells]
    assert "share of matmul rate" in next(row for row in cells if row[0] == "model")
    assert (tmp_path / "speed_S.log").is_file()


def test_what_falls_short_and_checks_without_time_left_are_listed(gpu_check, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_apart", lambda *_: "ValueError: no kernel")
    assert gpu_check.main(["--output", str(tmp_path), "--device", "cpu", "--checks", "losses"]) == 1
    assert "Fell short:\n  losses: ValueError: no kernel\n" in capsys.readouterr().out
    assert gpu_check.main(["--output", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 1
    assert "  speed_L: no time was left for it\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checks", "losses,speed"], "--checks: speed is unknown; choose from environment, tests,"),
        (["--device", "cuda:9"], "--device cuda:9: PyTorch sees no GPU; --device cpu --tiny tries the checks"),
    ],
)
def test_flags_that_cannot_work(flags, message, gpu_check, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null_in_the_report(gpu_check, tmp_path):
    gpu_check.write_report(
        tmp_path, {"losses": gpu_check.Outcome([{"what": "a", "error": math.nan, "tolerance": 0.5}])}
    )
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["losses"]["rows"] == [{"what": "a", "error": None, "tolerance": 0.5}]
    assert "nan" in (tmp_path / "report.md").read_text()
