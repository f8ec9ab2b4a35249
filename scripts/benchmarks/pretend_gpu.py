"""Count what a training step does on a GPU, without one: bytes, launches, products, waits, copies.

    python scripts/benchmarks/pretend_gpu.py --output counts.md

It runs the step of train.py with custom.yaml's recipe in bf16 on the pretend GPU of tests/cuda_stub, which needs gcc
and a CUDA build of torch. Bytes and counts are exact; nothing is known about time.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dinov2  # noqa: F401  # before torch

# isort: split
import torch
import torch.distributed as dist
from harness import table
from step import ARCHS, MAX_NORM, MOMENTUM, TEACHER_TEMP, load_recipe, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2.train.micro_batches import forward_backward
from dinov2.train.optimizer import StepGuard, build_optimizer, clip_gradients
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.command import exit_code

STUB = Path(__file__).parents[2] / "tests" / "cuda_stub"
BATCHES = {"S": 152, "B": 120, "L": 56, "G": 26}  # DinoBloom's, on each GPU
MEMORIES_GIB = (16, 24, 40, 80)
CONTEXT_GIB = 1  # of a process on the GPU, outside PyTorch's allocator
STRATEGIES = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")
ROLES = [f"{role}.{part}" for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
MICRO_BATCHES = {"S": (1, 2, 4, 8), "B": (1, 2, 4, 8), "L": (1, 2, 4, 8), "G": (1, 2, 13)}
CHECKPOINTING = "train.activation_checkpointing=1"
COMPILED = "train.compile_blocks=true"


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the inputs and outputs of operations on the device: products, attention and the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.gib: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled blocks stay compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided"):
            kind = "attention" if "attention" in name else "products" if name in PRODUCTS else "rest"
            self.add(kind, tree_leaves((args, kwargs, result)))
        return result

    def add(self, kind: str, leaves: Sequence[Any]) -> None:
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda}
        self.gib[kind] += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) / 2**30


def count_step(network: str, n_micro_batches: int, settings: Sequence[str], count_traffic: bool) -> dict[str, Any]:
    """Return bytes and counts of the third step of one process."""
    import stub

    device = torch.device("cuda", 0)
    sizes = [f"student.arch={ARCHS[network]}", f"train.batch_size_per_gpu={BATCHES[network] // n_micro_batches}"]
    cfg = load_recipe(device, "bf16", [*sizes, *settings])
    with device:
        model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    guard, optimizer = StepGuard(device), build_optimizer(cfg.optim, model.get_params_groups())
    batches = [make_batch(cfg, device) for _ in range(n_micro_batches)]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = forward_backward(model, batches, TEACHER_TEMP)
        guard.step(optimizer, losses, clip_gradients(model.student, MAX_NORM))
        model.update_teacher(MOMENTUM)

    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    stub.reset()
    step()
    counters, kernels = stub.counters(), sum(stub.kernels().values())
    counts = {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "kernels": kernels,
        "products": counters["gemm"],
        "flops": stub.matmul_flops(),
        "waits": sum(counters[name] for name in ("stream_sync", "device_sync", "event_sync", "memcpy_sync")),
        "copies": sum(counters[name] for name in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable")),
        "collectives": sum(stub.collectives().values()),
    }
    if count_traffic:
        counts["traffic"] = traffic_of(step)
    return counts


def traffic_of(step: Callable[[], None]) -> dict[str, float]:
    """Return the GiB that kernels read and write in a step, if each reads its inputs and writes its outputs once."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    run = CachingAutotuner.run
    with Traffic() as traffic:

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            traffic.add("rest", args)
            return run(self, *args, **kwargs)

        CachingAutotuner.run = counted
        step()
    CachingAutotuner.run = run
    return dict(traffic.gib)


def run_cases(cases: Mapping[str, Any]) -> None:
    """Count the cases of a network in this process, which is on the pretend GPU."""
    import stub

    counts = {}
    for name, (settings, n_micro_batches, world_size) in cases["cases"].items():
        if world_size > 1:  # the pretend NCCL needs no other processes
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
        has_traffic = name in ("eager", "compiled")
        counts[name] = count_step(cases["network"], n_micro_batches, settings, has_traffic)
        if world_size > 1:
            dist.destroy_process_group()
        gc.collect()
        torch.cuda.empty_cache()
    stub.report(counts)


