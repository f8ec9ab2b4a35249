"""Kill commands at random moments and fill their disk; started again, each must leave what an undisturbed one leaves.

    python scripts/fault_drill.py [--kills 200] [--disks 10] [--only training,packing] [--seed 0] [--folder F] [--short]
                                  [key=value ...]

Stages: training (on one and on two processes), extraction, packing, preparing, download.

  kills  SIGKILL, in a fifth of the cases SIGTERM, at a random moment or while a file is written. Of two processes
         mostly one is killed, and the other must end. What is there then is final: no file is cut short, no checkpoint
         is lost.
  disks  The output is on a tmpfs that is too small (only root can mount one). The command must say so in its log.
         After room is made, the same command goes on.

In the end the result equals that of an undisturbed command bit for bit: losses and weights, features, packed images,
files. Commands run in forked processes, so that torch is imported once. `key=value` go to train.py. Needs Linux.
Exit code 0: all checks held; report.json has them.
"""

import argparse
import ctypes
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import numpy as np
import pack_dataset
import prepare_dataset
import torch
from PIL import Image

from dinov2.data import cache
from dinov2.data.datasets.sources import ImageSource
from dinov2.data.sample_cells import write_sample_cells
from dinov2.eval import extract_features, finetune
from dinov2.eval.features import loop
from dinov2.eval.features.store import read_features
from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.models import architecture, build_backbone
from dinov2.train import train
from dinov2.utils.command import exit_code
from dinov2.utils.files import local_path

FORK = multiprocessing.get_context("fork")
KEEP = 3  # checkpoints
PATIENCE_SECONDS = 300.0
CLONE_NEWNS = 0x20000  # of linux/sched.h
SIZE = 28  # pixels of an image
TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=14", "student.layerscale=1.0", "student.drop_path_rate=0"),
    *(f"crops.global_crops_size={SIZE}", "crops.local_crops_size=14", "crops.local_crops_number=0"),
    *("dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("train.global_batch_size=8", "train.num_workers=0", "train.log_period=1", "train.device=cpu"),
    *("train.OFFICIAL_EPOCH_LENGTH=10", "train.max_bad_fraction=0", "train.hang_timeout_seconds=60"),
    *("train.saveckp_freq=0.3", f"train.keep_checkpoints={KEEP}", "train.tensorboard=false", "optim.epochs=3"),
    *("optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=1", "teacher.warmup_teacher_temp_epochs=2"),
    *("evaluation.eval_period_iterations=10", "evaluation.knn_k=[1,5]", "student.pretrained_weights=null"),
]
Checks = Iterator[tuple[str, bool, object]]  # what is checked, whether it held, details
Result = dict[str, object]  # what a command leaves, by name


class Lab:
    """The inputs of all commands: images, a weight file, a data set to prepare, and a server of one file."""

    def __init__(self, folder: Path, seed: int, overrides: Sequence[str]) -> None:
        self.folder, self.overrides, self.cells = folder, list(overrides), folder / "cells"
        numbers = {"n_train": 80, "n_probe_train": 400, "n_probe_test": 16, "n_patients": 0}
        write_sample_cells(self.cells, **numbers, seed=seed, size=SIZE)
        torch.manual_seed(seed)
        model = build_backbone({"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": SIZE})
        content = {"teacher": model.state_dict(), "architecture": architecture(model)}
        torch.save(content, folder / "weights.pth")
        self.archive = folder / "BCCD"
        _write_smears(self.archive, random.Random(seed))
        (folder / "served").mkdir()
        (folder / "served" / "weights.pth").write_bytes(random.Random(seed).randbytes(6 << 20))
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Slow, directory=folder / "served")
        )
        self.url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        FORK.Process(target=server.serve_forever, daemon=True).start()


