"""The pretend GPU itself: what it counts is what the code did."""

import pytest

SCRIPT = """
import torch
import stub

small = torch.zeros(8, device="cuda")
stub.reset()
half = torch.zeros(64, 32, device="cuda", dtype=torch.float16)
half @ half.T
pageable, pinned = torch.zeros(4, 4), torch.zeros(4, 4).pin_memory()
pinned.to("cuda", non_blocking=True)
pageable.to("cuda")
counts = stub.counters()
try:
    torch.zeros(3 * 2**30, dtype=torch.uint8, device="cuda")
    is_full = False
except torch.OutOfMemoryError:
    is_full = True
capability = torch.cuda.get_device_capability()
stub.report({"capability": capability, "flops": stub.matmul_flops(), "is_full": is_full, **counts})
"""


@pytest.fixture(scope="module")
def counted(run_on_stub, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "count.py"
    script.write_text(SCRIPT)
    return run_on_stub(script, capability="12.0", memory_gb=2)


def test_it_has_the_capability_and_the_memory_that_are_set(counted):
    assert counted["capability"] == [12, 0]
    assert counted["is_full"]


def test_products_count_in_their_type(counted):
    assert counted["flops"] == {"fp32": 0, "fp64": 0, "bf16": 0, "fp16": 2 * 64 * 64 * 32}


def test_copies_count_by_the_kind_of_memory(counted):
    assert (counted["h2d_pinned"], counted["h2d_pageable"]) == (1, 1)


def test_real_values_are_those_of_the_cpu(run_on_stub, tmp_path):
    script = tmp_path / "values.py"
    script.write_text("""
import stub
import torch
from dinov2.eval.knn import nearest_neighbours

train, test = torch.randn(12, 8), torch.randn(4, 8)
with stub.RealValues():
    on_device, _ = nearest_neighbours(train.cuda(), test.cuda(), 3)
on_cpu, _ = nearest_neighbours(train, test, 3)
stub.report([on_device.tolist(), on_cpu.tolist()])
""")
    on_device, on_cpu = run_on_stub(script)
    assert on_device == on_cpu
