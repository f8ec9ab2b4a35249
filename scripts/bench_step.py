"""The training step against a plain PyTorch rendering of upstream's: speed, memory, and kernels of attention.

    python scripts/bench_step.py --folder bench [--only speed memory attention models] [--rounds 7]

`ours` is the step of train.py, `plain` that of scripts/plain_step.py, both with custom.yaml's recipe, the same random
weights and the same made-up crops, in fp32 and bf16.

  speed      rounds of all ways in turns, each in a process of its own; where the time of ours goes; losses and
             gradients against plain fp32
  memory     the peak of each way, in a process of its own
  attention  each kernel by type and number of tokens, forward alone and with backward
  models     S, B and L with --batches, their share of the measured rate of matrix products, and of what an H100 could
             do at 800 TFLOP/s: on a GPU

Ratios are those of the medians; the range is over rounds. Memory on a CPU is the process's high-water mark, and `added`
is what it has more than after its imports; on a GPU it is what PyTorch's allocator gave out. Tables go to the terminal,
all numbers to results.json in the folder.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch loads: it limits how OpenMP threads spin

# isort: split
import torch
import torch.nn.functional as F
from benchmarking import ProcessOfItsOwn, answer_questions, machine, ratio, resident_mib, take_turns
from step_setup import TEACHER_TEMP, OurStep, UpstreamsStep, build_model, made_up_batch, recipe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2.layers.attention import xformers_attention
from dinov2.logging.metrics import StepClock
from dinov2.train.dry_run import count_step_flops, measured_matmul_rate
from dinov2.utils.files import atomic_write
from dinov2.utils.memory import keep_freed_memory
from dinov2.utils.precision import fast_matmul_within

PARTS = ("speed", "memory", "attention", "models")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REFERENCE = "plain fp32"
WAYS = ("ours fp32", "ours bf16", REFERENCE, "plain bf16")
# Images/s of one H100 at all of 800 TFLOP/s, by the recipe's arithmetic: half of it is the mark
CEILINGS = {"S": 7141, "B": 2077, "L": 610}
ARCHS = {"tiny": "vit_tiny", "S": "dinov2_vits14", "B": "dinov2_vitb14", "L": "dinov2_vitl14"}
LONG_SECONDS = 5.0  # a step that takes longer is timed once
TOKENS = (50, 257, 530, 1025, 2049)  # crops of 98, 224, 322, 448 and 630 px
ROWS_OF_TOKENS = 4112  # about so many tokens at a time: 16 crops of 224 px


@dataclass(frozen=True)
class Way:
    """Whose step, in which type."""

    name: str

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    @property
    def precision(self) -> str:
        return self.name.split()[1]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.child:
        task = json.loads(args.child)
        if task.get("serves"):
            serve(task)
        else:
            print(json.dumps(measure(task)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = f"{machine('torch')}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        name = f"{torch.cuda.get_device_name(args.device)}; {name}"
    results: dict[str, Any] = {"machine": name}
    for part in args.only:
        found, lines = WORK[part](args)
        results[part] = found
        print("\n".join(["", *lines]))
        with atomic_write(args.folder / "results.json", "w") as file:
            json.dump(results, file, indent=1)
    print(f"\nMachine: {name}.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of results.json (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all that the device is fit for")
    parser.add_argument("--arch", default="dinov2_vits14", help="of speed and memory (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of speed and memory")
    parser.add_argument("--rounds", type=int, default=7, help="of speed, and repetitions of attention")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process (default: %(default)s)")
    parser.add_argument("--plain-attention", choices=("explicit", "sdpa"), help="default: explicit, and sdpa on a GPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of a crop, in attention")
    parser.add_argument("--batches", nargs="+", default=["S=152", "B=120", "L=56"], metavar="S=152", help="of models")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="config values for every step")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.only = args.only or [part for part in PARTS if part != "models" or args.device.type == "cuda"]
    try:
        args.batches = {name: int(batch) for name, batch in (each.split("=") for each in args.batches)}
    except ValueError:
        parser.error(f"--batches: {' '.join(args.batches)} is not of the form S=152 B=120")
    if not args.batches.keys() <= ARCHS.keys():
        parser.error(f"--batches: {', '.join(args.batches.keys() - ARCHS.keys())}; there are {', '.join(ARCHS)}")
    return args


# --- one step, by each way ------------------------------------------------------------------------------------------


def make_step(
    way: Way, device: torch.device, overrides: Sequence[str], plain_attention: str | None
) -> tuple[OurStep | UpstreamsStep, dict[str, Any], float]:
    """The step, its batch, and the operations that its recipe asks for in matrix products."""
    cfg = recipe(device, way.precision if way.is_ours else "fp32", overrides)
    model = build_model(cfg, device)
    images = made_up_batch(cfg, device)
    flops = count_step_flops(cfg)
    if way.is_ours:
        model.prepare_for_distributed_training()  # compiles, if --set asks for it
    step = OurStep(model) if way.is_ours else UpstreamsStep(model, DTYPES[way.precision], plain_attention)
    return step, images, flops


def finished(step: Callable[[], object], device: torch.device) -> None:
    """Take a step and wait until the device has."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def base_overrides(args: argparse.Namespace, arch: str, batch: int) -> list[str]:
    return [f"student.arch={arch}", f"train.batch_size_per_gpu={batch}", *args.set]


