"""The fast path of float32 matrix products: chosen only where it is as accurate, and undone where that was promised."""

import logging
from collections.abc import Iterator

import pytest
import torch

from dinov2.utils import matmul
from dinov2.utils.matmul import EXACT, FAST, TOLERANCE, fast_matmul, fast_matmul_within, largest_error


@pytest.fixture(autouse=True)
def own_setting() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    matmul._is_fast_path_accurate.cache_clear()
    yield
    matmul._is_fast_path_accurate.cache_clear()
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


def test_other_devices_keep_the_exact_path():
    assert not fast_matmul(True, "cuda:0")
    assert torch.get_float32_matmul_precision() == EXACT


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
    matmul._is_fast_path_accurate.cache_clear()
    assert under_autocast == fast_matmul(True)