class _Slow(http.server.SimpleHTTPRequestHandler):
    """Send a file slowly enough to be killed meanwhile."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with suppress(OSError):  # the receiver was killed
            while block := source.read(1 << 16):
                outputfile.write(block)
                time.sleep(0.01)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def _write_smears(folder: Path, rng: random.Random) -> None:
    """Write smears with boxes around cells, in the layout of the data set BCCD."""
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        pixels = np.frombuffer(rng.randbytes(160 * 160 * 3), np.uint8).reshape(160, 160, 3)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"BloodImage_{number:05d}.jpg")
        objects = ""
        for _ in range(12):
            x, y = rng.randrange(110), rng.randrange(110)
            box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 40}</xmax><ymax>{y + 40}</ymax>"
            objects += f"<object><name>WBC</name><bndbox>{box}</bndbox></object>"
        (folder / "Annotations" / f"BloodImage_{number:05d}.xml").write_text(f"<annotation>{objects}</annotation>")


# --- stages ----------------------------------------------------------------------------------------------------------


def run_training(lab: Lab, output: Path) -> int:
    probe = {"name": "drawn", **{split: str(lab.cells / "probe" / split) for split in ("train", "test")}}
    dataset = f"train.dataset_path=HemaStandardDataset:root={lab.cells / 'lists'}:shuffle=1"
    settings = [dataset, f"evaluation.datasets={json.dumps([probe])}", *TINY, *lab.overrides]
    return train.main(["--output-dir", str(output), "--name", "run", *settings])


def read_training(lab: Lab, output: Path) -> Result:
    """Return the numbers of each step, and the teacher's weights of each evaluation."""
    result: Result = {}
    metrics = output / "run" / "training_metrics.json"
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    for number, row in enumerate(map(json.loads, lines)):
        result[f"line {number}"] = {name: row[name] for name in row if re.search("_loss$|^grad_norm|^iteration$", name)}
    for file in output.glob("run/eval/training_*/teacher_checkpoint.pth"):
        weights = torch.load(file, weights_only=True)["teacher"]
        result[file.parent.name] = {name: _sha256(value.numpy().tobytes()) for name, value in weights.items()}
    return result


def read_checkpoints(output: Path) -> dict[int, bool]:
    """Return {iteration: True if its files are undamaged} of the complete checkpoints of a run, ascending."""
    checkpointer, is_whole = Checkpointer(output / "run" / "checkpoints", KEEP), {}
    for path in checkpointer.paths():
        iteration, newest = int(path.name.rpartition("_")[2]), None
        with suppress(ValueError, FileNotFoundError):  # none up to this one can be read; the run removed it
            newest = checkpointer.newest(before=iteration)
        if path.exists():
            is_whole[iteration] = newest is not None and newest[0] == path
    return is_whole


