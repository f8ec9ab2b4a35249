"""Measure the training step against upstream's: seconds, memory, sharding, kernels of attention, busy machines.

    python scripts/benchmarks/step.py --folder bench [--only speed agreement attention contention] [--rounds 7]
    python scripts/benchmarks/step.py --folder bench --only speed --networks S=152 B=120 L=56          # on a GPU

`ours` is the step of train.py, `plain` that of plain.py, both with custom.yaml's recipe, the same random weights and
the same synthetic crops.

  speed       each way in a process of its own, in turns; the stages of ours; the most memory of each process (CPU:
              VmHWM, and what the step added to the imports; GPU: what PyTorch's allocator gave out)
  agreement   losses and gradients against plain fp32
  attention   each kernel by type and number of tokens
  contention  steps of ours beside busy processes, by OpenMP spin count (GOMP_SPINCOUNT); on a CPU
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import harness
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from plain import PlainStep
from torch import Tensor

from dinov2 import distributed
from dinov2.configs import CONFIG_FOLDER
from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.masking import MaskingGenerator
from dinov2.logging import StepClock
from dinov2.train.batches import resolve_batch_size
from dinov2.train.dry_run import count_step_flops, measured_matmul_rate
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import exit_code
from dinov2.utils.config import load_run_config
from dinov2.utils.numerics import fast_matmul_within, resolve_precision
from dinov2.utils.resources import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARCHS = {"Ti": "vit_tiny", "S": "dinov2_vits14", "B": "dinov2_vitb14", "L": "dinov2_vitl14", "G": "dinov2_vitg14"}
REFERENCE = "plain fp32"
WAYS = ("ours fp32", "ours bf16", REFERENCE, "plain bf16")
ROLES = [f"{role}.{part}" for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
TEACHER_TEMP, MOMENTUM, MAX_NORM, LR = 0.05, 0.994, 3.0, 1e-5
PEAK_FLOPS = 800e12  # dense bf16 of an H100, in practice
TOKENS = (50, 257, 530, 1025)
ROWS_OF_TOKENS = 4112  # tokens at a time: 16 crops of 224 px
SPIN_COUNTS = (300_000, 100_000, 10_000, 1_000, 0)  # the first is libgomp's own


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
    """Return crops of noise, and masks as a run draws them."""
    n, crops, generator = cfg.train.batch_size_per_gpu, cfg.crops, torch.Generator().manual_seed(0)
    side = crops.global_crops_size // cfg.student.patch_size
    masking = MaskingGenerator((side, side), max_num_patches=side * side // 2)
    masks = draw_masks(2 * n, cfg.ibot.mask_ratio_min_max, cfg.ibot.mask_sample_probability, masking, 0)

    def noise(n_crops: int, size: int) -> list[Tensor]:
        return [torch.randn(n, 3, size, size, generator=generator) for _ in range(n_crops)]

    local_crops = noise(crops.local_crops_number, crops.local_crops_size)
    made = {"global_crops": noise(2, crops.global_crops_size), "local_crops": local_crops}
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


class Way:
    """Model, step and batch of a way, such as `ours bf16`, `plain fp32` or `ours bf16 FULL_SHARD`."""

    def __init__(self, way: str, device: str, overrides: Sequence[str]) -> None:
        whose, precision, *sharding = way.split()
        self.is_ours, self.dtype, self.device = whose == "ours", DTYPES[precision], torch.device(device)
        self.start_mib = harness.memory_mib()
        if self.is_ours and device == "cpu":
            keep_freed_memory()  # as train.py does
        if sharding:
            distributed.enable(distributed.Launch(0, 1, 0, 1, "localhost", 0, "alone"), self.device, 600)
        strategies = [f"compute_precision.{role}.sharding_strategy={name}" for role in ROLES for name in sharding]
        self.cfg = load_recipe(self.device, precision if self.is_ours else "fp32", [*overrides, *strategies])
        self.model: SSLMetaArch | PlainStep = build_model(self.cfg, self.device)
        if sharding or (self.is_ours and self.cfg.train.compile_blocks):
            self.model.prepare_for_distributed_training()
        if not self.is_ours:
            self.model = PlainStep(self.model, self.dtype)
        self.step = OurStep(self.model) if isinstance(self.model, SSLMetaArch) else self.model
        for group in self.step.optimizer.param_groups:
            group["lr"] = LR
        self.images = make_batch(self.cfg, self.device)

    def seconds(self) -> float:
        with fast_matmul_within(self.is_ours, self.device):
            return harness.seconds_of(lambda: self.step(self.images, TEACHER_TEMP, MOMENTUM, MAX_NORM))

    def stages(self) -> dict[str, float]:
        """Return the mean seconds of each stage of our step; the plain one has no clock."""
        if not isinstance(self.model, SSLMetaArch):
            return {}
        self.model.clock = StepClock(self.device)
        for _ in range(2):
            self.model.clock.restart()
            self.seconds()
        return self.model.clock.means()

    def costs(self) -> dict[str, float]:
        """Return the most memory, what the step added to the imports, the rate of matrix products, and the FLOPs."""
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if is_cuda else harness.memory_mib("VmHWM")
        with fast_matmul_within(self.is_ours, self.device):
            rate = measured_matmul_rate(self.device, self.dtype)
        added = peak if is_cuda else peak - self.start_mib
        return {"peak": peak, "added": added, "rate": rate, "flops": count_step_flops(self.cfg)}

    def losses_and_gradient(self) -> tuple[dict[str, float], Tensor]:
        """Return the losses of the first step, and all gradients in one vector."""
        with fast_matmul_within(self.is_ours, self.device):
            losses = self.model.forward_backward(self.images, TEACHER_TEMP)
        parameters = [parameter for _, parameter in sorted(self.model.student.named_parameters())]
        gradients = [parameter.grad.flatten().double().cpu() for parameter in parameters if parameter.grad is not None]
        return {name: value.item() for name, value in losses.items()}, torch.cat(gradients)


def measure_speed(args: argparse.Namespace) -> harness.Measured:
    numbers: dict[str, Any] = {}
    tables: dict[str, str] = {}
    for network, batch in args.networks.items():
        arguments = args.device, settings_of(args, network, batch)
        seconds, costs, stages = harness.measure_ways(
            Way, args.ways, arguments, args.rounds, network, "costs", "stages"
        )
        name = f"ViT-{network}, batch {batch}"
        numbers[name] = {"seconds": seconds, "costs": costs, "stages": stages}
        tables[name] = speed_table(seconds, costs, batch)
        rows = [[way, *(f"{value:.3f}" for value in each.values())] for way, each in stages.items() if each]
        tables[f"{name}, seconds of each stage"] = harness.table(["way", *max(stages.values(), key=len)], rows)
    return numbers, tables


def settings_of(args: argparse.Namespace, network: str, batch: int) -> list[str]:
    return [f"student.arch={ARCHS[network]}", f"train.batch_size_per_gpu={batch}", *args.set]


def speed_table(seconds: Mapping[str, Sequence[float]], costs: Mapping[str, Mapping[str, float]], batch: int) -> str:
    header = ["way", "seconds a step", "images/s", f"{REFERENCE} / it", "same type / it", "share of matmul rate"]
    header += ["of 800 TFLOP/s", "peak memory, MiB", "added to the imports, MiB"]
    rows = []
    for way, times in seconds.items():
        median, cost = statistics.median(times), costs[way]
        rate, same_type = cost["flops"] / median, seconds.get(f"plain {way.split()[1]}")
        ratios = harness.ratio(seconds.get(REFERENCE), times), harness.ratio(same_type, times)
        speed = [f"{median:.3f}", f"{batch / median:.2f}", *ratios]
        shares = [f"{rate / cost['rate']:.0%}", f"{rate / PEAK_FLOPS:.1%}"]
        rows.append([way, *speed, *shares, f"{cost['peak']:.0f}", f"{cost['added']:.0f}"])
    return harness.table(header, rows)


def measure_agreement(args: argparse.Namespace) -> harness.Measured:
    """Compare losses and gradients of the first step with those of plain fp32."""
    numbers: dict[str, Any] = {}
    for network, batch in args.networks.items():
        settings = settings_of(args, network, batch)
        wanted_losses, wanted = Way(REFERENCE, args.device, settings).losses_and_gradient()
        for way in args.ways:
            losses, gradient = Way(way, args.device, settings).losses_and_gradient()
            error = max(abs(losses[name] / value - 1) for name, value in wanted_losses.items())
            cosine = F.cosine_similarity(gradient, wanted, dim=0).item()
            numbers[f"{network}, {way}"] = {"loss_error": error, "gradient_cosine": cosine}
    rows = [[name, f"{each['loss_error']:.1e}", f"{each['gradient_cosine']:.6f}"] for name, each in numbers.items()]
    header = [f"against {REFERENCE}", "largest relative error of a loss", "cosine of gradients"]
    return numbers, {"Losses and gradients of one step": harness.table(header, rows)}


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1) @ value


def measure_attention(args: argparse.Namespace) -> harness.Measured:
    """Time two kernels on six heads of 64, forward and backward."""
    kernels, numbers, rows = {"explicit": explicit, "sdpa": F.scaled_dot_product_attention}, {}, []
    if args.device == "cpu":
        keep_freed_memory()
    for dtype, n_tokens in product(("fp32", "bf16"), args.tokens):
        shape = (3, max(1, ROWS_OF_TOKENS // n_tokens), 6, n_tokens, 64)
        qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device, DTYPES[dtype])

        def once(kernel: Any, qkv: Tensor = qkv) -> float:
            inputs = qkv.detach().requires_grad_()
            with fast_matmul_within(True, qkv.device):
                return harness.seconds_of(lambda: kernel(*inputs.unbind(0)).sum().backward())

        case = f"{args.device}, {dtype}, {n_tokens}"
        numbers[case] = harness.take_turns(
            {name: partial(once, kernel) for name, kernel in kernels.items()}, args.rounds, case
        )
        medians = {name: 1000 * statistics.median(times) for name, times in numbers[case].items()}
        rows.append([case, *(f"{median:.2f}" for median in medians.values()), min(medians, key=medians.__getitem__)])
    header = ["device, type, tokens", *(f"{name}, ms" for name in kernels), "fastest"]
    return numbers, {"Attention, forward and backward": harness.table(header, rows)}


def measure_contention(args: argparse.Namespace) -> harness.Measured:
    """Time steps of `ours fp32` beside busy processes, for each spin count."""
    ((network, batch),) = args.networks.items()
    workers: dict[int, harness.Worker] = {}
    for count in args.spin_counts:
        with mock.patch.dict(os.environ, {"GOMP_SPINCOUNT": str(count)}):  # the new process reads it
            os.environ.pop("OMP_WAIT_POLICY", None)
            workers[count] = harness.Worker(Way, "ours fp32", args.device, settings_of(args, network, batch))
            workers[count].call("seconds")
    seconds = {}
    for load in args.loads:
        with ExitStack() as stack:
            for _ in range(load):
                busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(busy.kill)
            seconds[load] = harness.time_workers(workers, args.rounds, f"load {load}")
    for worker in workers.values():
        worker.close()
    rows = []
    for count in args.spin_counts:
        rates = [f"{batch / statistics.median(times[count]):.1f}" for times in seconds.values()]
        ratios = [harness.ratio(times[args.spin_counts[0]], times[count]) for times in seconds.values()]
        rows.append([f"{count:,}", *map(", ".join, zip(rates, ratios, strict=True))])
    header = ["spin count", *(f"load {load}: images/s, ratio to the first" for load in args.loads)]
    return seconds, {"Steps beside busy processes": harness.table(header, rows)}


PARTS: dict[str, harness.Part] = {"speed": measure_speed, "agreement": measure_agreement}
PARTS |= {"attention": measure_attention, "contention": measure_contention}


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, PARTS, ["speed", "agreement", "attention"])
    parser.add_argument("--networks", nargs="+", default=["S=8"], metavar="S=8", help="networks and images a step")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="such as `ours bf16 FULL_SHARD` (default: all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of attention")
    parser.add_argument("--loads", type=int, nargs="+", default=(0, 2, 4), help="busy processes of contention")
    parser.add_argument("--spin-counts", type=int, nargs="+", default=SPIN_COUNTS, help="of contention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config values for every step")
    args = parser.parse_args(argv)
    args.networks = {name: int(batch) for name, _, batch in (each.partition("=") for each in args.networks)}
    harness.run_parts(args, PARTS)


if __name__ == "__main__":
    sys.exit(exit_code(main))
