"""Pre-train a ViT on cell pictures by self-distillation.

    python dinov2/train/train.py --config-file dinov2/configs/train/custom.yaml \
        train.dataset_path=HemaStandardDataset:root=<folder with *.txt lists>:shuffle=1
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import get_rank, get_world_size
from dinov2.fsdp.precision import resolve_precision
from dinov2.logging import setup_logging
from dinov2.models import fixed_settings
from dinov2.train.batches import TrainBatches, build_augmentation, build_dataset, timed
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.plan import describe_environment, describe_run
from dinov2.train.run_folder import RunFolder, open_metrics, run_folder_path
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import USER_ERRORS, text_of
from dinov2.utils.config import load_run_config, missing_keys
from dinov2.utils.cores import available_cores
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


def train(
    cfg: Any,
    model: SSLMetaArch,
    dataset: HemaStandardDataset,
    evaluation: TeacherEvaluation,
    folder: RunFolder,
    state: dict[str, Any] | None,
) -> None:
    """Pre-train up to optim.epochs, from the checkpoint `state` that `model` was restored from, or from the start."""
    optimizer = build_optimizer(cfg.optim, model.get_params_groups())
    schedules = Schedules(cfg, get_world_size())
    guard = StepGuard(model.device)
    start, stop = folder.restore_progress(state, model, optimizer, guard), schedules.n_iterations
    logger.info("%s", describe_run(cfg, model, schedules, dataset))
    batches = TrainBatches(cfg, dataset, model.device, start)
    if start == 0:
        evaluation.judge(model, folder.path, 0)  # what the untrained network can do

    with closing(open_metrics(cfg, folder.path, start, schedules)) as metrics:
        for iteration, batch in zip(range(start, stop), timed(batches, metrics.add_data_time), strict=False):
            now = schedules.at(iteration)
            now.apply_to(optimizer)
            torch.manual_seed(derive_seed(cfg.train.seed, "step", iteration, get_rank()))  # stochastic depth
            optimizer.zero_grad(set_to_none=True)
            losses = model.forward_backward(batch, teacher_temp=now.teacher_temp)
            if model.fp16_scaler is not None:
                model.fp16_scaler.unscale_(optimizer)
            norms = clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
            guard.step(optimizer, losses, norms, model.fp16_scaler)
            model.update_teacher(now.teacher_momentum)  # teacher <- m * teacher + (1 - m) * student

            done = iteration + 1
            newest = metrics.update(iteration, now.shown(), guard.shown(losses, norms))
            if newest is not None:
                guard.stop_if_stuck(newest, cfg.train.max_bad_steps_in_row)
            # The checkpoint comes last: a run that is killed in an evaluation takes it up again
            if evaluation.is_due(done) or done == stop:
                with metrics.interruption():
                    evaluation.run(model, folder.path, done)
            if folder.checkpoint_is_due(done) or done == stop:
                with metrics.interruption():
                    folder.save(done, model, optimizer, guard)
    if model.device.type == "cuda":
        logger.info("peak memory %.2f GiB", torch.cuda.max_memory_allocated(model.device) / 2**30)
    logger.info("done: %s holds config.yaml, training_metrics.json, checkpoints and eval/", folder.path)


def dry_run(cfg: Any, model: SSLMetaArch, dataset: HemaStandardDataset) -> None:
    """Say what the run would do, and time two steps of it; nothing is written."""
    schedules = Schedules(cfg, get_world_size())
    logger.info("%s", describe_run(cfg, model, schedules, dataset))
    now, seconds = schedules.at(0), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        batches = TrainBatches(OmegaConf.merge(cfg, {"train": {"output_dir": scratch}}), dataset, model.device)
        for _, batch in zip(range(2), batches, strict=False):  # the first step also warms the device up
            started = time.perf_counter()
            losses = model.forward_backward(batch, teacher_temp=now.teacher_temp)
            values = {name: value.item() for name, value in losses.items()}
            seconds = time.perf_counter() - started
    logger.info("one step works: %s", "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    logger.info(
        "a step takes about %.2f s besides decoding, so the run at least %.1f h",
        *(seconds, seconds * schedules.n_iterations / 3600),
    )


def pick_device(name: str) -> torch.device:
    """The device that train.device means."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"train.device={name}, but PyTorch sees no CUDA device; set train.device=auto or cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be auto, cpu, cuda or cuda:<n>, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device={name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_arch(cfg: DictConfig) -> None:
    """Put what the name student.arch decides into the configuration, which states what the run really has."""
    for key, value in fixed_settings(cfg.student.arch).items():
        if cfg.student[key] != value:
            logger.info("student.%s is %s, as student.arch=%s says", key, value, cfg.student.arch)
            cfg.student[key] = value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="F", help="YAML with what differs from ssl_default_config.yaml")
    parser.add_argument("--output-dir", metavar="D", default="runs", help="folder of runs (default: %(default)s)")
    parser.add_argument(
        "--name", metavar="N", help="the run's folder in D; resumed if it holds a run (default: a new one)"
    )
    parser.add_argument("--no-resume", action="store_true", help="start anew; a run that D/N holds is moved aside")
    parser.add_argument("--eval-only", action="store_true", help="write and judge the teacher of the latest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, try a step, write nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for instance optim.epochs=10")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    try:
        cfg = load_run_config(args.config_file, args.overrides, resolve_arch)
        missing = [key for key in missing_keys(cfg) if not (args.eval_only and key == "train.dataset_path")]
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}; add {missing[0]}=<value> to the command or the file")
        device = pick_device(cfg.train.device)
        resolve_precision(cfg.compute_precision, device.type)
        if cfg.train.num_workers > available_cores():
            logger.info("train.num_workers=%d becomes %d, the cores here", cfg.train.num_workers, available_cores())
            cfg.train.num_workers = available_cores()
        folder = RunFolder(cfg, run_folder_path(args.output_dir, args.name, args.config_file))
        evaluation = TeacherEvaluation(cfg)
        dataset = None if args.eval_only else build_dataset(cfg)
        build_augmentation(cfg)  # here its settings are checked
        if not args.dry_run:
            folder.prepare(resume=not args.no_resume, eval_only=args.eval_only)
            setup_logging(folder.path)
        logger.info("%s", describe_environment(cfg))
        torch.manual_seed(derive_seed(cfg.train.seed, "weights"))
        model = SSLMetaArch(cfg).to(device)
        state = None if args.dry_run else folder.restore(model, must_exist=args.eval_only)
    except USER_ERRORS as error:
        logger.error("%s", text_of(error))
        return 2
    try:
        if dataset is None:
            assert state is not None, "restore(must_exist=True) raises where there is no checkpoint"
            evaluation.run(model, folder.path, state["iteration"])
        elif args.dry_run:
            dry_run(cfg, model, dataset)
        else:
            train(cfg, model, dataset, evaluation, folder, state)
    except (RuntimeError, FloatingPointError) as error:
        logger.exception("the run stopped: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
