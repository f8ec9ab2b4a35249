"""What the names of types mean on a CPU."""

import pytest
import torch

from dinov2.fsdp.precision import autocast, resolve_dtype


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