def matmul_rate(way: Way, device: torch.device) -> float:
    """FLOP/s of large matrix products in the way's type and with its settings."""
    with fast_matmul_within(way.is_ours, device):
        return measured_matmul_rate(device, DTYPES[way.precision])


# --- speed ----------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    overrides, ways = base_overrides(args, args.arch, args.batch), [Way(name) for name in args.ways]
    agreement = {}
    if REFERENCE in args.ways:
        made = {way: make_step(way, args.device, overrides, args.plain_attention) for way in ways}
        agreement = compare_gradients({way: (step, images) for way, (step, images, _) in made.items()})
        del made
        gc.collect()
    with ExitStack() as stack:
        steppers = {way.name: stack.enter_context(stepper(way, overrides, args)) for way in ways}
        takes = {name: partial(each.ask, "step") for name, each in steppers.items()}
        seconds = take_turns(takes, args.rounds, "speed")
        found: dict[str, Any] = {"batch": args.batch, "arch": args.arch, "agreement": agreement}
        found["ways"] = {name: {"seconds": seconds[name], **each.ask("rate")} for name, each in steppers.items()}
        found["split"] = {way.name: steppers[way.name].ask("split") for way in ways if way.is_ours}
    return found, [*speed_table(found), "", *split_table(found["split"]), "", *agreement_table(agreement)]


def stepper(way: Way, overrides: Sequence[str], args: argparse.Namespace) -> ProcessOfItsOwn:
    """Takes steps of one way when asked."""
    task = {
        **{"serves": True, "way": way.name, "overrides": [*overrides], "device": str(args.device)},
        **{"plain_attention": args.plain_attention, "threads": args.threads, "rounds": args.rounds},
    }
    return ProcessOfItsOwn([sys.executable, __file__, "--child", json.dumps(task)])


