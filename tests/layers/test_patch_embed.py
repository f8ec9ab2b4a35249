import pytest
import torch

from dinov2.layers import PatchEmbed


def test_each_token_is_a_linear_map_of_its_patch_in_row_order():
    torch.manual_seed(0)
    embed = PatchEmbed(img_size=(8, 12), patch_size=4, in_chans=3, embed_dim=5)
    x = torch.randn(2, 3, 8, 12)
    tokens = embed(x)
    assert embed.num_patches == 6
    assert tokens.shape == (2, 6, 5)
    patch = x[1, :, 4:8, 8:12].flatten()  # second row, third column: token 5
    expected = embed.proj.weight.flatten(1) @ patch + embed.proj.bias
    torch.testing.assert_close(tokens[1, 5], expected)


def test_unflattened_keeps_rows_and_columns():
    embed = PatchEmbed(img_size=8, patch_size=4, embed_dim=5, norm_layer=torch.nn.LayerNorm)
    x = torch.randn(2, 3, 8, 12)
    flat = embed(x)
    embed.flatten_embedding = False
    assert torch.equal(embed(x), flat.reshape(2, 2, 3, 5))


@pytest.mark.parametrize("size", [(30, 28), (28, 30), (7, 28)])
def test_a_image_that_patches_do_not_fill_is_an_error_that_says_so(size):
    embed = PatchEmbed(img_size=28, patch_size=14, embed_dim=4)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} px.*14 x 14 px.*multiple of the patch size"):
        embed(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="multiple of the patch size"):
        PatchEmbed(img_size=size, patch_size=14)
