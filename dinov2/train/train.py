"""Pre-train a ViT on cell pictures by self-distillation.

    python dinov2/train/train.py --config-file dinov2/configs/train/custom.yaml \
        train.dataset_path=HemaStandardDataset:root=<folder with *.txt lists>:shuffle=1

The same under `torchrun --nproc_per_node=N` and `srun` uses N processes. Ends with 0 when done, 1 when it failed, 2 for
a wrong setting, and 75 when a signal (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) asked it to stop and its checkpoint is
written: the same command then goes on.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from omegaconf import DictConfig

from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import Launch, StepAgreement
from dinov2.distributed.watchdog import Watchdog
from dinov2.fsdp.precision import resolve_precision
from dinov2.logging import setup_logging
from dinov2.logging.metrics import MetricLogger
from dinov2.logging.step_clock import StepClock
from dinov2.models import fixed_settings
from dinov2.train.batches import TrainBatches, build_augmentation, build_dataset, resolve_batch_size, timed
from dinov2.train.dry_run import count_step_flops, dry_run, find_batch_size, measured_matmul_rate
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.monitor import CollapseMonitor, StepProfile
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.plan import describe_environment, describe_run
from dinov2.train.run_folder import RunFolder, open_metrics, run_folder_path
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.state import TrainState
from dinov2.train.views import TrainingViews
from dinov2.utils.command import REQUEUE_EXIT_CODE, USER_ERRORS, text_of
from dinov2.utils.config import load_run_config, missing_keys
from dinov2.utils.cores import available_cores
from dinov2.utils.matmul import fast_matmul, matmul_setting_kept
from dinov2.utils.memory import keep_freed_memory
from dinov2.utils.seeds import derive_seed
from dinov2.utils.stop_signals import StopSignals

logger = logging.getLogger("dinov2")


def train(
    cfg: Any,
    state: TrainState,
    dataset: HemaStandardDataset,
    evaluation: TeacherEvaluation,
    folder: RunFolder,
    signals: StopSignals,
    n_profiled: int = 0,
) -> int:
    """Pre-train from where `state` is up to optim.epochs, profiling `n_profiled` steps; returns the exit code."""
    model, optimizer, guard, progress = state.model, state.optimizer, state.guard, state.progress
    schedules, agreement = Schedules(cfg), StepAgreement(model.device)
    batches, views = TrainBatches(cfg, dataset, model.device), TrainingViews(cfg, folder.path)
    teacher_is_written = True

    with (
        closing(open_metrics(cfg, folder.path, progress.iteration, schedules)) as metrics,
        open_watchdog(cfg.train.hang_timeout_seconds) as watchdog,
        StepProfile(folder.path / "profile", n_profiled, model.device) as profile,
    ):
        clock, flops = watch_speed(model, metrics)
        if progress.iteration == 0:  # what the untrained network can do
            watchdog.beat(0, "evaluation", patient=True)
            with metrics.interruption():
                evaluation.evaluate(model, folder.path, 0, metrics)
        stream = timed(batches.starting_at(progress.batch_number, progress.position), metrics.add_data_time)
        while progress.iteration < schedules.n_iterations:
            iteration = progress.iteration
            watchdog.beat(iteration, "waiting for data")
            with clock.stage("data"):
                parts = next(stream)
            if iteration == 0:
                with metrics.interruption():
                    views.write(parts, 0, metrics)
            watchdog.beat(iteration, "step")
            now = schedules.at(iteration)
            now.apply_to(optimizer)
            optimizer.zero_grad(set_to_none=True)
            model.backbone_is_frozen = now.backbone_is_frozen
            own_losses = model.forward_backward(parts, teacher_temp=now.teacher_temp)
            with clock.stage("optimizer"):
                shared = agreement.average({**own_losses, **model.statistics}, wants_stop=signals.received is not None)
                losses = {name: shared.pop(name) for name in own_losses}
                if state.scaler is not None:
                    state.scaler.unscale_(optimizer)
                norms = clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
                guard.step(optimizer, losses, norms, state.scaler)
            with clock.stage("teacher update"):
                model.update_teacher(now.teacher_momentum)  # teacher <- m * teacher + (1 - m) * student
            progress.advance(schedules.global_batch_size)
            profile.step()

            rows = metrics.update(
                iteration, now.shown(), {**guard.shown(losses, norms), **shared}, flops[now.backbone_is_frozen]
            )
            if rows:
                batches.bad_images.settle()
                state.monitor.check(rows)
                if guard.is_stuck(rows[-1], cfg.train.max_bad_steps_in_row):
                    folder.go_back(state, rows[-1])
                    metrics.go_back_to(progress.iteration)
                    stream = timed(batches.starting_at(progress.batch_number, progress.position), metrics.add_data_time)
                    continue
            # The checkpoint comes last: a run that is killed in an evaluation takes it up again
            is_last, must_stop = progress.iteration == schedules.n_iterations, agreement.stop_agreed()
            if is_last or (evaluation.is_due(progress.iteration) and not must_stop):
                watchdog.beat(iteration, "evaluation", patient=True)
                with metrics.interruption():
                    teacher_is_written = evaluation.run(model, folder.path, progress.iteration, metrics)
                    views.write(parts, progress.iteration, metrics)
            if is_last or must_stop or folder.checkpoint_is_due(progress.iteration):
                watchdog.beat(iteration, "checkpoint", patient=True)
                with metrics.interruption():
                    folder.save(state, wait=is_last or must_stop)
            if must_stop and not is_last:
                logger.warning("stopped after iteration %d, as asked; the same command goes on", progress.iteration)
                return REQUEUE_EXIT_CODE
        is_saved = folder.checkpointer.wait()
    if model.device.type == "cuda":
        logger.info("peak memory %.2f GiB", torch.cuda.max_memory_allocated(model.device) / 2**30)
    if not (is_saved and teacher_is_written):
        logger.error("trained to the end, but its last files could not be written or its teacher judged (see above)")
        return 1
    logger.info("done: %s holds config.yaml, training_metrics.json, checkpoints and eval/", folder.path)
    return 0


def watch_speed(model: SSLMetaArch, metrics: MetricLogger) -> tuple[StepClock, dict[bool, float]]:
    """Have model and log tell where a step's time goes, and of which rate of matrix products it makes use.

    Returns:
        the clock for the rest of the loop, and a step's FLOP by whether the backbone is frozen in it.
    """
    model.clock = metrics.clock = StepClock(model.device)
    metrics.matmul_rate = measured_matmul_rate(model.device, model.matmul_dtype)
    return model.clock, {frozen: count_step_flops(model.cfg, backbone_is_frozen=frozen) for frozen in (False, True)}


def fill_cache(dataset: HemaStandardDataset, signals: StopSignals, *, only_tell: bool) -> bool:
    """Pack what the data set's cache, if it has one, lacks; all processes share the work. False if told to stop.

    With `only_tell` nothing is written, and pictures are decoded as if there were no cache.
    """
    if dataset.cache is None:
        return True
    if only_tell:
        logger.info("packed cache %s: %s", dataset.cache.folder, dataset.cache.plan())
        dataset.cache = None
        return True
    summary = dataset.cache.build(should_stop=lambda: signals.received is not None)
    return all(distributed.all_gather_objects(summary.is_complete))


def open_watchdog(timeout_seconds: float) -> Watchdog:
    """Ends the run when it hangs, and names the process that does; 0 seconds: never."""
    return Watchdog(
        distributed.get_global_store(),
        distributed.get_rank(),
        distributed.get_world_size(),
        timeout_seconds or math.inf,
    )


def tell_batch_size(args: argparse.Namespace, cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset) -> int:
    """Print the override that sets the largest batch that fits; returns the exit code."""
    # What follows from the batch size is open again, as the user left it
    given, unsettled = load_run_config(args.config_file, args.overrides, resolve_arch), cfg.copy()
    for key in ("accumulation_steps", "global_batch_size"):
        unsettled.train[key] = given.train[key]
    batch_size = find_batch_size(unsettled, model, dataset)
    if batch_size is None:
        logger.error(
            "train.batch_size_per_gpu: not even the smallest batch fits; train.activation_checkpointing=1, fewer "
            "head_n_prototypes or a smaller student.arch make room"
        )
        return 1
    override = f"train.batch_size_per_gpu={batch_size}"
    logger.info("the largest batch that fits: add %s to the command", override)
    print(override)
    return 0


def pick_device(name: str, launch: Launch | None) -> torch.device:
    """The device that train.device means for this process: of several on a node, each takes the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"train.device={name}, but PyTorch sees no CUDA device; set train.device=auto or cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device must be auto, cpu, cuda or cuda:<n>, found {name!r}") from error
    if device.type != "cuda":
        return device
    n_devices = torch.cuda.device_count()
    if launch is None:
        index = device.index or 0
    elif device.index is not None and launch.local_world_size > 1:
        raise ValueError(f"train.device={name} is one GPU for {launch.local_world_size} processes; set it to auto")
    else:
        # a SLURM step may show each of its processes only its own GPU
        index = 0 if n_devices == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= n_devices:
        raise ValueError(
            f"this process needs CUDA device {index}, but there are only {n_devices}; start as many processes a node "
            "as it has GPUs, or set train.device"
        )
    return torch.device("cuda", index)


