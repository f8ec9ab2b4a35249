"""Submit a command to SLURM through submitit: options, the job's task, and waiting for the job.

The job imports this module before submitit sets its signal handlers, so its imports must be fast.
"""

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import Checkpointable

from dinov2.utils.command import REQUEUE_EXIT_CODE, StoppedError, StopSignals, log_error

# final states of a job in scontrol
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"),
    *("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
}
_SILENCE_SECONDS = 300  # of SLURM's controller, before --wait gives up
_RANK_0_SECONDS = 60  # for rank 0 to notice that the run has failed

# options that are passed to sbatch unchanged, with their help
_SAME_IN_SBATCH = {
    "partition": "(default: the cluster's)",
    "qos": "quality of service",
    "account": "account to charge",
    "constraint": "features that the nodes must have",
    "mem": "memory of a node, for instance 64G",
    "comment": "text for the job's comment field, which some clusters require",
    "exclude": "nodes not to use",
    "nodelist": "nodes to use",
    "gres": "the cluster's way to request the GPUs of --ngpus, for instance gpu:a100:8",
    "dependency": "condition for the start, for instance afterok:<job id>",
}


def add_cluster_arguments(
    parser: argparse.ArgumentParser, *, ngpus: int, minutes: int, many_tasks: bool, max_timeouts: int
) -> None:
    """Add the options of a launcher; the arguments are defaults. `many_tasks` allows several nodes and tasks."""
    group = parser.add_argument_group("cluster")
    add, default = group.add_argument, "(default: %(default)s)"
    if many_tasks:
        add("--nodes", "-n", type=int, default=1, help=f"nodes {default}")
        add("--tasks-per-node", type=int, metavar="N", help="processes of a node with --ngpus 0 (default: 1)")
    else:
        parser.set_defaults(nodes=1, tasks_per_node=None)
    gpus_help = f"GPUs per node, one process each; 0 for the CPU {default}"
    add("--ngpus", "--gpus", "--gpus-per-node", type=int, default=ngpus, help=gpus_help)
    add("--timeout", type=int, default=minutes, metavar="MINUTES", help=f"time limit {default}")
    add("-p", dest="partition", help="the same as --partition")
    for name, text in _SAME_IN_SBATCH.items():
        add(f"--{name}", help=text)
    volta_help = "the same as --constraint volta32gb"
    add("--use-volta32", dest="constraint", action="store_const", const="volta32gb", help=volta_help)
    add("--cpus-per-task", type=int, metavar="N", help="cores per process; decoding needs several")
    repeated: dict[str, Any] = {"action": "append", "default": []}
    sbatch_help = "any other option of sbatch, as in --slurm reservation=r1 --slurm exclusive; may be repeated"
    add("--slurm", **repeated, metavar="KEY[=VALUE]", help=sbatch_help)
    setup_help = "shell line to run before the job, for instance 'module load cuda'; may be repeated"
    add("--setup", **repeated, metavar="LINE", help=setup_help)
    delay_help = f"time before the limit at which the job saves and requeues; SLURM may be a minute early {default}"
    add("--signal-delay", type=int, default=120, metavar="SECONDS", help=delay_help)
    limits_help = f"number of times that the job may reach its limit and requeue {default}"
    add("--max-timeouts", type=int, default=max_timeouts, metavar="N", help=limits_help)
    add("--wait", action="store_true", help="wait until the job has ended, and return its exit code")


