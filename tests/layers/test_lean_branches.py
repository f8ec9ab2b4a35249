"""The lean branches against the modules that they stand for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dinov2.layers import Block, LayerNorm, SwiGLUFFN
from dinov2.layers import block as block_module
from dinov2.layers.block import pack
from dinov2.layers.scratch import _Held, scratch_like
from dinov2.utils.matmul import fast_matmul_within

SHAPES = [(3, 7), (5, 4)]
N_TOKENS = sum(n_samples * n_tokens for n_samples, n_tokens in SHAPES)


def make(**settings) -> Block:
    torch.manual_seed(0)
    block = Block(24, num_heads=3, **{"qkv_bias": True, "init_values": 0.5, "norm_layer": LayerNorm, **settings})
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def outputs_and_gradients(block: Block, lean: bool, rows=None, dtype=None) -> list[torch.Tensor]:
    """The output, and the gradients of input and parameters, of a loss that weighs each entry differently."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKENS, 24, generator=generator).requires_grad_()
    weights = torch.randn(N_TOKENS if rows is None else len(rows), 24, generator=generator)
    block.lean = lean
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = block(x, SHAPES, rows)
    learned = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *learned])]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Names of the lean branches that are taken, in turn."""
    taken: list[str] = []

    def note(name):
        branch = getattr(block_module, name)

        def noted(*args, **kwargs):
            taken.append(name)
            return branch(*args, **kwargs)

        monkeypatch.setattr(block_module, name, noted)

    note("attention_branch")
    note("ffn_branch")
    return taken


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 7, 14, 21, 25, 3, 26])], ids=["all", "rows"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"init_values": None}, {"qkv_bias": False, "proj_bias": False, "ffn_bias": False}, {"ffn_layer": SwiGLUFFN}],
    ids=["usual", "no layer scale", "no bias", "swiglu"],
)
def test_outputs_and_gradients_are_those_of_the_modules(settings, rows, counted):
    block = make(**settings)
    expected = outputs_and_gradients(block, lean=False, rows=rows)
    assert not counted
    found = outputs_and_gradients(block, lean=True, rows=rows)
    assert counted == (["attention_branch"] if "ffn_layer" in settings else ["attention_branch", "ffn_branch"])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_it_does_not_matter_how_many_samples_attend_at_a_time(at_once, monkeypatch):
    block = make()
    expected = outputs_and_gradients(block, lean=False)
    n_weights = 3 * 4**2  # of a sample of the second batch, whose five are no multiple of two or three
    monkeypatch.setattr("dinov2.layers.grouped_attention.CACHED_WEIGHTS", at_once * n_weights)
    for ours, theirs in zip(outputs_and_gradients(block, lean=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_an_earlier_output_outlives_the_memory_that_branches_share():
    """Twice forward before backward, as gradient accumulation's features ahead, and a smaller batch in between."""
    block = make()
    x = torch.randn(N_TOKENS, 24)
    expected = outputs_and_gradients(block, lean=True)
    first = block(x, SHAPES)
    kept = first.detach().clone()
    block(x[:7], [(1, 7)]).sum().backward()
    block(2 * x, SHAPES).sum().backward()
    assert torch.equal(first, kept)
    for ours, theirs in zip(outputs_and_gradients(block, lean=True), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("has_own", [True, False], ids=["oneDNN's linear map", "F.linear"])
def test_the_fast_path_of_products_is_as_exact(has_own, monkeypatch):
    if not has_own:
        monkeypatch.setattr("dinov2.layers.lean_branches._has_own_linear", lambda dtype: False)
    for settings in ({}, {"qkv_bias": False, "ffn_bias": False}):
        block = make(**settings)
        expected = outputs_and_gradients(block, lean=False)
        with fast_matmul_within(True) as is_fast:
            if not is_fast:
                pytest.skip("the fast path of this processor rounds")
            found = outputs_and_gradients(block, lean=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_memory_first_taken_in_inference_mode_serves_training_too(monkeypatch):
    monkeypatch.setattr("dinov2.layers.scratch._HELD", _Held())
    block = make()
    with torch.inference_mode():
        block(torch.randn(N_TOKENS, 24), SHAPES)
    outputs_and_gradients(block, lean=True)
    with torch.inference_mode():
        block(torch.randn(N_TOKENS, 24), SHAPES)


def test_each_thread_has_memory_of_its_own():
    here = scratch_like(torch.empty(4))
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(scratch_like, torch.empty(4)).result()
    assert here.data_ptr() == scratch_like(torch.empty(2, 2)).data_ptr() != there.data_ptr()


def test_in_bfloat16_both_are_as_far_from_float32():
    block = make()
    exact = outputs_and_gradients(block, lean=False)
    modules = outputs_and_gradients(block, lean=False, dtype=torch.bfloat16)
    lean = outputs_and_gradients(block, lean=True, dtype=torch.bfloat16)
    for true, theirs, ours in zip(exact, modules, lean, strict=True):
        assert ours.dtype == true.dtype
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-3 * true.norm()


def test_rows_are_those_of_the_whole_output():
    block, rows = make(), torch.tensor([26, 0, 5])
    whole = outputs_and_gradients(block, lean=True)[0]
    torch.testing.assert_close(outputs_and_gradients(block, lean=True, rows=rows)[0], whole[rows])


def test_what_does_not_learn_gets_no_gradient():
    block = make()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in ("attn.proj.bias", "mlp.fc1.weight", "ls2.gamma"))
    expected = outputs_and_gradients(block, lean=False)
    for ours, theirs in zip(outputs_and_gradients(block, lean=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_without_gradients_the_attention_weights_are_not_kept():
    block = make()
    with torch.no_grad():
        assert not block(torch.randn(2, 7, 24)).requires_grad


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "norm2", "mlp.act", "ls1"])
def test_who_listens_to_a_module_hears_it(path):
    block, heard = make(), []
    block.get_submodule(path).register_forward_hook(lambda *_: heard.append(path))
    block(torch.randn(2, 7, 24))
    assert heard == [path]


def test_another_kind_of_layer_is_not_passed_by(counted):
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block = make()
    block.mlp.fc2 = Doubling(96, 24)
    block(torch.randn(2, 7, 24))
    assert counted == ["attention_branch"]


def test_dropout_goes_by_the_modules_while_training(counted):
    block = make(drop=0.5, attn_drop=0.5)
    block(torch.randn(2, 7, 24))
    assert not counted
    block.eval()(torch.randn(2, 7, 24))
    assert counted == ["attention_branch", "ffn_branch"]


def test_stochastic_depth_with_rows_drops_the_same_samples():
    """Rows of the output are those of a block that computes all of them with the same draw."""
    block = make(drop_path=0.4)
    x, shapes = pack([torch.randn(5, 7, 24), torch.randn(6, 3, 24)])
    rows = torch.tensor([0, 7, 14, 3, 35, 38, 52])
    torch.manual_seed(3)
    whole = block(x, shapes)
    torch.manual_seed(3)
    torch.testing.assert_close(block(x, shapes, rows), whole[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 7, 14, 21])], ids=["all", "rows"])
def test_activations_may_be_computed_again_in_backward(rows):
    block = make()
    expected = outputs_and_gradients(block, lean=True, rows=rows)
    block.checkpoint_activations = True
    for ours, theirs in zip(outputs_and_gradients(block, lean=True, rows=rows), expected, strict=True):
        assert torch.equal(ours, theirs)