def serve(task: Mapping[str, Any]) -> None:
    """Take a step when asked to, and tell about steps."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    way, device = Way(task["way"]), torch.device(task["device"])
    settle(way, device)
    step, images, flops = make_step(way, device, task["overrides"], task["plain_attention"])
    answer_questions(
        {
            "step": lambda: finished(lambda: step(images), device),
            "split": lambda: split_of(step, images, device, max(1, task["rounds"] // 2)),
            "rate": lambda: {"flops": flops, "matmul_rate": matmul_rate(way, device)},
        }
    )


def settle(way: Way, device: torch.device) -> None:
    """What train.py sets for its process before a step, besides the path of matrix products."""
    if way.is_ours and device.type == "cpu":
        keep_freed_memory()


def split_of(
    step: OurStep | UpstreamsStep, images: Mapping[str, Any], device: torch.device, n_steps: int
) -> dict[str, float]:
    """Seconds of each part of our step, the mean over some."""
    assert isinstance(step, OurStep), "only our step has a clock"
    step.model.clock = clock = StepClock(device)
    for _ in range(n_steps):
        clock.restart()
        step(images)
    return clock.means()


def gradients_of(step: OurStep | UpstreamsStep, images: Mapping[str, Any]) -> tuple[dict[str, float], list[Tensor]]:
    """Losses, and the gradient of each parameter, which is then forgotten."""
    model = step.model if isinstance(step, OurStep) else step.plain
    with fast_matmul_within(isinstance(step, OurStep), model.device):
        losses = model.forward_backward(images, TEACHER_TEMP)
    network = model.student
    gradients = [parameter.grad for _, parameter in sorted(network.named_parameters()) if parameter.grad is not None]
    for parameter in network.parameters():
        parameter.grad = None
    return {name: value.item() for name, value in losses.items()}, gradients


def compare_gradients(
    steps: Mapping[Way, tuple[OurStep | UpstreamsStep, Mapping[str, Any]]],
) -> dict[str, dict[str, float]]:
    """How near each way comes to the plain one in fp32, before any step: nothing if that one is not timed."""
    reference = next((way for way in steps if way.name == REFERENCE), None)
    if reference is None:
        return {}
    wanted_losses, wanted = gradients_of(*steps[reference])
    squares = sum(gradient.double().square().sum().item() for gradient in wanted)
    largest = max(gradient.abs().max().item() for gradient in wanted)
    found = {}
    for way in (way for way in steps if way != reference):
        losses, gradients = gradients_of(*steps[way])
        pairs = list(zip(gradients, wanted, strict=True))
        product = sum((ours.double() * theirs.double()).sum().item() for ours, theirs in pairs)
        own_squares = sum(gradient.double().square().sum().item() for gradient in gradients)
        found[way.name] = {
            "loss_error": max(abs(losses[name] / value - 1) for name, value in wanted_losses.items()),
            "gradient_cosine": product / math.sqrt(squares * own_squares),
            "gradient_error": max((ours - theirs).abs().max().item() for ours, theirs in pairs),
            "largest_gradient": largest,
        }
        del gradients, pairs
        gc.collect()
    return found


def speed_table(found: Mapping[str, Any]) -> list[str]:
    ways = found["ways"]
    lines = [
        f"{found['arch']}, batch {found['batch']}:",
        "",
        f"| way | seconds a step | images/s | {REFERENCE} / it | same type / it | range | share of matmul rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in ways.items():
        middle = statistics.median(each["seconds"])
        share = each["flops"] / middle / each["matmul_rate"]
        to_reference = f"{ratio(ways[REFERENCE]['seconds'], each['seconds'])[0]:.2f}" if REFERENCE in ways else ""
        plain = ways.get(f"plain {Way(name).precision}")
        ratios = ratio(plain["seconds"], each["seconds"]) if plain else (math.nan,) * 3
        own, spread = (f"{ratios[0]:.2f}", f"{ratios[1]:.2f} to {ratios[2]:.2f}") if plain else ("", "")
        rate = found["batch"] / middle
        lines.append(f"| {name} | {middle:.3f} | {rate:.2f} | {to_reference} | {own} | {spread} | {share:.0%} |")
    return lines


def split_table(split: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for each in split.values() for name in each))
    lines = [f"| where the time goes | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for way, laps in split.items():
        whole = sum(laps.values())
        cells = [f"{laps[name]:.3f} s ({laps[name] / whole:.0%})" if name in laps else "" for name in names]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def agreement_table(agreement: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not agreement:
        return []
    lines = [
        f"| against {REFERENCE} | largest relative error of a loss | cosine of gradients | largest error of one |",
        "|---|---|---|---|",
    ]
    for way, each in agreement.items():
        error = f"{each['gradient_error']:.1e} (largest gradient {each['largest_gradient']:.2f})"
        lines.append(f"| {way} | {each['loss_error']:.1e} | {each['gradient_cosine']:.6f} | {error} |")
    return lines


# --- processes of their own: memory, models -------------------------------------------------------------------------


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of one way in this process, which does nothing else: seconds, MiB, operations."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    way, device = Way(task["way"]), torch.device(task["device"])
    at_start = resident_mib()
    settle(way, device)
    step, images, flops = make_step(way, device, task["overrides"], task["plain_attention"])
    gc.collect()
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(1 + task["steps"]):
        started = time.perf_counter()
        finished(lambda: step(images), device)
        if number > 0:  # the first one fills caches, and makes what stays
            seconds.append(time.perf_counter() - started)
            if seconds[-1] > LONG_SECONDS:
                break
    if device.type == "cuda":
        peak, at_start = torch.cuda.max_memory_allocated(device) / 2**20, 0.0
    else:
        peak = high_water_mib()
    n_images = len(images["collated_global_crops"]) // 2
    return {
        **{"seconds": seconds, "images_per_second": n_images / statistics.median(seconds)},
        **{"peak_mib": peak, "added_mib": peak - at_start, "flops": flops},
        "matmul_rate": matmul_rate(way, device) if task["with_rate"] else None,
    }


def high_water_mib() -> float:
    """The most memory that this process ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_a_process(
    way: str, overrides: Sequence[str], args: argparse.Namespace, with_rate: bool = False
) -> dict[str, Any] | None:
    """What `measure` finds; None, and the last line of its error, where it does not fit into memory."""
    task = {
        **{"way": way, "overrides": [*overrides], "device": str(args.device), "steps": args.steps},
        **{"plain_attention": args.plain_attention, "threads": args.threads, "with_rate": with_rate},
    }
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    was_killed, says_so = done.returncode < 0, "OutOfMemoryError" in done.stderr or "allocate memory" in done.stderr
    if not (was_killed or says_so):
        raise RuntimeError(f"{way} with {' '.join(overrides)} failed:\n{done.stderr}")
    print(f"{way} with {' '.join(overrides)} does not fit into memory", file=sys.stderr)
    return None


