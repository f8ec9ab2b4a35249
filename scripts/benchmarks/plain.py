"""Upstream's training step and embedding in plain eager PyTorch, on this project's weights, to measure against.

Mathematics and names of weights are those of `SSLMetaArch`; the work is arranged as DinoBloom's code arranges it:

- the teacher sends all tokens of both global crops through all blocks;
- the student's global crops, with masks, and its local crops go through the blocks packed as one row of tokens, and
  DinoBloom's recipe has one local crop of 98 px an image that no loss reads: it costs its forward and backward pass;
- masked patches are copied into a buffer of `upperbound` rows, all of which the head computes;
- logits, targets, log-probabilities and their products are whole matrices, kept for the backward pass;
- Sinkhorn-Knopp rewrites its [K, R] matrix for each normalisation;
- gradients are clipped by `clip_grad_norm_` for each sub-network, AdamW has torch's defaults, and the teacher follows
  tensor by tensor.

Attention writes q k^T, softmax and the product with v out, as upstream does where xFormers is missing; on CUDA it is
torch's scaled_dot_product_attention, in xFormers' place. Stochastic depth and registers are left out.

Dimension key:  B images, L local crops, P patches of a global crop, N tokens of a crop, T tokens of all crops,
                H heads, d = D / H, D embedding dim, M masked patches, R rows, K prototypes
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from dinov2.layers import DINOHead
from dinov2.layers.attention import Attention
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

N_GLOBAL_CROPS = 2
STUDENT_TEMP = 0.1
SINKHORN_ITERATIONS = 3
UNUSED_CROP_PX = 98


def embed(
    vit: DinoVisionTransformer, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """Return CLS tokens [crops, D] and patch tokens [crops, P, D] of each batch of crops [crops, 3, S, S]."""
    tokens = [_tokens(vit, x, mask) for x, mask in zip(crops, masks, strict=True)]
    shapes = [each.shape[:2] for each in tokens]
    x = torch.cat([each.flatten(0, 1) for each in tokens])  # [T, D]
    for block in vit.each_block():
        x = x + block.ls1(_attention(block.attn, block.norm1(x), shapes))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return [(part[:, 0], part[:, 1:]) for part in _unpacked(vit.norm(x), shapes)]


def _tokens(vit: DinoVisionTransformer, x: Tensor, masks: Tensor | None) -> Tensor:
    patches = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)  # [crops, P, D]
    if masks is not None:
        patches = torch.where(masks.unsqueeze(-1), vit.mask_token.to(patches.dtype).unsqueeze(0), patches)
    tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), patches], dim=1)
    return tokens + vit.interpolate_pos_encoding(tokens, x.shape[-2], x.shape[-1])


def _attention(layer: Attention, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Attend within each crop: [T, D] to [T, D]."""
    attended = []
    for part in _unpacked(layer.qkv(x), shapes):  # [crops, N, 3 D]
        query, key, value = part.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [crops, H, N, d]
        if x.is_cuda:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        attended.append(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
    return layer.proj(torch.cat(attended))


def _unpacked(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split [T, ...] into [crops, N, ...] for each (crops, N)."""
    parts = x.split([n_crops * n_tokens for n_crops, n_tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _logits(head: DINOHead, x: Tensor) -> Tensor:
    """Compute [R, K] of [R, D]."""
    x = head.mlp(x)
    x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
    direction = head.last_layer.weight_v
    return F.linear(x, head.last_layer.weight_g * direction / direction.norm(dim=1, keepdim=True))


def _sinkhorn(logits: Tensor, teacher_temp: float) -> Tensor:
    """Compute targets [R, K] by normalising rows and columns of the whole matrix in turn."""
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


def _koleo(features: Tensor) -> Tensor:
    x = F.normalize(features.float(), eps=1e-8, dim=-1)
    with torch.no_grad():
        neighbours = (x @ x.t()).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[neighbours], eps=1e-4) + 1e-8).mean()


class PlainStep:
    """Student, teacher and optimizer with copies of the weights of `model`; calling it takes one step.

    Args:
        model: with Sinkhorn-Knopp, separate heads, no registers and no stochastic depth, as in custom.yaml.
        dtype: float32, or what autocast computes in.

    Raises:
        ValueError: for another recipe.
    """

    def __init__(self, model: SSLMetaArch, dtype: torch.dtype = torch.float32) -> None:
        cfg = model.cfg
        wanted = {
            "train.centering": "sinkhorn_knopp",
            "ibot.separate_head": True,
            "student.drop_path_rate": 0,
            "student.num_register_tokens": 0,
            "dino.smooth_rank_loss_weight": 0,
        }
        wrong = [f"{key}={value}" for key, value in wanted.items() if OmegaConf.select(cfg, key) != value]
        if wrong:
            raise ValueError(f"plain step: set {', '.join(wrong)}, as in custom.yaml")
        self.cfg, self.dtype, self.device = cfg, dtype, model.device
        self.n_local_crops = cfg.crops.local_crops_number
        self.student, self.teacher = copy.deepcopy(model.student), copy.deepcopy(model.teacher)
        groups = []
        for module in self.student.children():
            rates = cfg.optim.layerwise_decay, cfg.optim.patch_embed_lr_mult
            groups += fuse_params_groups(get_params_groups_with_decay(module, *rates))
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))

    def __call__(
        self, images: Mapping[str, Any], teacher_temp: float, momentum: float, max_norm: float
    ) -> dict[str, Tensor]:
        """Take one step and return its losses; learning rates are those of `optimizer`."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.forward_backward(images, teacher_temp)
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                teacher.mul_(momentum).add_(student, alpha=1 - momentum)
        return losses

    def forward_backward(self, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """Return the losses under SSLMetaArch's names, with their gradients in the student's parameters."""
        student, teacher, dino = self.student, self.teacher, self.cfg.dino
        crops = images["collated_global_crops"]  # [2B, 3, S, S]
        n_masked, upperbound = len(images["mask_indices_list"]), int(images["upperbound"])
        with torch.no_grad(), self._autocast():
            cls_tokens, patch_tokens = embed(teacher["backbone"], [crops], [None])[0]
            first, second = cls_tokens.chunk(N_GLOBAL_CROPS)
            cls_logits = _logits(teacher["dino_head"], torch.cat([second, first]))  # [2B, K]: the other view's
            patch_logits = _logits(teacher["ibot_head"], _padded(patch_tokens, images, upperbound))[:n_masked]
        with torch.no_grad():
            cls_targets = _sinkhorn(cls_logits, teacher_temp).unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, K]
            patch_targets = _sinkhorn(patch_logits, teacher_temp)  # [M, K]

        batches, masks = [crops], [images["collated_masks"], None]
        if self.n_local_crops > 0:
            batches.append(images["collated_local_crops"])
        else:
            size = min(UNUSED_CROP_PX, crops.shape[-1]) // self.cfg.student.patch_size * self.cfg.student.patch_size
            batches.append(crops[: len(crops) // N_GLOBAL_CROPS, :, :size, :size])
        with self._autocast():
            outputs = embed(student["backbone"], batches, masks)
            global_cls, global_patches = outputs[0]
            all_logits = _logits(student["dino_head"], torch.cat([cls_tokens for cls_tokens, _ in outputs]))
            student_patches = _logits(student["ibot_head"], _padded(global_patches, images, upperbound))[:n_masked]
        global_logits, local_logits = all_logits.tensor_split([len(global_cls)])

        n_terms, losses = N_GLOBAL_CROPS * (1 + self.n_local_crops), {}
        total = torch.zeros((), device=crops.device)
        if self.n_local_crops > 0:
            losses["dino_local_crops_loss"] = _pairs(local_logits.chunk(self.n_local_crops), cls_targets) / n_terms
            total = total + dino.loss_weight * losses["dino_local_crops_loss"]
        global_loss = _pairs([global_logits], [cls_targets.flatten(0, 1)]) * N_GLOBAL_CROPS / n_terms
        losses["dino_global_crops_loss"] = global_loss
        total = total + dino.loss_weight * global_loss
        if dino.koleo_loss_weight > 0:
            koleo = dino.koleo_loss_weight * sum(_koleo(view) for view in global_cls.chunk(N_GLOBAL_CROPS))
            losses["koleo_loss"] = koleo / N_GLOBAL_CROPS
            total = total + koleo
        agreement = (patch_targets * F.log_softmax(student_patches.float() / STUDENT_TEMP, dim=-1)).sum(dim=-1)  # [M]
        patch_loss = -(agreement * images["masks_weight"]).sum() / len(images["collated_masks"])
        losses["ibot_loss"] = patch_loss / N_GLOBAL_CROPS
        (total + self.cfg.ibot.loss_weight * patch_loss).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _autocast(self) -> AbstractContextManager[None]:
        is_half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if is_half else torch.bfloat16, enabled=is_half)


def _padded(patch_tokens: Tensor, images: Mapping[str, Any], upperbound: int) -> Tensor:
    """Copy the masked patches of [2B, P, D] into the first M rows of [upperbound, D]; the rest is zero."""
    indices = images["mask_indices_list"]
    buffer = patch_tokens.new_zeros(upperbound, patch_tokens.shape[-1])
    buffer[: len(indices)] = patch_tokens.flatten(0, 1).index_select(0, indices)
    return buffer


def _pairs(students: Sequence[Tensor], targets: Sequence[Tensor] | Tensor) -> Tensor:
    """Sum the mean cross-entropies over pairs; each student's log-probabilities are computed once."""
    total = torch.zeros((), device=students[0].device)
    for logits in students:
        log_probabilities = F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)
        for target in targets:
            total = total - (target * log_probabilities).sum(dim=-1).mean()
    return total
