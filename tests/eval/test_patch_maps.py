"""Maps of patches: attention is the network's own, rollout and PCA are what independent code makes of the same."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dinov2.eval.patch_maps import (
    attention_rollout,
    attention_weights,
    border_share,
    cls_attention,
    likeness_to,
    occlusion_map,
    patch_tokens,
    pca_colours,
    pca_components,
    probability_of,
    similarity_maps,
)
from dinov2.hub.conversions import to_own_names
from dinov2.layers import attention as attention_layer
from dinov2.models.vision_transformer import DinoVisionTransformer

HEADS, DIM, DEPTH, PATCH = 3, 48, 3, 14


def tiny_vit(formulas, n_registers=0, block_chunks=0):
    settings = {"num_register_tokens": n_registers, "block_chunks": block_chunks, "init_values": 1.0}
    model = DinoVisionTransformer(
        img_size=56, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **settings
    )
    return formulas.fill_(model, "maps").eval()


def pictures(formulas, n=2, height=56, width=56):
    return formulas.sym("pictures", (n, 3, height, width), 1.5)


def weights_by_numpy(model, tokens):
    """[layers, B, heads, N, N]: every layer by its own linear maps, a head at a time."""
    found = []
    for block in model.each_block():
        with torch.no_grad():
            normed = block.norm1(tokens)
            weight, bias = (x.detach().double().numpy() for x in (block.attn.qkv.weight, block.attn.qkv.bias))
            qkv = normed.double().numpy() @ weight.T + bias  # [B, N, 3 D]
            tokens = block(tokens)
        size = DIM // HEADS
        of_heads = []
        for head in range(HEADS):
            query = qkv[..., head * size : (head + 1) * size]
            key = qkv[..., DIM + head * size : DIM + (head + 1) * size]
            scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(size))
            of_heads.append(scores / scores.sum(axis=-1, keepdims=True))
        found.append(np.stack(of_heads, axis=1))
    return np.stack(found)


@pytest.mark.parametrize("block_chunks", [0, 1])
@pytest.mark.parametrize("n_registers", [0, 4])
def test_attention_is_the_softmax_of_the_layers_own_queries_and_keys(formulas, n_registers, block_chunks):
    model, batch = tiny_vit(formulas, n_registers, block_chunks), pictures(formulas, height=42)
    with torch.no_grad():
        expected = weights_by_numpy(model, model.prepare_tokens_with_masks(batch))
    for block in (0, 1, -1):
        found = attention_weights(model, batch, block)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, HEADS, found.shape[-1]))
        np.testing.assert_allclose(found.numpy(), expected[block], atol=1e-5)
    maps = cls_attention(model, batch)
    assert maps.shape == (2, HEADS, 3, 4)
    np.testing.assert_allclose(maps.flatten(2).numpy(), expected[-1][:, :, 0, 1 + n_registers :], atol=1e-5)
    assert (maps.sum(dim=(-2, -1)) < 1).all()


def test_the_attention_of_the_fused_kernel_gives_the_same_output(formulas):
    """What the maps say is what the layer did: its output is these weights times its values."""
    model, batch = tiny_vit(formulas), pictures(formulas)
    *_, last = model.each_block()
    seen = {}
    hooks = [
        last.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output)),
        last.attn.proj.register_forward_hook(lambda module, inputs, output: seen.update(joined=inputs[0])),
    ]
    weights = attention_weights(model, batch)
    for hook in hooks:
        hook.remove()
    values = seen["qkv"].unflatten(-1, (3, HEADS, -1))[:, :, 2]  # [B, N, heads, d]
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2), seen["joined"])


def test_attention_does_not_depend_on_the_backend(formulas):
    """The other kernel is xFormers', for which a plain attention stands here: its binaries need a GPU."""
    model, batch = tiny_vit(formulas), pictures(formulas)
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

    model, batch = tiny_vit(formulas, n_registers), pictures(formulas)
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
    model, batch = tiny_vit(formulas, n_registers), pictures(formulas, width=70)
    with torch.no_grad():
        weights = weights_by_numpy(model, model.prepare_tokens_with_masks(batch))
    rollout = np.eye(weights.shape[-1])[None].repeat(2, axis=0)
    for layer in weights:
        mixed = layer.mean(axis=1) + np.eye(weights.shape[-1])
        rollout = (mixed / mixed.sum(axis=-1, keepdims=True)) @ rollout
    np.testing.assert_allclose(rollout.sum(axis=-1), 1)
    found = attention_rollout(model, batch)
    assert found.shape == (2, 4, 5)
    np.testing.assert_allclose(found.flatten(1).numpy(), rollout[:, 0, 1 + n_registers :], atol=1e-6)


