"""Submit evaluation commands as SLURM jobs of one process."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from dinov2.logging import setup_logging
from dinov2.run.submit import EvaluationTask, add_cluster_arguments, submit
from dinov2.utils.command import log_error

__all__ = ["launch"]


def launch(module: str, argv: Sequence[str] | None = None) -> int:
    """Submit the evaluation command `module`; return the launcher's exit code.

    The command's own `parse_arguments` checks the job's arguments before the job is queued. The inputs need not exist
    yet: with --dependency afterok:<job id> the job waits for the training that writes them.
    """
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        description=f"Submit dinov2/eval/{name}.py to a SLURM cluster. Other arguments are passed to it.",
        allow_abbrev=False,
    )
    add_cluster_arguments(parser, ngpus=1, minutes=2800, many_tasks=False, max_timeouts=3)
    args, command_argv = parser.parse_known_args(argv)
    setup_logging()
    try:
        if args.ngpus > 1:
            raise ValueError(f"--ngpus must be 0 or 1, found {args.ngpus}: evaluations are one process")
        output_dir = import_module(module).parse_arguments(command_argv).output_dir.absolute()
        return submit(EvaluationTask(module, command_argv), args, output_dir, name, results=output_dir)
    except Exception as error:
        log_error(error)
        return 2
