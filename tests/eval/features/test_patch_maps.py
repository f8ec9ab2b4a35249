"""Maps of patches agree with independent implementations of attention, rollout and PCA."""

import numpy as np
import pytest
import torch

from dinov2.eval.features.patch_maps import (
    attention_rollout,
    attention_weights,
    border_share,
    cls_attention,
    likeness_to,
    occlusion_map,
    patch_tokens,
    pca_colours,
    similarity_maps,
)
from dinov2.hub.conversions import to_own_names
from dinov2.layers import attention as attention_layer
from dinov2.models.vision_transformer import DinoVisionTransformer

HEADS, DIM, DEPTH, SIZE, PATCH = 3, 48, 3, 56, 14


def tiny_vit(formulas, n_registers=0, block_chunks=0):
    settings = {"num_register_tokens": n_registers, "block_chunks": block_chunks, "init_values": 1.0}
    model = DinoVisionTransformer(
        img_size=56, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **settings
    )
    return formulas.fill_(model, "maps").eval()


def make_images(formulas, n=2, height=56, width=56):
    return formulas.sym("images", (n, 3, height, width), 1.5)


def weights_by_numpy(model, tokens):
    """Compute [blocks, B, heads, N, N] from each block's own linear layers, one head at a time."""
    result = []
    for block in model.each_block():
        with torch.no_grad():
            normed = block.norm1(tokens)
            weight, bias = (x.detach().double().numpy() for x in (block.attn.qkv.weight, block.attn.qkv.bias))
            qkv = normed.double().numpy() @ weight.T + bias  # [B, N, 3 D]
            tokens = block(tokens)
        size = DIM // HEADS
        heads = []
        for head in range(HEADS):
            query = qkv[..., head * size : (head + 1) * size]
            key = qkv[..., DIM + head * size : DIM + (head + 1) * size]
            scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(size))
            heads.append(scores / scores.sum(axis=-1, keepdims=True))
        result.append(np.stack(heads, axis=1))
    return np.stack(result)


@pytest.mark.parametrize("block_chunks", [0, 1])
@pytest.mark.parametrize("n_registers", [0, 4])
def test_attention_is_the_softmax_of_the_layers_own_queries_and_keys(formulas, n_registers, block_chunks):
    model, batch = tiny_vit(formulas, n_registers, block_chunks), make_images(formulas, height=42)
    with torch.no_grad():
        expected = weights_by_numpy(model, model.prepare_tokens_with_masks(batch))
    for block in (0, 1, -1):
        result = attention_weights(model, batch, block)
        torch.testing.assert_close(result.sum(dim=-1), torch.ones(2, HEADS, result.shape[-1]))
        np.testing.assert_allclose(result.numpy(), expected[block], atol=1e-5)
    maps = cls_attention(model, batch)
    assert maps.shape == (2, HEADS, 3, 4)
    np.testing.assert_allclose(maps.flatten(2).numpy(), expected[-1][:, :, 0, 1 + n_registers :], atol=1e-5)
    assert (maps.sum(dim=(-2, -1)) < 1).all()


def test_the_attention_of_the_fused_kernel_gives_the_same_output(formulas):
    """The output of the layer is these weights times its values."""
    model, batch = tiny_vit(formulas), make_images(formulas)
    *_, last = model.each_block()
    outputs = {}
    hooks = [
        last.attn.qkv.register_forward_hook(lambda module, inputs, output: outputs.update(qkv=output)),
        last.attn.proj.register_forward_hook(lambda module, inputs, output: outputs.update(joined=inputs[0])),
    ]
    weights = attention_weights(model, batch)
    for hook in hooks:
        hook.remove()
    values = outputs["qkv"].unflatten(-1, (3, HEADS, -1))[:, :, 2]  # [B, N, heads, d]
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2), outputs["joined"])