class TrainingTask(Checkpointable):
    """Task of each process of a training job: train.py, which resumes from its checkpoints in a requeued job.

    The job has a copy of the configuration file, so later changes of the file have no effect.
    """

    def __init__(self, argv: Sequence[str], config_file: Path | None) -> None:
        self.argv = list(argv)
        self.config_name = config_file.name if config_file else None
        self.config_text = config_file.read_text(encoding="utf-8") if config_file else ""

    def __call__(self) -> None:
        """Train; return only if the run has finished, which is success for submitit and SLURM."""
        argv = list(self.argv)
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:  # a requeued job resumes its run
            argv = [text for text in argv if not (len(text) > 3 and "--no-resume".startswith(text))]
        signals = StopSignals()  # train.py enters this context
        with tempfile.TemporaryDirectory() as folder:
            if self.config_name is not None:
                file = Path(folder, self.config_name)
                file.write_text(self.config_text, encoding="utf-8")
                argv += ["--config-file", str(file)]
            code = import_module("dinov2.train.train").main(argv, signals)
        if code != 0:
            _end_process(code, signals.received)


class EvaluationTask(Checkpointable):
    """Task of an evaluation job; after a requeue it starts again, and what finetune.py had stored it continues."""

    def __init__(self, module: str, argv: Sequence[str]) -> None:
        self.module, self.argv = module, list(argv)

    def __call__(self) -> None:
        try:
            import_module(self.module).main(self.argv)
        except StoppedError as stopped:
            _end_process(REQUEUE_EXIT_CODE, stopped.received)
        except Exception as error:
            log_error(error)
            sys.exit(2)


def _end_process(code: int, received: int | None) -> None:
    """End the process of unfinished work, and requeue a stopped job unless SLURM does so.

    - The signal before the time limit, or a user's signal: submitit's handler requeues the job.
    - SIGTERM of scontrol requeue, preemption or scancel: SLURM has decided already.
    - SIGTERM as the notice of a preemption (GraceTime): requeued here, since SLURM would mark the job as failed.
    """
    environment = submitit.JobEnvironment()
    if environment.global_rank != 0:
        _wait_for_rank_0(environment.job_id, math.inf if code == REQUEUE_EXIT_CODE else _RANK_0_SECONDS)
    elif code == REQUEUE_EXIT_CODE:
        fields = _job_fields(environment.job_id)
        is_preempted = fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") != "None"
        if received not in (signal.SIGTERM, signal.SIGINT) or is_preempted:
            signal.raise_signal(signal.Signals[f"SIG{environment.USR_SIG}"])
    sys.exit(code)


def submit(
    task: TrainingTask | EvaluationTask, args: argparse.Namespace, output_dir: Path, name: str, results: Path
) -> int:
    """Submit `task` to SLURM and print where its results will be; return 0, or the job's exit code with --wait.

    The files and logs of submitit are in `output_dir/submitit/<job id>`. `%j` in `results` stands for the job's number.
    """
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise ValueError(
                f"no {program} on this machine; submit from a login node of the cluster, or run the command itself "
                "here, without dinov2/run"
            )
    folder = output_dir / "submitit"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"--output-dir: cannot write to {folder} ({error.strerror}); choose another") from error

    # since SLURM 22.05 srun does not inherit --cpus-per-task from sbatch
    srun_cpus = [] if args.cpus_per_task is None else [f"--cpus-per-task={args.cpus_per_task}"]
    extra = (text.lstrip("-").partition("=") for text in args.slurm)
    executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=args.max_timeouts)
    executor.update_parameters(
        **{key: getattr(args, key) for key in (*_SAME_IN_SBATCH, "cpus_per_task") if getattr(args, key) is not None},
        **({"gpus_per_node": args.ngpus} if args.ngpus > 0 and args.gres is None else {}),
        job_name=name,
        wckey=None,  # submitit's own default is refused where clusters enforce such keys; --slurm wckey=... gives one
        time=args.timeout,
        nodes=args.nodes,
        ntasks_per_node=tasks_per_node(args),
        setup=args.setup,
        srun_args=["--kill-on-bad-exit=1", *srun_cpus],
        stderr_to_stdout=True,
        signal_delay_s=args.signal_delay,
        additional_parameters={
            "requeue": True,
            **{key.replace("-", "_"): value if equals else True for key, equals, value in extra},
        },
    )
    try:
        job = executor.submit(task)
    except UncompletedJobError as error:
        raise ValueError(f"SLURM refused the job: {error}") from error
    log, number = job.paths.stdout, job.job_id
    print(
        f"""job {number}: nodes {args.nodes}, tasks {job.num_tasks}, {args.timeout} min
  results  {str(results).replace("%j", number)}
  log      {log} (of task 0; task k: {number}_<k>_log.out)
  follow   tail -F {log}
  state    squeue -j {number}; in the end: sacct -j {number}
  requeue  scontrol requeue {number}
  cancel   scancel {number}""",
        flush=True,
    )
    return wait(number) if args.wait else 0