def test_no_hook_stays(formulas):
    model = tiny_vit(formulas)
    attention_rollout(model, pictures(formulas))
    with pytest.raises(RuntimeError):
        cls_attention(model, pictures(formulas).to("meta"))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 50), r"56 x 50 px are no whole number of patches of 14 px; take multiples, for instance 56 x 56"),
        ((1, 3, 0, 56), "0 x 56 px"),
        ((3, 56, 56), r"not \[3, 56, 56\]; a single picture becomes one with \[None\]"),
        ((1, 1, 56, 56), r"\[pictures, 3, height, width\]"),
    ],
)
def test_pictures_that_patches_do_not_fill(formulas, shape, message):
    model = tiny_vit(formulas)
    for function in (patch_tokens, cls_attention, attention_rollout):
        with pytest.raises(ValueError, match=message):
            function(model, torch.zeros(shape))


def test_a_layer_that_is_not_there(formulas):
    with pytest.raises(ValueError, match="block: 3 of a network with 3"):
        attention_weights(tiny_vit(formulas), pictures(formulas), 3)


# --- PCA


def test_components_are_those_of_scikit_learn_up_to_sign():
    rows = np.random.default_rng(0).normal(size=(200, 7)) * [5, 4, 3, 1, 1, 1, 1] + 20
    reference = PCA(n_components=3).fit(rows)
    projections, directions, shares = pca_components(rows, 3)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(directions), np.abs(reference.components_), atol=1e-8)
    np.testing.assert_allclose(projections, (rows - rows.mean(axis=0)) @ directions.T)
    assert (directions[np.arange(3), np.abs(directions).argmax(axis=1)] > 0).all()