def test_attention_does_not_depend_on_the_backend(formulas):
    """Plain attention replaces the xFormers kernel, because its binaries need a GPU."""
    model, batch = tiny_vit(formulas), make_images(formulas)
    before = cls_attention(model, batch), attention_rollout(model, batch)
    calls = []

    def kernel(query, key, value, p):
        calls.append(p)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return ((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value).transpose(1, 2)

    for block in model.each_block():
        assert isinstance(block.attn, attention_layer.Attention)
        block.attn._xformers, block.attn.backend = kernel, "xformers"
    after = cls_attention(model, batch), attention_rollout(model, batch)
    assert calls
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n_registers", [0, 4])
def test_attention_is_that_of_transformers(formulas, n_registers):
    transformers = pytest.importorskip("transformers")

    model, batch = tiny_vit(formulas, n_registers), make_images(formulas)
    settings = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": PATCH,
        "attn_implementation": "eager",
    }
    if n_registers:
        config = transformers.Dinov2WithRegistersConfig(**settings, num_register_tokens=n_registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**settings)).eval()
    model.load_state_dict(to_own_names(formulas.fill_(theirs, "theirs").state_dict()))
    with torch.no_grad():
        expected = theirs(batch, output_attentions=True).attentions
    for block in range(DEPTH):
        torch.testing.assert_close(attention_weights(model, batch, block), expected[block], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_registers", [0, 4])
def test_rollout_is_the_product_of_the_papers_matrices(formulas, n_registers):
    model, batch = tiny_vit(formulas, n_registers), make_images(formulas, width=70)
    with torch.no_grad():
        weights = weights_by_numpy(model, model.prepare_tokens_with_masks(batch))
    rollout = np.eye(weights.shape[-1])[None].repeat(2, axis=0)
    for layer in weights:
        mixed = layer.mean(axis=1) + np.eye(weights.shape[-1])
        rollout = (mixed / mixed.sum(axis=-1, keepdims=True)) @ rollout
    np.testing.assert_allclose(rollout.sum(axis=-1), 1)
    result = attention_rollout(model, batch)
    assert result.shape == (2, 4, 5)
    np.testing.assert_allclose(result.flatten(1).numpy(), rollout[:, 0, 1 + n_registers :], atol=1e-6)


def test_no_hook_stays(formulas):
    model = tiny_vit(formulas)
    attention_rollout(model, make_images(formulas))
    with pytest.raises(RuntimeError):
        cls_attention(model, make_images(formulas).to("meta"))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 50), r"56 x 50 px .*can't be cut into patches of 14 x 14 px; resize or crop it"),
        ((1, 3, 0, 56), "0 x 56 px"),
        ((3, 56, 56), r"found \[3, 56, 56\]; add the first dimension to a single image with \[None\]"),
        ((1, 1, 56, 56), r"\[images, 3, height, width\]"),
    ],
)
def test_images_that_patches_do_not_fill_are_refused(formulas, shape, message):
    model = tiny_vit(formulas)
    for function in (patch_tokens, cls_attention, attention_rollout):
        with pytest.raises(ValueError, match=message):
            function(model, torch.zeros(shape))


def test_a_block_that_does_not_exist_is_refused(formulas):
    with pytest.raises(ValueError, match="block: 3 of a network with 3"):
        attention_weights(tiny_vit(formulas), make_images(formulas), 3)


# --- PCA


