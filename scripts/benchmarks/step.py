"""Measure the training step against upstream's: seconds, memory, sharding, kernels of attention, busy machines.

    python scripts/benchmarks/step.py --folder bench [--only speed attention contention] [--rounds 7]
    python scripts/benchmarks/step.py --folder bench --only speed --networks S=152 B=120 L=56          # on a GPU

`ours` is the step of train.py, `plain` that of plain.py, both with custom.yaml's recipe, the same random weights and
the same made-up crops.

  speed       each way in a process of its own, in turns; where the time of ours goes; losses and gradients against
              plain fp32; the most memory of each process (CPU: VmHWM, and what the step added to the imports; GPU:
              what PyTorch's allocator gave out)
  attention   each kernel by type and number of tokens
  contention  steps of ours beside busy processes, by OpenMP spin count (GOMP_SPINCOUNT); on a CPU
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch
import torch.nn.functional as F
from harness import Worker, finish, memory_mib, ratio, serve, table, take_turns
from omegaconf import DictConfig
from plain import PlainStep
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2 import distributed
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.masking import MaskingGenerator
from dinov2.fsdp.precision import resolve_precision
from dinov2.logging.step_clock import StepClock
from dinov2.train.batches import resolve_batch_size
from dinov2.train.dry_run import count_step_flops, measured_matmul_rate
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config
from dinov2.utils.matmul import fast_matmul_within
from dinov2.utils.memory import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARCHS = {"Ti": "vit_tiny", "S": "dinov2_vits14", "B": "dinov2_vitb14", "L": "dinov2_vitl14", "G": "dinov2_vitg14"}
REFERENCE = "plain fp32"
WAYS = ("ours fp32", "ours bf16", REFERENCE, "plain bf16")
ROLES = [f"{role}.{part}" for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
TEACHER_TEMP, MOMENTUM, MAX_NORM, LR = 0.05, 0.994, 3.0, 1e-5
PEAK_FLOPS = 800e12  # dense bf16 of an H100, in practice
TOKENS = (50, 257, 1025)  # crops of 98, 224 and 448 px
ROWS_OF_TOKENS = 4112  # tokens at a time: 16 crops of 224 px
SPIN_COUNTS = (300_000, 100_000, 10_000, 1_000, 0)  # the first is libgomp's own


# --- one step --------------------------------------------------------------------------------------------------------


def load_recipe(device: torch.device, precision: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return custom.yaml from random weights, with all networks in one `param_dtype`, changed by `overrides`."""
    settings = [
        *("train.dataset_path=none", "student.pretrained_weights=null"),
        # What trained weights come near to. With 1e-5 the CLS tokens of a random net are equal to four digits, and
        # rounding decides which is whose neighbour in KoLeo
        "student.layerscale=1.0",
        *(f"compute_precision.{role}.mixed_precision.param_dtype={precision}" for role in ROLES),
    ]
    cfg = load_run_config(CONFIG_FOLDER / "train" / "custom.yaml", [*settings, *overrides])
    resolve_batch_size(cfg.train, distributed.get_world_size())
    resolve_precision(cfg.compute_precision, device.type)
    return cfg


def build_model(cfg: DictConfig, device: torch.device) -> SSLMetaArch:
    torch.manual_seed(0)
    return SSLMetaArch(cfg).to(device)


