"""Maps over the patches of an image: PCA colours, attention, rollout, similarity and occlusion.

Images are normalised (`ImageTransform`) and on the model's device. Their sides are multiples of the patch size and may
differ. The model is in eval mode. The maps are deterministic and start at the upper left patch.

An attention map shows where a token takes its input from. An occlusion map shows what the output depends on. Neither
shows that the network is right, and the two may disagree.

Dimension key:  B images, h x w patches of each, P = h * w, N = 1 + registers + P tokens, D embedding dim
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

Score = Callable[[Tensor], Tensor]
PERCENTILES = (1.0, 99.0)  # of a component: no colour and full colour
BACKGROUND = 255  # white
N_COLOURS = 3


def grid_of(model: DinoVisionTransformer, images: Tensor) -> tuple[int, int]:
    """Return h and w of images [B, 3, H, W].

    Raises:
        ValueError: for a tensor of another shape, or sides that are not multiples of the patch size.
    """
    size = model.patch_size
    if images.ndim != 4 or images.shape[1] != model.in_chans:
        raise ValueError(
            f"images: expected a tensor [images, {model.in_chans}, height, width], found {list(images.shape)}; "
            f"add the first dimension to a single image with [None]"
        )
    height, width = images.shape[-2:]
    if not height or not width or height % size or width % size:
        raise ValueError(
            f"images: {height} x {width} px is not a whole number of patches of {size} px; use multiples, "
            f"for instance {math.ceil(max(height, 1) / size) * size} x {math.ceil(max(width, 1) / size) * size}"
        )
    return height // size, width // size


@torch.no_grad()
def patch_tokens(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the patch tokens after the last norm, float32 [B, h, w, D], of images [B, 3, H, W].

    Raises:
        ValueError: see `grid_of`.
    """
    grid = grid_of(model, images)
    return model.forward_features(images)["x_norm_patchtokens"].unflatten(1, grid).float()


class PatchColours(NamedTuple):
    """Colours of patches by PCA.

    Attributes:
        colours: uint8 [B, h, w, 3]; the first component is red, the second green, the third blue.
        is_foreground: bool [B, h, w]; True everywhere without `foreground`.
        variance_shares: float64 [3], share of the variance per component; [B, 3] with `per_image`.
    """

    colours: np.ndarray
    is_foreground: np.ndarray
    variance_shares: np.ndarray


def pca_colours(tokens: Tensor | np.ndarray, *, per_image: bool = False, foreground: bool = False) -> PatchColours:
    """Show the first three principal components of patch tokens as red, green and blue (Oquab et al. 2023, 2304.07193).

    Each component goes from no colour at its 1st percentile to full colour at its 99th. Colours of a PCA over all
    images can be compared: equal colours are parts that the network sees as similar. A PCA of each image alone shows
    more detail, but its colours cannot be compared between images.

    The sign of the first component is chosen so that it is higher in the middle of the images (the inner half of each
    side) than around it, because cells lie in the middle. The largest entry of each other direction is positive.

    With `foreground`, a first PCA separates cell and background as in that paper: patches whose first component is
    above its mean are foreground. A second PCA over them gives the colours, and all other patches are white.

    Args:
        tokens: [B, h, w, D], finite.
        per_image: fit a PCA to each image alone.
        foreground: leave out the background; ignored where it would leave fewer than three patches.

    Raises:
        ValueError: for tokens of another shape, fewer than three patches, or D below three.
    """
    array = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
    if array.ndim != 4 or array.shape[-1] < N_COLOURS or math.prod(array.shape[per_image:3]) < N_COLOURS:
        raise ValueError(
            f"tokens: expected [images, rows, columns, numbers] with three or more patches and numbers, "
            f"found {list(array.shape)}"
        )
    if per_image:
        each = [pca_colours(image[None], foreground=foreground) for image in array]
        return PatchColours(
            np.concatenate([one.colours for one in each]),
            np.concatenate([one.is_foreground for one in each]),
            np.stack([one.variance_shares for one in each]),
        )
    grid = array.shape[:3]
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)  # [B * P, D]
    in_middle_row, in_middle_column = (np.abs(np.arange(n) - (n - 1) / 2) < n / 4 for n in grid[1:])
    is_middle = np.broadcast_to(in_middle_row[:, None] & in_middle_column, grid).ravel()  # [B * P]
    projections, shares = _principal_components(rows, is_middle)
    is_foreground = projections[:, 0] > 0
    if foreground and is_foreground.sum() >= N_COLOURS:
        projections, shares = _principal_components(rows[is_foreground], is_middle[is_foreground])
    else:
        is_foreground[:] = True
    low, high = np.percentile(projections, PERCENTILES, axis=0)
    colours = np.full((len(rows), N_COLOURS), BACKGROUND, dtype=np.uint8)
    scaled = np.clip((projections - low) / np.where(high > low, high - low, 1.0), 0, 1)
    colours[is_foreground] = np.rint(255 * scaled)
    return PatchColours(colours.reshape(*grid, N_COLOURS), is_foreground.reshape(grid), shares)