def tasks_per_node(args: argparse.Namespace) -> int:
    """Return the number of processes per node, one for each GPU; ValueError if options contradict each other."""
    for name, low in {"nodes": 1, "ngpus": 0, "timeout": 1, "cpus_per_task": 1, "tasks_per_node": 1}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, found {value}")
    if not 0 < args.signal_delay < 60 * args.timeout:
        raise ValueError(
            f"--signal-delay must be between 1 s and the time limit, found {args.signal_delay} s with --timeout "
            f"{args.timeout} (minutes)"
        )
    if args.ngpus == 0:
        return int(args.tasks_per_node or 1)
    if args.tasks_per_node is not None:
        raise ValueError("--tasks-per-node is for --ngpus 0; with GPUs there is one process for each")
    requested = re.search(r"\bgpu(?::[^:,]*[A-Za-z][^:,]*)?(?::(\d+))?", args.gres or "")
    if requested and int(requested[1] or 1) != args.ngpus:
        raise ValueError(
            f"--gres {args.gres} is {requested[1] or 1} GPUs of a node, but --ngpus {args.ngpus}; give the same number"
        )
    return int(args.ngpus)


def wait(job_id: str) -> int:
    """Wait until the job has ended, print each new state, and return its exit code. Ctrl-C does not end the job."""
    printed, started = "", time.monotonic()
    answered = started
    try:
        while True:
            fields, now = _job_fields(job_id), time.monotonic()
            if fields:
                where = fields["Reason"] if fields["JobState"] == "PENDING" else fields.get("NodeList", "")
                answered, text = now, f"job {job_id} {fields['JobState']} ({where})"
                if text != printed:
                    print(time.strftime("%H:%M:%S"), text, flush=True)
                    printed = text
                if fields["JobState"] in _ENDED:
                    return _job_exit_code(fields)
            elif now - answered > _SILENCE_SECONDS:
                raise ConnectionError(f"scontrol shows nothing of job {job_id}, which may go on; see sacct -j {job_id}")
            time.sleep(min(30.0, 1 + (now - started) / 20))
    except KeyboardInterrupt:
        print(f"job {job_id} goes on; scancel {job_id} ends it")
        return 130  # a shell's exit code for Ctrl-C


def _job_exit_code(fields: dict[str, str]) -> int:
    """Return a job's exit code for a shell: the training's, else srun's, which is that of the last killed process."""
    if fields["JobState"] == "COMPLETED":
        return 0
    codes = [fields.get(name, "0:0").split(":") for name in ("DerivedExitCode", "ExitCode")]
    return next((int(code) or 128 + int(number) for code, number in codes if (code, number) != ("0", "0")), 1)


def _wait_for_rank_0(job_id: str, max_seconds: float) -> None:
    """Wait while rank 0 may requeue the job or log an error: the first process that exits ends all."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    deadline = time.monotonic() + max_seconds
    while time.monotonic() < deadline and _job_fields(job_id).get("JobState", "RUNNING") == "RUNNING":
        time.sleep(5)


def _job_fields(job_id: str) -> dict[str, str]:
    """Return scontrol's fields of a job, {} without an answer; sacct has more, but not on every cluster."""
    command = ["scontrol", "--details", "--oneliner", "show", "job", job_id]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return {}
    # the user's own texts come last and may contain a key again: the first value of a key is kept
    return dict(reversed(re.findall(r"(\w+)=(\S*)", run.stdout)))
