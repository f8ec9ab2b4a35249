"""The GPU kernels against plain PyTorch in float64.

Triton decides at its import whether it interprets, so this file runs itself in a process of its own, as a program:
`python test_triton_kernels.py cpu` (the interpreter) or `cuda`. It prints what each check found.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.loss import triton_kernels
from dinov2.loss.teacher_targets import sinkhorn_knopp

CPU = torch.device("cpu")
# rounding of a result: half a unit in the last place on a GPU, a whole one in the interpreter, which cuts bits off
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def reference(
    logits: Tensor, mass: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, weights: Tensor, temp: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [R] and the gradient [R, K] of their weighted sum, in float64, by autograd."""
    logits = logits.double().requires_grad_()
    targets = mass.double()
    if row_scale is not None:
        targets = targets * row_scale.double()[:, None]
    if column_scale is not None:
        targets = targets * column_scale.double()
    cross_entropy = -(targets * (logits / temp).log_softmax(dim=1)).sum(dim=1)
    (cross_entropy * weights.double()).sum().backward()
    assert logits.grad is not None
    return cross_entropy.detach(), logits.grad


def compare(
    device: torch.device, n_columns: int, logits_dtype: torch.dtype, mass_dtype: torch.dtype, scales: str = "both"
) -> None:
    logits, mass = draw((3, n_columns), logits_dtype, 1), draw((3, n_columns), seed=2).exp().to(mass_dtype)
    row_scale = draw((3,), seed=3).exp() if scales in ("both", "rows") else None
    column_scale = draw((n_columns,), seed=4).exp() / n_columns if scales in ("both", "columns") else None
    weights = draw((3,), seed=5).abs()
    expected, gradient = reference(logits, mass, row_scale, column_scale, weights, temp=0.1)

    def there(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device)

    found = logits.to(device).clone()
    cross_entropy = triton_kernels.cross_entropy_and_gradient_(
        found, mass.to(device), there(row_scale), there(column_scale), weights.to(device), 1 / 0.1
    )
    torch.testing.assert_close(cross_entropy.cpu().double(), expected, rtol=2e-6, atol=0)
    largest = gradient.abs().max().item()
    torch.testing.assert_close(found.cpu().double(), gradient, rtol=ROUNDING[logits_dtype], atol=2e-6 * largest)


def check_a_row_in_one_block(device: torch.device) -> None:
    compare(device, 1024, torch.float32, torch.float32)


def check_rows_that_end_within_a_block(device: torch.device) -> None:
    for n_columns in (1, 100, 2 * triton_kernels.MAX_BLOCK + 5):
        compare(device, n_columns, torch.float32, torch.float32)


def check_half_precision(device: torch.device) -> None:
    for logits_dtype, mass_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        compare(device, triton_kernels.MAX_BLOCK + 16, logits_dtype, mass_dtype)


def check_scales_may_be_left_out(device: torch.device) -> None:
    for scales in ("rows", "columns", "none"):
        compare(device, 300, torch.float32, torch.float32, scales)


def check_large_logits_stay_finite(device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 9.9e3], [-1e30, -1e30, -1e30, -1e30]])
    mass = torch.full((2, 4), 0.25)
    expected, gradient = reference(logits, mass, None, None, torch.ones(2), temp=0.1)
    found = logits.to(device)
    weights = torch.ones(2, device=device)
    cross_entropy = triton_kernels.cross_entropy_and_gradient_(found, mass.to(device), None, None, weights, 10.0)
    torch.testing.assert_close(cross_entropy[0].cpu().double(), expected[0])
    torch.testing.assert_close(found[0].cpu().double(), gradient[0])
    assert cross_entropy.isfinite().all()
    assert found.isfinite().all()


def check_nan_is_not_hidden(device: torch.device) -> None:
    logits = torch.zeros(2, 300, device=device)
    logits[1, 7] = float("nan")
    mass, weights = torch.full_like(logits, 1 / 300), torch.ones(2, device=device)
    cross_entropy = triton_kernels.cross_entropy_and_gradient_(logits, mass, None, None, weights, 10.0)
    assert cross_entropy.isnan().tolist() == [False, True]
    assert logits[1].isnan().all()
    assert logits[0].isfinite().all()


