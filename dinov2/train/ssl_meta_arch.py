"""Student and teacher, and one step of self-distillation between them: DINO + iBOT + KoLeo (DINOv2, arXiv 2304.07193).

LeJEPA (arXiv 2511.08544) is another objective, without prototypes and targets: views of an image get one projection,
and the projections of all images a normal distribution. If it is the only one, a step does not run the teacher.

Two more terms may stand beside or in place of these. Distillation: the student predicts the tokens of a frozen network
(train/distillation.py). Metadata guidance (FINO, arXiv 2606.05107): CLS tokens forget or keep a value known of each
image.

A step's global batch is divided over W processes and, in each process, over A micro-batches (train/micro_batches.py).
Neither changes the loss: Sinkhorn-Knopp and centering use the teacher's logits of the global batch, and KoLeo searches
each feature's neighbour in it (with dino.koleo_loss_distributed: false in each micro-batch, as upstream does on each
GPU), and LeJEPA and metadata guidance project all of it. The other terms are means over images, and gradients are
averaged.

Dimension key:  W processes, A micro-batches of a process, B images in one, N = W*A*B images in the global batch,
                L local crops, P patches per global crop, M masked patches, D embedding dim, K prototypes of a head,
                d bottleneck dim, or dim of LeJEPA's and metadata's projections; V = 2 + L views
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.distributed import all_gather_rows, get_rank, is_enabled
from dinov2.fsdp.sharding import SHARDED, lerp_, make_mesh, replicate, reshard, shard
from dinov2.hub.adapters import lora_scaling
from dinov2.layers import Block, DINOHead, projection_head
from dinov2.logging import StepClock
from dinov2.loss import (
    DINOLoss,
    DistillationHead,
    KoLeoLoss,
    MetadataLoss,
    SIGRegLoss,
    iBOTPatchLoss,
    reverse_gradient,
    smooth_rank_loss,
    token_distance,
)
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.distillation import resize_to_grid
from dinov2.train.finetuning import limit_learning, start_from_weights
from dinov2.train.monitor import feature_statistics, prototype_use
from dinov2.train.optimizer import LossScaler
from dinov2.utils.numerics import autocast, computes_in_fp16, resolve_dtype
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

STUDENT_ONLY = ("distillation_head", "metadata_head")  # no target comes from the teacher's, and no user needs them
METADATA_DIM = 64  # of projections
METADATA_HIDDEN_DIM = 256
# To suppress a value, the head must find it in whatever way features show it now; a head as slow as the backbone is
# evaded instead: the loss stays at chance, and a probe still finds the value (scripts/experiments/forget_slide.py)
METADATA_LR_MULTIPLIER = 10.0


class HeadOutput(NamedTuple):
    """Output of a head: logits [R, K]; or embeddings [R, d] and prototypes [K, d], whose products are the logits."""

    rows: Tensor
    prototypes: Tensor | None = None


@dataclass
class TeacherOutputs:
    """Outputs of the teacher for a micro-batch, before centering."""

    cls_tokens: Tensor  # [2B, D]
    cls_logits: HeadOutput | None  # [2B, K], of the other view of each image
    patch_logits: HeadOutput | None  # [M, K]
    n_masked_patches: Tensor  # [1]: M


@dataclass
class TeacherTargets:
    """Targets of the student's predictions; rows sum to 1."""

    cls: Tensor | None  # [2B, K]
    patches: Tensor | None  # [M, K]
    metadata: Tensor | None = None  # [N]: numbers of the values of the global batch, negative for an image without one


@dataclass
class StudentOutputs:
    """Outputs of the student that the losses use."""

    global_cls_tokens: Tensor  # [2B, D]
    global_patch_tokens: Tensor  # [2B, P, D]
    cls: HeadOutput | None  # embeddings [2B + L*B, d]
    patches: HeadOutput | None  # embeddings [M, d]
    compared: Tensor  # CLS tokens that losses compare across images: [2, B, D], or [V, B, D] with LeJEPA


@dataclass
class BatchFeatures:
    """The student's CLS tokens that losses compare across a global batch, without gradient."""

    all: Tensor  # [W*A, 2, B, D], or [W*A, V, B, D] with LeJEPA
    index: int  # number of the present micro-batch among the W*A

    @property
    def global_rows(self) -> Tensor:
        """Return those of the global crops, [W*A*2B, D]."""
        return self.all[:, :N_GLOBAL_CROPS].flatten(0, 2)


