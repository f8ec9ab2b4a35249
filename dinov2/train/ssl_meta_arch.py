"""Student and teacher, and one step of self-distillation between them: DINO + iBOT + KoLeo (DINOv2, arXiv 2304.07193).

Dimension key:  B images on this process, L local crops, P patches per global crop, M masked patches in the batch,
                D embedding dim, K prototypes of a head
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.fsdp.precision import autocast, resolve_dtype
from dinov2.hub.backbones import load_backbone, without_chunk
from dinov2.layers import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss, smooth_rank_loss
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.param_groups import fuse_params_groups, get_params_groups_with_decay

logger = logging.getLogger("dinov2")


@dataclass
class TeacherTargets:
    """What the student has to predict; rows sum to 1."""

    cls: Tensor | None  # [2, B, K]: entry v is the target for view v, made from the other view
    patches: Tensor | None  # [M, K]


@dataclass
class StudentOutputs:
    """What the student says."""

    global_cls_tokens: Tensor  # [2B, D], before the head: KoLeo acts on these
    global_cls_logits: Tensor | None  # [2B, K]
    local_cls_logits: Tensor | None  # [L*B, K]
    patch_logits: Tensor | None  # [M, K]


class SSLMetaArch(nn.Module):
    """The two networks and their losses.

    `student` and `teacher` are ModuleDicts of `backbone`, `dino_head` and, with `ibot.separate_head`, `ibot_head`. They
    start equal; the teacher gets no gradient and follows by `update_teacher`.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_smooth_rank_loss = cfg.dino.smooth_rank_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0 and cfg.ibot.mask_sample_probability > 0
        self.ibot_separate_head = self.do_ibot and cfg.ibot.separate_head
        self.n_local_crops = cfg.crops.local_crops_number

        student_backbone, teacher_backbone, embed_dim = build_model_from_cfg(cfg)
        weights = cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS
        if weights:
            _start_from(student_backbone, weights, cfg)
        self.student = nn.ModuleDict({"backbone": student_backbone, **self._build_heads(embed_dim)})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **self._build_heads(embed_dim)})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

        if self.do_dino:
            self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        if self.do_koleo:
            self.koleo_loss = KoLeoLoss()
        if self.do_ibot:
            head = cfg.ibot if self.ibot_separate_head else cfg.dino
            self.ibot_patch_loss = iBOTPatchLoss(head.head_n_prototypes)
        self.fp16_scaler: torch.amp.GradScaler | None = None
        if cfg.compute_precision.grad_scaler and self._computes_in_fp16():
            self.fp16_scaler = torch.amp.GradScaler("cuda")
        self.train()

    def _build_heads(self, embed_dim: int) -> dict[str, nn.Module]:
        sections = {"dino_head": self.cfg.dino} if self.do_dino or not self.ibot_separate_head else {}
        if self.ibot_separate_head:
            sections["ibot_head"] = self.cfg.ibot
        return {
            name: DINOHead(
                in_dim=embed_dim,
                out_dim=section.head_n_prototypes,
                hidden_dim=section.head_hidden_dim,
                bottleneck_dim=section.head_bottleneck_dim,
                nlayers=section.head_nlayers,
            )
            for name, section in sections.items()
        }

    def _computes_in_fp16(self) -> bool:
        device_type = "cuda" if torch.cuda.is_available() and self.cfg.train.device != "cpu" else "cpu"
        student = self.cfg.compute_precision.student
        names = {student[part].mixed_precision.param_dtype for part in ("backbone", "dino_head", "ibot_head")}
        return any(resolve_dtype(name, device_type) == torch.float16 for name in names)

    @property
    def teacher_backbone(self) -> DinoVisionTransformer:
        """The network that is kept and used after training."""
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, DinoVisionTransformer), "build_model_from_cfg gives nothing else"
        return backbone

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward_backward(self, images: dict[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """One step's losses, and their gradients in the student's parameters.

        Args:
            images: batch dict of `dinov2.data.collate`: collated_global_crops [2B, 3, S, S] with the first views in
                front, collated_local_crops [L*B, 3, s, s] (absent for L = 0), collated_masks [2B, P], mask_indices_list
                [M], masks_weight [M], n_masked_patches [1].
            teacher_temp: temperature of the teacher's targets.

        Returns:
            detached scalars under upstream's keys, as upstream shows them: `koleo_loss` and `ibot_loss` are half of
            what is summed, and none but KoLeo and the smooth rank carries its weight.
        """
        device = self.device
        images = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in images.items()}
        targets = self.teacher_targets(images, teacher_temp)
        outputs = self.student_outputs(images)
        total, shown = self.losses(targets, outputs, images)
        self.backprop_loss(total)
        return {name: value.detach() for name, value in shown.items()}

    @torch.no_grad()
    def teacher_targets(self, images: dict[str, Any], teacher_temp: float) -> TeacherTargets:
        """Assignments of the unmasked global crops to prototypes, sharpened and kept from collapsing by centering."""
        tokens = self._backbone("teacher", images["collated_global_crops"])
        first, second = tokens["x_norm_clstoken"].chunk(N_GLOBAL_CROPS)
        other_view = torch.cat([second, first])  # [2B, D]: each view is predicted from the other
        masked = self._masked_patches(tokens["x_norm_patchtokens"], images)
        cls_logits, patch_logits = self._heads("teacher", other_view, masked)
        sinkhorn = self.cfg.train.centering == "sinkhorn_knopp"

        cls_targets = patch_targets = None
        if cls_logits is not None:
            if sinkhorn:
                cls_targets = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp)
            else:
                cls_targets = self.dino_loss.softmax_center_teacher(cls_logits, teacher_temp)
                self.dino_loss.update_center(cls_logits)
            cls_targets = cls_targets.unflatten(0, (N_GLOBAL_CROPS, -1))  # [2, B, K]
        if patch_logits is not None:
            if sinkhorn:
                patch_targets = self.ibot_patch_loss.sinkhorn_knopp_teacher(
                    patch_logits, teacher_temp, n_masked_patches_tensor=images["n_masked_patches"]
                )
            else:
                batch = patch_logits.unsqueeze(0)  # [1, M, K]
                patch_targets = self.ibot_patch_loss.softmax_center_teacher(batch, teacher_temp).squeeze(0)
                if len(patch_logits):
                    self.ibot_patch_loss.update_center(batch)
        return TeacherTargets(cls_targets, patch_targets)

    def student_outputs(self, images: dict[str, Any]) -> StudentOutputs:
        """The student sees the global crops with masks and the local crops without."""
        global_crops, masks = images["collated_global_crops"], images["collated_masks"]
        if self.n_local_crops > 0:
            global_tokens, local_tokens = self._backbone(
                "student", [global_crops, images["collated_local_crops"]], masks=[masks, None]
            )
            cls_tokens = torch.cat([global_tokens["x_norm_clstoken"], local_tokens["x_norm_clstoken"]])
        else:
            global_tokens = self._backbone("student", global_crops, masks=masks)
            cls_tokens = global_tokens["x_norm_clstoken"]
        masked = self._masked_patches(global_tokens["x_norm_patchtokens"], images)
        cls_logits, patch_logits = self._heads("student", cls_tokens, masked)

        n_global = global_crops.shape[0]
        global_logits = local_logits = None
        if cls_logits is not None:
            global_logits = cls_logits[:n_global]
            local_logits = cls_logits[n_global:] if self.n_local_crops > 0 else None
        return StudentOutputs(global_tokens["x_norm_clstoken"], global_logits, local_logits, patch_logits)

    def losses(
        self, targets: TeacherTargets, outputs: StudentOutputs, images: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate, and the terms as they are shown."""
        total = outputs.global_cls_tokens.new_zeros((), dtype=torch.float32)
        shown: dict[str, Tensor] = {}
        weights = self.cfg.dino
        if self.do_dino:
            assert targets.cls is not None and outputs.global_cls_logits is not None, "dino_head gave no logits"
            # Two views predict each other, and each of L local crops predicts both: 2 + 2L terms share the loss
            n_terms = N_GLOBAL_CROPS + N_GLOBAL_CROPS * self.n_local_crops
            if outputs.local_cls_logits is not None:
                local_loss = self.dino_loss(outputs.local_cls_logits.chunk(self.n_local_crops), targets.cls) / n_terms
                shown["dino_local_crops_loss"] = local_loss
                total = total + weights.loss_weight * local_loss
            # One mean over 2B rows stands for two terms of B rows each
            pairs = self.dino_loss([outputs.global_cls_logits], [targets.cls.flatten(0, 1)])
            global_loss = pairs * N_GLOBAL_CROPS / n_terms
            shown["dino_global_crops_loss"] = global_loss
            total = total + weights.loss_weight * global_loss
        if self.do_koleo:
            # Within a view: the two views of a picture are meant to be near
            views = outputs.global_cls_tokens.chunk(N_GLOBAL_CROPS)
            koleo = weights.koleo_loss_weight * torch.stack([self.koleo_loss(view) for view in views]).sum()
            shown["koleo_loss"] = koleo / N_GLOBAL_CROPS
            total = total + koleo
        if self.do_smooth_rank_loss:
            rank_loss = weights.smooth_rank_loss_weight * smooth_rank_loss(outputs.global_cls_tokens)
            shown["smooth_rank_loss"] = rank_loss / N_GLOBAL_CROPS
            total = total + rank_loss
        if self.do_ibot:
            assert targets.patches is not None and outputs.patch_logits is not None, "no head gave patch logits"
            patch_loss = self.ibot_patch_loss.forward_masked(
                outputs.patch_logits,
                targets.patches,
                student_masks_flat=images["collated_masks"],
                masks_weight=images["masks_weight"],
            )
            shown["ibot_loss"] = patch_loss / 2
            total = total + self.cfg.ibot.loss_weight * patch_loss
        return total, shown

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss`, scaled where the student computes in fp16."""
        (loss if self.fp16_scaler is None else self.fp16_scaler.scale(loss)).backward()

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """teacher <- m * teacher + (1 - m) * student, for every parameter."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1.0 - m)

    def apply_center_updates(self) -> None:
        """Finish the moving centers that still wait for their update, so that a checkpoint holds them."""
        for loss in (getattr(self, "dino_loss", None), getattr(self, "ibot_patch_loss", None)):
            if loss is not None:
                loss.apply_center_update()

    def get_params_groups(self) -> list[dict[str, Any]]:
        """The student's parameters for the optimizer: groups of each sub-network, see train/param_groups.py."""
        groups: list[dict[str, Any]] = []
        for module in self.student.values():
            groups += fuse_params_groups(
                get_params_groups_with_decay(module, self.cfg.optim.layerwise_decay, self.cfg.optim.patch_embed_lr_mult)
            )
        return groups

    def _backbone(self, role: str, crops: Any, **kwargs: Any) -> Any:
        with self._precision(role, "backbone"):
            return getattr(self, role)["backbone"](crops, is_training=True, **kwargs)

    def _masked_patches(self, patch_tokens: Tensor, images: dict[str, Any]) -> Tensor | None:
        """[M, D] tokens at the masked places of [2B, P, D]."""
        if not self.do_ibot:
            return None
        return patch_tokens.flatten(0, 1).index_select(0, images["mask_indices_list"])

    def _heads(
        self, role: str, cls_tokens: Tensor, masked_patches: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of CLS tokens and of masked patches; a shared head sees both in one call."""
        heads = getattr(self, role)
        if masked_patches is not None and not self.ibot_separate_head:
            with self._precision(role, "dino_head"):
                logits = heads["dino_head"](torch.cat([cls_tokens, masked_patches]))
            cls_logits, patch_logits = logits.split([len(cls_tokens), len(masked_patches)])
            return (cls_logits if self.do_dino else None), patch_logits
        cls_logits = patch_logits = None
        if self.do_dino:
            with self._precision(role, "dino_head"):
                cls_logits = heads["dino_head"](cls_tokens)
        if masked_patches is not None:
            with self._precision(role, "ibot_head"):
                patch_logits = heads["ibot_head"](masked_patches)
        return cls_logits, patch_logits

    def _precision(self, role: str, part: str) -> torch.autocast:
        name = self.cfg.compute_precision[role][part].mixed_precision.param_dtype
        return autocast(name, self.device.type)


def _start_from(backbone: nn.Module, weights: str, cfg: Any) -> None:
    """Fill the student's backbone from a weights file; every tensor must find its place."""
    loaded = load_backbone(weights, img_size=cfg.crops.global_crops_size).state_dict()
    own = backbone.state_dict()
    in_file = {name: without_chunk(name) for name in own}  # load_backbone gives names without block_chunks
    wrong = []
    for name, tensor in own.items():
        there = tuple(loaded[in_file[name]].shape) if in_file[name] in loaded else "absent"
        if there != tuple(tensor.shape):
            wrong.append(f"{name}: {there} in the file, {tuple(tensor.shape)} here")
    wrong += [f"{name}: in the file only" for name in loaded if name not in in_file.values()]
    if wrong:
        raise ValueError(
            f"student.pretrained_weights: {weights} holds another architecture than student.arch={cfg.student.arch}: "
            f"{'; '.join(wrong[:4])}" + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )
    backbone.load_state_dict({name: loaded[in_file[name]] for name in own})
    logger.info("student and teacher start from %s (%d tensors, all placed)", weights, len(own))