def made_tokens(n=3, side=8, dim=10):
    """Tokens of pictures with a disc in the middle, which differs from the rest in all numbers."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    is_cell = np.broadcast_to(np.hypot(y, x) < side / 4, (n, side, side))
    tokens = rng.normal(size=(n, side, side, dim)) * np.linspace(0.6, 0.1, dim)
    return (tokens + 4 * is_cell[..., None] * rng.normal(size=dim)).astype(np.float32), is_cell


@pytest.mark.parametrize("sign", [1, -1])
def test_the_middle_is_red_and_the_background_white_whatever_the_tokens_sign(sign):
    tokens, is_cell = made_tokens()
    found = pca_colours(sign * tokens)
    assert found.colours.dtype == np.uint8
    assert found.colours.shape == (3, 8, 8, 3)
    assert found.colours[is_cell][:, 0].min() > found.colours[~is_cell][:, 0].max()
    assert found.is_foreground.all()
    separated = pca_colours(torch.from_numpy(sign * tokens), foreground=True)
    np.testing.assert_array_equal(separated.is_foreground, is_cell)
    assert (separated.colours[~is_cell] == 255).all()
    np.testing.assert_array_equal(pca_colours(tokens).colours, pca_colours(tokens.copy()).colours)


def test_colours_over_all_pictures_are_scikit_learns():
    tokens, _ = made_tokens()
    projections = PCA(n_components=3).fit_transform(tokens.reshape(-1, 10))
    low, high = np.percentile(projections, [1, 99], axis=0)
    expected = 255 * np.clip((projections - low) / (high - low), 0, 1)
    found = pca_colours(tokens).colours.reshape(-1, 3)
    for channel in range(3):  # up to the sign
        one, other = expected[:, channel], 255 - expected[:, channel]
        differences = [np.abs(found[:, channel] - values).max() for values in (one, other)]
        assert min(differences) <= 0.51


def test_each_picture_alone():
    tokens, _ = made_tokens()
    found = pca_colours(tokens, per_picture=True)
    np.testing.assert_array_equal(found.colours[1], pca_colours(tokens[1:2]).colours[0])
    assert found.shares.shape == (3, 3)


def test_pictures_without_any_structure_have_colours_too():
    found = pca_colours(np.ones((1, 2, 2, 5), np.float32), foreground=True)
    assert found.colours.shape == (1, 2, 2, 3)
    assert np.isfinite(found.shares).all()
    with pytest.raises(ValueError, match="3 or more numbers"):
        pca_colours(np.ones((1, 2, 2, 2)))


# --- similarity and occlusion


def test_similarity_is_symmetric_and_one_with_itself():
    tokens = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    found = similarity_maps(tokens)
    assert found.shape == (2, 15, 15)
    torch.testing.assert_close(found, found.mT, atol=0, rtol=0)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, 15))
    a, b = tokens[1, 0, 2], tokens[1, 2, 1]
    torch.testing.assert_close(found[1, 2, 11], (a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize(("window", "stride"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_occlusion_finds_the_patch_that_a_score_depends_on(window, stride):
    picture = torch.zeros(3, 8 * 7, 8 * 9)
    picture[:, 2 * 8 : 3 * 8, 5 * 8 : 6 * 8] = 1

    def score(batch):
        return batch[:, 0, 2 * 8 : 3 * 8, 5 * 8 : 6 * 8].mean(dim=(1, 2))

    found = occlusion_map(score, picture, 8, window, stride, batch_size=5)
    assert found.shape == (7, 9)
    assert found[2, 5] == found.max() == 1
    far = found.clone()
    far[0:5, 3:8] = 0
    assert not far.any()
    if window == 1:
        assert found.sum() == 1


def test_what_covers_is_the_border_of_the_picture_or_what_is_given():
    picture = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    seen = []

    def score(batch):
        seen.append(batch)
        return batch.sum(dim=(1, 2, 3))

    assert not occlusion_map(score, picture, 1).any()
    found = occlusion_map(score, picture, 1, fill=torch.tensor([0.0, 0.0, 0.0]))
    torch.testing.assert_close(found, torch.full((4, 4), 3.0))


def test_scores_of_a_network(formulas):
    model, batch = tiny_vit(formulas), pictures(formulas)
    likeness = likeness_to(model, batch[0])
    values = likeness(batch).tolist()
    assert values[0] == pytest.approx(1)
    assert values[1] < 1
    found = occlusion_map(likeness, batch[0], PATCH)
    assert found.shape == (4, 4)
    assert (found >= -1e-6).all()
    assert found.max() > 0
    weight, bias = formulas.sym("w", (5, DIM), 1.0), torch.zeros(5)
    with torch.no_grad():
        expected = (model(batch) @ weight.T).softmax(dim=-1)[:, 2]
    torch.testing.assert_close(probability_of(model, weight, bias, 2)(batch).detach(), expected)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "message"),
    [
        ((3, 20, 16), 1, 1, r"multiples of 8 px is needed, not \[3, 20, 16\]"),
        ((1, 3, 16, 16), 1, 1, r"not \[1, 3, 16, 16\]"),
        ((3, 16, 24), 3, 1, "window 3, stride 1: choose 1 <= stride <= window <= 2"),
        ((3, 16, 24), 1, 2, "never covered"),
    ],
)
def test_windows_that_make_no_sense(shape, window, stride, message):
    with pytest.raises(ValueError, match=message):
        occlusion_map(lambda batch: batch.sum(dim=(1, 2, 3)), torch.zeros(shape), 8, window, stride)


def test_border_share():
    maps = np.zeros((2, 4, 5))
    maps[0, 0, 0], maps[1, 2, 2] = 1, 3
    np.testing.assert_allclose(border_share(maps), [1, 0])
    assert border_share(torch.ones(4, 5)) == pytest.approx(1 - 2 * 3 / 20)
