import pytest
import torch

from dinov2.layers import Attention, MemEffAttention, attention


def explicit(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V, written out."""
    n_samples, n_tokens, dim = x.shape
    heads = module.num_heads
    qkv = x @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    query, key, value = qkv.reshape(n_samples, n_tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1)
    out = (weights @ value).transpose(1, 2).reshape(n_samples, n_tokens, dim)
    return out @ module.proj.weight.T + module.proj.bias


def in_xformers_layout(query, key, value, p=0.0):
    """What xFormers' function computes: tensors are [B, N, H, d] in and out."""
    weights = torch.einsum("bnhd,bmhd->bhnm", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_sdpa_is_softmax_attention(qkv_bias):
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, qkv_bias=qkv_bias, backend="sdpa")
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x), explicit(module, x), atol=1e-6, rtol=1e-5)


def test_the_xformers_branch_hands_over_its_layout(monkeypatch):
    monkeypatch.setattr(attention, "xformers_attention", lambda: in_xformers_layout)
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, backend="xformers")
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x), explicit(module, x), atol=1e-6, rtol=1e-5)


def test_auto_never_takes_xformers(monkeypatch):
    """Its fp32 kernels are missing on sm_100 and sm_120, its bf16 kernels on older GPUs."""

    def taken():
        raise AssertionError("auto asked for xFormers")

    monkeypatch.setattr(attention, "xformers_attention", taken)
    torch.manual_seed(0)
    module = Attention(24, num_heads=3)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x), explicit(module, x), atol=1e-6, rtol=1e-5)


def test_xformers_disabled_is_respected_and_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    attention.xformers_attention.cache_clear()
    try:
        with pytest.raises(ImportError, match="does not load.*'auto' or 'sdpa'"):
            Attention(24, num_heads=3, backend="xformers")
        Attention(24, num_heads=3)(torch.randn(1, 2, 24))
    finally:
        attention.xformers_attention.cache_clear()


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="num_heads: 5 heads.*24"):
        Attention(24, num_heads=5)
    with pytest.raises(ValueError, match="backend: 'flash'.*auto, sdpa, xformers, explicit"):
        Attention(24, num_heads=3, backend="flash")


def test_attention_dropout_is_for_training_only():
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, attn_drop=0.5)
    x = torch.randn(2, 7, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_upstream_name():
    assert MemEffAttention is Attention


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("backend", ["auto", "explicit", "xformers"])
def test_each_kernel_on_a_gpu_is_near_float32_on_the_cpu(backend, dtype, tolerance):
    if backend == "xformers" and attention.xformers_attention() is None:
        pytest.skip("xFormers doesn't load here")
    torch.manual_seed(0)
    module = Attention(128, num_heads=2, backend=backend)
    x = torch.randn(2, 257, 128)
    expected = explicit(module, x)
    module, dtype = module.cuda(), getattr(torch, dtype)
    try:
        attended = module.to(dtype)(x.to("cuda", dtype))
    except NotImplementedError as error:  # xFormers has no kernel for this type and GPU
        assert backend == "xformers"
        pytest.skip(str(error).splitlines()[0])
    torch.testing.assert_close(attended.float().cpu(), expected, atol=tolerance, rtol=0)
