"""The teacher evaluated as it trains: the results, which teachers stay, and that the run stays the same."""

import csv
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov2.train import evaluation
from dinov2.train.evaluation import TRACKED_METRICS, TeacherEvaluation

EACH, EVERY_SECOND = (f"evaluation.eval_period_iterations={n}" for n in (1, 2))
TEACHER = "teacher_checkpoint.pth"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Dark and bright cells: two/{train,test} with twelve and eight of them, and one.csv with 16 of eight patients."""
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)

    def write(path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 60, (28, 28, 3)) + level).astype(np.uint8)).save(path)

    levels = {"dark": 40, "bright": 150}
    for side, n in (("train", 6), ("test", 4)):
        for label, level in levels.items():
            for i in range(n):
                write(folder / "two" / side / label / f"{i}.png", level)
    rows = []
    for patient in range(8):
        label = list(levels)[patient % 2]
        for i in range(2):
            write(folder / "one" / f"{patient}_{i}.png", levels[label])
            rows.append((f"one/{patient}_{i}.png", label, f"p{patient}"))
    with open(folder / "one.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Image Path", "Label", "patient"), *rows])
    return folder


def datasets(*entries: dict) -> str:
    return f"evaluation.datasets={json.dumps(entries)}"


def two(cells: Path, **more) -> dict:
    return {"name": "two", "train": str(cells / "two" / "train"), "test": str(cells / "two" / "test"), **more}


@pytest.fixture(scope="module")
def evaluated(cells):
    """Two data sets, one with a linear probe."""
    both = datasets(two(cells, linear=True, knn_k=[1, 5]), {"name": "one", "data": str(cells / "one.csv")})
    return [both, "evaluation.knn_k=[3]"]


def networks(folder: Path, n: int) -> dict[str, torch.Tensor]:
    """Student and teacher of the checkpoint after n iterations."""
    dcp_to_torch_save(folder / "checkpoints" / f"iteration_{n:07d}", folder / "whole.pth")
    return torch.load(folder / "whole.pth", weights_only=True)["model"]


def results(folder: Path) -> dict[int, dict]:
    """By iteration."""
    found = [json.loads(path.read_text()) for path in folder.glob("eval/training_*/results.json")]
    return {result["iteration"]: result for result in sorted(found, key=lambda result: result["iteration"])}


def teachers(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("training_")) for path in folder.glob(f"eval/*/{TEACHER}"))


def best(folder: Path) -> dict:
    return json.loads((folder / "eval" / "best.json").read_text())


# --- what is found and written --------------------------------------------------------------------------------------


def test_each_set_is_evaluated_in_its_way_and_the_best_teacher_named(run, evaluated, monkeypatch, rows):
    logged = []
    tracker = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: tracker))
    code, folder = run(*evaluated, EVERY_SECOND, "train.wandb.enabled=true")
    assert code == 0

    found = results(folder)
    assert list(found) == [0, 2, 4]
    assert teachers(folder) == [2, 4]
    for result in found.values():
        first, second = result["datasets"]["two"], result["datasets"]["one"]
        assert (first["n_train"], first["n_test"]) == (12, 8)
        assert (second["n_train"], second["n_test"]) == (12, 4)  # whole patients
        assert (list(first["knn"]), list(second["knn"])) == (["knn_1", "knn_5"], ["knn_3"])
        assert first["linear"].keys() >= {"accuracy", "auroc", "log_loss", "confusion"}
        assert "linear" not in second
        assert result["teacher"].keys() >= {"effective_rank", "feature_spread"}
    assert found[4]["datasets"]["two"]["knn"]["knn_1"]["accuracy"] == 1.0
    assert found[4]["datasets"]["two"]["linear"]["accuracy"] == 1.0
    assert "prototype_use" not in found[0]["teacher"]  # no step was taken
    for name in ("prototype_use", "patch_prototype_use"):
        assert found[4]["teacher"][name] == rows(folder)[-1][name]

    scores = {
        n: (of["two"]["knn"]["knn_5"]["balanced_accuracy"] + of["one"]["knn"]["knn_3"]["balanced_accuracy"]) / 2
        for n, of in ((n, found[n]["datasets"]) for n in (2, 4))
    }
    winner = 4 if scores[4] > scores[2] else 2
    assert best(folder) == {
        "iteration": winner,
        "metric": "mean balanced accuracy of knn_5 on two, knn_3 on one",
        "score": pytest.approx(scores[winner]),
        "checkpoint": f"training_{winner}/{TEACHER}",
    }

    steps = [step for step, _ in logged]
    assert steps == sorted(steps) == [0, 0, 1, 1, 2, 3, 3]  # each evaluation with the iteration it follows
    newest = logged[-1][1]
    assert newest["evaluation/two/linear_accuracy"] == 1.0
    assert newest["evaluation/one/knn_3_balanced_accuracy"] == found[4]["datasets"]["one"]["knn"]["knn_3"]["accuracy"]
    assert newest["evaluation/teacher/effective_rank"] == found[4]["teacher"]["effective_rank"]
    log = (folder / "logs" / "log.txt").read_text()
    assert "after iteration 4, two (8 cells): knn_1 accuracy 1.000 balanced 1.000  knn_5" in log
    assert f"(best so far: {scores[winner]:.3f} at iteration {winner})" in log


def test_eval_only_evaluates_the_latest_checkpoint(run, evaluated):
    _, folder = run(*evaluated)
    written = results(folder)[4]
    (folder / "eval" / "training_4" / "results.json").unlink()
    assert run(*evaluated, arguments=("--eval-only",))[0] == 0
    again = results(folder)[4]
    assert again["datasets"] == written["datasets"]
    assert again["teacher"].items() <= written["teacher"].items()


def test_unreadable_cells_are_left_out_and_none_left_does_not_end_the_run(run, tmp_path, cells, rows):
    for side in ("train", "test"):
        for path in (cells / "two" / side).rglob("*.png"):
            copy = tmp_path / path.relative_to(cells)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"" if side == "test" and path.name == "0.png" else path.read_bytes())
    overrides = [datasets(two(tmp_path)), "evaluation.knn_k=[1]"]
    code, folder = run(*overrides, name="some")
    assert code == 0
    assert results(folder)[4]["datasets"]["two"]["n_test"] == 6

    for path in (tmp_path / "two" / "test").rglob("*.png"):
        path.write_bytes(b"")
    code, folder = run(*overrides, EVERY_SECOND, name="none")
    assert code == 1
    assert len(rows(folder)) == 4
    assert teachers(folder) == [2, 4]
    log = (folder / "logs" / "log.txt").read_text()
    for n in (0, 2, 4):
        assert f"the teacher after iteration {n} could not be evaluated: none of 8 images could be read" in log


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("extract", NotImplementedError("no kernel for this GPU")),
        ("extract", OSError("gone")),
        ("evaluate_knn", KeyError("no such layer")),
        ("evaluate_knn", TypeError("not a tensor")),
    ],
)
def test_an_evaluation_that_fails_is_counted_and_does_not_end_the_run(run, evaluated, monkeypatch, place, error, rows):
    original, calls = getattr(evaluation, place), []

    def fail(*arguments, **settings):
        calls.append(place)
        if len(calls) in (1, 2):
            raise error
        return original(*arguments, **settings)

    monkeypatch.setattr(evaluation, place, fail)
    code, folder = run(*evaluated, EVERY_SECOND)
    assert code == 0  # the last teacher was evaluated
    assert len(rows(folder)) == 4
    assert list(results(folder)) == [4]
    assert best(folder)["iteration"] == 4
    log = (folder / "logs" / "log.txt").read_text()
    for n_failed, done in enumerate((0, 2), start=1):
        reason = f"the teacher after iteration {done} could not be evaluated: {error.args[0]}"
        assert f"{reason} (failed evaluations so far: {n_failed})" in log
        assert any(text.startswith(reason) for text in json.loads((folder / "status.json").read_text())["warnings"])


def test_a_mistake_is_found_before_there_is_a_model_or_a_folder(run, cells, monkeypatch, capfd):
    monkeypatch.setattr("dinov2.train.train.SSLMetaArch", lambda _: pytest.fail("built a model"))
    code, folder = run(datasets(two(cells, knn_k=[13])))
    assert code == 2
    assert "evaluation.datasets, two: knn_k asks for 13 neighbours of 12 training cells" in capfd.readouterr().err
    assert not folder.exists()


# --- the run is the one it would have been --------------------------------------------------------------------------


LONGER = ("student.drop_path_rate=0.5", "optim.epochs=3")


def test_no_number_of_the_run_changes_also_when_it_is_killed_in_an_evaluation(run, evaluated, monkeypatch, rows):
    code, plain = run(*LONGER, name="plain")
    assert code == 0

    evaluate_knn, calls = evaluation.evaluate_knn, []

    def drawing(*arguments):
        calls.append((random.random(), np.random.rand(), torch.rand(())))  # noqa: NPY002
        if len(calls) == kill_at:
            raise Killed
        return evaluate_knn(*arguments)

    class Killed(BaseException):
        pass

    monkeypatch.setattr(evaluation, "evaluate_knn", drawing)
    kill_at = None
    code, unbroken = run(*LONGER, *evaluated, EACH, name="unbroken")
    assert code == 0
    assert len(calls) == 2 * 7

    calls.clear()
    kill_at = 2 * 6  # after the fifth iteration; the checkpoint is that of the fourth
    with pytest.raises(Killed):
        run(*LONGER, *evaluated, EACH, name="killed")
    assert teachers(unbroken.with_name("killed")) == [1, 2, 3, 4, 5]
    code, killed = run(*LONGER, *evaluated, EACH, name="killed")
    assert code == 0

    ends = {folder: networks(folder, 6) for folder in (plain, unbroken, killed)}
    for folder in (unbroken, killed):
        assert rows(folder) == rows(plain)
        assert all(torch.equal(ends[folder][name], value) for name, value in ends[plain].items())
    assert results(killed) == results(unbroken)
    assert best(killed) == best(unbroken)


# --- which teachers stay --------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """Give the evaluation after each iteration a score; returns the dict to fill."""
    scores: dict[int, float] = {}
    write, now = TeacherEvaluation._write, []

    def watched(self, features, model, run_folder, done, metrics):
        now[:] = [done]
        write(self, features, model, run_folder, done, metrics)

    monkeypatch.setattr(TeacherEvaluation, "_write", watched)
    monkeypatch.setattr(
        evaluation, "evaluate_knn", lambda *_: {"knn_1": dict.fromkeys(TRACKED_METRICS, scores[now[0]])}
    )
    return scores


def test_the_newest_and_the_best_teacher_stay_also_after_a_resume(run, cells, planted):
    planted.update({0: 1.0, 1: 0.2, 2: 0.9, 3: 0.3, 4: 0.4})
    settings = [datasets(two(cells)), EACH, "evaluation.knn_k=[1]", "evaluation.keep_teachers=1"]
    _, folder = run(*settings)
    assert teachers(folder) == [2, 4]
    assert best(folder)["iteration"] == 2
    planted.update({5: 0.8, 6: 0.95, 7: 0.1, 8: 0.3})
    run(*settings, "optim.epochs=3")
    assert teachers(folder) == [6]
    run(*settings, "optim.epochs=4")
    assert teachers(folder) == [6, 8]
    assert (folder / "eval" / best(folder)["checkpoint"]).is_file()
    assert list(results(folder)) == list(range(9))  # small, and the course of the run


def test_all_teachers_stay_unless_asked_and_without_data_the_newest(run, cells, planted):
    planted.update(dict.fromkeys(range(5), 0.5))
    assert teachers(run(datasets(two(cells)), EACH, "evaluation.knn_k=[1]", name="all")[1]) == [1, 2, 3, 4]
    _, folder = run(EACH, "evaluation.keep_teachers=2", name="newest")
    assert teachers(folder) == [3, 4]
    assert sorted(path.name for path in (folder / "eval").iterdir()) == ["training_3", "training_4"]


def test_no_teacher_goes_before_the_next_is_whole(run, monkeypatch):
    save_teacher = evaluation.save_teacher

    def full(state, model, path, done):
        if done >= 3:
            raise OSError(28, "No space left on device")
        save_teacher(state, model, path, done)

    monkeypatch.setattr(evaluation, "save_teacher", full)
    code, folder = run(EACH, "evaluation.keep_teachers=1")
    assert code == 1
    assert teachers(folder) == [2]


# --- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_find_what_one_finds(run, tmp_path, cells, evaluated, tiny_overrides, run_on_processes, rows):
    """Blocks add their full share (layer scale 1), so that images differ. One set has a single test cell."""
    single = cells / "single.csv"
    single.write_text("Image Path,Label\ntwo/test/dark/0.png,dark\n")
    last = {"name": "single", "train": str(cells / "two" / "train"), "test": str(single)}
    entries = [*json.loads(evaluated[0].partition("=")[2]), last]
    settings = [datasets(*entries), *evaluated[1:], EVERY_SECOND, "student.layerscale=1.0", "train.global_batch_size=4"]
    code, alone = run(*settings, name="alone")
    assert code == 0

    common = ["--output-dir", str(tmp_path / "out"), *tiny_overrides(tmp_path / "lists", *settings)]
    commands = [
        {"arguments": [*common, "--name", "several"]},
        {"arguments": [*common, "--name", "plain", "evaluation.datasets=[]"]},
    ]
    assert run_on_processes(2, commands, tmp_path) == [0, 0]

    ours, theirs = results(alone.with_name("several")), results(alone)
    assert list(ours) == list(theirs) == [0, 2, 4]
    assert flat(ours[0]) == pytest.approx(flat(theirs[0]), rel=1e-6, abs=1e-6)
    # weights agree up to rounding, which a step or two magnify
    assert flat(ours[4]["datasets"]) == pytest.approx(flat(theirs[4]["datasets"]), rel=1e-2, abs=1e-3)
    assert rows(alone.with_name("several")) == rows(alone.with_name("plain"))


def flat(values, prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings and lists by their path."""
    if isinstance(values, (dict, list)):
        members = values.items() if isinstance(values, dict) else enumerate(values)
        return {name: number for key, member in members for name, number in flat(member, f"{prefix}/{key}").items()}
    return {prefix: -1.0 if values is None else values}  # what is undefined