def check_rows_beyond_two_to_the_31(device: torch.device) -> None:
    # Only the rows' own pages are touched: the rest of these 4 GiB is never there on a CPU
    stride = 2**30 + 16
    everything = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    far_apart = everything.as_strided((3, 64), (stride, 1))
    logits, weights = draw((3, 64), torch.bfloat16), torch.ones(3)
    mass = torch.full((3, 64), 1 / 64)
    far_apart.copy_(logits)
    expected, gradient = reference(logits, mass, None, None, weights, temp=0.1)
    sums = triton_kernels.row_sums(far_apart, torch.ones(64, device=device))
    torch.testing.assert_close(sums.cpu(), logits.float().sum(dim=1), rtol=1e-5, atol=1e-5)
    sums = triton_kernels.column_sums(far_apart, torch.ones(3, device=device))
    torch.testing.assert_close(sums.cpu(), logits.float().sum(dim=0), rtol=1e-5, atol=1e-5)
    cross_entropy = triton_kernels.cross_entropy_and_gradient_(
        far_apart, mass.to(device), None, None, weights.to(device), 10.0
    )
    torch.testing.assert_close(cross_entropy.cpu().double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(far_apart.cpu().double(), gradient, rtol=2**-7, atol=1e-6)


def check_rows_of_a_larger_matrix(device: torch.device) -> None:
    whole, mass = draw((8, 512), seed=1).to(device), draw((8, 512), seed=2).exp().to(device)
    before, weights = whole.clone(), torch.ones(3, device=device)
    triton_kernels.cross_entropy_and_gradient_(whole[2:5], mass[2:5], None, None, weights, 10.0)
    _, gradient = reference(before[2:5].cpu(), mass[2:5].cpu(), None, None, torch.ones(3), temp=0.1)
    torch.testing.assert_close(whole[2:5].cpu().double(), gradient, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole[:2], before[:2])
    assert torch.equal(whole[5:], before[5:])


def check_exponentiate(device: torch.device) -> None:
    for dtype in ROUNDING:
        for n_columns in (100, triton_kernels.MAX_BLOCK + 100):
            logits = draw((3, n_columns), dtype)
            scaled = logits.double() / 0.25
            expected = (scaled - scaled.amax(dim=1, keepdim=True)).exp()
            mass = logits.to(device).clone()
            row_max = triton_kernels.exponentiate_(mass, 1 / 0.25)
            torch.testing.assert_close(row_max.cpu().double(), scaled.amax(dim=1), rtol=1e-6, atol=0)
            # the exponent is rounded in float32, where it is up to 30 large
            torch.testing.assert_close(mass.cpu().double(), expected, rtol=ROUNDING[dtype] + 4e-6, atol=6e-8)


def check_row_sums(device: torch.device) -> None:
    for dtype in ROUNDING:
        for n_columns in (1, 100, triton_kernels.MAX_BLOCK + 9):
            mass, columns = draw((2, n_columns), seed=6).exp().to(dtype), draw((n_columns,), seed=8).exp()
            found = triton_kernels.row_sums(mass.to(device), columns.to(device)).cpu()
            torch.testing.assert_close(found.double(), mass.double() @ columns.double(), rtol=2e-6, atol=0)


def check_column_sums(device: torch.device) -> None:
    # whole and broken groups of rows, whole and broken tiles of columns
    for n_rows, n_columns in ((1, 1), (triton_kernels.GROUP_ROWS, 256), (triton_kernels.GROUP_ROWS + 3, 260)):
        for dtype in ROUNDING:
            mass, rows = draw((n_rows, n_columns), seed=6).exp().to(dtype), draw((n_rows,), seed=7).exp()
            found = triton_kernels.column_sums(mass.to(device), rows.to(device)).cpu()
            torch.testing.assert_close(found.double(), rows.double() @ mass.double(), rtol=2e-6, atol=0)


def check_the_passes_make_sinkhorn_knopp(device: torch.device) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-6)):
        logits = draw((8, 300), dtype, scale=0.3)
        for n_rows in (8, torch.tensor([8.0], device=device)):
            mass = logits.to(device).clone()
            row_max = triton_kernels.exponentiate_(mass, 1 / 0.07)
            column_mass = triton_kernels.column_sums(mass, torch.exp(row_max - row_max.max()))
            for _ in range(2):
                column_scale = 1 / (300 * column_mass)
                row_scale, column_mass = triton_kernels.row_and_column_sums(mass, column_scale, n_rows)
            column_scale = 1 / (300 * column_mass)
            row_scale = 1 / triton_kernels.row_sums(mass, column_scale)
            found = mass.float() * column_scale * row_scale[:, None]
            expected = sinkhorn_knopp(logits, 0.07, 8, n_iterations=3)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


def check_no_rows(device: torch.device) -> None:
    nothing, columns = torch.empty(0, 100, device=device), torch.ones(100, device=device)
    rows = torch.empty(0, device=device)
    assert triton_kernels.cross_entropy_and_gradient_(nothing, nothing, rows, columns, rows, 10.0).shape == (0,)
    assert triton_kernels.exponentiate_(nothing, 10.0).shape == (0,)
    row_scale, column_mass = triton_kernels.row_and_column_sums(nothing, columns, 8)
    assert row_scale.shape == (0,)
    assert torch.equal(column_mass, torch.zeros(100, device=device))