def make_batch(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """Make crops of noise, and masks as a run draws them."""
    n, crops, generator = cfg.train.batch_size_per_gpu, cfg.crops, torch.Generator().manual_seed(0)
    side = crops.global_crops_size // cfg.student.patch_size
    masking = MaskingGenerator((side, side), max_num_patches=side * side // 2)
    masks = draw_masks(2 * n, cfg.ibot.mask_ratio_min_max, cfg.ibot.mask_sample_probability, masking, 0)

    def noise(n_crops: int, size: int) -> list[Tensor]:
        return [torch.randn(n, 3, size, size, generator=generator) for _ in range(n_crops)]

    made = {
        "global_crops": noise(2, crops.global_crops_size),
        "local_crops": noise(crops.local_crops_number, crops.local_crops_size),
    }
    batch = assemble_batch(made, *masks, torch.float32)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class OurStep:
    """The step of train.py: zero the gradients, forward and backward, clip, AdamW with its guard, EMA."""

    def __init__(self, model: SSLMetaArch) -> None:
        self.model, self.guard = model, StepGuard(model.device)
        self.optimizer = build_optimizer(model.cfg.optim, model.get_params_groups())

    def __call__(self, images: Mapping[str, Any], teacher_temp: float, momentum: float, max_norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.model.forward_backward(images, teacher_temp)
        with self.model.clock.stage("optimizer"):
            self.guard.step(self.optimizer, losses, clip_gradients(self.model.student, max_norm))
        with self.model.clock.stage("teacher update"):
            self.model.update_teacher(momentum)


def make_step(way: str, device: torch.device, overrides: Sequence[str]) -> tuple[OurStep | PlainStep, dict[str, Any]]:
    """Return the step of a way (`ours bf16`, `plain fp32`, `ours bf16 FULL_SHARD`) and its batch."""
    whose, precision, *sharding = way.split()
    strategy = [f"compute_precision.{role}.sharding_strategy={name}" for name in sharding for role in ROLES]
    cfg = load_recipe(device, precision if whose == "ours" else "fp32", [*overrides, *strategy])
    model = build_model(cfg, device)
    if whose == "ours" and (sharding or cfg.train.compile_blocks):
        model.prepare_for_distributed_training()
    step: OurStep | PlainStep = OurStep(model) if whose == "ours" else PlainStep(model, DTYPES[precision])
    for group in step.optimizer.param_groups:
        group["lr"] = LR
    return step, make_batch(cfg, device)


def work(task: Mapping[str, Any]) -> None:
    """Take steps of one way in this process when asked."""
    way, device, overrides = task["way"], torch.device(task["device"]), task["overrides"]
    is_ours, is_cuda, at_start = way.startswith("ours"), device.type == "cuda", memory_mib()
    if is_ours and not is_cuda:
        keep_freed_memory()  # as train.py does
    if len(way.split()) > 2:
        distributed.enable(distributed.Launch(0, 1, 0, 1, "localhost", 0, "alone"), device, 600)
    step, images = make_step(way, device, overrides)

    def seconds() -> float:
        started = time.perf_counter()
        with fast_matmul_within(is_ours, device):
            step(images, TEACHER_TEMP, MOMENTUM, MAX_NORM)
        if is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def stages() -> dict[str, float]:
        assert isinstance(step, OurStep), "only our step has a clock"
        step.model.clock = clock = StepClock(device)
        for _ in range(2):
            clock.restart()
            seconds()
        return clock.means()

    def costs() -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if is_cuda else memory_mib("VmHWM")
        with fast_matmul_within(is_ours, device):
            rate = measured_matmul_rate(device, DTYPES[way.split()[1]])
        flops = count_step_flops(load_recipe(device, "fp32", overrides))
        return {"peak": peak, "added": peak - (0 if is_cuda else at_start), "rate": rate, "flops": flops}

    serve({"step": seconds, "stages": stages, "costs": costs, "gradients": partial(_gradients, step, images, is_ours)})


def _gradients(step: OurStep | PlainStep, images: Mapping[str, Any], is_ours: bool) -> str:
    """Write losses and gradients of the first step to a file, and return its name."""
    model = step.model if isinstance(step, OurStep) else step
    with fast_matmul_within(is_ours, model.device):
        losses = model.forward_backward(images, TEACHER_TEMP)
    named = sorted(model.student.named_parameters())
    gradient = torch.cat(
        [parameter.grad.flatten().float().cpu() for _, parameter in named if parameter.grad is not None]
    )
    file = Path(f"/tmp/gradients_{time.time_ns()}.pt")
    torch.save(({name: value.item() for name, value in losses.items()}, gradient), file)
    return str(file)


# --- parts -----------------------------------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    numbers: dict[str, Any] = {}
    tables: dict[str, str] = {}
    for network, batch in args.networks.items():
        workers = {way: start(args, way, network, batch) for way in args.ways}
        gradients = {} if args.device == "cuda" else {way: each.ask("gradients") for way, each in workers.items()}
        steps = {way: partial(each.ask, "step") for way, each in workers.items()}
        seconds = take_turns(steps, args.rounds, network)
        costs = {way: each.ask("costs") for way, each in workers.items()}
        stages = {way: each.ask("stages") for way, each in workers.items() if way.startswith("ours")}
        for each in workers.values():
            each.close()
        name = f"ViT-{network}, batch {batch}"
        agreement = compare_gradients(gradients)
        numbers[name] = {"seconds": seconds, "costs": costs, "stages": stages, "agreement": agreement}
        tables[name] = speed_table(seconds, costs, batch)
        tables[f"{name}: seconds of each stage"] = stages_table(stages)
        if agreement:
            header = ["against plain fp32", "largest relative error of a loss", "cosine of gradients"]
            rows = [[way, f"{loss:.1e}", f"{cosine:.6f}"] for way, (loss, cosine) in agreement.items()]
            tables[f"{name}: agreement"] = table(header, rows)
    return numbers, tables


def start(args: argparse.Namespace, way: str, network: str, batch: int, **environment: str | None) -> Worker:
    overrides = [f"student.arch={ARCHS[network]}", f"train.batch_size_per_gpu={batch}", *args.set]
    task = {"way": way, "device": args.device, "overrides": overrides}
    return Worker(__file__, task, environment=environment)


def compare_gradients(files: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Return the largest relative error of a loss and the cosine of the gradients, of each way to plain fp32."""
    results = {way: torch.load(file) for way, file in files.items()}
    for file in files.values():
        Path(file).unlink()
    if REFERENCE not in results:
        return {}
    wanted_losses, wanted = results.pop(REFERENCE)
    return {
        way: (
            max(abs(losses[name] / value - 1) for name, value in wanted_losses.items()),
            F.cosine_similarity(gradient.double(), wanted.double(), dim=0).item(),
        )
        for way, (losses, gradient) in results.items()
    }


def speed_table(seconds: Mapping[str, Sequence[float]], costs: Mapping[str, Mapping[str, float]], batch: int) -> str:
    header = ["way", "seconds a step", "images/s", f"{REFERENCE} / it", "same type / it", "share of matmul rate"]
    header += ["of 800 TFLOP/s", "peak memory, MiB", "added to the imports, MiB", f"added / {REFERENCE}"]
    rows = []
    for way, times in seconds.items():
        middle, cost = statistics.median(times), costs[way]
        rate, of_reference = cost["flops"] / middle, costs.get(REFERENCE, {}).get("added")
        rows.append(
            [
                *(way, f"{middle:.3f}", f"{batch / middle:.2f}", ratio(seconds.get(REFERENCE), times)),
                *(ratio(seconds.get(f"plain {way.split()[1]}"), times), f"{rate / cost['rate']:.0%}"),
                *(f"{rate / PEAK_FLOPS:.1%}", f"{cost['peak']:.0f}", f"{cost['added']:.0f}"),
                f"{cost['added'] / of_reference:.2f}" if of_reference else "",
            ]
        )
    return table(header, rows)


def stages_table(stages: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for each in stages.values() for name in each))
    rows = [[way, *(f"{each.get(name, 0):.3f}" for name in names)] for way, each in stages.items()]
    return table(["way", *names], rows)


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1) @ value


def sdpa(backend: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def measure_attention(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time each kernel on six heads of 64, forward and backward; kernels that lack a type are left out."""
    device = torch.device(args.device)
    kernels: dict[str, Kernel] = {"explicit": explicit, "sdpa": partial(sdpa, None)}
    kernels["math"] = partial(sdpa, SDPBackend.MATH)
    if device.type == "cuda":
        backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        kernels |= {backend.name.lower(): partial(sdpa, backend) for backend in backends}
    else:
        keep_freed_memory()
    numbers, rows = [], []
    for dtype in ("bf16", "fp16", "fp32") if device.type == "cuda" else ("fp32", "bf16"):
        for n_tokens in args.tokens:
            shape = (3, max(1, ROWS_OF_TOKENS // n_tokens), 6, n_tokens, 64)
            qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])

            def once(kernel: Kernel, qkv: Tensor = qkv) -> None:
                inputs = qkv.detach().requires_grad_()
                with fast_matmul_within(True, device):
                    kernel(*inputs.unbind(0)).sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            usable = {}
            for name, kernel in kernels.items():
                try:
                    once(kernel)
                except (RuntimeError, NotImplementedError, ValueError):  # no such kernel for this type or device
                    continue
                usable[name] = partial(once, kernel)
            seconds = take_turns(usable, args.rounds, f"attention, {dtype}, {n_tokens} tokens")
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            numbers.append({"dtype": dtype, "tokens": n_tokens, "seconds": medians})
            cells = [f"{1000 * medians[name]:.2f}" if name in medians else "" for name in kernels]
            rows.append([dtype, n_tokens, *cells, min(medians, key=medians.__getitem__)])
    header = ["type", "tokens", *(f"{name}, ms" for name in kernels), "fastest"]
    return numbers, {"Attention, forward and backward": table(header, rows)}


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Run `n` processes that compute without pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5 * bool(n))  # until they have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_contention(args: argparse.Namespace) -> tuple[dict[int, Any], dict[str, str]]:
    """Time steps of `ours fp32` beside busy processes, for each spin count in a process of its own."""
    ((network, batch),) = args.networks.items()
    own = {"OMP_WAIT_POLICY": None, "KMP_BLOCKTIME": None}
    workers = {
        count: start(args, "ours fp32", network, batch, GOMP_SPINCOUNT=str(count), **own) for count in args.spin_counts
    }
    seconds = {}
    for load in args.loads:
        with busy_processes(load):
            steps = {str(count): partial(each.ask, "step") for count, each in workers.items()}
            seconds[load] = take_turns(steps, args.rounds, f"load {load}")
    for each in workers.values():
        each.close()
    first = str(args.spin_counts[0])
    rows = [
        [
            f"{count:,}",
            *(
                f"{batch / statistics.median(at[str(count)]):.1f}, {ratio(at[first], at[str(count)])}"
                for at in seconds.values()
            ),
        ]
        for count in args.spin_counts
    ]
    header = ["spin count", *(f"load {load}: images/s, ratio to the first" for load in args.loads)]
    return seconds, {"Steps beside busy processes": table(header, rows)}


PARTS = {"speed": measure_speed, "attention": measure_attention, "contention": measure_contention}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of the tables (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["speed", "attention"])
    parser.add_argument("--networks", nargs="+", default=["S=8"], metavar="S=8", help="networks and images a step")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="such as `ours bf16 FULL_SHARD`; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of attention")
    parser.add_argument("--loads", type=int, nargs="+", default=(0, 2, 4), help="busy processes of contention")
    parser.add_argument("--spin-counts", type=int, nargs="+", default=SPIN_COUNTS, help="of contention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config values for every step")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return
    args.networks = {name: int(batch) for name, _, batch in (each.partition("=") for each in args.networks)}
    for part in args.only:
        numbers, tables = PARTS[part](args)
        finish(args.folder, part, tables, numbers)


if __name__ == "__main__":
    main()