def count_network(network: str, folder: Path) -> dict[str, Any]:
    """Return {case: counts} of a network from a process on the pretend GPU in `folder`."""
    cases: dict[str, Any] = {"eager": [[], 1, 1], "compiled": [[COMPILED], 1, 1]}
    for strategy in STRATEGIES:
        cases[strategy] = [[f"compute_precision.{role}.sharding_strategy={strategy}" for role in ROLES], 1, 8]
    for n, checkpointing in ways_to_fit(network):
        cases[f"{n} {checkpointing}"] = [[CHECKPOINTING] if checkpointing else [], n, 1]
    environment = {**os.environ, "STUB_MEM_GB": "1000", "STUB_REPORT": str(folder)}
    given = json.dumps({"network": network, "cases": cases})
    command = ["bash", str(STUB / "run.sh"), str(folder), sys.executable, __file__, "--cases", given]
    subprocess.run(command, env=environment, check=True)
    counts: dict[str, Any] = json.loads((folder / "0").read_text())
    return counts


def ways_to_fit(network: str) -> list[tuple[int, bool]]:
    """Return numbers of micro-batches and whether activations are checkpointed, the fastest ways first."""
    return [(n, checkpointing) for n in MICRO_BATCHES[network] for checkpointing in (False, True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--output", type=Path, help="write the tables here too")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cases:
        run_cases(args.cases)
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["bash", str(STUB / "build.sh"), sys.executable, scratch], check=True)
        counts = {network: count_network(network, Path(scratch)) for network in args.networks}
    text = "\n\n".join([memory_table(counts), work_table(counts), traffic_table(counts), fit_table(counts)])
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def title(network: str) -> str:
    return f"ViT-{network}, {BATCHES[network]}"


def memory_table(counts: Mapping[str, Any]) -> str:
    rows = []
    for network, cases in counts.items():
        peaks = [cases[name]["peak_gib"] for name in ("eager", "compiled", *STRATEGIES)]
        rows.append([title(network), *(f"{peak:.1f}" for peak in peaks)])
    header = ["network, images a GPU", "one GPU", "one GPU, compiled blocks", *(f"8 x {name}" for name in STRATEGIES)]
    return table(header, rows)


def work_table(counts: Mapping[str, Any]) -> str:
    rows = []
    for network, cases in counts.items():
        eager, compiled, sharded = cases["eager"], cases["compiled"], cases["SHARD_GRAD_OP"]
        flops = eager["flops"]
        products = [f"{flops['bf16'] / 1e12:.1f}", f"{flops['fp32'] / sum(flops.values()):.2%}", eager["products"]]
        others = [eager["waits"], eager["copies"], cases["NO_SHARD"]["collectives"], sharded["collectives"]]
        rows.append([title(network), *products, eager["kernels"], compiled["kernels"], *others])
    header = ["network, images a GPU", "TFLOP of products in bf16", "share of fp32", "products", "other kernels"]
    header += ["with compiled blocks", "waits", "copies from or to the host", "collectives of NO_SHARD"]
    return table([*header, "of SHARD_GRAD_OP"], rows)


def traffic_table(counts: Mapping[str, Any]) -> str:
    rows = []
    for network, cases in counts.items():
        eager, compiled = (cases[name]["traffic"] for name in ("eager", "compiled"))
        kinds = [f"{eager[kind]:.0f}" for kind in ("products", "attention", "rest")]
        totals = [f"{sum(each.values()):.0f}" for each in (eager, compiled)]
        rows.append([title(network), *kinds, f"{compiled['rest']:.0f}", *totals])
    header = ["network, images", "products", "attention", "rest", "rest with compiled blocks", "all"]
    return table([*header, "all with compiled blocks"], rows)


def fit_table(counts: Mapping[str, Any]) -> str:
    """Return the table of the first way in which DinoBloom's batch fits each memory on one GPU."""
    rows = []
    for network, cases in counts.items():
        cells = []
        for memory in MEMORIES_GIB:
            fitting = [
                f"{way_name(network, *way)}: {peak:.1f}"
                for way in ways_to_fit(network)
                if (peak := cases[f"{way[0]} {way[1]}"]["peak_gib"]) + CONTEXT_GIB <= memory
            ]
            cells.append(fitting[0] if fitting else "no")
        rows.append([title(network), *cells])
    return table(["network, images", *(f"{memory} GiB" for memory in MEMORIES_GIB)], rows)


def way_name(network: str, n_micro_batches: int, checkpointing: bool) -> str:
    words = [f"{n_micro_batches} micro-batches of {BATCHES[network] // n_micro_batches}"] if n_micro_batches > 1 else []
    return ", ".join([*words, *(["checkpointing"] if checkpointing else [])]) or "as it is"


if __name__ == "__main__":
    sys.exit(exit_code(main))