class SSLMetaArch(nn.Module):
    """The two networks and their losses.

    `student` and `teacher` are ModuleDicts of `backbone` and the heads of the losses that are on: `dino_head`,
    `ibot_head` (with `ibot.separate_head`), `lejepa_head`. They start equal; the teacher gets no gradient and follows
    the student by `update_teacher`. train/finetuning.py decides which parameters of the student's backbone learn; while
    `backbone_is_frozen`, the backbone gets no gradient. The student alone has the heads of `STUDENT_ONLY`.

    `frozen_teacher` is the network of `teacher.pretrained_weights`, on the training device. It is no part of the state,
    which is saved: each start reads it from its file.
    """

    def __init__(
        self, cfg: Any, load_weights: bool = True, frozen_teacher: DinoVisionTransformer | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_smooth_rank_loss = cfg.dino.smooth_rank_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0 and cfg.ibot.mask_sample_probability > 0
        self.ibot_separate_head = self.do_ibot and cfg.ibot.separate_head
        self.do_lejepa = cfg.lejepa.loss_weight > 0
        self.do_distillation = frozen_teacher is not None
        self.do_metadata = cfg.train.metadata.n_values is not None
        self.has_targets = self.do_dino or self.do_ibot  # else no loss uses the teacher
        self.n_local_crops = cfg.crops.local_crops_number

        student_backbone, teacher_backbone, embed_dim = build_model_from_cfg(cfg)
        self.student = nn.ModuleDict({"backbone": student_backbone, **self._build_heads(embed_dim)})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **self._build_heads(embed_dim)})
        # last: the other weights are then the same with and without them
        self.student.update(self._build_own_heads(embed_dim, frozen_teacher))
        if load_weights:
            start_from_weights(self.student, cfg)
        limit_learning(student_backbone, teacher_backbone, cfg.student)
        self.lora_scaling = lora_scaling(cfg.student)
        self.backbone_is_frozen = False
        self.counts_patch_prototypes = True  # costs a pass over the targets of all masked patches, gigabytes
        for name, network in self.teacher.items():
            network.load_state_dict(self.student[name].state_dict())
        self.teacher.requires_grad_(False)

        if self.do_dino:
            self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes, compiled=cfg.train.compile_loss)
        if self.do_koleo:
            self.koleo_loss = KoLeoLoss()
        if self.do_ibot:
            head = cfg.ibot if self.ibot_separate_head else cfg.dino
            self.ibot_patch_loss = iBOTPatchLoss(head.head_n_prototypes, compiled=cfg.train.compile_loss)
        if self.do_lejepa:
            self.sigreg_loss = SIGRegLoss()
        if self.do_metadata:
            self.metadata_loss = MetadataLoss(cfg.train.metadata.n_values, METADATA_DIM)
        blocks = list(student_backbone.each_block())
        # The first blocks: when backward recomputes their inner values, those of all later blocks are freed already
        for block in blocks[: math.ceil(round(cfg.train.activation_checkpointing * len(blocks), 6))]:
            block.checkpoint_activations = True
        device_type = "cuda" if torch.cuda.is_available() and cfg.train.device != "cpu" else "cpu"
        needs_scaler = cfg.compute_precision.grad_scaler and computes_in_fp16(cfg.compute_precision, device_type)
        self.fp16_scaler = LossScaler() if needs_scaler else None
        self.clock = StepClock("cpu")  # the training loop sets one for its device
        self.statistics: dict[str, Tensor] = {}  # of the last step's teacher outputs: 0-d, on the device
        # The modules that forward calls: the networks themselves, or DDP around them
        self.callables: dict[tuple[str, str], nn.Module] = {
            (role, part): module
            for role, networks in (("student", self.student), ("teacher", self.teacher))
            for part, module in networks.items()
        }
        if frozen_teacher is not None:
            self.callables["frozen", "backbone"] = frozen_teacher.requires_grad_(False).eval()
        self.train()

    def prepare_for_distributed_training(self, n_nodes: int = 1) -> None:
        """Compile blocks (`train.compile_blocks`), and shard or replicate networks over the processes.

        Call it on the training device, before the optimizer is built. The strategies are those of
        `compute_precision.*.*.sharding_strategy`.
        """
        if self.cfg.train.compile_blocks:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compile_branches()
        if not is_enabled():
            return
        device_type = self.device.type
        mesh_of = cache(partial(make_mesh, device_type=device_type, n_nodes=n_nodes))  # networks share process groups
        for (role, part), module in self.callables.items():
            settings = self.cfg.compute_precision["teacher" if role == "frozen" else role][part]
            reduce_dtype = resolve_dtype(settings.mixed_precision.reduce_dtype, device_type)
            if settings.sharding_strategy in SHARDED:
                shard(
                    module,
                    module.each_block() if isinstance(module, DinoVisionTransformer) else (),
                    mesh=mesh_of(settings.sharding_strategy),
                    param_dtype=resolve_dtype(settings.mixed_precision.param_dtype, device_type),
                    reduce_dtype=reduce_dtype,
                    # A teacher has no backward that would free its weights, and the EMA changes between its forwards
                    reshard_after_forward=role != "student" or settings.sharding_strategy != "SHARD_GRAD_OP",
                )
            elif role == "student":
                self.callables[role, part] = replicate(module, reduce_dtype=reduce_dtype)

    def _build_heads(self, embed_dim: int) -> dict[str, nn.Module]:
        sections = (
            {"dino_head": self.cfg.dino} if self.do_dino or (self.do_ibot and not self.ibot_separate_head) else {}
        )
        if self.ibot_separate_head:
            sections["ibot_head"] = self.cfg.ibot
        heads: dict[str, nn.Module] = {
            name: DINOHead(
                in_dim=embed_dim,
                out_dim=section.head_n_prototypes,
                hidden_dim=section.head_hidden_dim,
                bottleneck_dim=section.head_bottleneck_dim,
                nlayers=section.head_nlayers,
            )
            for name, section in sections.items()
        }
        if self.do_lejepa:
            lejepa = self.cfg.lejepa
            heads["lejepa_head"] = projection_head(embed_dim, lejepa.head_hidden_dim, lejepa.head_out_dim)
        return heads

    def _build_own_heads(self, embed_dim: int, frozen_teacher: DinoVisionTransformer | None) -> dict[str, nn.Module]:
        """Build the heads of STUDENT_ONLY."""
        heads: dict[str, nn.Module] = {}
        if frozen_teacher is not None:
            heads["distillation_head"] = DistillationHead(embed_dim, frozen_teacher.embed_dim)
        if self.do_metadata:
            heads["metadata_head"] = projection_head(embed_dim, METADATA_HIDDEN_DIM, METADATA_DIM)
        return heads

    @property
    def teacher_backbone(self) -> DinoVisionTransformer:
        """Return the teacher's backbone, the network that is used after training."""
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, DinoVisionTransformer), "build_model_from_cfg builds nothing else"
        return backbone

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Return the type of the matrix products of the student's backbone."""
        name = self.cfg.compute_precision.student.backbone.mixed_precision.param_dtype
        return resolve_dtype(name, self.device.type)

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward_backward(self, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """Compute one batch's losses, and their gradients in the student's parameters.

        Args:
            images: batch dict of `dinov2.data.collate`: collated_global_crops [2B, 3, S, S] with the first views in
                front, collated_local_crops [L*B, 3, s, s] (absent for L = 0), collated_masks [2B, P],
                mask_indices_list [M], masks_weight [M], n_masked_patches [1]; optionally the seed of this step's
                stochastic depth and slices_seed, that of SIGReg's slices; with `train.metadata`, metadata [B].
            teacher_temp: temperature of the teacher's targets.

        Returns:
            the losses for the log, see `losses`: detached scalars, means over this process's images.
        """
        images = self.to_device(images)
        (targets,) = self.step_targets([images], teacher_temp)
        return self.student_step(images, targets)

    def step_targets(self, batches: Sequence[Mapping[str, Any]], teacher_temp: float) -> list[TeacherTargets]:
        """Compute the targets of a step's micro-batches; the teacher does not run if no loss has targets."""
        targets = [TeacherTargets(None, None) for _ in batches]
        if self.has_targets:
            with self.clock.stage("teacher"):
                targets = self.teacher_targets([self.teacher_outputs(images) for images in batches], teacher_temp)
        if self.do_metadata:
            values = all_gather_rows(torch.cat([images["metadata"] for images in batches]))  # [W*A*B], as BatchFeatures
            for target in targets:
                target.metadata = values
        return targets

    def to_device(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a batch dict's tensors to the training device."""
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in images.items()}

    @torch.no_grad()
    def teacher_outputs(self, images: Mapping[str, Any]) -> TeacherOutputs:
        """Compute the teacher's CLS tokens and logits on the unmasked global crops.

        CLS tokens [2B, D]; CLS logits [2B, K], the two views swapped as each predicts the other; patch logits [M, K] of
        the masked patches.
        """
        tokens = self._backbone("teacher", images["collated_global_crops"])
        first, second = tokens["x_norm_clstoken"].chunk(N_GLOBAL_CROPS)
        other_view = torch.cat([second, first])  # [2B, D]: each view predicts the other one
        patches = self._masked_patches(tokens, images)  # [M, D]
        cls_logits, patch_logits = self._heads("teacher", other_view, patches, with_logits=True)
        return TeacherOutputs(tokens["x_norm_clstoken"], cls_logits, patch_logits, images["n_masked_patches"])

    @torch.no_grad()
    def teacher_targets(self, outputs: Sequence[TeacherOutputs], teacher_temp: float) -> list[TeacherTargets]:
        """Compute the teacher's targets for each micro-batch, and set `self.statistics`.

        Targets are sharpened assignments to prototypes, None for a loss that is off. Centering prevents a collapse; it
        sees all micro-batches of the step together.
        """
        n, centering = len(outputs), self.cfg.train.centering
        cls_targets: Sequence[Tensor | None] = [None] * n
        patch_targets: Sequence[Tensor | None] = [None] * n
        self.statistics = feature_statistics(all_gather_rows(torch.cat([output.cls_tokens for output in outputs])))
        if self.do_dino:
            logits = _concatenate_logits([output.cls_logits for output in outputs])  # [A * 2B, K]
            targets = self.dino_loss.targets(logits, teacher_temp, centering)
            self.statistics["prototype_use"] = prototype_use(targets.argmax(dim=1), targets.shape[1])
            cls_targets = targets.chunk(n)
        if self.do_ibot:
            logits = _concatenate_logits([output.patch_logits for output in outputs])  # [M of all, K]
            n_masked = torch.stack([output.n_masked_patches for output in outputs]).sum(dim=0)  # [1]
            targets = self.ibot_patch_loss.targets(logits, teacher_temp, centering, n_masked)
            if self.counts_patch_prototypes:
                self.statistics["patch_prototype_use"] = prototype_use(targets.argmax(dim=1), targets.shape[1])
            patch_targets = targets.split([len(out.patch_logits.rows) for out in outputs if out.patch_logits])
        return [TeacherTargets(cls, patches) for cls, patches in zip(cls_targets, patch_targets, strict=True)]

    def student_step(
        self,
        images: Mapping[str, Any],
        targets: TeacherTargets,
        features: BatchFeatures | None = None,
        n_micro_batches: int = 1,
    ) -> dict[str, Tensor]:
        """Run forward and backward of one micro-batch; gradients add up to the mean over `n_micro_batches`.

        Args:
            features: of the global batch, if there are several micro-batches and a loss compares images.
        """
        with self.clock.stage("teacher"):
            frozen = self.frozen_tokens(images) if self.do_distillation else None
        with self.clock.stage("student"):
            outputs = self.student_outputs(images)
            if not self.has_targets:  # else they are the teacher's
                whole = all_gather_rows(outputs.global_cls_tokens) if features is None else features.global_rows
                self.statistics = feature_statistics(whole)
            terms = self.losses(images, targets, outputs, features, frozen)
            targets.cls = targets.patches = None  # as large as logits; backward does not need them
        with self.clock.stage("backward"):
            total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
            self.backprop_loss(total / n_micro_batches)
        return {name: loss.detach() for name, (_, loss) in terms.items()}

    def student_outputs(self, images: Mapping[str, Any]) -> StudentOutputs:
        """Run the student on masked global crops and unmasked local crops."""
        global_tokens, *local_tokens = self.student_tokens(images)
        global_cls = global_tokens["x_norm_clstoken"]  # [2B, D]
        cls_tokens = torch.cat([global_cls, *(tokens["x_norm_clstoken"] for tokens in local_tokens)])
        patches = self._masked_patches(global_tokens, images)  # [M, D]
        heads = self._heads("student", cls_tokens, patches, with_logits=False)
        compared = self.compared_tokens([global_tokens, *local_tokens])
        return StudentOutputs(global_cls, global_tokens["x_norm_patchtokens"], *heads, compared)

    @torch.no_grad()
    def frozen_tokens(self, images: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the frozen teacher on the global crops, resized to as many of its patches as the student's have."""
        crops, patch_size = images["collated_global_crops"], self.cfg.student.patch_size
        network = self.callables["frozen", "backbone"]
        assert isinstance(network, DinoVisionTransformer), "it has no gradient, so DDP does not wrap it"
        resized = resize_to_grid(crops, crops.shape[-1] // patch_size, network.patch_size)
        with self._precision("teacher", "backbone"):
            tokens: dict[str, Tensor] = network(resized, is_training=True)
        return tokens

    def student_tokens(self, images: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Run the student's backbone; return the features of the global crops and, if there are any, local crops."""
        if "seed" in images:
            torch.manual_seed(images["seed"])
        crops, masks = [images["collated_global_crops"]], [images["collated_masks"]]
        if self.n_local_crops:
            crops.append(images["collated_local_crops"])
            masks.append(None)
        tokens: list[dict[str, Tensor]] = self._backbone("student", crops, masks=masks)
        return tokens

    def compared_tokens(self, tokens: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the CLS tokens of `student_tokens` that losses compare across images, by view.

        Those of global crops [2, B, D]; with LeJEPA those of all crops, [V, B, D].
        """
        views = [each["x_norm_clstoken"] for each in tokens]
        return torch.cat(views if self.do_lejepa else views[:1]).unflatten(0, (-1, len(views[0]) // N_GLOBAL_CROPS))

    def losses(
        self,
        images: Mapping[str, Any],
        targets: TeacherTargets,
        student: StudentOutputs,
        features: BatchFeatures | None = None,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> dict[str, tuple[float, Tensor]]:
        """Compute the terms of the loss: {name: (weight in the sum, term)}.

        Names and scales are those that upstream logs: koleo_loss, smooth_rank_loss and ibot_loss are half of the summed
        terms, and the first two include their weights. LeJEPA's are invariance_loss, the mean squared distance of a
        view's projection to the mean over the image's global views, and sigreg_loss. distill_cls_loss and
        distill_patch_loss are those of `token_distance`; metadata_loss is the InfoNCE of `MetadataLoss`, for either
        mode, so a suppressed value has a growing one.

        Args:
            features: of the global batch; None to gather those of this micro-batch from all processes.
            frozen: tokens of the frozen teacher on the global crops.
        """
        dino, terms = self.cfg.dino, dict[str, tuple[float, Tensor]]()
        whole_batch = self._whole_batch(student.compared, features)  # [2, N, D], or [V, N, D] with LeJEPA
        global_views = whole_batch[:N_GLOBAL_CROPS]
        if self.do_dino:
            terms |= self._dino_terms(student, targets)
        if self.do_koleo:
            # within a view: the two views of an image should be close
            views = global_views if dino.koleo_loss_distributed else split_views(student.global_cls_tokens)
            koleo = torch.stack([self.koleo_loss(view) for view in views]).mean()
            terms["koleo_loss"] = N_GLOBAL_CROPS, dino.koleo_loss_weight * koleo
        if self.do_smooth_rank_loss:
            rank_loss = smooth_rank_loss(global_views.flatten(0, 1)) / N_GLOBAL_CROPS
            terms["smooth_rank_loss"] = N_GLOBAL_CROPS, dino.smooth_rank_loss_weight * rank_loss
        if self.do_ibot:
            terms |= self._ibot_terms(images, student, targets)
        if self.do_lejepa:
            terms |= self._lejepa_terms(whole_batch, images.get("slices_seed", 0))
        if frozen is not None:
            terms |= self._distillation_terms(student, frozen)
        if self.do_metadata:
            terms |= self._metadata_terms(global_views, targets)
        return terms

    def _dino_terms(self, student: StudentOutputs, targets: TeacherTargets) -> dict[str, tuple[float, Tensor]]:
        assert student.cls is not None and targets.cls is not None, "the DINO loss has a head"
        embeddings, prototypes = student.cls
        n_global, weight = len(student.global_cls_tokens), self.cfg.dino.loss_weight
        # Two global crops predict each other, and each of L local crops predicts both: 2 + 2L pairs
        n_pairs = N_GLOBAL_CROPS + N_GLOBAL_CROPS * self.n_local_crops
        terms = {}
        if self.n_local_crops:
            local_crops = embeddings[n_global:].chunk(self.n_local_crops)
            local_loss = self.dino_loss(local_crops, targets.cls.chunk(N_GLOBAL_CROPS), prototypes)
            terms["dino_local_crops_loss"] = weight, local_loss / n_pairs
        global_loss = N_GLOBAL_CROPS * self.dino_loss([embeddings[:n_global]], [targets.cls], prototypes)
        return terms | {"dino_global_crops_loss": (weight, global_loss / n_pairs)}

    def _ibot_terms(
        self, images: Mapping[str, Any], student: StudentOutputs, targets: TeacherTargets
    ) -> dict[str, tuple[float, Tensor]]:
        assert student.patches is not None and targets.patches is not None, "the iBOT loss has a head"
        embeddings, prototypes = student.patches
        patch_loss = self.ibot_patch_loss.forward_masked(
            embeddings,
            targets.patches,
            images["collated_masks"],
            masks_weight=images["masks_weight"],
            prototypes=prototypes,
        )
        return {"ibot_loss": (N_GLOBAL_CROPS * self.cfg.ibot.loss_weight, patch_loss / N_GLOBAL_CROPS)}

    def _lejepa_terms(self, whole_batch: Tensor, slices_seed: int) -> dict[str, tuple[float, Tensor]]:
        """Compare the projections of CLS tokens [V, N, D]."""
        with self._precision("student", "lejepa_head"):
            rows = self.callables["student", "lejepa_head"](whole_batch.flatten(0, 1))  # [V*N, d]
        projections = rows.float().unflatten(0, whole_batch.shape[:2])  # [V, N, d]
        centres = projections[:N_GLOBAL_CROPS].mean(dim=0)  # [N, d]
        invariance = (projections - centres).square().mean()
        sigreg = self.sigreg_loss(projections, slices_seed)
        weight, share = self.cfg.lejepa.loss_weight, self.cfg.lejepa.sigreg_weight
        return {"invariance_loss": (weight * (1 - share), invariance), "sigreg_loss": (weight * share, sigreg)}

    def _distillation_terms(
        self, student: StudentOutputs, frozen: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, Tensor]]:
        with self._precision("student", "distillation_head"):
            head = self.callables["student", "distillation_head"]
            cls_tokens, patch_tokens = head(student.global_cls_tokens, student.global_patch_tokens)
        weight = self.cfg.teacher.distillation_loss_weight
        return {
            "distill_cls_loss": (weight, token_distance(cls_tokens, frozen["x_norm_clstoken"])),
            "distill_patch_loss": (weight, token_distance(patch_tokens, frozen["x_norm_patchtokens"])),
        }

    def _metadata_terms(self, global_views: Tensor, targets: TeacherTargets) -> dict[str, tuple[float, Tensor]]:
        """Tell the values of images apart by their CLS tokens [2, N, D]."""
        metadata, tokens = self.cfg.train.metadata, global_views.flatten(0, 1)  # [2N, D]
        with self._precision("student", "metadata_head"):
            tokens = reverse_gradient(tokens) if metadata.mode == "suppress" else tokens
            rows = self.callables["student", "metadata_head"](tokens)  # [2N, d]
        assert targets.metadata is not None, "step_targets sets it"
        loss = self.metadata_loss(rows, targets.metadata.repeat(N_GLOBAL_CROPS))
        return {"metadata_loss": (metadata.weight, loss)}

    @property
    def compares_images(self) -> bool:
        """Return True if a loss compares features across the global batch."""
        koleo_compares = self.do_koleo and self.cfg.dino.koleo_loss_distributed
        return koleo_compares or self.do_smooth_rank_loss or self.do_lejepa or self.do_metadata

    def _whole_batch(self, own: Tensor, features: BatchFeatures | None) -> Tensor:
        """Insert this micro-batch's CLS tokens [2 or V, B, D] into those of the global batch: [2 or V, N, D].

        If no loss compares images across the global batch, return them alone.

        Averaging over n micro-batches and processes divides gradients by n, but only one of them has the gradient of
        these tokens. So it is multiplied by n here.
        """
        if not self.compares_images:
            return own
        if features is None:
            features = BatchFeatures(all_gather_rows(own.unsqueeze(0)), get_rank())
        n, index = len(features.all), features.index
        own = own + (n - 1) * (own - own.detach())
        parts = [*features.all[:index], own, *features.all[index + 1 :]]
        return torch.cat([part.to(own.dtype) for part in parts], dim=1)

    def backprop_loss(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, which is scaled if the student computes in fp16."""
        (loss if self.fp16_scaler is None else self.fp16_scaler.scale(loss)).backward()

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """Update every parameter that learns: teacher <- m * teacher + (1 - m) * student; and the metadata's bank."""
        if self.do_metadata:
            self.metadata_loss.update_bank()
        pairs = [
            pair
            for name, network in self.teacher.items()
            for pair in zip(network.parameters(), self.student[name].parameters(), strict=True)
        ]
        learning = [(teacher, student) for teacher, student in pairs if student.requires_grad]
        lerp_([teacher for teacher, _ in learning], [student for _, student in learning], 1.0 - m)

    def apply_center_updates(self) -> None:
        """Apply queued updates of the moving centers, so that a checkpoint includes them."""
        for loss in (getattr(self, "dino_loss", None), getattr(self, "ibot_patch_loss", None)):
            if loss is not None:
                loss.apply_center_update()

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups of each sub-network of the student, see train/optimizer.py."""
        groups: list[dict[str, Any]] = []
        for name, module in self.student.items():
            of_module = fuse_params_groups(
                get_params_groups_with_decay(module, self.cfg.optim.layerwise_decay, self.cfg.optim.patch_embed_lr_mult)
            )
            for group in of_module:
                group["lr_multiplier"] *= METADATA_LR_MULTIPLIER if name == "metadata_head" else 1.0
            groups += of_module
        return groups

    def _backbone(self, role: str, crops: Any, **kwargs: Any) -> Any:
        frozen = role == "student" and self.backbone_is_frozen
        with self._precision(role, "backbone"), torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            tokens = self.callables[role, "backbone"](crops, is_training=True, **kwargs)
        if frozen:
            reshard(self.student["backbone"])  # without a backward, nothing else frees the gathered weights
        return tokens

    def _heads(
        self, role: str, cls_tokens: Tensor, patches: Tensor, *, with_logits: bool
    ) -> tuple[HeadOutput | None, HeadOutput | None]:
        """Apply the heads to CLS tokens and masked patches, if a loss needs them; a shared head is called once."""

        def head(name: str, tokens: Tensor) -> HeadOutput:
            with self._precision(role, name):
                out = self.callables[role, name](tokens, with_logits=with_logits)
            return HeadOutput(out) if with_logits else HeadOutput(*out)

        if self.do_ibot and not self.ibot_separate_head:
            rows, prototypes = head("dino_head", torch.cat([cls_tokens, patches]))
            cls_rows, patch_rows = rows.split([len(cls_tokens), len(patches)])
            return HeadOutput(cls_rows, prototypes) if self.do_dino else None, HeadOutput(patch_rows, prototypes)
        return (
            head("dino_head", cls_tokens) if self.do_dino else None,
            head("ibot_head", patches) if self.do_ibot else None,
        )

    def _masked_patches(self, tokens: Mapping[str, Tensor], images: Mapping[str, Any]) -> Tensor:
        """Select the masked patch tokens [M, D]; none if there is no iBOT loss."""
        indices: Tensor = images["mask_indices_list"]
        return tokens["x_norm_patchtokens"].flatten(0, 1).index_select(0, indices if self.do_ibot else indices[:0])

    def _precision(self, role: str, part: str) -> torch.autocast:
        name = self.cfg.compute_precision[role][part].mixed_precision.param_dtype
        return autocast(name, self.device.type)


def split_views(cls_tokens: Tensor) -> Tensor:
    """Reshape CLS tokens [2B, D] to [2, B, D]."""
    return cls_tokens.unflatten(0, (N_GLOBAL_CROPS, -1))


def _concatenate_logits(outputs: Sequence[HeadOutput | None]) -> Tensor:
    """Concatenate the logits of all micro-batches, without a copy if there is only one."""
    logits = [output.rows for output in outputs if output is not None]
    return logits[0] if len(logits) == 1 else torch.cat(logits)