def run_extraction(lab: Lab, output: Path) -> int:
    loop.PART_SIZE = 16  # many parts, between which a kill may fall
    data, weights = str(lab.cells / "probe" / "train"), str(lab.folder / "weights.pth")
    options = ["--image-size", str(SIZE), "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    argv = ["--checkpoint", weights, "--data", data, "--output-dir", str(output), *options]
    return exit_code(lambda: extract_features.main(argv))


def read_extraction(lab: Lab, output: Path) -> Result:
    if not (output / "features.h5").is_file():
        return {}
    features = read_features(output / "features.h5")
    return dict(zip(features.paths, map(np.ndarray.tobytes, features.features), strict=True))


def run_finetuning(lab: Lab, output: Path) -> int:
    weights, sides = str(lab.folder / "weights.pth"), [str(lab.cells / "probe" / side) for side in ("train", "test")]
    argv = ["--checkpoint", weights, "--train", sides[0], "--test", sides[1], "--output-dir", str(output)]
    options = ["--image-size", str(SIZE), "--epochs", "8", "--num-workers", "0", "--device", "cpu"]
    return exit_code(lambda: finetune.main([*argv, *options]))


def read_finetuning(lab: Lab, output: Path) -> Result:
    """Return the weights of the network, and the predictions."""
    result: Result = {}
    if (output / "finetuned.pth").is_file():
        weights = torch.load(output / "finetuned.pth", weights_only=True)["model"]
        result = {name: _sha256(value.numpy().tobytes()) for name, value in weights.items()}
    if (output / "predictions.csv").is_file():
        result["predictions"] = _sha256((output / "predictions.csv").read_bytes())
    return result


def run_packing(lab: Lab, output: Path) -> int:
    cache.IMAGES_PER_ROUND = 8
    dataset = f"HemaStandardDataset:root={lab.cells / 'probe' / 'train'}"
    options = ["--cache", str(output), "--image-size", "112", "--workers", "0"]
    return pack_dataset.main([dataset, *options])


def read_packing(lab: Lab, output: Path) -> Result:
    source, result = ImageSource.from_root(lab.cells / "probe" / "train"), Result()
    packed = cache.PackedCache(output, source, 112)
    for position in range(len(source)):
        with suppress(KeyError):  # not packed yet
            result[source.path(position)] = _sha256(packed.fetch(position).tobytes())
    return result


def run_preparing(lab: Lab, output: Path) -> int:
    options = ["--source", str(lab.archive), "--output", str(output), "--size", "112", "--n-workers", "1"]
    return prepare_dataset.main(["bccd", *options])


def run_download(lab: Lab, output: Path) -> int:
    os.environ["TORCH_HOME"] = str(output)
    return exit_code(lambda: print(local_path(lab.url)))


def read_files(lab: Lab, output: Path) -> Result:
    """Return the checksums of all files with a final name; in texts the output folder has no name."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.suffix not in (".lock", ".part", ".tmp")]
    contents = {path: path.read_bytes().replace(str(output).encode(), b"") for path in paths}
    return {str(path.relative_to(output)): _sha256(content) for path, content in contents.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Stage:
    """A command with its output in a folder; it returns its exit code. `read` returns what is in the folder so far."""

    run: Callable[[Lab, Path], int]
    read: Callable[[Lab, Path], Result]
    n_processes: int = 1


STAGES = {
    "training": Stage(run_training, read_training),
    "training on two processes": Stage(run_training, read_training, n_processes=2),
    "extraction": Stage(run_extraction, read_extraction),
    "fine-tuning": Stage(run_finetuning, read_finetuning),
    "packing": Stage(run_packing, read_packing),
    "preparing": Stage(run_preparing, read_files),
    "download": Stage(run_download, read_files),
}


# --- one start of a command ------------------------------------------------------------------------------------------


class Start:
    """A command in forked processes, one for each rank; its output is appended to `log`."""

    def __init__(self, stage: Stage, lab: Lab, output: Path) -> None:
        self.log = lab.folder / f"{output.parent.name} {output.name}.log"  # not on the full disk
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        output.parent.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        starts = [(stage, lab, output, rank, port) for rank in range(stage.n_processes)]
        self.processes = [FORK.Process(target=self._run, args=arguments) for arguments in starts]
        for process in self.processes:
            process.start()

    def _run(self, stage: Stage, lab: Lab, output: Path, rank: int, port: int) -> None:
        os.setpgid(0, 0)  # the workers of this process end with it
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stage.n_processes > 1:
            os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(stage.n_processes))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)  # a forked process has none of the threads of this one
        code = 1
        try:
            code = stage.run(lab, output)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def codes(self, seconds: float = PATIENCE_SECONDS) -> list[int | None]:
        """Wait for the end; return the exit codes, None for a process that still runs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self, rng: random.Random) -> list[int | None]:
        """Stop the command by a signal to one of its processes, or to all; return the exit codes."""
        number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        victims = self.processes if rng.random() < 0.3 else [rng.choice(self.processes)]
        for process in victims:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid or 0, number)
        codes = self.codes()
        self.end()
        return codes

    def end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()

    def to_end(self) -> tuple[list[int | None], str]:
        """Wait for the end; return the exit codes and the output."""
        codes = self.codes()
        self.end()
        return codes, self.log.read_bytes()[self._offset :].decode(errors="replace")


# --- drills ----------------------------------------------------------------------------------------------------------


def kills(lab: Lab, name: str, rng: random.Random, n_kills: int) -> Checks:
    """Kill a command again and again, a few times in each output folder; then let it end."""
    stage, began = STAGES[name], time.monotonic()
    codes, text = Start(stage, lab, lab.folder / name / "undisturbed").to_end()
    yield "the undisturbed command ended with code 0", not any(codes), text[-2000:] if any(codes) else ""
    seconds, expected = time.monotonic() - began, stage.read(lab, lab.folder / name / "undisturbed")
    n_done = n_folders = 0
    while n_done < n_kills:
        output, before = lab.folder / name / f"killed_{n_folders}", {}
        n_folders += 1
        for _ in range(min(rng.randint(1, 4), n_kills - n_done)):
            start = Start(stage, lab, output)
            start.codes(rng.uniform(0, 0.8 * seconds))
            if rng.random() < 0.5:
                until_file_is_written(output, seconds / 4)
            before, is_over = read_checkpoints(output), None not in start.codes(0)
            codes = start.kill(rng)
            if is_over:
                break  # before the kill
            n_done += 1
            yield from check_after_kill(f"kill {n_done}", stage.read(lab, output), expected, codes)
            if before:
                after = read_checkpoints(output)
                is_kept = all(after.values()) and max(after, default=0) >= max(before)
                yield f"kill {n_done}: checkpoints are whole", is_kept, f"{before} before, {after} after"
        codes, text = Start(stage, lab, output).to_end()
        yield from check_end(f"folder {n_folders}", codes, text, stage.read(lab, output), expected)
        if before:
            yield f"folder {n_folders}: continued from a checkpoint", "resuming" in text, codes
        shutil.rmtree(output)


