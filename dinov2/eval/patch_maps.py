"""What a backbone makes of the parts of a picture: PCA of patch tokens, attention, rollout, occlusion, similarity.

Every function takes pictures or patch tokens and gives numbers on the grid of patches, row by row from the upper left.
Pictures are normalised (`ImageTransform`) and on the model's device; their sides are multiples of the patch size and
need not be equal. The model is in eval mode. Nothing is random.

An attention map says where a token takes its input from, and an occlusion map what the output depends on; neither says
that the network is right, and the two need not agree.

Dimension key:  B pictures, h x w patches of each, P = h * w, N = 1 + registers + P tokens, D embedding dim
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.models.vision_transformer import DinoVisionTransformer

Score = Callable[[Tensor], Tensor]
PERCENTILES = (1.0, 99.0)  # of each component, from no to full colour
EMPTY = 255  # all three colours where there is no foreground


def grid_of(model: DinoVisionTransformer, pictures: Tensor) -> tuple[int, int]:
    """h, w of pictures [B, 3, H, W].

    Raises:
        ValueError: for a tensor of another shape, or sides that patches don't fill.
    """
    size = model.patch_size
    if pictures.ndim != 4 or pictures.shape[1] != model.in_chans:
        raise ValueError(
            f"pictures: a tensor [pictures, {model.in_chans}, height, width] is needed, not {list(pictures.shape)}; "
            f"a single picture becomes one with [None]"
        )
    height, width = pictures.shape[-2:]
    if not height or not width or height % size or width % size:
        raise ValueError(
            f"pictures: {height} x {width} px are no whole number of patches of {size} px; take multiples, "
            f"for instance {math.ceil(max(height, 1) / size) * size} x {math.ceil(max(width, 1) / size) * size}"
        )
    return height // size, width // size


@torch.no_grad()
def patch_tokens(model: DinoVisionTransformer, pictures: Tensor) -> Tensor:
    """Patch tokens after the last norm, float32 [B, h, w, D], of pictures [B, 3, H, W].

    Raises:
        ValueError: as `grid_of`.
    """
    grid = grid_of(model, pictures)
    return model.forward_features(pictures)["x_norm_patchtokens"].unflatten(1, grid).float()


# --- PCA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchColours:
    """Patches as colours.

    Attributes:
        colours: uint8 [B, h, w, 3]; the first component is red, the second green, the third blue.
        is_foreground: bool [B, h, w]; True everywhere unless the foreground was asked for.
        shares: float64 [3], each component's share of the variance; [B, 3] where each picture has its own.
    """

    colours: np.ndarray
    is_foreground: np.ndarray
    shares: np.ndarray


def pca_components(rows: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components, with a sign that depends on the data alone: the largest entry of a direction is positive.

    Args:
        rows: [n, D].
        n_components: at most D.

    Returns:
        projections float64 [n, n_components], directions [n_components, D], shares of the variance [n_components].
    """
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    variances, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    directions = vectors[:, ::-1][:, :n_components].T  # [n_components, D]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    directions = directions * np.where(largest < 0, -1.0, 1.0)
    total = max(float(variances.sum()), np.finfo(np.float64).tiny)
    return centred @ directions.T, directions, np.clip(variances[::-1][:n_components], 0, None) / total


def pca_colours(tokens: Tensor | np.ndarray, *, per_picture: bool = False, foreground: bool = False) -> PatchColours:
    """The first three principal components of patch tokens as red, green and blue (Oquab et al. 2023, 2304.07193).

    Each component goes from no colour at its 1st to full colour at its 99th percentile. Fitted over all pictures, equal
    colours mean that the network finds parts of different cells alike; fitted per picture, colours cannot be compared
    but show more within each.

    Signs are fixed: the first component is higher in the middle of the pictures (the inner half of each side) than
    around it, as cells stand in the middle; the others have their direction's largest entry positive.

    With `foreground`, a first PCA separates cell from background as in that paper: patches whose first component is
    above its mean are foreground, a second PCA over these gives the colours, and the others are white.

    Args:
        tokens: [B, h, w, D], finite.
        per_picture: fit each picture alone.
        foreground: leave out the background.

    Raises:
        ValueError: for tokens of another shape, or with fewer than three numbers each.
    """
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
    if array.ndim != 4 or not array.size or array.shape[-1] < 3:
        raise ValueError(f"tokens: [pictures, rows, columns, 3 or more numbers] are needed, not {list(array.shape)}")
    if per_picture:
        found = [pca_colours(picture[None], foreground=foreground) for picture in array]
        return PatchColours(
            np.concatenate([f.colours for f in found]),
            np.concatenate([f.is_foreground for f in found]),
            np.stack([f.shares for f in found]),
        )
    grid = array.shape[:3]
    rows = array.reshape(-1, array.shape[-1])  # [B * P, D]
    is_kept = np.ones(len(rows), dtype=bool)
    projections, _, shares = pca_components(rows, 3)
    projections[:, 0] *= _middle_sign(projections[:, 0].reshape(grid))
    if foreground and (projections[:, 0] > 0).any():
        is_kept = projections[:, 0] > 0
        projections, _, shares = pca_components(rows[is_kept], 3)
        whole = np.full(grid, np.nan)
        whole[is_kept.reshape(grid)] = projections[:, 0]
        projections[:, 0] *= _middle_sign(whole)
    low, high = np.percentile(projections, PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1.0)
    colours = np.full((len(rows), 3), EMPTY, dtype=np.uint8)
    colours[is_kept] = np.rint(255 * np.clip((projections - low) / span, 0, 1)).astype(np.uint8)
    return PatchColours(colours.reshape(*grid, 3), is_kept.reshape(grid), shares)


