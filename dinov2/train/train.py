"""Pre-train a ViT on cell images by self-distillation.

    python dinov2/train/train.py --config-file dinov2/configs/train/custom.yaml \
        train.dataset_path=HemaStandardDataset:root=<folder with *.txt lists>:shuffle=1

The same command under `torchrun --standalone --nproc_per_node=N` or `srun` uses N processes. Exit codes: 0 done, 1
failed, 2 a wrong setting, file or disk, 75 stopped by a signal (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) after a checkpoint:
the same command resumes.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import dinov2  # noqa: F401  # before torch: it limits how long OpenMP threads spin

# isort: split
import torch
from omegaconf import DictConfig

from dinov2 import distributed
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.distributed import average_over_ranks, get_world_size
from dinov2.logging import MetricLogger, StepClock, setup_logging
from dinov2.train.batches import TrainBatches, build_augmentation, build_dataset
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.dry_run import count_step_flops, dry_run, find_batch_size, measured_matmul_rate
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.finetuning import warn_of_other_crop
from dinov2.train.micro_batches import forward_backward
from dinov2.train.monitor import CollapseMonitor, profiled_steps
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.run_folder import RunFolder, TrainState, open_metrics, run_folder_path
from dinov2.train.schedules import Schedules
from dinov2.train.setup import (
    Supervision,
    describe_environment,
    describe_run,
    fill_cache,
    read_settings,
    resolve_arch,
    run_environment,
    set_up_device,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.views import TrainingViews
from dinov2.utils.command import REQUEUE_EXIT_CODE, USER_ERRORS, StopReceived, StopSignals, error_text, find_cause
from dinov2.utils.config import load_run_config
from dinov2.utils.files import user_path
from dinov2.utils.numerics import derive_seed, fast_matmul_within
from dinov2.utils.resources import end_worker_processes

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
    """Pre-train from `state` up to optim.epochs, profiling `n_profiled` steps; return the exit code."""
    model, optimizer, guard, progress = state.model, state.optimizer, state.guard, state.progress
    schedules, views = Schedules(cfg), TrainingViews(cfg, folder.path)
    batches = TrainBatches(cfg, dataset, model.device)
    folder.record_images(dataset.source.fingerprint())
    must_stop, teacher_is_written = False, True

    with (
        closing(open_metrics(cfg, folder.path, progress.iteration, schedules)) as metrics,
        Supervision(cfg.train.hang_timeout_seconds, folder, metrics, signals) as supervision,
        profiled_steps(folder.path / "profile", n_profiled, model.device) as end_profiled_step,
    ):
        clock, flops = measure_speed(model, metrics)
        if progress.iteration == 0:  # the untrained network
            with supervision.pause("evaluating"):
                evaluation.evaluate(model, folder.path, 0, metrics)
        elif evaluation.is_missing(folder.path, progress.iteration):
            with supervision.pause("evaluating"):
                evaluation.run(model, folder.path, progress.iteration, metrics)
        stream = batches.starting_at(progress.batch_number, progress.position)
        while progress.iteration < schedules.n_iterations and not must_stop:
            iteration = progress.iteration
            supervision.begin_step()
            try:
                with clock.stage("data"), signals.wait(is_interruptible=get_world_size() == 1):
                    micro_batches = next(stream)
            except StopReceived:  # ranks that wait can't stop alone: the others may be in a step already
                with supervision.pause("saving"):
                    folder.save(state, wait=True)
                break
            if iteration == 0:
                with supervision.pause("running"):
                    views.write(micro_batches, 0, metrics)

            now = schedules.at(iteration)
            now.apply_to(optimizer)
            optimizer.zero_grad(set_to_none=True)
            model.backbone_is_frozen = now.backbone_is_frozen
            model.counts_patch_prototypes = metrics.is_logged(iteration)
            own_losses = forward_backward(model, micro_batches, now.teacher_temp)
            with clock.stage("optimizer"):
                means = average_over_ranks({**own_losses, **model.statistics})
                losses = {name: means[name] for name in own_losses}
                if state.scaler is not None:
                    state.scaler.unscale_(optimizer)
                norms = clip_gradients(model.student, max_norm=cfg.optim.clip_grad)
                guard.step(optimizer, losses, norms, state.scaler)
            with clock.stage("teacher update"):
                model.update_teacher(now.teacher_momentum)  # teacher <- m * teacher + (1 - m) * student
            progress.advance(schedules.global_batch_size)
            end_profiled_step()

            logged = {**guard.log_values(losses, norms), **means}
            rows = metrics.update(iteration, now.log_values(), logged, flops[now.backbone_is_frozen])
            if rows:
                batches.bad_images.settle()
                state.monitor.check(rows)
                supervision.report(rows, state.monitor.signs_seen())
                if guard.is_stuck(rows[-1], cfg.train.max_bad_steps_in_row):
                    folder.roll_back(state, rows[-1])
                    metrics.roll_back(progress.iteration)
                    stream = batches.starting_at(progress.batch_number, progress.position)
                    continue
            # The checkpoint comes last: a run that is killed during an evaluation repeats it
            is_last, must_stop = progress.iteration == schedules.n_iterations, supervision.must_stop()
            if is_last or (evaluation.is_due(progress.iteration) and not must_stop):
                with supervision.pause("evaluating"):
                    teacher_is_written = evaluation.run(model, folder.path, progress.iteration, metrics)
                    views.write(micro_batches, progress.iteration, metrics)
            if is_last or must_stop or folder.checkpoint_is_due(progress.iteration):
                with supervision.pause("saving"):
                    folder.save(state, wait=is_last or must_stop)
        is_complete = folder.checkpointer.wait() and teacher_is_written
    return finish(state, folder, schedules.n_iterations, is_complete=is_complete)


def finish(state: TrainState, folder: RunFolder, n_iterations: int, *, is_complete: bool) -> int:
    """Report the end of the training in the log and in status.json; return the exit code."""
    done, device = state.progress.iteration, state.model.device
    if done < n_iterations:
        end_worker_processes()
        logger.warning("stopped after iteration %d, as asked; the same command resumes it", done)
        folder.write_status("stopped")
        return REQUEUE_EXIT_CODE
    if device.type == "cuda":
        logger.info("peak memory %.2f GiB", torch.cuda.max_memory_allocated(device) / 2**30)
    if not is_complete:
        message = "trained to the end, but its last files could not be written or its teacher evaluated"
        logger.error("%s (see above)", message)
        folder.write_status("failed", message)
        return 1
    logger.info("done: %s holds config.yaml, training_metrics.json, checkpoints and eval/", folder.path)
    folder.write_status("finished")
    return 0


def measure_speed(model: SSLMetaArch, metrics: MetricLogger) -> tuple[StepClock, dict[bool, float]]:
    """Attach the step timer, measure the matmul throughput; return FLOP of a step by whether the backbone is frozen."""
    model.clock = metrics.clock = StepClock(model.device)
    metrics.matmul_rate = measured_matmul_rate(model.device, model.matmul_dtype)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)  # the peak is that of the training
    phases = {False, model.cfg.optim.freeze_backbone_iterations > 0}
    return model.clock, {frozen: count_step_flops(model.cfg, backbone_is_frozen=frozen) for frozen in phases}


def print_batch_size(
    args: argparse.Namespace, cfg: DictConfig, model: SSLMetaArch, dataset: HemaStandardDataset
) -> int:
    """Print the override that sets the largest batch that fits; return the exit code."""
    # settings that follow from the batch size get the user's values back
    given, unresolved = load_run_config(args.config_file, args.overrides, resolve_arch), cfg.copy()
    for key in ("accumulation_steps", "global_batch_size"):
        unresolved.train[key] = given.train[key]
    batch_size = find_batch_size(unresolved, model, dataset)
    if batch_size is None:
        logger.error(
            "train.batch_size_per_gpu: not even the smallest batch fits; train.activation_checkpointing=1, fewer "
            "head_n_prototypes or a smaller student.arch need less memory"
        )
        return 1
    override = f"train.batch_size_per_gpu={batch_size}"
    logger.info("the largest batch that fits: add %s to the command", override)
    print(override)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="F", help="YAML with values that replace ssl_default_config.yaml's")
    parser.add_argument(
        "--output-dir", type=user_path, metavar="D", default="runs", help="folder of runs (default: %(default)s)"
    )
    parser.add_argument(
        "--name", metavar="N", help="the run's folder in D; resumed if it holds a run (default: a new one)"
    )
    parser.add_argument("--no-resume", action="store_true", help="start a new run; an earlier one is moved aside")
    parser.add_argument("--eval-only", action="store_true", help="write and evaluate the newest teacher")
    parser.add_argument("--dry-run", action="store_true", help="describe the run, try a step, write nothing")
    find_help = "print the largest train.batch_size_per_gpu that fits into the memory, write nothing"
    parser.add_argument("--find-batch-size", action="store_true", help=find_help)
    profile_help = "record some steps as a trace and a table in the run's folder profile/"
    parser.add_argument("--profile", action="store_true", help=profile_help)
    steps_help = "number of steps to profile (default: %(default)s)"
    parser.add_argument("--profile-steps", type=int, default=5, metavar="N", help=steps_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for instance optim.epochs=10")
    args = parser.parse_intermixed_args(argv)
    if args.dry_run + args.find_batch_size + args.eval_only > 1:
        parser.error("--dry-run, --find-batch-size and --eval-only exclude each other; give one of them")
    if args.profile and (args.dry_run or args.find_batch_size or args.eval_only):
        parser.error("--profile records steps of a training; --dry-run, --find-batch-size and --eval-only do not train")
    if args.profile_steps < 1:
        parser.error(f"--profile-steps {args.profile_steps}: at least 1 step has to be recorded")
    return args


def main(argv: Sequence[str] | None = None, signals: StopSignals | None = None) -> int:
    """Run the command and return its exit code; `signals` then holds the signal that stopped it, if any."""
    args = parse_arguments(argv)
    try:
        with signals or StopSignals() as active, fast_matmul_within(False):
            return run(args, active)
    finally:
        distributed.disable()


def run(args: argparse.Namespace, signals: StopSignals) -> int:
    """Set up, then train, evaluate or try a step; return the exit code."""
    folder: RunFolder | None = None
    only_tries = args.dry_run or args.find_batch_size
    try:
        launch = distributed.read_launch()
        setup_logging(rank=launch.rank if launch else 0)
        if args.find_batch_size and launch is not None and launch.world_size > 1:
            raise ValueError(
                f"--find-batch-size works in one process, found {launch.world_size}; start it with plain python, "
                "on one of the GPUs"
            )
        with signals.wait():
            cfg = read_settings(args, launch.world_size if launch else 1)
            device = set_up_device(cfg, launch)
            path = distributed.on_main_process(lambda: run_folder_path(args.output_dir, args.name, args.config_file))
            folder = RunFolder(cfg, path)
            evaluation = TeacherEvaluation(cfg)
            dataset = None if args.eval_only else build_dataset(cfg)
            frozen_teacher = None if args.eval_only else load_frozen_teacher(cfg, device)
            build_augmentation(cfg)  # checks its settings
            if not only_tries:
                folder.prepare(resume=not args.no_resume, eval_only=args.eval_only)
                setup_logging(folder.path)
            logger.info("%s", describe_environment(cfg))
            if frozen_teacher is not None:
                warn_of_other_crop("teacher.pretrained_weights", cfg.teacher.pretrained_weights, frozen_teacher, cfg)
            if not (only_tries or args.eval_only):
                folder.open_status(run_environment(cfg))
        if dataset is not None and not fill_cache(dataset, signals, only_report=only_tries):
            logger.warning("stopped while the cache was being built, as asked; the same command resumes it")
            folder.write_status("stopped")
            return REQUEUE_EXIT_CODE
        with signals.wait():
            torch.manual_seed(derive_seed(cfg.train.seed, "weights"))
            # a resumed run needs no pretrained weights, which may no longer exist
            needs_weights = not args.find_batch_size and (args.dry_run or not folder.has_checkpoint())
            model = SSLMetaArch(cfg, load_weights=needs_weights, frozen_teacher=frozen_teacher).to(device)
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
        if dataset is None:
            return 0 if evaluation.run(model, folder.path, iteration) else 1
        if args.find_batch_size:
            return print_batch_size(args, cfg, model, dataset)
        logger.info("%s", describe_run(cfg, model, dataset))
        if args.dry_run:
            return dry_run(cfg, model, dataset)
        return train(cfg, state, dataset, evaluation, folder, signals, args.profile_steps if args.profile else 0)
    except StopReceived:
        logger.warning("stopped before the first step, as asked; the same command starts or resumes the run")
        if folder is not None:
            folder.write_status("stopped")
        return REQUEUE_EXIT_CODE
    except Exception as error:
        return end_failed_run(find_cause(error), folder)


def end_failed_run(error: BaseException, folder: RunFolder | None) -> int:
    """Report an error in the log and in status.json; return the exit code."""
    if folder is not None:
        folder.write_status("failed", error_text(error))
    if isinstance(error, USER_ERRORS):
        logger.error("%s", error_text(error))
        return 2
    if isinstance(error, FloatingPointError):
        logger.error("the run stopped: %s", error)
    else:
        logger.error("a fault of the program, please report it: the run stopped: %s", error, exc_info=error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
