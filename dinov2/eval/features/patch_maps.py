"""Maps over the patches of images: PCA colours, attention, rollout, similarity and occlusion.

Images [B, 3, H, W] are normalised (`ImageTransform`) and on the model's device; the model is in eval mode. The sides of
an image are multiples of the patch size; other shapes are a ValueError. Maps are deterministic and start at the upper
left patch. An attention map shows where a token takes its input from, and an occlusion map what the output depends on.
Neither shows that the network is right, and the two may disagree.

Dimension key:  B images, h x w patches, P = h * w, N = 1 + registers + P tokens, D embedding dim
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

Score = Callable[[Tensor], Tensor]  # images [B, 3, H, W] to numbers [B]
PERCENTILES = (1.0, 99.0)  # of a component: no colour and full colour


def grid_of(model: DinoVisionTransformer, images: Tensor) -> tuple[int, int]:
    """Return h and w of images [B, 3, H, W]; ValueError for other shapes or sides that patches do not fill."""
    if images.ndim != 4 or images.shape[1] != model.in_chans:
        raise ValueError(
            f"images: expected a tensor [images, {model.in_chans}, height, width], found {list(images.shape)}; "
            f"add the first dimension to a single image with [None]"
        )
    return model.patch_embed.grid_of(*images.shape[-2:])


@torch.no_grad()
def patch_tokens(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the patch tokens after the last norm, float32 [B, h, w, D], of images [B, 3, H, W]."""
    grid = grid_of(model, images)
    return model.forward_features(images)["x_norm_patchtokens"].unflatten(1, grid).float()


def pca_colours(tokens: Tensor | np.ndarray, *, per_image: bool = False, foreground: bool = False) -> np.ndarray:
    """Show the first three principal components of patch tokens as red, green and blue (Oquab et al. 2023, 2304.07193).

    A component goes from no colour at its 1st percentile to full colour at its 99th. The sign of the first component is
    chosen so that it is higher in the middle of the images (the inner half of each side) than around it, because cells
    lie in the middle. The largest entry of each other direction is positive.

    Args:
        tokens: [B, h, w, D], finite.
        per_image: fit a PCA to each image alone; colours of two images then cannot be compared.
        foreground: show patches white whose first component is not above its mean, and fit the colours to the others,
            as in that paper; ignored where fewer than three patches would stay.

    Returns:
        uint8 [B, h, w, 3].
    """
    array = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)  # [B * P, D]
    if array.ndim != 4 or min(rows.shape) < 3:
        raise ValueError(
            f"tokens: expected [images, rows, columns, numbers] with three or more patches and three or more numbers, "
            f"found {list(array.shape)}"
        )
    if per_image:
        return np.concatenate([pca_colours(image[None], foreground=foreground) for image in array])
    grid = array.shape[:3]
    in_middle_row, in_middle_column = (np.abs(np.arange(n) - (n - 1) / 2) < n / 4 for n in grid[1:])
    is_middle = np.broadcast_to(in_middle_row[:, None] & in_middle_column, grid).ravel()  # [B * P]
    components = _principal_components(rows, is_middle)
    is_shown = np.ones(len(rows), dtype=bool)
    if foreground and (components[:, 0] > 0).sum() >= 3:
        is_shown = components[:, 0] > 0
        components = _principal_components(rows[is_shown], is_middle[is_shown])
    low, high = np.percentile(components, PERCENTILES, axis=0)
    scaled = np.clip((components - low) / np.where(high > low, high - low, 1.0), 0, 1)
    colours = np.full((len(rows), 3), 255, dtype=np.uint8)
    colours[is_shown] = np.rint(255 * scaled)
    return colours.reshape(*grid, 3)


def _principal_components(rows: np.ndarray, is_middle: np.ndarray) -> np.ndarray:
    """Project rows [n, D] on their first three components; the mean of the first is higher where `is_middle`."""
    with np.errstate(invalid="ignore"):  # scikit-learn divides by a variance of 0 if all rows are equal
        components = PCA(3, svd_solver="covariance_eigh").fit_transform(rows)  # [n, 3], each largest entry positive
    middle, around = components[is_middle, 0], components[~is_middle, 0]
    if len(middle) and len(around) and middle.mean() < around.mean():
        components[:, 0] *= -1
    return components


