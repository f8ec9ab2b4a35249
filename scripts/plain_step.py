"""A training step the way upstream takes it, in plain eager PyTorch, for this project's own step to be held against.

Mathematics and names of weights are those of `SSLMetaArch`; the work is arranged as DinoBloom's code arranges it:

- the teacher sends all tokens of both global crops through all blocks;
- the student's global crops, with masks, and its local crops go through the blocks packed as one row of tokens, and
  DinoBloom's recipe has one local crop of 98 px a picture that no loss reads: it costs its forward and backward pass;
- masked patches are copied into a buffer of `upperbound` rows, all of which the head computes;
- logits, targets, log-probabilities and their products are whole matrices, kept for the backward pass;
- Sinkhorn-Knopp rewrites its [K, R] matrix for each normalisation;
- gradients are clipped by `clip_grad_norm_` for each sub-network, AdamW has torch's defaults, and the teacher follows
  tensor by tensor.

Attention is "explicit": q k^T, softmax, times v, which is what upstream falls back to where xFormers is missing, as on
a CPU; "sdpa" is torch's scaled_dot_product_attention, which does what xFormers' kernel does on a GPU.

Dimension key:  B pictures, L local crops, P patches of a global crop, N tokens of a crop, T tokens of all crops,
                H heads, d = D / H, D embedding dim, M masked patches, R rows, K prototypes
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from plain_vit import PlainAttention, PlainBlock, PlainViT
from torch import Tensor, nn

from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.optimizer import fuse_params_groups, get_params_groups_with_decay
from dinov2.train.ssl_meta_arch import SSLMetaArch

N_GLOBAL_CROPS = 2
STUDENT_TEMP = 0.1
SINKHORN_ITERATIONS = 3
UNUSED_CROP_PX = 98
ATTENTIONS = ("explicit", "sdpa")


class PackedViT(PlainViT):
    """The plain ViT, which takes crops of several sizes through its blocks as one row of tokens: upstream's training.

    Raises:
        ValueError: for registers, or another feed-forward network than "mlp".
    """

    def __init__(self, like: DinoVisionTransformer, attention: str) -> None:
        super().__init__(like)
        if self.register_tokens is not None:
            raise ValueError("plain step: student.num_register_tokens must be 0, as in custom.yaml")
        self.n_blocks = len(self.blocks)  # by which parameter groups know a backbone
        self.attention = attention

    def forward_packed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """CLS tokens [crops, D] and patch tokens [crops, P, D] of each batch of crops."""
        tokens = [self._tokens(x, mask) for x, mask in zip(crops, masks, strict=True)]
        shapes = [(each.shape[0], each.shape[1]) for each in tokens]
        x = torch.cat([each.flatten(0, 1) for each in tokens])  # [T, D]
        for block in self.blocks:
            assert isinstance(block, PlainBlock), "PlainViT has no others"
            x = x + block.ls1(self._attention(block.attn, block.norm1(x), shapes))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        outputs = _unpacked(self.norm(x), shapes)
        return [(part[:, 0], part[:, 1:]) for part in outputs]

    def _tokens(self, x: Tensor, masks: Tensor | None) -> Tensor:
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # [crops, P, D]
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self._positions(grid)

    def _attention(self, layer: PlainAttention, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Within each crop: [T, D] to [T, D]."""
        attended = []
        for part in _unpacked(layer.qkv(x), shapes):  # [crops, N, 3 D]
            heads = part.unflatten(-1, (3, layer.n_heads, -1))
            query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [crops, H, N, d]
            if self.attention == "sdpa":
                mixed = F.scaled_dot_product_attention(query, key, value)
            else:
                mixed = ((query * layer.scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
            attended.append(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        return layer.proj(torch.cat(attended))


def _unpacked(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[T, ...] as [crops, N, ...] for each (crops, N)."""
    parts = x.split([n_crops * n_tokens for n_crops, n_tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


class PlainHead(nn.Module):
    """The head with the weights of this project's `head`: an MLP, unit length, weight-normalised prototypes."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        state = head.state_dict()
        layers: list[nn.Module] = []
        for name in [name for name in state if name.startswith("mlp.") and name.endswith("weight")]:
            out_features, in_features = state[name].shape
            layers += [nn.Linear(in_features, out_features), nn.GELU()]
        self.mlp = layers[0] if len(layers) == 2 else nn.Sequential(*layers[:-1])
        self.last_layer = nn.ParameterDict(
            {key: torch.empty_like(state[f"last_layer.{key}"]) for key in ("weight_g", "weight_v")}
        )
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] to logits [R, K]."""
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        direction = self.last_layer["weight_v"]
        return F.linear(x, self.last_layer["weight_g"] * direction / direction.norm(dim=1, keepdim=True))


def plain_sinkhorn(logits: Tensor, teacher_temp: float) -> Tensor:
    """Targets [R, K] of logits [R, K], by normalising rows and columns of the whole matrix in turn."""
    mass = torch.exp(logits.float() / teacher_temp).t()  # [K, R]
    n_prototypes, n_rows = mass.shape
    mass /= mass.sum()
    for _ in range(SINKHORN_ITERATIONS):
        mass /= mass.sum(dim=1, keepdim=True)
        mass /= n_prototypes
        mass /= mass.sum(dim=0, keepdim=True)
        mass /= n_rows
    mass *= n_rows
    return mass.t()


def plain_koleo(features: Tensor) -> Tensor:
    """The KoLeo loss of features [B, D]."""
    x = F.normalize(features.float(), eps=1e-8, dim=-1)
    with torch.no_grad():
        neighbours = (x @ x.t()).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[neighbours], eps=1e-4) + 1e-8).mean()


class PlainNetworks(nn.Module):
    """Backbone and heads, under the names that they have in SSLMetaArch, with the weights of `networks`."""

    def __init__(self, networks: nn.ModuleDict, attention: str) -> None:
        super().__init__()
        like = networks["backbone"]
        assert isinstance(like, DinoVisionTransformer), "SSLMetaArch has no other backbone"
        self.backbone = PackedViT(like, attention)
        self.dino_head, self.ibot_head = PlainHead(networks["dino_head"]), PlainHead(networks["ibot_head"])


class PlainStep(nn.Module):
    """Student, teacher and optimizer with the weights of `model`, which is not changed; calling it takes one step.

    Args:
        cfg: the run's configuration: Sinkhorn-Knopp, separate heads, no stochastic depth.
        model: whose weights to start from.
        dtype: float32, or what autocast computes in.
        attention: "explicit" or "sdpa".
        with_unused_local_crop: where there are no local crops, send the one that DinoBloom's recipe has through the
            student; it changes no loss.

    Raises:
        ValueError: for a configuration that is not rendered here.
    """

    def __init__(
        self,
        cfg: Any,
        model: SSLMetaArch,
        dtype: torch.dtype = torch.float32,
        attention: str = "explicit",
        with_unused_local_crop: bool = True,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: {attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
        wrong = [
            name
            for name, is_wrong in {
                "train.centering": cfg.train.centering != "sinkhorn_knopp",
                "ibot.separate_head": not cfg.ibot.separate_head,
                "student.drop_path_rate": cfg.student.drop_path_rate > 0,
                "dino.smooth_rank_loss_weight": cfg.dino.smooth_rank_loss_weight > 0,
                "train.accumulation_steps": (cfg.train.accumulation_steps or 1) > 1,
            }.items()
            if is_wrong
        ]
        if wrong:
            raise ValueError(f"plain step: {', '.join(wrong)} are not as in custom.yaml; only its recipe is rendered")
        self.cfg, self.dtype = cfg, dtype
        self.n_local_crops = cfg.crops.local_crops_number
        self.with_unused_local_crop = with_unused_local_crop and self.n_local_crops == 0
        self.student, self.teacher = (PlainNetworks(networks, attention) for networks in (model.student, model.teacher))
        self.teacher.requires_grad_(False)
        self.to(model.device)
        groups = [
            group
            for module in self.student.children()
            for group in fuse_params_groups(
                get_params_groups_with_decay(module, cfg.optim.layerwise_decay, cfg.optim.patch_embed_lr_mult)
            )
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))

    def forward(
        self, images: Mapping[str, Any], teacher_temp: float, momentum: float, max_norm: float
    ) -> dict[str, Tensor]:
        """One step; returns its losses. Learning rates are those of `optimizer`."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.forward_backward(images, teacher_temp)
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        self.optimizer.step()
        self.update_teacher(momentum)
        return losses

    def forward_backward(self, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """The losses under SSLMetaArch's names, and their gradients in the student's parameters."""
        crops = images["collated_global_crops"]  # [2B, 3, S, S]
        n_masked, upperbound = len(images["mask_indices_list"]), int(images["upperbound"])
        with torch.no_grad(), self._autocast():
            cls_tokens, patch_tokens = self.teacher.backbone.forward_packed([crops], [None])[0]
            first, second = cls_tokens.chunk(N_GLOBAL_CROPS)
            cls_logits = self.teacher.dino_head(torch.cat([second, first]))  # [2B, K]: the other view's
            patch_logits = self.teacher.ibot_head(_padded(patch_tokens, images, upperbound))[:n_masked]
        with torch.no_grad():
            cls_targets = plain_sinkhorn(cls_logits, teacher_temp).unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, K]
            patch_targets = plain_sinkhorn(patch_logits, teacher_temp)  # [M, K]

        batches, masks = [crops], [images["collated_masks"], None]
        if self.n_local_crops > 0:
            batches.append(images["collated_local_crops"])
        elif self.with_unused_local_crop:
            size = min(UNUSED_CROP_PX, crops.shape[-1]) // self.cfg.student.patch_size * self.cfg.student.patch_size
            batches.append(crops[: len(crops) // N_GLOBAL_CROPS, :, :size, :size])
        with self._autocast():
            outputs = self.student.backbone.forward_packed(batches, masks[: len(batches)])
            global_cls, global_patches = outputs[0]
            all_logits = self.student.dino_head(torch.cat([cls_of_batch for cls_of_batch, _ in outputs]))
            student_patches = self.student.ibot_head(_padded(global_patches, images, upperbound))[:n_masked]
        global_logits, local_logits = all_logits.tensor_split([len(global_cls)])

        weights, losses = self.cfg.dino, {}
        n_terms = N_GLOBAL_CROPS * (1 + self.n_local_crops)
        total = torch.zeros((), device=crops.device)
        if self.n_local_crops > 0:
            local = _pairs(local_logits.chunk(self.n_local_crops), cls_targets) / n_terms
            losses["dino_local_crops_loss"] = local
            total = total + weights.loss_weight * local
        global_loss = _pairs([global_logits], [cls_targets.flatten(0, 1)]) * N_GLOBAL_CROPS / n_terms
        losses["dino_global_crops_loss"] = global_loss
        total = total + weights.loss_weight * global_loss
        if weights.koleo_loss_weight > 0:
            koleo = weights.koleo_loss_weight * sum(plain_koleo(view) for view in global_cls.chunk(N_GLOBAL_CROPS))
            losses["koleo_loss"] = koleo / N_GLOBAL_CROPS
            total = total + koleo
        agreement = (patch_targets * F.log_softmax(student_patches.float() / STUDENT_TEMP, dim=-1)).sum(dim=-1)  # [M]
        patch_loss = -(agreement * images["masks_weight"]).sum() / len(images["collated_masks"])
        losses["ibot_loss"] = patch_loss / N_GLOBAL_CROPS
        (total + self.cfg.ibot.loss_weight * patch_loss).backward()
        return {name: value.detach() for name, value in losses.items()}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- m * teacher + (1 - m) * student, one tensor after the other."""
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.mul_(momentum).add_(student, alpha=1 - momentum)

    def _autocast(self) -> AbstractContextManager[None]:
        is_half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if is_half else torch.bfloat16, enabled=is_half)


def _padded(patch_tokens: Tensor, images: Mapping[str, Any], upperbound: int) -> Tensor:
    """The masked ones of [2B, P, D] in the first M of [upperbound, D]; the rest is zero."""
    indices = images["mask_indices_list"]
    buffer = patch_tokens.new_zeros(upperbound, patch_tokens.shape[-1])
    buffer[: len(indices)] = patch_tokens.flatten(0, 1).index_select(0, indices)
    return buffer


def _pairs(students: Sequence[Tensor], targets: Sequence[Tensor] | Tensor) -> Tensor:
    """Sum over pairs of the mean cross-entropy; each student's log-probabilities are computed once."""
    total = torch.zeros((), device=students[0].device)
    for logits in students:
        log_probabilities = F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)
        for target in targets:
            total = total - (target * log_probabilities).sum(dim=-1).mean()
    return total
