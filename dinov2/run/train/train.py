r"""Submit dinov2/train/train.py to a SLURM cluster, one process per GPU.

    python dinov2/run/train/train.py --nodes 2 --ngpus 8 --partition gpu \
        --config-file dinov2/configs/train/custom.yaml --output-dir runs train.dataset_path=...

Other arguments are passed to train.py. A job that reaches its time limit, is preempted or is requeued resumes from its
last checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence

import dinov2  # noqa: F401  # before torch: it limits how long OpenMP threads spin

# isort: split
import torch

from dinov2.logging import setup_logging
from dinov2.models import build_model_from_cfg
from dinov2.run.submit import TrainingTask, add_cluster_arguments, submit, tasks_per_node
from dinov2.train.batches import build_augmentation, build_dataset
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.finetuning import choose_learned, locate_weights
from dinov2.train.schedules import Schedules
from dinov2.train.train import parse_arguments, read_settings
from dinov2.utils.command import log_error
from dinov2.utils.files import local_path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_cluster_arguments(parser, ngpus=8, minutes=2800, many_tasks=True, max_timeouts=1000)
    return parser


def check_settings(args: argparse.Namespace, world_size: int) -> None:
    """Check train.py's arguments for mistakes that would end the job at its start."""
    cfg = read_settings(args, world_size)
    Schedules(cfg)
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    choose_learned(backbone, cfg.student)
    locate_weights(cfg)  # downloads a name or URL here: compute nodes often have no internet
    build_augmentation(cfg)
    TeacherEvaluation(cfg)
    if not args.eval_only:
        build_dataset(cfg)


def main(argv: Sequence[str] | None = None) -> int:
    args, train_argv = build_parser().parse_known_args(argv)
    train_args = parse_arguments(train_argv)
    setup_logging()
    try:
        check_settings(train_args, args.nodes * tasks_per_node(args))
        output_dir = train_args.output_dir.absolute()
        config_file = local_path(train_args.config_file) if train_args.config_file else None
        task = TrainingTask([*train_argv, "--output-dir", str(output_dir)], config_file)
        config = config_file.stem if config_file else "run"
        name = train_args.name
        return submit(task, args, output_dir, name or config, results=output_dir / (name or f"{config}_%j"))
    except Exception as error:
        log_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