def until_file_is_written(output: Path, seconds: float) -> None:
    """Wait until there is a file or folder that has no final name yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):  # it has its final name now
            if any(path.suffix in (".tmp", ".part") for path in output.rglob("*")):
                return
        time.sleep(0.0003)


def check_after_kill(what: str, result: Result, expected: Result, codes: Sequence[int | None]) -> Checks:
    yield f"{what}: all processes ended", None not in codes, codes
    others = [key for key, value in result.items() if expected.get(key) != value]
    yield f"{what}: what is there is final", not others, f"{others[:3]}, codes {codes}" if others else f"codes {codes}"


def check_end(what: str, codes: Sequence[int | None], text: str, result: Result, expected: Result) -> Checks:
    yield f"{what}: ended with code 0", not any(codes) and None not in codes, text[-2000:] if any(codes) else codes
    keys = [key for key in result.keys() | expected.keys() if result.get(key) != expected.get(key)]
    yield f"{what}: as if undisturbed", not keys and bool(expected), f"{sorted(keys)[:5]}"


def disks(lab: Lab, name: str, rng: random.Random, n_disks: int) -> Checks:
    """Run a command on a disk that is too small, make room, and run it again."""
    stage, undisturbed = STAGES[name], lab.folder / name / "undisturbed"
    expected = stage.read(lab, undisturbed)
    n_bytes = sum(path.stat().st_blocks * 512 for path in undisturbed.rglob("*"))
    for number in range(n_disks):
        with small_disk(lab.folder / name / f"disk_{number}", int(n_bytes * rng.uniform(0.05, 0.9))) as disk:
            output = disk / "output"
            codes, text = Start(stage, lab, output).to_end()
            says = [line for line in text.splitlines() if "No space left" in line or "make room" in line.lower()]
            is_clear = bool(says) and "Traceback" not in text and None not in codes
            detail = f"codes {codes}: {says[-1] if says and is_clear else text[-2000:]}"
            yield f"disk {number + 1}: the log says that it is full", is_clear, detail
            subprocess.run(["mount", "-o", f"remount,size={4 * n_bytes + (64 << 20)}", str(disk)], check=True)
            codes, text = Start(stage, lab, output).to_end()
            yield from check_end(f"disk {number + 1}: with room", codes, text, stage.read(lab, output), expected)


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """Yield a folder on a tmpfs of `n_bytes`, which only this process and its children see."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "fault_drill", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def obstacle_to_mounting() -> str:
    """Give this process mounts of its own; return why that is not possible, empty if it is."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return f"no mounts of its own: {os.strerror(ctypes.get_errno())}; only root has the right"
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True).stderr.strip()


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="over all stages (default: %(default)s)")
    parser.add_argument("--disks", type=int, default=10, metavar="N", help="of each stage (default: %(default)s)")
    parser.add_argument("--only", default=",".join(STAGES), metavar="A,B", help="stages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="F", help="new folder to keep the outputs in (default: none)")
    parser.add_argument("--short", action="store_true", help="at most 12 kills, and one full disk of each stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.py, such as train.device=cuda")
    args = parser.parse_intermixed_args(argv)
    if args.short:
        args.kills, args.disks = min(args.kills, 12), min(args.disks, 1)
    args.stages = [name.strip() for name in args.only.split(",")]
    if unknown := sorted(set(args.stages) - set(STAGES)):
        parser.error(f"--only: there is no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if args.folder is not None and args.folder.is_dir() and any(args.folder.iterdir()):
        parser.error(f"--folder: {args.folder} is not empty; give a new one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="fault_drill_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lab, obstacle = Lab(folder, args.seed, args.overrides), obstacle_to_mounting()
    report: list[dict[str, Any]] = []
    for name in args.stages:
        rng = random.Random(f"{args.seed} {name}")
        n_kills = -(-args.kills // len(args.stages))
        drills = [("kills", kills(lab, name, rng, n_kills))]
        drills += [("disks", disks(lab, name, rng, args.disks))] if not obstacle else []
        for drill, checks in drills:
            for what, is_held, detail in checks:
                report.append({"stage": name, "drill": drill, "what": what, "held": is_held, "detail": str(detail)})
                print(f"{name}: {'ok' if is_held else 'FAILED'}: {what}  {detail}", flush=True)
    (folder / "report.json").write_text(json.dumps({"checks": report, "no full disks because": obstacle}, indent=1))
    n_failed = sum(not check["held"] for check in report)
    print(f"{len(report)} checks, {n_failed} failed{f'; no full disks: {obstacle}' if obstacle else ''}")
    if n_failed or args.folder:
        print(f"outputs, logs and report.json are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
