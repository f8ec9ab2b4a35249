"""Seed streams; types of the networks; the fast path of float32 products, chosen only where it is accurate."""

import logging
from collections.abc import Iterator

import pytest
import torch

from dinov2.utils import numerics
from dinov2.utils.numerics import (
    EXACT,
    FAST,
    TOLERANCE,
    autocast,
    derive_seed,
    fast_matmul,
    fast_matmul_within,
    largest_error,
    resolve_dtype,
)


@pytest.fixture(autouse=True)
def own_setting() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    numerics._is_fast_path_accurate.cache_clear()
    yield
    numerics._is_fast_path_accurate.cache_clear()
    torch.set_float32_matmul_precision(before)


def test_whatever_is_chosen_products_stay_accurate():
    is_fast = fast_matmul(True)
    assert torch.get_float32_matmul_precision() == (FAST if is_fast else EXACT)
    assert largest_error() < TOLERANCE
    assert not fast_matmul(False)
    assert torch.get_float32_matmul_precision() == EXACT


def test_a_processor_that_rounds_keeps_the_exact_path(monkeypatch, caplog):
    exact = torch.nn.functional.linear

    def rounding(x, weight, bias):
        rounds = x.dtype == torch.float32
        return exact(x.bfloat16().float(), weight.bfloat16().float(), bias) if rounds else exact(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", rounding)
    assert largest_error() > 10 * TOLERANCE
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert not fast_matmul(True)
        assert not fast_matmul(True)
    assert torch.get_float32_matmul_precision() == EXACT
    assert caplog.text.count("so the exact one is used") == 1


def test_other_devices_keep_the_exact_path_and_convolutions_never_use_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # cuDNN's default
    with fast_matmul_within(True, "cuda:0") as is_fast:
        assert not is_fast
        assert torch.get_float32_matmul_precision() == EXACT
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_the_setting_before_comes_back_even_after_an_error():
    torch.set_float32_matmul_precision("high")
    with fast_matmul_within(True) as is_fast:
        assert torch.get_float32_matmul_precision() == (FAST if is_fast else EXACT)
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), fast_matmul_within(True):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"


def test_the_check_is_exact_float32_under_autocast_too():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = fast_matmul(True)
    numerics._is_fast_path_accurate.cache_clear()
    assert under_autocast == fast_matmul(True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)],
)
def test_on_a_cpu(name, dtype):
    assert resolve_dtype(name, "cpu") == dtype
    with autocast(name, "cpu"):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


def test_auto_on_a_gpu_that_only_emulates_bf16_is_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    resolve_dtype.cache_clear()
    assert resolve_dtype("auto", "cuda") == torch.float16
    resolve_dtype.cache_clear()


def test_streams_are_functions_of_seed_and_name_and_differ():
    seeds = {derive_seed(s, name, i) for s in range(3) for name in ("masks", "crops") for i in range(50)}
    assert len(seeds) == 300
    assert derive_seed(0, "masks", 1) == derive_seed(0, "masks", 1)
    # "1" + "23" and "12" + "3" are different names
    assert derive_seed(0, 1, 23) != derive_seed(0, 12, 3)
    torch.Generator().manual_seed(max(seeds))  # fits what torch takes