def check_sums_are_the_same_each_time(device: torch.device) -> None:
    mass, columns, rows = draw((300, 300)).exp().to(device), torch.ones(300, device=device), torch.ones(300)
    first, again = (triton_kernels.row_sums(mass[:4], columns) for _ in range(2))
    assert torch.equal(first, again)
    first, again = (triton_kernels.column_sums(mass, rows.to(device)) for _ in range(2))
    assert torch.equal(first, again)


def check_the_device_is_available(device: torch.device) -> None:
    assert triton_kernels.available(device)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run_checks(device: str, **environment: str) -> dict[str, str]:
    """What went wrong in each check, run by a fresh process; empty where all is well."""
    run = subprocess.run(
        [sys.executable, __file__, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    pytest.importorskip("triton", reason="Triton has no packages for this system")
    return run_checks("cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str, interpreted: dict[str, str]):
    assert not interpreted[name], interpreted[name]


@pytest.mark.gpu
def test_on_a_gpu():
    failed = {name: text for name, text in run_checks("cuda").items() if text}
    assert not failed, "\n".join(failed.values())


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dinov2.loss import triton_kernels as kernels

def build(kernel, n_warps, types, constants):
    attributes = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(kernel.arg_names)
                  if types.get(name, "").startswith("*") or name.endswith("stride")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", 90, 32),
                    options={"num_warps": n_warps})
    assert ".v2.b32" in built.asm["ptx"] or ".v4.b32" in built.asm["ptx"], "loads are not wide"

block, n_warps = kernels._block_of_row(65536)
row = {"N_COLUMNS": 65536, "BLOCK": block}
build(kernels._cross_entropy_kernel, n_warps, {"logits": "*bf16", "mass": "*bf16", "row_scale": "*fp32",
      "column_scale": "*fp32", "weights": "*fp32", "cross_entropy": "*fp32", "inverse_temp": "fp32",
      "logits_stride": "i32", "mass_stride": "i32"}, row)
build(kernels._cross_entropy_kernel, n_warps, {"logits": "*fp32", "mass": "*fp32", "weights": "*fp32",
      "cross_entropy": "*fp32", "inverse_temp": "fp32", "logits_stride": "i32", "mass_stride": "i32"},
      {**row, "row_scale": None, "column_scale": None})
build(kernels._exponentiate_kernel, n_warps, {"logits": "*bf16", "row_max": "*fp32", "inverse_temp": "fp32",
      "stride": "i32"}, row)
build(kernels._row_sums_kernel, n_warps, {"mass": "*bf16", "column_scale": "*fp32", "sums": "*fp32", "stride": "i32"},
      row)
build(kernels._column_sums_kernel, 4, {"mass": "*bf16", "row_scale": "*fp32", "of_groups": "*fp32", "n_rows": "i32",
      "stride": "i32"}, {"N_COLUMNS": 65536, "GROUP_ROWS": kernels.GROUP_ROWS, "ROWS": kernels.TILE_ROWS,
      "COLUMNS": kernels.TILE_COLUMNS})
"""


def test_kernels_compile_for_an_h100(tmp_path: Path):
    """The interpreter takes what the compiler refuses; compiling needs no GPU."""
    pytest.importorskip("triton", reason="Triton has no packages for this system")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_cpu_has_no_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_kernels.available(CPU)


def test_without_triton_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        triton_kernels.exponentiate_(torch.zeros(2, 3), 1.0)


@pytest.mark.parametrize(
    ("missing", "said"), [("triton", "pip install triton"), ("capability", "older than"), ("compiler", "gcc")]
)
def test_a_gpu_without_kernels_is_told_once(missing, said, monkeypatch):
    triton_kernels._runs_on_gpu.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_kernels, "triton", None if missing == "triton" else object())
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 0) if missing == "capability" else (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A card")
    monkeypatch.setattr("shutil.which", lambda _: None if missing == "compiler" else "/usr/bin/gcc")
    told = []
    monkeypatch.setattr(triton_kernels.logger, "warning", lambda text, *values: told.append(text % values))
    try:
        assert [triton_kernels.available(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
    finally:
        triton_kernels._runs_on_gpu.cache_clear()
    assert len(told) == 1
    assert said in told[0]


def main(device: str) -> None:
    found = {}
    for name, check in CHECKS.items():
        try:
            check(torch.device(device))
            found[name] = ""
        except (AssertionError, RuntimeError, TypeError, ValueError):
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