def _middle_sign(values: np.ndarray) -> float:
    """-1 if values [B, h, w] are lower in the middle than around it, else 1; NaN counts on neither side."""
    rows, columns = ((np.abs(np.arange(n) - (n - 1) / 2) < n / 4) for n in values.shape[1:])
    is_middle = np.broadcast_to(rows[:, None] & columns[None, :], values.shape) & ~np.isnan(values)
    is_around = ~np.broadcast_to(rows[:, None] & columns[None, :], values.shape) & ~np.isnan(values)
    if not is_middle.any() or not is_around.any():
        return 1.0
    return -1.0 if values[is_middle].mean() < values[is_around].mean() else 1.0


# --- attention ------------------------------------------------------------------------------------------------------


@contextmanager
def _listening(model: DinoVisionTransformer, first_block: int, use: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, `use` gets the softmax weights [B, heads, N, N] of each layer from `first_block` on."""

    def hook_of(n_heads: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, inputs, output: use(_softmax_weights(output, n_heads))

    attentions: list[Any] = [block.attn for block in model.each_block()]
    hooks = [attn.qkv.register_forward_hook(hook_of(attn.num_heads)) for attn in attentions[first_block:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _softmax_weights(qkv: Tensor, n_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) in float32, [B, heads, N, N], of queries, keys and values [B, N, 3 D]."""
    query, key, _ = qkv.float().unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)


@torch.no_grad()
def attention_weights(model: DinoVisionTransformer, pictures: Tensor, block: int = -1) -> Tensor:
    """All attention weights of one layer, float32 [B, heads, N, N]; each row sums to 1.

    They are computed from the layer's own queries and keys, so they do not depend on the kernel that attends.

    Args:
        model: the backbone.
        pictures: [B, 3, H, W].
        block: number of the layer from 0, or from the end if negative.

    Raises:
        ValueError: as `grid_of`, or if there is no such layer.
    """
    grid_of(model, pictures)
    if not -model.n_blocks <= block < model.n_blocks:
        raise ValueError(f"block: {block} of a network with {model.n_blocks}; give -1 for the last one")
    found: list[Tensor] = []
    with _listening(model, block % model.n_blocks, found.append):
        model(pictures)
    return found[0]