def memory(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    overrides, found = base_overrides(args, args.arch, args.batch), {}
    for way in args.ways:
        each = found[way] = in_a_process(way, overrides, args)
        print(f"memory, {way}: {each['peak_mib']:.0f} MiB" if each else f"memory, {way}: does not fit", file=sys.stderr)
    lines = [
        f"{args.arch}, batch {args.batch}:",
        "",
        f"| way | peak memory | added to the imports | its peak / {REFERENCE} | added / {REFERENCE} |",
        "|---|---|---|---|---|",
    ]
    reference = found.get(REFERENCE)
    for way, each in found.items():
        if each is None:
            lines.append(f"| {way} | does not fit | | | |")
            continue
        shares = [f"{each[key] / reference[key]:.2f}" if reference else "" for key in ("peak_mib", "added_mib")]
        lines.append(f"| {way} | {each['peak_mib']:.0f} MiB | {each['added_mib']:.0f} MiB | {' | '.join(shares)} |")
    return {"batch": args.batch, "arch": args.arch, "ways": found}, lines


def models(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    ways = [way for way in args.ways if Way(way).precision != "fp32"] or args.ways
    found: dict[str, Any] = {}
    lines = [
        "| network | batch | way | images/s | share of matmul rate | of 800 TFLOP/s | of half the ceiling | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, batch in args.batches.items():
        for way in ways:
            each = in_a_process(way, base_overrides(args, ARCHS[name], batch), args, with_rate=True)
            found.setdefault(name, {"batch": batch})[way] = each
            print(f"{name}, {way}: measured", file=sys.stderr)
            if each is None:
                lines.append(f"| {name} | {batch} | {way} | does not fit | | | | |")
                continue
            rate = each["images_per_second"]
            achieved = each["flops"] / statistics.median(each["seconds"])
            mark = f"{rate / (CEILINGS[name] / 2):.0%}" if name in CEILINGS else ""
            lines.append(
                f"| {name} | {batch} | {way} | {rate:.1f} | {achieved / each['matmul_rate']:.0%} | "
                f"{achieved / 800e12:.1%} | {mark} | {each['peak_mib'] / 1024:.1f} GiB |"
            )
    return found, lines


# --- kernels of attention -------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, H, d] to the same shape; the weights [B, H, N, N] are kept."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return ((query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1) @ value).transpose(1, 2)


def sdpa_by(backend: SDPBackend | None) -> Kernel:
    """scaled_dot_product_attention by one of torch's kernels, or by its own choice."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            inputs = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            return F.scaled_dot_product_attention(*inputs).transpose(1, 2)

    return attend


def kernels_for(device: torch.device) -> dict[str, Kernel]:
    kernels = {"explicit": explicit, "sdpa": sdpa_by(None), "sdpa math": sdpa_by(SDPBackend.MATH)}
    if device.type == "cuda":
        kernels["sdpa flash"] = sdpa_by(SDPBackend.FLASH_ATTENTION)
        kernels["sdpa efficient"] = sdpa_by(SDPBackend.EFFICIENT_ATTENTION)
        kernels["sdpa cudnn"] = sdpa_by(SDPBackend.CUDNN_ATTENTION)
        xformers = xformers_attention()
        if xformers is not None:
            kernels["xformers"] = xformers
    return kernels


def attention(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    dtypes = ("bf16", "fp16", "fp32") if args.device.type == "cuda" else ("fp32", "bf16")
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py does
    kernels, found = kernels_for(args.device), []
    cases = [(dtype, n, with_backward) for dtype in dtypes for with_backward in (False, True) for n in args.tokens]
    for dtype, n_tokens, with_backward in cases:
        seconds = time_kernels(kernels, DTYPES[dtype], n_tokens, with_backward, args)
        found.append({"dtype": dtype, "tokens": n_tokens, "with_backward": with_backward, "seconds": seconds})
        print(f"attention, {dtype}, {n_tokens} tokens: measured", file=sys.stderr)
    return found, attention_table(found, list(kernels), args.device.type)


def time_kernels(
    kernels: Mapping[str, Kernel], dtype: torch.dtype, n_tokens: int, with_backward: bool, args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each kernel that takes such inputs, six heads of 64, on qkv as the layer gives it."""
    n_crops = max(1, ROWS_OF_TOKENS // n_tokens)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n_crops, n_tokens, 3, 6, 64, generator=generator).to(args.device, dtype)
    gradient = torch.ones(n_crops, n_tokens, 6, 64, device=args.device, dtype=dtype)

    def once(kernel: Kernel) -> None:
        inputs = qkv.detach().requires_grad_(with_backward)
        with torch.set_grad_enabled(with_backward), fast_matmul_within(True, args.device):
            output = kernel(*inputs.unbind(2))
            if with_backward:
                output.backward(gradient)
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)

    seconds: dict[str, list[float]] = {}
    for name, kernel in kernels.items():
        try:
            once(kernel)
        except (RuntimeError, NotImplementedError, ValueError):  # there is no such kernel for this type or device
            continue
        seconds[name] = []
    for _ in range(args.rounds):
        for name, timed in seconds.items():
            started = time.perf_counter()
            once(kernels[name])
            timed.append(time.perf_counter() - started)
    return {name: statistics.median(timed) for name, timed in seconds.items()}


def attention_table(found: Sequence[Mapping[str, Any]], names: Sequence[str], device: str) -> list[str]:
    lines = [
        f"| device, type, tokens | {' | '.join(f'{name}, ms' for name in names)} | fastest |",
        "|---" * (len(names) + 2) + "|",
    ]
    for each in found:
        what = "forward and backward" if each["with_backward"] else "forward"
        cells = [f"{each['seconds'][name] * 1000:.2f}" if name in each["seconds"] else "" for name in names]
        best = min(each["seconds"], key=each["seconds"].__getitem__)
        lines.append(f"| {device}, {each['dtype']}, {each['tokens']}, {what} | {' | '.join(cells)} | {best} |")
    return lines


WORK: dict[str, Callable[[argparse.Namespace], tuple[Any, list[str]]]] = {
    "speed": speed,
    "memory": memory,
    "attention": attention,
    "models": models,
}

if __name__ == "__main__":
    main()
