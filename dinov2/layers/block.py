"""One transformer layer, over one batch of token sequences or over several of different lengths at once.

Dimension key:  B samples, N tokens of a sample, T all tokens of all batches, R kept tokens, D embedding dim
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .drop_path import choose_samples
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .lean_branches import attention_branch, ffn_branch, has_hooks
from .mlp import Mlp

Shapes = Sequence[tuple[int, int]]
Branch = Callable[[Tensor, Shapes], Tensor]


class Block(nn.Module):
    """Pre-norm transformer layer with layer scale and stochastic depth.

    x <- x + ls1(attn(norm1(x)));   x <- x + ls2(mlp(norm2(x)))

    While training with `drop_path` > 0, each of the two branches is computed for a random
    max(int(B * (1 - drop_path)), 1) of the samples only, and what it adds to them is multiplied by B over that number.

    On a CPU the branches are those of `lean_branches`, where the modules are the ordinary ones and nothing listens to
    them: the same numbers up to rounding, sooner and with less memory.

    Args:
        dim: D.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward network over D.
        qkv_bias, proj_bias, ffn_bias: which linear maps have a bias.
        drop, attn_drop: dropout probabilities, see Attention and Mlp.
        init_values: where layer scale starts; None or 0 for no layer scale.
        drop_path: share of the samples that skip a branch.
        act_layer, norm_layer, attn_class, ffn_layer: what the parts are built with.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path
        self.checkpoint_activations = False  # compute the inner values again in backward instead of keeping them
        self.branches_checkpoint = False  # each branch does that for itself
        self.lean = True  # False: always by the modules

    @overload
    def forward(self, x: Tensor, shapes: Shapes | None = None, rows: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, x: list[Tensor]) -> list[Tensor]: ...

    def forward(
        self, x: Tensor | list[Tensor], shapes: Shapes | None = None, rows: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """The layer's output, of x's shape unless `rows` is given.

        Args:
            x: [B, N, D]; or, with `shapes`, the tokens of several batches one after the other, [T, D]; or a list of
                tensors [B, N, D] with B and N of their own.
            shapes: (B, N) of each of those batches.
            rows: int64 [R] into the T tokens: only these are wanted, and [R, D] is given. All are attended to.
        """
        if isinstance(x, list):
            packed, shapes = pack(x)
            return unpack(self(packed, shapes), shapes)
        tokens = x.flatten(0, 1) if shapes is None else x
        of_batches = [(x.shape[0], x.shape[1])] if shapes is None else shapes
        if self.checkpoint_activations and torch.is_grad_enabled() and not self.branches_checkpoint:
            out: Tensor = checkpoint(self._forward, tokens, of_batches, rows, use_reentrant=False)
        else:
            out = self._forward(tokens, of_batches, rows)
        return out if rows is not None else out.view(x.shape)

    def _forward(self, x: Tensor, shapes: Shapes, rows: Tensor | None) -> Tensor:
        """[T, D] to [T, D], or to [R, D]."""
        if self.training and self.sample_drop_ratio > 0:
            x = self._add_for_some_samples(x, shapes, self._attention_branch)
            if rows is not None:
                return self._add_for_some_rows(x, shapes, rows)
            return self._add_for_some_samples(x, shapes, self._ffn_branch)
        return self._add_ffn(self._add_attention(x, shapes, rows))

    def _add_attention(self, x: Tensor, shapes: Shapes, rows: Tensor | None) -> Tensor:
        """x + attention branch, of all tokens or of `rows`."""
        attn = self.attn
        if self._is_lean(self.norm1, attn, self.ls1) and type(attn) is Attention and attn.is_plain:
            return attention_branch(
                x,
                shapes,
                rows,
                n_heads=attn.num_heads,
                norm=_parameters(self.norm1),
                qkv=_parameters(attn.qkv),
                proj=_parameters(attn.proj),
                gamma=_gamma(self.ls1),
                eps=_eps(self.norm1),
                dtype=_matmul_dtype(attn.qkv.weight),
            )
        normed = self.norm1(x)
        if len(shapes) == 1:  # who listens to attention finds samples and tokens
            added = attn(normed.unflatten(0, shapes[0]), rows=rows).reshape(-1, x.shape[1])
        else:
            added = attn(normed, shapes, rows)
        return (x if rows is None else x.index_select(0, rows)) + self.ls1(added)

    def _add_ffn(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if self._is_lean(self.norm2, mlp, self.ls2) and type(mlp) is Mlp and mlp.is_plain:
            return ffn_branch(
                x,
                norm=_parameters(self.norm2),
                fc1=_parameters(mlp.fc1),
                fc2=_parameters(mlp.fc2),
                gamma=_gamma(self.ls2),
                eps=_eps(self.norm2),
                dtype=_matmul_dtype(mlp.fc1.weight),
            )
        return x + self._ffn_branch(x, [])

    def _is_lean(self, norm: nn.Module, branch: nn.Module, scale: nn.Module) -> bool:
        """Whether a branch may pass its modules by; what they are inside is for the branch's own `is_plain`."""
        weight = getattr(norm, "weight", None)
        return (
            self.lean
            and isinstance(weight, Tensor)
            and weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and type(norm) in (LayerNorm, nn.LayerNorm)
            and type(scale) in (LayerScale, nn.Identity)
            and not any(has_hooks(module) for module in (norm, branch, scale))
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        )

    def _attention_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), shapes))

    def _ffn_branch(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def _add_for_some_samples(self, x: Tensor, shapes: Shapes, branch: Branch) -> Tensor:
        batches = unpack(x, shapes)
        chosen = [choose_samples(batch.shape[0], self.sample_drop_ratio, x.device) for batch in batches]
        kept = [
            batch if index is None else batch.index_select(0, index)
            for batch, (index, _) in zip(batches, chosen, strict=True)
        ]
        packed, kept_shapes = pack(kept)
        added = []
        for batch, (index, scale), residual in zip(
            batches, chosen, unpack(branch(packed, kept_shapes), kept_shapes), strict=True
        ):
            if index is None:
                added.append(batch + residual)
            else:
                added.append(batch.index_add(0, index, residual.to(batch.dtype), alpha=scale))
        return pack(added)[0]

    def _add_for_some_rows(self, x: Tensor, shapes: Shapes, rows: Tensor) -> Tensor:
        """The feed-forward branch of tokens `rows` alone: they are few, so those of dropped samples are computed too
        and count nothing; how many there are would otherwise have to be asked of the device."""
        factors = []
        for n_samples, n_tokens in shapes:
            index, scale = choose_samples(n_samples, self.sample_drop_ratio, x.device)
            factor = x.new_ones(n_samples) if index is None else x.new_zeros(n_samples).index_fill_(0, index, scale)
            factors.append(factor.repeat_interleave(n_tokens, output_size=n_samples * n_tokens))
        factor = torch.cat(factors).index_select(0, rows).unsqueeze(1)  # [R, 1]
        x = x.index_select(0, rows)
        return x + self._ffn_branch(x, shapes) * factor


NestedTensorBlock = Block  # upstream's name for the variant that takes lists; one class does both here


def pack(x_list: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """All tokens as one [T, D] with the (B, N) they came from; those of a single tensor are not copied."""
    shapes = [(x.shape[0], x.shape[1]) for x in x_list]
    if len(x_list) == 1:
        return x_list[0].flatten(0, 1), shapes
    return torch.cat([x.flatten(0, 1) for x in x_list]), shapes


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """Undo `pack`, as views."""
    batches = x.split([n_samples * n_tokens for n_samples, n_tokens in shapes])
    return [batch.unflatten(0, shape) for batch, shape in zip(batches, shapes, strict=True)]


def _parameters(module: Any) -> tuple[Any, Any]:
    return module.weight, module.bias


def _eps(norm: Any) -> float:
    return float(norm.eps)


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    """What a product with `weight` computes in: autocast's type inside it, or the weight's own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
