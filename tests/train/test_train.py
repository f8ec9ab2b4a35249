"""train.py as a user runs it: whole runs, stopped runs, and what it says to mistakes."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov2.configs import CONFIG_FOLDER
from dinov2.data.bad_images import BadImages
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.hub.backbones import load_backbone
from dinov2.train import train as train_module
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.run_folder import run_folder_path
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from dinov2.utils.run_status import read_status

CUSTOM = CONFIG_FOLDER / "train" / "custom.yaml"
TRAIN = Path(sys.modules[main.__module__].__file__)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def networks(folder: Path, n: int) -> dict[str, torch.Tensor]:
    """Student and teacher of the checkpoint after n iterations."""
    dcp_to_torch_save(folder / "checkpoints" / f"iteration_{n:07d}", folder / "whole.pth")
    return torch.load(folder / "whole.pth", weights_only=True)["model"]


def losses(folder: Path) -> list[tuple]:
    return [(r["iteration"], r["total_loss"], r["grad_norm_backbone"]) for r in rows(folder)]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["crops.local_crops_number=0"],
        ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"],
        ["dino.loss_weight=0"],
        ["ibot.loss_weight=0"],
        ["data_transform=hema", "dino.smooth_rank_loss_weight=0.01"],
        ["compute_precision.student.backbone.mixed_precision.param_dtype=bf16"],
        ["compute_precision.student.backbone.mixed_precision.param_dtype=fp16"],
        ["student.block_chunks=2", "student.num_register_tokens=2", "student.ffn_layer=swiglufused"],
    ],
    ids=lambda o: ",".join(o) or "defaults",
)
def test_a_run_leaves_what_the_docs_say(run, overrides):
    code, folder = run(*overrides)
    assert code == 0
    assert [r["iteration"] for r in rows(folder)] == [0, 1, 2, 3]
    assert all(torch.isfinite(torch.tensor(r["total_loss"])) for r in rows(folder))
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "iteration_0000004").is_dir()
    teacher = torch.load(folder / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)
    assert {name.split(".")[0] for name in teacher["teacher"]} >= {"backbone", "dino_head"}
    assert all(value.dtype == torch.float32 for value in teacher["teacher"].values())
    model = load_backbone(folder, img_size=28)
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 32)


def test_a_run_without_a_teacher_is_evaluated_viewed_and_written(run, lejepa_alone, tmp_path, image_list):
    cells, table = image_list(n=12, folder=tmp_path / "cells"), tmp_path / "cells.csv"
    lines = [f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(sorted(cells.glob("images/*.png")))]
    table.write_text("".join(["Image Path,Label\n", *lines]))
    evaluation = f"evaluation.datasets=[{{name: cells, data: {table}, knn_k: [1, 2]}}]"
    momentum = ["teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0"]
    code, folder = run(*lejepa_alone, *momentum, evaluation, "evaluation.eval_period_iterations=2")
    assert code == 0
    assert {"invariance_loss", "sigreg_loss", "effective_rank"} <= rows(folder)[-1].keys()
    assert {path.name for path in (folder / "eval").iterdir()} == {
        "training_0",
        "training_2",
        "training_4",
        "best.json",
    }
    assert (folder / "views" / "crops_0.png").is_file()
    teacher = torch.load(folder / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    state = networks(folder, 4)
    assert {name.split(".")[0] for name in teacher} == {"backbone", "lejepa_head"}
    for name, value in teacher.items():  # it is the student
        torch.testing.assert_close(value, state[f"student.{name}"])


def test_custom_yaml_shrunk_trains_two_iterations(run):
    code, folder = run("optim.epochs=1", "optim.warmup_epochs=0.5", arguments=("--config-file", str(CUSTOM)))
    assert code == 0
    assert set(rows(folder)[0]) >= {"dino_global_crops_loss", "koleo_loss", "ibot_loss", "lr", "wd", "mom"}
    assert "dino_local_crops_loss" not in rows(folder)[0]
    assert len(rows(folder)) == 2


def test_the_learning_rate_follows_the_schedule(run):
    _, folder = run("optim.base_lr=1.024", "teacher.momentum_teacher=0.5")
    assert rows(folder)[1]["lr"] == pytest.approx(1.024 * (4 / 1024) ** 0.5)
    assert rows(folder)[0]["mom"] == 0.5


@pytest.mark.parametrize("momentum", [0, 1])
def test_the_teacher_follows_the_student_by_its_momentum(run, momentum):
    _, folder = run(f"teacher.momentum_teacher={momentum}", f"teacher.final_momentum_teacher={momentum}")
    first, last = (networks(folder, n) for n in (2, 4))
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert not torch.equal(first[f"student.{name}"], last[f"student.{name}"])
    assert torch.equal(first[f"teacher.{name}"], last[f"teacher.{name}"]) == (momentum == 1)
    assert torch.equal(last[f"teacher.{name}"], last[f"student.{name}"]) == (momentum == 0)


def test_one_poisoned_batch_costs_one_step(run, monkeypatch):
    forward_backward = SSLMetaArch.forward_backward
    calls = []

    def poisoned(self, images, teacher_temp):
        calls.append(None)
        if len(calls) == 2:
            images = {**images, "collated_global_crops": images["collated_global_crops"] * float("nan")}
        return forward_backward(self, images, teacher_temp)

    monkeypatch.setattr(SSLMetaArch, "forward_backward", poisoned)
    code, folder = run()
    assert code == 0
    assert [r["skipped_steps"] for r in rows(folder)] == [0, 1, 1, 1]
    assert rows(folder)[1]["total_loss"] is None
    assert all(r["total_loss"] is not None for r in rows(folder)[2:])


def test_a_run_killed_in_its_last_evaluation_repeats_it(run, monkeypatch):
    evaluate = TeacherEvaluation.run
    monkeypatch.setattr(TeacherEvaluation, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    code, folder = run()
    assert code == 1
    monkeypatch.setattr(TeacherEvaluation, "run", evaluate)
    assert run()[0] == 0
    assert (folder / "eval" / "training_4" / "teacher_checkpoint.pth").is_file()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_stop_signal_ends_a_wait_for_data(run, monkeypatch, n_workers):
    read, trainer = HemaStandardDataset.__getitem__, os.getpid()

    def read_from_a_dead_disk(self, index):
        if counter.value == 8:  # two batches of four
            os.kill(trainer, signal.SIGTERM)
            time.sleep(600)
        counter.value += 1
        return read(self, index)

    counter = multiprocessing.Value("i", 0)
    with monkeypatch.context() as patch:
        patch.setattr(HemaStandardDataset, "__getitem__", read_from_a_dead_disk)
        code, folder = run(f"train.num_workers={n_workers}", "train.saveckp_freq=0")
    assert code == 75
    assert read_status(folder).state == "stopped"
    (checkpoint,) = (folder / "checkpoints").glob("iteration_*")
    assert n_workers == 1 or checkpoint.name == "iteration_0000002"  # a worker reads ahead
    assert run("train.saveckp_freq=0")[0] == 0


def test_a_stop_signal_ends_the_set_up(run, monkeypatch):
    def download_from_a_silent_server(cfg):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr("dinov2.train.train.TeacherEvaluation", download_from_a_silent_server)
    assert run()[0] == 75


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.bin"), 2),
        (MemoryError(), 2),
        (torch.OutOfMemoryError("CUDA out of memory."), 2),
        (RuntimeError("shapes differ"), 1),
    ],
)
def test_an_error_in_the_loop_ends_with_its_reason(run, monkeypatch, error, code):
    def fail(*_, **settings):
        raise error

    monkeypatch.setattr("dinov2.train.train.clip_gradients", fail)
    ended, folder = run()
    assert ended == code
    log, status = (folder / "logs" / "log.txt").read_text(), read_status(folder)
    assert status.state == "failed"
    assert status.reason in log
    assert ("Traceback" in log) == ("please report it" in log) == (code == 1)


def test_a_run_that_never_wrote_a_checkpoint_is_moved_aside(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TeacherEvaluation, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        run("train.saveckp_freq=0")
    code, folder = run()
    assert code == 0
    (aside,) = (tmp_path / "out").glob("run.before_*")
    assert (aside / "config.yaml").is_file()


def test_a_name_that_fixes_the_patch_size_is_stated_in_the_config(run):
    code, folder = run("student.patch_size=7", "student.arch=dinov2_vits14")
    assert code == 0
    cfg = OmegaConf.load(folder / "config.yaml")
    assert (cfg.student.patch_size, cfg.student.ffn_layer) == (14, "mlp")
    assert cfg.compute_precision.student.backbone.mixed_precision.param_dtype == "fp32"  # what auto is on a CPU


def test_tensorboard_is_written_by_default(run):
    pytest.importorskip("tensorboard")
    _, folder = run("train.tensorboard=true")
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_weights_and_biases_is_opt_in_and_keeps_one_id_over_a_resume(run, monkeypatch):
    started, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values["total_loss"]))

        def finish(self):
            logged.append("finished")

    fake = SimpleNamespace(init=lambda **settings: started.append(settings) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run("train.wandb.enabled=true")
    run("train.wandb.enabled=true", "optim.epochs=3")
    assert [s["id"] for s in started] == [started[0]["id"]] * 2
    assert started[0]["config"]["train"]["seed"] == 0
    assert [entry[0] for entry in logged if entry != "finished"] == [0, 1, 2, 3, 4, 5]
    assert logged.count("finished") == 2


def test_mlflow_is_opt_in_and_keeps_one_run_over_a_resume(run):
    mlflow = pytest.importorskip("mlflow")
    run("train.mlflow.enabled=true")
    _, folder = run("train.mlflow.enabled=true", "optim.epochs=3")
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("dinobloom").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.seed"] == "0"
    history = client.get_metric_history(found.info.run_id, "total_loss")
    assert sorted(each.step for each in history) == [0, 1, 2, 3, 4, 5]


def test_an_untouched_folder_gives_the_same_losses_again(run):
    _, first = run(name="first")
    _, second = run(name="second")
    _, other = run("train.seed=1", name="other")
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


KILLED = ["train.log_period=1", "train.saveckp_freq=1.5", "optim.epochs=6", "student.drop_path_rate=0.5"]


@pytest.mark.parametrize("objective", ["sinkhorn_knopp", "centering", "lejepa", "guided"])
def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(
    tmp_path, image_list, tiny_overrides, capfd, objective, lejepa_alone, make_guided
):
    lists = image_list(n=13)
    settings = lejepa_alone if objective in ("lejepa", "guided") else [f"train.centering={objective}"]
    settings = settings + make_guided(lists) * (objective == "guided")
    overrides = tiny_overrides(lists, *KILLED, *settings)

    def command(name):
        return [sys.executable, str(TRAIN), "--output-dir", str(tmp_path), "--name", name, *overrides]

    assert main(command("unbroken")[2:]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    metrics = tmp_path / "killed" / "training_metrics.json"
    with subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        # the checkpoints are those of iterations 3, 6, 9, 12: seven lines are past one and before the next
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 7):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run wrote no metrics"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert 7 <= len(rows(tmp_path / "killed")) < 12
    capfd.readouterr()
    assert main(command("killed")[2:]) == 0
    assert "resuming" in capfd.readouterr().err
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    ends = [
        torch.load(p, weights_only=True)["teacher"] for p in tmp_path.glob("*/eval/training_12/teacher_checkpoint.pth")
    ]
    assert len(ends) == 2
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    both = [networks(tmp_path / name, 12) for name in ("killed", "unbroken")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])


def test_a_run_whose_config_was_overwritten_is_not_resumed(run, failing):
    _, folder = run()
    (folder / "config.yaml").write_text("train: [1, 2]\n")
    assert "config.yaml is no longer that of a run" in failing()


def test_no_resume_moves_the_old_run_aside(run, tmp_path):
    run("train.seed=1")
    before = losses(tmp_path / "out" / "run")
    _, folder = run(arguments=("--no-resume",))
    (aside,) = (tmp_path / "out").glob("run.before_*")
    assert losses(aside) == before != losses(folder)


def test_a_finished_run_trains_no_further(run):
    _, folder = run()
    stamp = (folder / "checkpoints" / "iteration_0000004").stat().st_mtime_ns
    run()
    assert (folder / "checkpoints" / "iteration_0000004").stat().st_mtime_ns == stamp


def test_a_list_that_grew_is_warned_of_when_the_run_is_resumed(run, tmp_path, capfd):
    run()
    run()
    assert "so far had" not in capfd.readouterr().err
    (file,) = (tmp_path / "lists").glob("*.txt")
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    run()
    assert re.search(r"the run so far had \d+ images, names sha256 \w+, and .* now have", capfd.readouterr().err)


def test_eval_only_judges_the_latest_checkpoint_without_the_training_data(run, tmp_path):
    _, folder = run()
    shutil.rmtree(tmp_path / "lists")
    teacher = folder / "eval" / "training_4" / "teacher_checkpoint.pth"
    teacher.unlink()
    code, _ = run(arguments=("--eval-only",))
    assert code == 0
    assert teacher.is_file()


def test_dry_run_says_the_plan_and_writes_nothing(run, tmp_path, capfd):
    code, folder = run(arguments=("--dry-run",))
    told = capfd.readouterr().err
    assert code == 0
    assert "4 steps of 4 images = 2.0 passes" in told
    assert "one step works" in told
    assert not folder.exists()


@pytest.mark.parametrize(("key", "chunks"), [("student.pretrained_weights", 0), ("MODEL.WEIGHTS", 2)])
def test_pretrained_weights_are_loaded_into_both_networks(run, key, chunks):
    _, folder = run(name="first")
    still = ("optim.base_lr=0", "optim.min_lr=0", f"student.block_chunks={chunks}")
    code, second = run(f"{key}={folder}", *still, name="second")
    assert code == 0
    assert len(rows(second)) == 4  # it starts, and does not resume
    start = load_backbone(folder, img_size=28).state_dict()
    after = load_backbone(second, img_size=28).state_dict()
    assert all(torch.equal(start[name], after[name]) for name in start)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_in_settings(failing):
    assert "did you mean optim.epochs?" in failing("optim.epocs=2")
    assert "must be a whole number" in failing("train.seed=abc")
    assert "train.device must be" in failing("train.device=gpu")
    if not torch.cuda.is_available():
        assert "no CUDA device" in failing("train.device=cuda")
    assert "give --output-dir" in failing("train.output_dir=x")
    assert "have no column 'slide', but only 'dataset'" in failing("train.metadata.column=slide")
    assert "must be one of suppress, encourage" in failing("train.metadata.mode=forget")
    assert "train.metadata.weight is 0" in failing("train.metadata.column=dataset", "train.metadata.weight=0")
    assert "set train.metadata.column instead" in failing("train.metadata.n_values=3")
    assert "blur_sigma" in failing("augmentation.default.blur_sigma=[2.0,1.0]")
    assert "evaluation.datasets, a: labelled cells: 'nowhere'" in failing("evaluation.datasets=[{name:a,data:nowhere}]")
    assert "at least 2" in failing("train.batch_size_per_gpu=1")
    for ibot in ("ibot.loss_weight=0", "ibot.mask_sample_probability=0"):
        assert "all 0: nothing is learned; set one of them" in failing("dino.loss_weight=0", ibot)
    assert "lejepa.sigreg_weight must be between 0 and 1" in failing("lejepa.sigreg_weight=2")
    assert "lejepa.head_out_dim must be at least 1" in failing("lejepa.head_out_dim=0")
    assert "unknown dataset" in failing("train.dataset_path=ImageNet:split=TRAIN")
    assert "student.arch: 'vit_smal' is unknown" in failing("student.arch=vit_smal")
    assert "no file at" in failing(arguments=("--config-file", "nowhere.yaml"))


def test_a_run_without_a_name_under_slurm_is_found_again_by_its_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path = run_folder_path(tmp_path, None, str(CUSTOM))
    assert path == tmp_path / "custom_7"
    path.mkdir()
    with pytest.raises(ValueError, match="already holds a run of this SLURM job"):
        run_folder_path(tmp_path, None, str(CUSTOM))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_folder_path(tmp_path, None, str(CUSTOM)) == path


def test_a_run_that_torchrun_may_restart_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--name: missing"):
        run_folder_path(tmp_path, None, None)
    assert run_folder_path(tmp_path, "mine", None) == tmp_path / "mine"


def test_a_batch_that_does_not_divide(failing):
    assert "leave accumulation_steps at null" in failing("train.global_batch_size=10", "train.accumulation_steps=3")


def test_no_dataset_path(capfd, tmp_path):
    assert main(["--config-file", str(CUSTOM), "--output-dir", str(tmp_path)]) == 2
    assert "no value for train.dataset_path" in capfd.readouterr().err


def test_lists_that_cannot_be_used(failing, tmp_path):
    def told(folder):
        return failing(f"train.dataset_path=HemaStandardDataset:root={folder}")

    empty, blank, missing = (tmp_path / name for name in ("empty", "blank", "missing"))
    for folder in (empty, blank, missing):
        folder.mkdir()
    assert "no *.txt" in told(empty)
    (blank / "list.txt").write_text("\n# only a comment\n")
    assert "name no image" in told(blank)
    (missing / "list.txt").write_text("".join(f"gone/{i}.png\n" for i in range(30)))
    assert "gone/0.png" in told(missing)


@pytest.mark.parametrize("blocker", ["a file where the folder should be", "a read-only file system"])
def test_an_output_folder_that_cannot_be_written(tmp_path, image_list, tiny_overrides, capfd, monkeypatch, blocker):
    output = tmp_path / "place"
    if blocker.startswith("a file"):
        output.write_text("")
    else:

        def refuse(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("dinov2.train.run_folder.tempfile.TemporaryFile", refuse)
    code = main(["--output-dir", str(output), "--name", "x", *tiny_overrides(image_list())])
    assert code == 2
    assert "choose another --output-dir" in capfd.readouterr().err


def test_two_commands_do_not_train_in_one_folder(run, failing, monkeypatch):
    _, folder = run("optim.epochs=1")
    monkeypatch.setattr("dinov2.train.run_folder._LOCK_TIMEOUT_SECONDS", 0.1)
    before = (folder / "training_metrics.json").read_bytes()
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        told = failing("optim.epochs=2")
        assert f"process {os.getpid()} of " in told  # who wrote there last
        assert "end it first, or choose another --name" in told
        assert (folder / "training_metrics.json").read_bytes() == before
        holder.kill()
    assert run("optim.epochs=2")[0] == 0


def test_a_run_of_another_architecture_is_not_resumed(run, failing):
    run()
    told = failing("student.depth=1")
    assert "another architecture" in told
    assert "student.depth: 2 there, 1 now" in told


def test_weights_of_another_architecture(run, failing):
    _, folder = run(name="first")
    told = failing("student.depth=3", f"student.pretrained_weights={folder}", name="second")
    assert "holds another architecture" in told


def test_eval_only_without_a_run(failing):
    assert "no checkpoint" in failing(arguments=("--eval-only",), name="never")


def test_unreadable_images_are_replaced_and_reported(tmp_path, image_list, tiny_overrides):
    lists = image_list(n=8)
    (lists / "images" / "003.png").write_bytes(b"not an image")
    common = ["--output-dir", str(tmp_path), "--name", "run"]
    assert main([*common, *tiny_overrides(lists, "train.max_bad_fraction=0.2")]) == 0
    with open(tmp_path / "run" / "bad_images.csv", newline="") as file:
        (bad,) = csv.DictReader(file)
    assert bad["path"].endswith("003.png")
    assert bad["reason"]


def test_the_record_of_unreadable_images_outlives_a_full_disk(tmp_path, monkeypatch, caplog):
    record = BadImages(tmp_path / "bad_images.csv", n_listed=99, max_fraction=0.5)
    record.record([("a.png", "it is empty")])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("dinov2.data.bad_images.atomic_write", full)
        record.settle()
        record.settle()
    assert not record.path.exists()
    assert caplog.text.count("No space left on device") == 1
    record.settle()
    assert record.path.read_text() == "path,reason\na.png,it is empty\n"


def test_too_many_unreadable_images_stop_the_run_until_they_are_mended(tmp_path, image_list, tiny_overrides):
    lists = image_list(n=8)
    for i in (1, 3, 5):
        (lists / "images" / f"00{i}.png").write_bytes(b"")
    overrides = tiny_overrides(lists, "train.max_bad_fraction=0.2")
    assert main(["--output-dir", str(tmp_path), "--name", "run", *overrides]) == 2
    log = (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert re.search(r"train\.max_bad_fraction: \d of 8 listed images", log)
    assert (tmp_path / "run" / "bad_images.csv").is_file()
    for i in (1, 3, 5):  # mended images no longer count
        shutil.copy(lists / "images" / "000.png", lists / "images" / f"00{i}.png")
    assert main(["--output-dir", str(tmp_path), "--name", "run", *overrides]) == 0


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1", "I;16"])
def test_every_mode_of_image_trains(tmp_path, image_list, tiny_overrides, mode):
    lists = image_list(n=4)
    for path in (lists / "images").iterdir():
        image = Image.open(path)
        suffix = ".tif" if mode == "CMYK" else ".png"
        (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(path.with_suffix(suffix))
    names = "\n".join(f"images/{i:03d}{suffix}" for i in range(4))
    (lists / "all.txt").write_text(names)
    once = ("optim.epochs=0.5", "optim.warmup_epochs=0", "teacher.warmup_teacher_temp_epochs=0")
    assert main(["--output-dir", str(tmp_path), "--name", "run", *tiny_overrides(lists, *once)]) == 0
    assert not (tmp_path / "run" / "bad_images.csv").exists()


def test_patch_prototypes_are_counted_in_logged_iterations_only(run):
    code, folder = run("train.log_period=3")
    assert code == 0
    assert [row["iteration"] for row in rows(folder) if "patch_prototype_use" in row] == [2, 3]
    assert all("prototype_use" in row for row in rows(folder))


def test_the_peak_memory_of_a_run_is_reset_after_the_probe_of_products(monkeypatch):
    calls = []
    monkeypatch.setattr(train_module, "StepClock", lambda device: None)
    monkeypatch.setattr(train_module, "count_step_flops", lambda *_, **__: 1)
    monkeypatch.setattr(train_module, "measured_matmul_rate", lambda *_: calls.append("probe"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    device = torch.device("cuda", 1)
    cfg = OmegaConf.create({"optim": {"freeze_backbone_iterations": 0}})
    train_module.measure_speed(SimpleNamespace(device=device, matmul_dtype=torch.bfloat16, cfg=cfg), SimpleNamespace())
    assert calls == ["probe", device]