def read_settings(args: argparse.Namespace, world_size: int) -> DictConfig:
    """The configuration that the command's arguments describe, with nothing left open.

    Raises:
        FileNotFoundError, KeyError, ValueError: a setting that is missing, unknown or wrong.
    """

    def resolve(cfg: DictConfig) -> None:
        resolve_arch(cfg)
        resolve_batch_size(cfg.train, world_size)

    cfg = load_run_config(args.config_file, args.overrides, resolve)
    missing = [key for key in missing_keys(cfg) if not (args.eval_only and key == "train.dataset_path")]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; add {missing[0]}=<value> to the command or the file")
    return cfg


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
    parser.add_argument(
        "--find-batch-size",
        action="store_true",
        help="print the largest train.batch_size_per_gpu that fits into the memory, write nothing",
    )
    parser.add_argument(
        "--profile", action="store_true", help="record some steps, as a trace and a table in the run's folder profile/"
    )
    parser.add_argument("--profile-steps", type=int, default=5, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for instance optim.epochs=10")
    args = parser.parse_intermixed_args(argv)
    if args.dry_run + args.find_batch_size + args.eval_only > 1:
        parser.error("--dry-run, --find-batch-size and --eval-only are three things to do; give one of them")
    if args.profile and (args.dry_run or args.find_batch_size or args.eval_only):
        parser.error("--profile records steps of a training; --dry-run, --find-batch-size and --eval-only do not train")
    if args.profile_steps < 1:
        parser.error(f"--profile-steps {args.profile_steps}: at least 1 step has to be recorded")
    return args


def main(argv: Sequence[str] | None = None, signals: StopSignals | None = None) -> int:
    """Run the command; returns its exit code. `signals` then tells which signal stopped it, if one did."""
    args = parse_arguments(argv)
    try:
        with signals or StopSignals() as active, matmul_setting_kept():
            return run(args, active)
    finally:
        distributed.disable()


def run(args: argparse.Namespace, signals: StopSignals) -> int:
    """Set up, then train, evaluate or try a step; returns the exit code."""
    try:
        launch = distributed.read_launch()
        setup_logging(rank=launch.rank if launch else 0)
        if args.find_batch_size and launch is not None and launch.world_size > 1:
            raise ValueError(
                f"--find-batch-size works in one process, found {launch.world_size}; start it with plain python, "
                "on one of the GPUs"
            )
        cfg = read_settings(args, launch.world_size if launch else 1)
        device = pick_device(cfg.train.device, launch)
        resolve_precision(cfg.compute_precision, device.type)
        fast_matmul(cfg.compute_precision.fp32_matmul == "fast", device)
        if device.type == "cpu":
            keep_freed_memory()
        if cfg.train.num_workers > available_cores():
            logger.info("train.num_workers=%d becomes %d, the cores here", cfg.train.num_workers, available_cores())
            cfg.train.num_workers = available_cores()
        if launch is not None:
            # The watchdog is to notice first, and to say more; without one, a dead peer still ends the wait
            distributed.enable(launch, device, timeout_seconds=max(1800, 4 * cfg.train.hang_timeout_seconds))
        path = distributed.on_main_process(lambda: run_folder_path(args.output_dir, args.name, args.config_file))
        folder = RunFolder(cfg, path)
        evaluation = TeacherEvaluation(cfg)
        dataset = None if args.eval_only else build_dataset(cfg)
        build_augmentation(cfg)  # here its settings are checked
        only_tries = args.dry_run or args.find_batch_size
        if not only_tries:
            folder.prepare(resume=not args.no_resume, eval_only=args.eval_only)
            setup_logging(folder.path)
        logger.info("%s", describe_environment(cfg))
        if dataset is not None and not fill_cache(dataset, signals, only_tell=only_tries):
            logger.warning("stopped while the cache was being built, as asked; the same command goes on")
            return REQUEUE_EXIT_CODE
        torch.manual_seed(derive_seed(cfg.train.seed, "weights"))
        # A run that goes on needs them no more, and they may be gone
        needs_weights = not args.find_batch_size and (args.dry_run or not folder.has_checkpoint())
        model = SSLMetaArch(cfg, load_weights=needs_weights).to(device)
        model.prepare_for_distributed_training(launch.n_nodes if launch else 1)
        if model.fp16_scaler is not None:
            model.fp16_scaler.to(device)
        if args.eval_only:
            iteration = folder.restore_networks(model)
        elif not only_tries:
            state = TrainState(
                model,
                build_optimizer(cfg.optim, model.get_params_groups()),
                StepGuard(device, cfg.train.max_loss_spike),
                CollapseMonitor(cfg, Schedules(cfg).n_iterations),
            )
            folder.restore(state)
    except USER_ERRORS as error:
        logger.error("%s", text_of(error))
        return 2
    try:
        if dataset is None:
            return 0 if evaluation.run(model, folder.path, iteration) else 1
        if args.find_batch_size:
            return tell_batch_size(args, cfg, model, dataset)
        logger.info("%s", describe_run(cfg, model, dataset))
        if args.dry_run:
            return dry_run(cfg, model, dataset)
        return train(cfg, state, dataset, evaluation, folder, signals, args.profile_steps if args.profile else 0)
    except (RuntimeError, FloatingPointError, OSError) as error:
        logger.exception("the run stopped: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