def make_tokens(n=3, side=8, dim=10):
    """Return tokens of images with a disc in the middle that differs in all numbers, and the disc."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    is_cell = np.broadcast_to(np.hypot(y, x) < side / 4, (n, side, side))
    tokens = rng.normal(size=(n, side, side, dim)) * np.linspace(0.6, 0.1, dim)
    return (tokens + 4 * is_cell[..., None] * rng.normal(size=dim)).astype(np.float32), is_cell


@pytest.mark.parametrize("sign", [1, -1])
def test_the_middle_is_red_and_the_background_white_whatever_the_tokens_sign(sign):
    tokens, is_cell = make_tokens()
    colours = pca_colours(sign * tokens)
    assert colours.dtype == np.uint8
    assert colours.shape == (3, 8, 8, 3)
    assert colours[is_cell][:, 0].min() > colours[~is_cell][:, 0].max()
    separated = pca_colours(torch.from_numpy(sign * tokens), foreground=True)
    np.testing.assert_array_equal((separated == 255).all(axis=-1), ~is_cell)
    np.testing.assert_array_equal(pca_colours(tokens), pca_colours(tokens.copy()))


@pytest.mark.parametrize("foreground", [False, True])
def test_colours_are_the_components_with_fixed_signs(foreground):
    tokens, is_cell = make_tokens()
    is_shown = is_cell if foreground else np.ones_like(is_cell)
    y, x = np.mgrid[:8, :8]
    is_middle = np.broadcast_to((abs(y - 3.5) < 2) & (abs(x - 3.5) < 2), is_cell.shape)
    rows = tokens[is_shown].astype(np.float64)
    centred = rows - rows.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    directions *= np.sign(directions[range(3), np.abs(directions).argmax(axis=1)])[:, None]
    components = centred @ directions.T
    middle, around = components[is_middle[is_shown], 0], components[~is_middle[is_shown], 0]
    if len(around) and middle.mean() < around.mean():
        components[:, 0] *= -1
    low, high = np.percentile(components, [1, 99], axis=0)
    expected = 255 * np.clip((components - low) / (high - low), 0, 1)
    np.testing.assert_allclose(pca_colours(tokens, foreground=foreground)[is_shown], expected, atol=0.51)


@pytest.mark.parametrize("foreground", [False, True])
def test_each_image_alone(foreground):
    tokens, _ = make_tokens()
    colours = pca_colours(tokens, per_image=True, foreground=foreground)
    np.testing.assert_array_equal(colours[1], pca_colours(tokens[1:2], foreground=foreground)[0])
    assert (colours != pca_colours(tokens, foreground=foreground)).any()


@pytest.mark.filterwarnings("error")
def test_images_without_any_structure_have_colours_too():
    colours = pca_colours(np.ones((1, 2, 2, 5), np.float32), foreground=True)
    assert colours.shape == (1, 2, 2, 3)
    for shape in ((1, 2, 2, 2), (1, 1, 2, 5), (4, 4, 5)):
        with pytest.raises(ValueError, match="three or more patches and three or more numbers"):
            pca_colours(np.ones(shape))
    with pytest.raises(ValueError, match="three or more patches"):
        pca_colours(np.ones((3, 1, 2, 5)), per_image=True)


# --- similarity and occlusion


def test_similarity_is_symmetric_and_one_with_itself():
    tokens = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    result = similarity_maps(tokens)
    assert result.shape == (2, 15, 15)
    torch.testing.assert_close(result, result.mT, atol=0, rtol=0)
    torch.testing.assert_close(result.diagonal(dim1=1, dim2=2), torch.ones(2, 15))
    a, b = tokens[1, 0, 2], tokens[1, 2, 1]
    torch.testing.assert_close(result[1, 2, 11], (a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize(("window", "stride"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_occlusion_finds_the_patch_that_a_score_depends_on(window, stride):
    image = torch.zeros(3, 8 * 7, 8 * 9)
    image[:, 2 * 8 : 3 * 8, 5 * 8 : 6 * 8] = 1

    def score(batch):
        return batch[:, 0, 2 * 8 : 3 * 8, 5 * 8 : 6 * 8].mean(dim=(1, 2))

    result = occlusion_map(score, image, 8, window, stride, batch_size=5)
    assert result.shape == (7, 9)
    assert result[2, 5] == result.max() == 1
    far = result.clone()
    far[0:5, 3:8] = 0
    assert not far.any()
    if window == 1:
        assert result.sum() == 1


def test_the_square_has_the_colour_of_the_border_or_a_given_one():
    image = torch.arange(3.0)[:, None, None].expand(3, 4, 4)

    def score(batch):
        return batch.sum(dim=(1, 2, 3))

    assert not occlusion_map(score, image, 1).any()
    result = occlusion_map(score, image, 1, fill=torch.tensor([0.0, 0.0, 0.0]))
    torch.testing.assert_close(result, torch.full((4, 4), 3.0))


def test_scores_of_a_network(formulas):
    model, batch = tiny_vit(formulas), make_images(formulas)
    likeness = likeness_to(model, batch[0])
    values = likeness(batch).tolist()
    assert values[0] == pytest.approx(1)
    assert values[1] < 1
    result = occlusion_map(likeness, batch[0], PATCH)
    assert result.shape == (4, 4)
    assert (result >= -1e-6).all()
    assert result.max() > 0


@pytest.mark.parametrize(
    ("shape", "window", "stride", "message"),
    [
        ((3, 20, 16), 1, 1, r"multiples of 8 px, found \[3, 20, 16\]"),
        ((1, 3, 16, 16), 1, 1, r"found \[1, 3, 16, 16\]"),
        ((3, 16, 24), 3, 1, "window 3, stride 1: choose 1 <= stride <= window <= 2"),
        ((3, 16, 24), 1, 2, "never covered"),
    ],
)
def test_images_and_windows_that_do_not_fit_are_refused(shape, window, stride, message):
    with pytest.raises(ValueError, match=message):
        occlusion_map(lambda batch: batch.sum(dim=(1, 2, 3)), torch.zeros(shape), 8, window, stride)


def test_border_share():
    maps = np.zeros((2, 4, 5))
    maps[0, 0, 0], maps[1, 2, 2] = 1, 3
    np.testing.assert_allclose(border_share(maps), [1, 0])
    assert border_share(torch.ones(4, 5)) == pytest.approx(1 - 2 * 3 / 20)