def cls_attention(model: DinoVisionTransformer, pictures: Tensor, block: int = -1) -> Tensor:
    """How much the CLS token attends to each patch, per head (Caron et al. 2021, arXiv 2104.14294).

    The maps of a picture sum to less than 1: what the CLS token gives itself and the registers is left out.

    Args:
        model, pictures, block: as for `attention_weights`.

    Returns:
        float32 [B, heads, h, w].

    Raises:
        ValueError: as `attention_weights`.
    """
    grid = grid_of(model, pictures)
    return attention_weights(model, pictures, block)[:, :, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


@torch.no_grad()
def attention_rollout(model: DinoVisionTransformer, pictures: Tensor) -> Tensor:
    """How much of the CLS token's input comes from each patch, through all layers (Abnar & Zuidema 2020, 2005.00928).

    With W_l the weights of layer l, averaged over its heads, and I for the residual connection:

        A_l = (W_l + I) / 2,   rollout = A_L A_(L-1) ... A_1;   its row of the CLS token, columns of the patches

    Values, feed-forward networks and layer scales do not enter, so this tells routes and not effects.

    Args:
        model: the backbone.
        pictures: [B, 3, H, W].

    Returns:
        float32 [B, h, w]; what comes from the CLS token and the registers themselves is left out.

    Raises:
        ValueError: as `grid_of`.
    """
    grid = grid_of(model, pictures)
    product: Tensor | None = None

    def multiply(weights: Tensor) -> None:
        nonlocal product
        mean = weights.mean(dim=1)  # [B, N, N]
        mixed = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        product = mixed if product is None else mixed @ product

    with _listening(model, 0, multiply):
        model(pictures)
    assert product is not None, "a backbone has blocks"
    return product[:, 0, 1 + model.num_register_tokens :].unflatten(-1, grid)


def border_share(maps: Tensor | np.ndarray) -> np.ndarray:
    """The share of each map [..., h, w] that lies on the outermost patches; an even map has 1 - (h-2)(w-2) / (hw)."""
    array = maps.detach().cpu().numpy() if isinstance(maps, Tensor) else maps
    total = array.sum(axis=(-2, -1), dtype=np.float64)
    inner = array[..., 1:-1, 1:-1].sum(axis=(-2, -1), dtype=np.float64)
    return 1 - inner / np.where(total > 0, total, 1)


# --- similarity -----------------------------------------------------------------------------------------------------


def similarity_maps(tokens: Tensor) -> Tensor:
    """Cosine of every patch to every other one.

    Args:
        tokens: [B, h, w, D].

    Returns:
        float32 [B, P, P]: row p is the map of patch p, to be unflattened to [h, w]; symmetric, 1 on the diagonal. A
        token of only zeros is like none.
    """
    directions = F.normalize(tokens.flatten(1, 2).float(), dim=-1)  # [B, P, D]
    cosines = (directions @ directions.mT).clamp(-1, 1)
    return (cosines + cosines.mT) / 2  # products of matrices may round the two halves differently


# --- occlusion ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def occlusion_map(
    score: Score,
    picture: Tensor,
    patch_size: int,
    window: int = 0,
    stride: int = 0,
    fill: Tensor | None = None,
    batch_size: int = 32,
) -> Tensor:
    """How far a score falls when a part of the picture is covered (Zeiler & Fergus 2014, arXiv 1311.2901).

    A square of `window` x `window` patches is moved over the picture; a patch's value is the mean, over all squares
    that cover it, of score(whole picture) - score(covered picture). Negative values rise when covered.

    Args:
        score: pictures [B, 3, H, W] to numbers [B]: `likeness_to`, `probability_of` or your own.
        picture: [3, H, W].
        patch_size: in pixels.
        window: side of the square in patches; 0 for about a seventh of the shorter side.
        stride: patches between two squares; 0 for half the window.
        fill: [3], what covers, in normalised colours; None for the mean of the picture's outermost pixels: a grey
            square on a bright slide would be a new object rather than nothing.
        batch_size: covered pictures in one call of `score`.

    Returns:
        float32 [h, w], on the CPU.

    Raises:
        ValueError: if patches don't fill the picture, or for a window that does not fit or a stride that leaves gaps.
    """
    height, width = picture.shape[-2:]
    if picture.ndim != 3 or height % patch_size or width % patch_size or not picture.numel():
        raise ValueError(
            f"picture: [3, height, width] with sides in multiples of {patch_size} px is needed, "
            f"not {list(picture.shape)}"
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
        is_border = torch.ones(height, width, dtype=torch.bool, device=picture.device)
        is_border[1:-1, 1:-1] = False
        fill = picture[:, is_border].mean(dim=1)  # [3]
    corners = [(row, column) for row in _starts(grid[0], window, stride) for column in _starts(grid[1], window, stride)]
    whole = float(score(picture[None])[0])
    total, n_covered = torch.zeros(grid), torch.zeros(grid)
    side = window * patch_size
    for start in range(0, len(corners), batch_size):
        chunk = corners[start : start + batch_size]
        covered = picture.expand(len(chunk), -1, -1, -1).clone()
        for i, (row, column) in enumerate(chunk):
            top, left = row * patch_size, column * patch_size
            covered[i, :, top : top + side, left : left + side] = fill[:, None, None]
        for (row, column), found in zip(chunk, score(covered).tolist(), strict=True):
            total[row : row + window, column : column + window] += whole - found
            n_covered[row : row + window, column : column + window] += 1
    return total / n_covered


def _starts(n: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover n patches, the last one at the end."""
    return sorted({*range(0, n - window + 1, stride), n - window})


@torch.no_grad()
def likeness_to(model: DinoVisionTransformer, picture: Tensor) -> Score:
    """A score for `occlusion_map`: cosine of pictures' CLS tokens to that of this picture [3, H, W], so 1 for itself.

    The occlusion map is then 1 - cosine: how far the feature turns.
    """
    with_picture = F.normalize(model(picture[None]).float(), dim=-1)[0]  # [D]
    return lambda pictures: F.normalize(model(pictures).float(), dim=-1) @ with_picture


def probability_of(model: DinoVisionTransformer, weight: Tensor, bias: Tensor, class_number: int) -> Score:
    """A score for `occlusion_map`: the probability that a linear classifier of CLS tokens gives a class.

    Args:
        model: the backbone.
        weight, bias: [C, D] and [C], of a softmax over C classes; with two rows for a logistic regression of two.
        class_number: from 0.
    """
    return lambda pictures: F.linear(model(pictures).float(), weight, bias).softmax(dim=-1)[:, class_number]