def _visit_attention(
    model: DinoVisionTransformer, images: Tensor, visit: Callable[[Tensor], None], first_block: int = 0
) -> None:
    """Run the network and call `visit` with softmax(Q K^T / sqrt(d)) [B, heads, N, N] of blocks from `first_block` on.

    The weights are computed from the layer's own queries and keys, so they do not depend on the attention kernel.
    """

    def hook(module: Any, inputs: Any, qkv: Tensor) -> None:
        query, key, _ = qkv.float().unflatten(-1, (3, model.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        visit((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1))

    attentions: list[Any] = [block.attn for block in model.each_block()]
    with ExitStack() as hooks:
        for attention in attentions[first_block:]:
            hooks.enter_context(attention.qkv.register_forward_hook(hook))
        model(images)


@torch.no_grad()
def attention_weights(model: DinoVisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Return all attention weights of one block, float32 [B, heads, N, N]; negative numbers count from the last one."""
    grid_of(model, images)
    if not -model.n_blocks <= block < model.n_blocks:
        raise ValueError(f"block: {block} of a network with {model.n_blocks}; use -1 for the last one")
    weights: list[Tensor] = []
    _visit_attention(model, images, weights.append, block % model.n_blocks)
    return weights[0]


def cls_attention(model: DinoVisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Return the attention of the CLS token to each patch, float32 [B, heads, h, w] (Caron et al. 2021, 2104.14294).

    The map of a head sums to less than 1, because attention to the CLS token and the registers is left out.
    """
    grid = grid_of(model, images)
    return attention_weights(model, images, block)[:, :, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


@torch.no_grad()
def attention_rollout(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the share of the CLS token's input per patch, float32 [B, h, w] (Abnar & Zuidema 2020, 2005.00928).

    W_l are the weights of block l, averaged over its heads. The identity I is the residual connection:

        A_l = (W_l + I) / 2,   rollout = A_L A_(L-1) ... A_1;   its row of the CLS token, columns of the patches

    Values, feed-forward networks and layer scales are not used, so the rollout shows routes and not effects.
    """
    grid = grid_of(model, images)
    blocks: list[Tensor] = []
    _visit_attention(model, images, lambda weights: blocks.append(weights.mean(dim=1)))
    identity = torch.eye(blocks[0].shape[-1], device=blocks[0].device)
    rollout = reduce(lambda earlier, block: (block + identity) / 2 @ earlier, blocks, identity)  # [B, N, N]
    return rollout[:, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


def border_share(maps: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of each map [..., h, w] on the outermost patches; a uniform map has 1 - (h-2)(w-2) / (hw)."""
    array = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=np.float64)
    total, inner = array.sum(axis=(-2, -1)), array[..., 1:-1, 1:-1].sum(axis=(-2, -1))
    return 1 - inner / np.where(total > 0, total, 1)


def similarity_maps(tokens: Tensor) -> Tensor:
    """Return the cosine of each pair of patches, float32 [B, P, P], of tokens [B, h, w, D].

    Row p, unflattened to [h, w], is the map of patch p. A token of zeros has cosine 0 to all others.
    """
    directions = F.normalize(tokens.flatten(1, 2).float(), dim=-1)  # [B, P, D]
    cosines = (directions @ directions.mT).clamp(-1, 1)
    return (cosines + cosines.mT) / 2  # symmetric: rounding may differ between the two halves


@torch.no_grad()
def occlusion_map(
    score: Score,
    image: Tensor,
    patch_size: int,
    window: int = 0,
    stride: int = 0,
    fill: Tensor | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Measure how much a score falls when a part of the image is covered (Zeiler & Fergus 2014, arXiv 1311.2901).

    A square of `window` x `window` patches moves over the image. The value of a patch is the mean of
    score(image) - score(covered image) over all squares that cover it. It is negative where the score rises.

    Args:
        score: `likeness_to`, or any other function of images, such as the probability of a class.
        image: [3, H, W].
        window: side of the square in patches; 0 for about a seventh of the shorter side.
        stride: patches between two squares; 0 for half the window.
        fill: [3], normalised colour of the square; None for the mean of the image's outermost pixels, because a grey
            square on a bright slide would look like an object.
        batch_size: covered images in one call of `score`.

    Returns:
        float32 [h, w], on the CPU.
    """
    height, width = image.shape[-2:]
    if image.ndim != 3 or height % patch_size or width % patch_size or not image.numel():
        raise ValueError(
            f"image: expected [3, height, width] with sides in multiples of {patch_size} px, found {list(image.shape)}"
        )
    grid = height // patch_size, width // patch_size
    window = window or max(1, round(min(grid) / 7))
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window <= min(grid):
        raise ValueError(
            f"window {window}, stride {stride}: choose 1 <= stride <= window <= {min(grid)}, the patches of the "
            f"shorter side; a larger stride would leave patches that are never covered"
        )
    if fill is None:
        is_border = torch.ones(height, width, dtype=torch.bool, device=image.device)
        is_border[1:-1, 1:-1] = False
        fill = image[:, is_border].mean(dim=1)  # [3]
    tops, lefts = (sorted({*range(0, n - window + 1, stride), n - window}) for n in grid)
    squares = torch.zeros(len(tops) * len(lefts), *grid)
    for square, (top, left) in zip(squares, product(tops, lefts), strict=True):
        square[top : top + window, left : left + window] = 1
    scores = []
    for batch in squares.split(batch_size):
        is_covered = F.interpolate(batch[:, None], scale_factor=patch_size).to(image.device) > 0  # [b, 1, H, W]
        scores.append(score(torch.where(is_covered, fill[:, None, None], image)).cpu())
    falls = score(image[None]).cpu() - torch.cat(scores)
    return torch.einsum("s,shw->hw", falls.float(), squares) / squares.sum(dim=0)


@torch.no_grad()
def likeness_to(model: DinoVisionTransformer, image: Tensor) -> Score:
    """Return the score of an `occlusion_map` of 1 - cosine: cosine of CLS tokens to that of an image [3, H, W]."""
    direction = F.normalize(model(image[None]).float(), dim=-1)[0]  # [D]
    return lambda images: F.normalize(model(images).float(), dim=-1) @ direction