def _principal_components(rows: np.ndarray, is_middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the projections [n, 3] of rows [n, D] and the shares of the variance [3]; see `pca_colours` for signs."""
    pca = PCA(N_COLOURS, svd_solver="covariance_eigh")  # exact; scikit-learn makes each largest entry positive
    with np.errstate(invalid="ignore"):  # rows without variance have shares of 0 / 0
        projections = pca.fit_transform(rows)
    middle, around = projections[is_middle, 0], projections[~is_middle, 0]
    if len(middle) and len(around) and middle.mean() < around.mean():
        projections[:, 0] *= -1
    return projections, np.nan_to_num(pca.explained_variance_ratio_)


def _visit_attention(
    model: DinoVisionTransformer, images: Tensor, visit: Callable[[Tensor], None], first_block: int = 0
) -> None:
    """Run the network and call `visit` with the softmax weights [B, heads, N, N] of each layer from `first_block` on.

    The weights are softmax(Q K^T / sqrt(d)) of the layer's own queries and keys, so no attention kernel changes them.
    """

    def hook(n_heads: int, module: Any, inputs: Any, qkv: Tensor) -> None:
        query, key, _ = qkv.float().unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        visit((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1))

    attentions: list[Any] = [block.attn for block in model.each_block()]
    with ExitStack() as hooks:
        for attention in attentions[first_block:]:
            hooks.enter_context(attention.qkv.register_forward_hook(partial(hook, attention.num_heads)))
        model(images)


@torch.no_grad()
def attention_weights(model: DinoVisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Return all attention weights of one layer, float32 [B, heads, N, N]; each row sums to 1.

    Args:
        model: the backbone.
        images: [B, 3, H, W].
        block: number of the layer, from 0; negative numbers count from the end.

    Raises:
        ValueError: see `grid_of`; or if the network has no such layer.
    """
    grid_of(model, images)
    if not -model.n_blocks <= block < model.n_blocks:
        raise ValueError(f"block: {block} of a network with {model.n_blocks}; use -1 for the last one")
    layers: list[Tensor] = []
    _visit_attention(model, images, layers.append, block % model.n_blocks)
    return layers[0]


def cls_attention(model: DinoVisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Return the attention of the CLS token to each patch, per head (Caron et al. 2021, arXiv 2104.14294).

    The map of a head sums to less than 1, because attention to the CLS token and the registers is left out.

    Args:
        model, images, block: see `attention_weights`.

    Returns:
        float32 [B, heads, h, w].

    Raises:
        ValueError: see `attention_weights`.
    """
    grid = grid_of(model, images)
    return attention_weights(model, images, block)[:, :, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


@torch.no_grad()
def attention_rollout(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the share of the CLS token's input per patch, through all layers (Abnar & Zuidema 2020, 2005.00928).

    W_l are the weights of layer l, averaged over its heads. The identity I is the residual connection:

        A_l = (W_l + I) / 2,   rollout = A_L A_(L-1) ... A_1;   its row of the CLS token, columns of the patches

    Values, feed-forward networks and layer scales are not used, so the rollout shows routes and not effects.

    Args:
        model: the backbone.
        images: [B, 3, H, W].

    Returns:
        float32 [B, h, w], without the columns of the CLS token and the registers.

    Raises:
        ValueError: see `grid_of`.
    """
    grid = grid_of(model, images)
    layers: list[Tensor] = []
    _visit_attention(model, images, lambda weights: layers.append(weights.mean(dim=1)))
    identity = torch.eye(layers[0].shape[-1], device=layers[0].device)
    rollout = reduce(lambda earlier, layer: (layer + identity) / 2 @ earlier, layers, identity)  # [B, N, N]
    return rollout[:, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


def border_share(maps: Tensor | np.ndarray) -> np.ndarray:
    """Return the share of each map [..., h, w] on the outermost patches; a uniform map has 1 - (h-2)(w-2) / (hw)."""
    array = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=np.float64)
    total, inner = array.sum(axis=(-2, -1)), array[..., 1:-1, 1:-1].sum(axis=(-2, -1))
    return 1 - inner / np.where(total > 0, total, 1)


def similarity_maps(tokens: Tensor) -> Tensor:
    """Return the cosine of each pair of patches of an image.

    Args:
        tokens: [B, h, w, D].

    Returns:
        float32 [B, P, P], symmetric: row p, unflattened to [h, w], is the map of patch p. A token of zeros has cosine
        0 to all others.
    """
    directions = F.normalize(tokens.flatten(1, 2).float(), dim=-1)  # [B, P, D]
    cosines = (directions @ directions.mT).clamp(-1, 1)
    return (cosines + cosines.mT) / 2  # rounding may differ between the two halves


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
        score: maps images [B, 3, H, W] to numbers [B], for instance `likeness_to` or `probability_of`.
        image: [3, H, W].
        patch_size: in pixels.
        window: side of the square in patches; 0 for about a seventh of the shorter side.
        stride: patches between two squares; 0 for half the window.
        fill: [3], normalised colour of the square. None for the mean of the image's outermost pixels: a grey square
            on a bright slide would look like an object.
        batch_size: covered images in one call of `score`.

    Returns:
        float32 [h, w], on the CPU.

    Raises:
        ValueError: if the image is not a whole number of patches, the window does not fit, or the stride leaves gaps.
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
            f"shorter side; patches between squares of a larger stride would never be covered"
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
        is_covered = F.interpolate(batch[:, None], scale_factor=patch_size) > 0  # [b, 1, H, W], nearest patch
        covered = torch.where(is_covered.to(image.device), fill[:, None, None], image)  # [b, 3, H, W]
        scores.append(score(covered).cpu())
    falls = score(image[None]).cpu() - torch.cat(scores)
    return torch.einsum("s,shw->hw", falls.float(), squares) / squares.sum(dim=0)


@torch.no_grad()
def likeness_to(model: DinoVisionTransformer, image: Tensor) -> Score:
    """Return a score for `occlusion_map`: the cosine of CLS tokens to that of this image [3, H, W].

    The occlusion map is then 1 - cosine of the covered image.
    """
    direction = F.normalize(model(image[None]).float(), dim=-1)[0]  # [D]
    return lambda images: F.normalize(model(images).float(), dim=-1) @ direction


def probability_of(model: DinoVisionTransformer, weight: Tensor, bias: Tensor, class_number: int) -> Score:
    """Return a score for `occlusion_map`: the probability of a class by a linear classifier of CLS tokens.

    Args:
        model: the backbone.
        weight, bias: [C, D] and [C], of a softmax over C classes; two rows for a logistic regression of two classes.
        class_number: from 0.
    """
    return lambda images: F.linear(model(images).float(), weight, bias).softmax(dim=-1)[:, class_number]
