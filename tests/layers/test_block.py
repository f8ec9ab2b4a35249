import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dinov2.layers import Block, LayerNorm, LayerScale, NestedTensorBlock, SwiGLUFFNFused
from dinov2.layers import block as block_module


def make(formulas, **settings) -> Block:
    settings = {"init_values": 1e-5, "qkv_bias": True, **settings}
    return formulas.fill_(Block(24, num_heads=3, **settings), "test/block")


@pytest.fixture
def batches(formulas):
    return [formulas.sym("test/long", (4, 7, 24), 1.0), formulas.sym("test/short", (6, 3, 24), 1.0)]


def rows_seen(module: torch.nn.Module) -> list[int]:
    """Numbers of tokens that `module` is given, call by call."""
    rows: list[int] = []
    module.register_forward_hook(lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1]))
    return rows


def test_a_block_is_two_pre_norm_residuals(formulas, batches):
    block, x = make(formulas), batches[0]
    expected = x + block.ls1.gamma * block.attn(block.norm1(x))
    expected = expected + block.ls2.gamma * block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("settings", [{}, {"init_values": None}, {"ffn_layer": SwiGLUFFNFused}])
def test_a_list_gives_what_its_tensors_give_alone(formulas, batches, settings):
    block = make(formulas, **settings)
    before = [x.clone() for x in batches]
    together = block(batches)
    assert [x.shape for x in together] == [x.shape for x in batches]
    for x, out in zip(batches, together, strict=True):
        torch.testing.assert_close(out, block(x), atol=2e-6, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))


def test_a_list_passes_gradients_to_each_of_its_tensors(formulas, batches):
    block = make(formulas)
    inputs = [x.requires_grad_() for x in batches]
    together = torch.autograd.grad(sum(out.square().sum() for out in block(inputs)), inputs)
    for x, gradient in zip(inputs, together, strict=True):
        (alone,) = torch.autograd.grad(block(x).square().sum(), x)
        torch.testing.assert_close(gradient, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.4])
@pytest.mark.parametrize("as_list", [True, False])
def test_dropped_samples_cost_no_computation(formulas, batches, rate, as_list):
    block = make(formulas, drop_path=rate)
    attention_rows, ffn_rows = rows_seen(block.attn), rows_seen(block.mlp)
    block(batches if as_list else batches[0])
    kept = [int(4 * (1 - rate)), int(6 * (1 - rate))]
    expected = [kept[0] * 7, kept[1] * 3] if as_list else [kept[0] * 7]
    assert attention_rows == expected
    assert ffn_rows == expected


def test_kept_samples_get_the_scaled_residual_and_the_others_nothing(formulas, batches, monkeypatch):
    x = batches[0]
    choices = iter([torch.tensor([2, 0, 3]), torch.tensor([1, 2, 3])])
    monkeypatch.setattr(block_module, "choose_samples", lambda *_: next(choices))
    block = make(formulas, drop_path=0.25)
    out = block(x)

    attention = block.ls1(block.attn(block.norm1(x)))
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None]
    expected = x + attention * kept * 4 / 3
    kept = torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None, None]
    expected = expected + block.ls2(block.mlp(block.norm2(expected))) * kept * 4 / 3
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_one_sample_is_never_dropped(formulas, batches):
    x = batches[0][:1]
    torch.testing.assert_close(make(formulas, drop_path=0.9)(x), make(formulas)(x))


def test_nothing_is_dropped_in_evaluation(formulas, batches):
    dropping, plain = make(formulas, drop_path=0.9).eval(), make(formulas).eval()
    for out, expected in zip(dropping(batches), plain(batches), strict=True):
        assert torch.equal(out, expected)


def test_drop_path_trains_under_autocast(formulas, batches):
    """The residual comes in bfloat16 and is added to a float32 stream."""
    block = make(formulas, drop_path=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = block(batches)
    assert [out.dtype for out in outputs] == [torch.float32] * 2
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in block.parameters())


def test_recomputed_activations_give_the_same_gradients(formulas, batches):
    block = make(formulas, drop_path=0.4)
    gradients = []
    for block.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        block.zero_grad()
        sum(out.square().sum() for out in block(batches)).backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_compiled_branches_give_the_same_results_and_share_their_code(formulas, batches, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    settings = {"drop_path": 0.4, "init_values": 1.0}
    plain = [make(formulas, **settings) for _ in range(3)]
    compiled = copy.deepcopy(plain)
    for block in compiled:
        block.compile_branches()
    results = []
    for blocks in (plain, compiled):
        torch.manual_seed(0)
        x = batches
        for block in blocks:
            x = block(x)
        sum(out.square().sum() for out in x).backward()
        results.append([*x, *(parameter.grad for block in blocks for parameter in block.parameters())])
        assert [name for block in blocks for name in block.state_dict()] == [n for b in plain for n in b.state_dict()]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 6  # two branches, by shape and gradient: not the 12 of three blocks alone


def test_layer_scale_is_there_only_if_asked_for():
    assert isinstance(Block(24, 3, init_values=1e-5).ls1, LayerScale)
    assert not any("gamma" in name for name in Block(24, 3, init_values=None).state_dict())


def test_upstream_name():
    assert NestedTensorBlock is Block


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
def test_half_precision_weights_serve_a_float32_stream(weight_type):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    norm, reference = LayerNorm(6, eps=1e-6).to(weight_type), nn.LayerNorm(6, eps=1e-6)
    with torch.no_grad():
        for parameter, other in zip(norm.parameters(), reference.parameters(), strict=True):
            other.copy_(torch.linspace(0.5, 2, 6).to(weight_type))
            parameter.copy_(other)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(x))
