"""From images to patch tokens (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1).

Dimension key:  B images, C channels, H x W pixels, P = (H / patch) * (W / patch) patches, D embedding dim
"""

from collections.abc import Callable

from torch import Tensor, nn


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


class PatchEmbed(nn.Module):
    """Linear map of each non-overlapping patch, computed as a convolution whose stride is its kernel size."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _pair(img_size), _pair(patch_size)
        self.patches_resolution = self.grid_of(*self.img_size)
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans, self.embed_dim, self.flatten_embedding = in_chans, embed_dim, flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image; ValueError if patches do not fill it."""
        rows, cols = height // self.patch_size[0], width // self.patch_size[1]
        if rows * self.patch_size[0] != height or cols * self.patch_size[1] != width or not rows * cols:
            raise ValueError(
                f"image size: {height} x {width} px (height x width) can't be cut into patches of "
                f"{self.patch_size[0]} x {self.patch_size[1]} px; resize or crop it to a multiple of the patch size"
            )
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to tokens [B, P, D], patches row by row."""
        rows, cols = self.grid_of(x.shape[-2], x.shape[-1])
        x = self.proj(x).flatten(2).transpose(1, 2)  # [B, P, D]
        x = self.norm(x)
        return x if self.flatten_embedding else x.unflatten(1, (rows, cols))
