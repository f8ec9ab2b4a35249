"""Student and teacher, and one step of self-distillation between them: DINO + iBOT + KoLeo (DINOv2, arXiv 2304.07193).

A step's batch is spread over W processes, and over A parts that a process takes one after the other (gradient
accumulation). Neither changes the loss: what compares pictures with each other sees the whole batch of all W x A parts.
Sinkhorn-Knopp balances the teacher's logits of all parts together, and centering moves by their mean, for which the
teacher runs over all parts before the student starts; KoLeo finds each feature's neighbour among the features of all
parts (with dino.koleo_loss_distributed: false within each part, as upstream does within each GPU). Everything else is
a mean over pictures, and the parts' gradients are averaged.

Dimension key:  A parts of this process, W processes, B images in a part, L local crops, P patches per global crop,
                M masked patches in a part, D embedding dim, K prototypes of a head
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.distributed import all_gather_rows, get_rank, get_world_size, is_enabled, is_main_process
from dinov2.fsdp.precision import autocast, resolve_dtype
from dinov2.fsdp.sharding import SHARDED, lerp_, make_mesh, replicate, reshard, shard, whole, without_gradient_sync
from dinov2.hub.adapters import lora_scaling, merged
from dinov2.layers import DINOHead
from dinov2.layers.drop_path import BatchShare, batch_share
from dinov2.logging.step_clock import StepClock
from dinov2.loss import DINOLoss, KoLeoLoss, Targets, iBOTPatchLoss, prototype_cross_entropy, smooth_rank_loss
from dinov2.models import architecture, build_backbone, build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.compiling import check_compilable, compile_blocks, fill_up, most_masked_patches
from dinov2.train.finetuning import limit_learning
from dinov2.train.health import feature_statistics, prototype_use
from dinov2.train.optimizer import LossScaler
from dinov2.train.param_groups import fuse_params_groups, get_params_groups_with_decay
from dinov2.train.pretrained import start_from_weights
from dinov2.utils.memory import trim_heap

logger = logging.getLogger("dinov2")


@dataclass
class TeacherTargets:
    """What the student has to predict; rows sum to 1."""

    cls: Tensor | None  # [2, B, K]: entry v is the target for view v, made from the other view
    patches: Targets | None  # of M rows


@dataclass
class StudentOutputs:
    """What the student's backbone says, before the heads."""

    global_cls_tokens: Tensor  # [2B, D]
    local_cls_tokens: Tensor | None  # [L*B, D]
    masked_patches: Tensor  # [M, D]


class SSLMetaArch(nn.Module):
    """The two networks and their losses.

    `student` and `teacher` are ModuleDicts of `backbone`, `dino_head` and, with `ibot.separate_head`, `ibot_head`. They
    start equal; the teacher gets no gradient and follows by `update_teacher`. What of the student's backbone learns,
    and how, is in train/finetuning.py; while `backbone_is_frozen`, it gives features and gets no gradient either.

    Args:
        load_weights: start from the weights that `cfg` names; False where a checkpoint replaces them at once.
    """

    def __init__(self, cfg: Any, load_weights: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_smooth_rank_loss = cfg.dino.smooth_rank_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0 and cfg.ibot.mask_sample_probability > 0
        self.ibot_separate_head = self.do_ibot and cfg.ibot.separate_head
        self.n_local_crops = cfg.crops.local_crops_number

        student_backbone, teacher_backbone, embed_dim = build_model_from_cfg(cfg)
        self.student = nn.ModuleDict({"backbone": student_backbone, **self._build_heads(embed_dim)})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **self._build_heads(embed_dim)})
        if load_weights:
            start_from_weights(self.student, cfg)
        limit_learning(student_backbone, teacher_backbone, cfg.student)
        self.lora_scaling = lora_scaling(cfg.student)
        self.backbone_is_frozen = False
        self.uses_graphs = cfg.train.compile_blocks == "graphs"
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

        if self.do_dino:
            self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        if self.do_koleo:
            self.koleo_loss = KoLeoLoss()
        if self.do_ibot:
            head = cfg.ibot if self.ibot_separate_head else cfg.dino
            self.ibot_patch_loss = iBOTPatchLoss(head.head_n_prototypes)
        blocks = list(student_backbone.each_block())
        # From the first one on, whose inner values would stay the longest: when backward computes them again, those of
        # all later blocks are gone. Of the last blocks they would come on top of what the first ones keep.
        for block in blocks[: math.ceil(round(cfg.train.activation_checkpointing * len(blocks), 6))]:
            block.checkpoint_activations = True  # type: ignore[assignment]
        self.fp16_scaler: LossScaler | None = None
        if cfg.compute_precision.grad_scaler and self._computes_in_fp16():
            self.fp16_scaler = LossScaler()
        self.clock = StepClock("cpu")  # is told where a step's time goes; a loop sets one for its device
        self.statistics: dict[str, Tensor] = {}  # of the last step's teacher: 0-d, on the device
        # What forward calls: the networks themselves, or DDP around them
        self._callable: dict[tuple[str, str], nn.Module] = {
            (role, part): module
            for role, networks in (("student", self.student), ("teacher", self.teacher))
            for part, module in networks.items()
        }
        self.train()

    def prepare_for_distributed_training(self, n_nodes: int = 1) -> None:
        """Compile the networks, and spread them over the processes, as `train.compile_blocks` and
        `compute_precision.*.*.sharding_strategy` say.

        To be called on the training device, before the optimizer is built.

        Raises:
            ValueError: `train.compile_blocks` does not go with other settings or this machine.
        """
        check_compilable(self.cfg, self.device, get_world_size())
        if self.cfg.train.compile_blocks != "none":
            backbones = [networks["backbone"] for networks in (self.student, self.teacher)]
            compile_blocks(backbones, with_graphs=self.uses_graphs)  # type: ignore[arg-type]
        if not is_enabled():
            return
        device_type = self.device.type
        for (role, part), module in self._callable.items():
            settings = self.cfg.compute_precision[role][part]
            reduce_dtype = resolve_dtype(settings.mixed_precision.reduce_dtype, device_type)
            if settings.sharding_strategy in SHARDED:
                shard(
                    module,
                    module.each_block() if isinstance(module, DinoVisionTransformer) else (),
                    mesh=make_mesh(settings.sharding_strategy, device_type, n_nodes),
                    param_dtype=resolve_dtype(settings.mixed_precision.param_dtype, device_type),
                    reduce_dtype=reduce_dtype,
                    # The teacher has no backward after which its weights would be freed, and changes in between
                    reshard_after_forward=role == "teacher" or settings.sharding_strategy != "SHARD_GRAD_OP",
                )
            elif role == "student":
                self._callable[role, part] = replicate(module, reduce_dtype=reduce_dtype)

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

    @property
    def matmul_dtype(self) -> torch.dtype:
        """What the student's backbone multiplies matrices in."""
        name = self.cfg.compute_precision.student.backbone.mixed_precision.param_dtype
        return resolve_dtype(name, self.device.type)

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward_backward(
        self, images: Mapping[str, Any] | Sequence[Mapping[str, Any]], teacher_temp: float
    ) -> dict[str, Tensor]:
        """One step's losses, and their gradients in the student's parameters.

        Args:
            images: batch dict of `dinov2.data.collate`, or A of them: collated_global_crops [2B, 3, S, S] with the
                first views in front, collated_local_crops [L*B, 3, s, s] (absent for L = 0), collated_masks [2B, P],
                mask_indices_list [M], masks_weight [M], n_masked_patches [1]; optionally, for the stochastic depth,
                seed and share (a BatchShare).
            teacher_temp: temperature of the teacher's targets.

        Returns:
            detached scalars, means over this process's pictures, under upstream's keys and as upstream shows them:
            `koleo_loss` and `ibot_loss` are half of what is summed, and none but KoLeo and the smooth rank carries its
            weight.
        """
        parts = [images] if isinstance(images, Mapping) else list(images)
        parts = [self._on_device(part) for part in parts]
        with self.clock.stage("teacher"):
            targets = self.teacher_targets(parts, teacher_temp)
        with self.clock.stage("student"):
            everyone = self._features_ahead(parts) if len(parts) > 1 and self.compares_pictures else None
        means: dict[str, Tensor] = {}
        for number, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with ExitStack() as stack:
                stack.enter_context(batch_share(part.get("share", BatchShare())))
                if number < len(parts) - 1:
                    for module in self._callable.values():
                        stack.enter_context(without_gradient_sync(module))
                with self.clock.stage("student"):
                    outputs = self.student_outputs(part)
                    if self.device.type == "cpu":
                        trim_heap()  # the step's peak comes next; what the teacher left in pieces would add to it
                    others = self._others(outputs, everyone, number, len(parts))
                    total, shown = self.losses(target, outputs, part, others)
                with self.clock.stage("backward"):
                    self.backprop_loss(total / len(parts))
            for name, value in shown.items():
                share = value.detach() / len(parts)
                means[name] = means[name] + share if name in means else share
        return means

    def _on_device(self, part: Mapping[str, Any]) -> dict[str, Any]:
        device = self.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in part.items()}

    @torch.no_grad()
    def teacher_targets(self, parts: Sequence[Mapping[str, Any]], teacher_temp: float) -> list[TeacherTargets]:
        """Assignments of the unmasked global crops to prototypes, sharpened and kept from collapsing by centering.

        The logits of all parts are balanced together: they are kept at once, which is what accumulation costs.
        """
        cls_tokens, cls_logits, patch_logits = [], [], []
        for part in parts:
            tokens = self._backbone("teacher", part["collated_global_crops"], patch_indices=self._masked_patches(part))
            first, second = tokens["x_norm_clstoken"].chunk(N_GLOBAL_CROPS)
            other_view = torch.cat([second, first])  # [2B, D]: each view is predicted from the other
            of_cls, of_patches = self._teacher_logits(other_view, self._of_masked(tokens, part))
            cls_tokens.append(tokens["x_norm_clstoken"])
            cls_logits.append(of_cls)
            patch_logits.append(of_patches)

        n_patches = [len(logits) for logits in patch_logits if logits is not None]
        cls = self._cls_targets(_joined(cls_logits), teacher_temp)
        patches = self._patch_targets(_joined(patch_logits), parts, teacher_temp)
        self.statistics = feature_statistics(all_gather_rows(torch.cat(cls_tokens)))
        if cls is not None:
            self.statistics["prototype_use"] = prototype_use(cls.argmax(dim=1), cls.shape[1])
        if patches is not None:
            self.statistics["patch_prototype_use"] = prototype_use(patches.choices(), patches.mass.shape[1])
        of_parts = []
        for number in range(len(parts)):
            start = sum(n_patches[:number])
            of_parts.append(
                TeacherTargets(
                    None if cls is None else cls.chunk(len(parts))[number].unflatten(0, (N_GLOBAL_CROPS, -1)),
                    None if patches is None else patches[start : start + n_patches[number]],
                )
            )
        return of_parts

    def _cls_targets(self, logits: Tensor | None, teacher_temp: float) -> Tensor | None:
        """[A*2B, K] to the same shape."""
        if logits is None:
            return None
        if self.cfg.train.centering == "sinkhorn_knopp":
            return self.dino_loss.sinkhorn_knopp_teacher(logits, teacher_temp)
        targets = self.dino_loss.softmax_center_teacher(logits, teacher_temp)
        self.dino_loss.update_center(logits)
        return targets

    def _patch_targets(
        self, logits: Tensor | None, parts: Sequence[Mapping[str, Any]], teacher_temp: float
    ) -> Targets | None:
        """Of logits [M of all parts, K], which are not to be used any more."""
        if logits is None:
            return None
        if self.cfg.train.centering == "sinkhorn_knopp":
            n_masked = torch.stack([part["n_masked_patches"] for part in parts]).sum(dim=0)  # [1]
            return self.ibot_patch_loss.balance_teacher_(logits, teacher_temp, n_masked_patches_tensor=n_masked)
        batch = logits.unsqueeze(0)  # [1, M, K]
        targets = self.ibot_patch_loss.softmax_center_teacher(batch, teacher_temp).squeeze(0)
        self.ibot_patch_loss.update_center(batch)
        return Targets(targets)

    def student_outputs(self, images: Mapping[str, Any]) -> StudentOutputs:
        """The student sees the global crops with masks and the local crops without."""
        global_tokens, local_tokens = self._student_tokens(images, self.n_local_crops > 0)
        return StudentOutputs(
            global_tokens["x_norm_clstoken"],
            None if local_tokens is None else local_tokens["x_norm_clstoken"],
            self._of_masked(global_tokens, images),
        )

    def _student_tokens(
        self, images: Mapping[str, Any], with_local_crops: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        if "seed" in images:
            torch.manual_seed(images["seed"])
        global_crops, masks = images["collated_global_crops"], images["collated_masks"]
        masked = self._masked_patches(images)
        if not with_local_crops:
            return self._backbone("student", global_crops, masks=masks, patch_indices=masked), None
        crops = [global_crops, images["collated_local_crops"]]
        global_tokens, local_tokens = self._backbone(
            "student", crops, masks=[masks, None], patch_indices=[masked, masked[:0]]
        )
        return global_tokens, local_tokens

    @property
    def compares_pictures(self) -> bool:
        """Whether a loss compares features across the whole batch."""
        return self.do_smooth_rank_loss or (self.do_koleo and self.cfg.dino.koleo_loss_distributed)

    @torch.no_grad()
    def _features_ahead(self, parts: Sequence[Mapping[str, Any]]) -> Tensor:
        """CLS tokens of all parts of all processes, before the step proper: [W*A, 2, B, D]. Costs a forward pass."""
        # Stochastic depth draws for all crops in turn, so the local ones have to be there to draw the same
        draws = self.cfg.student.drop_path_rate > 0 or (self.lora_scaling > 0 and self.cfg.student.lora.dropout > 0)
        with_local_crops = self.n_local_crops > 0 and draws
        features = []
        for part in parts:
            with batch_share(part.get("share", BatchShare())):
                tokens, _ = self._student_tokens(part, with_local_crops)
            features.append(tokens["x_norm_clstoken"].unflatten(0, (N_GLOBAL_CROPS, -1)))
        return all_gather_rows(torch.stack(features))

    def _others(self, outputs: StudentOutputs, everyone: Tensor | None, number: int, n_parts: int) -> Tensor | None:
        """Features of all parts of all processes but part `number` of this one: [W*A - 1, 2, B, D], no gradient."""
        if not self.compares_pictures:
            return None
        if everyone is None:  # there is one part, and its features are these
            own_features = outputs.global_cls_tokens.unflatten(0, (N_GLOBAL_CROPS, -1))
            everyone = all_gather_rows(own_features.unsqueeze(0))
        own = get_rank() * n_parts + number
        return torch.cat([everyone[:own], everyone[own + 1 :]])

    def losses(
        self, targets: TeacherTargets, outputs: StudentOutputs, images: Mapping[str, Any], others: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate, and the terms as they are shown.

        Args:
            targets: used up by this; their memory is free afterwards.
            others: [W*A - 1, 2, B, D] features of the rest of the batch, where a loss compares pictures.
        """
        total = outputs.global_cls_tokens.new_zeros((), dtype=torch.float32)
        shown: dict[str, Tensor] = {}
        weights = self.cfg.dino
        cross_entropy, cls_losses, patch_losses = self._cross_entropies(targets, outputs, images)
        targets.cls = targets.patches = None
        total = total + cross_entropy
        if self.do_dino:
            n_global = len(outputs.global_cls_tokens)
            share = 1 / self._n_cls_rows(outputs)
            if outputs.local_cls_tokens is not None:
                shown["dino_local_crops_loss"] = cls_losses[n_global:].sum() * share
            shown["dino_global_crops_loss"] = cls_losses[:n_global].sum() * share
        if self.do_koleo:
            # Within a view: the two views of a picture are meant to be near
            if weights.koleo_loss_distributed:
                assert others is not None, "losses() needs the rest of the batch"
                koleo = _of_the_whole_batch(self._koleo_of_views, outputs.global_cls_tokens, others)
            else:
                koleo = self._koleo_of_views(outputs.global_cls_tokens.unflatten(0, (N_GLOBAL_CROPS, -1)))
            koleo = weights.koleo_loss_weight * koleo
            shown["koleo_loss"] = koleo / N_GLOBAL_CROPS
            total = total + koleo
        if self.do_smooth_rank_loss:
            assert others is not None, "losses() needs the rest of the batch"
            rank_loss = weights.smooth_rank_loss_weight * _of_the_whole_batch(
                lambda views: smooth_rank_loss(views.flatten(0, 1)), outputs.global_cls_tokens, others
            )
            shown["smooth_rank_loss"] = rank_loss / N_GLOBAL_CROPS
            total = total + rank_loss
        if self.do_ibot:
            n_crops = len(outputs.global_cls_tokens)
            shown["ibot_loss"] = (patch_losses * images["masks_weight"]).sum() / n_crops / 2
        return total, shown

    def _n_cls_rows(self, outputs: StudentOutputs) -> int:
        """By how much the cross-entropies of CLS predictions are divided: two views predict each other, and each of L
        local crops predicts both, so 2 + 2L means over B pictures share the loss. A local crop's two are one row."""
        n_terms = N_GLOBAL_CROPS + N_GLOBAL_CROPS * self.n_local_crops
        return n_terms * len(outputs.global_cls_tokens) // N_GLOBAL_CROPS

    def _cross_entropies(
        self, targets: TeacherTargets, outputs: StudentOutputs, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What DINO and iBOT add to the loss, and the cross-entropies of CLS tokens [2B + L*B] and patches [M]."""
        cls_rows, cls_targets = outputs.global_cls_tokens[:0], []
        if self.do_dino:
            assert targets.cls is not None, "the teacher gave no CLS targets"
            cls_rows, cls_targets = outputs.global_cls_tokens, [Targets(targets.cls.flatten(0, 1))]
            if outputs.local_cls_tokens is not None:
                cls_rows = torch.cat([cls_rows, outputs.local_cls_tokens])
                # Targets meet predictions in sums of products alone, so those of both views can be added up first
                cls_targets += [Targets(targets.cls.sum(dim=0))] * self.n_local_crops
        patch_rows, patch_targets = outputs.masked_patches[:0], []
        if self.do_ibot:
            assert targets.patches is not None, "the teacher gave no patch targets"
            patch_rows, patch_targets = outputs.masked_patches, [targets.patches]
        device = cls_rows.device
        cls_weights = torch.full((len(cls_rows),), self.cfg.dino.loss_weight / self._n_cls_rows(outputs), device=device)
        n_crops = len(outputs.global_cls_tokens)
        patch_weights = images["masks_weight"][: len(patch_rows)] * (self.cfg.ibot.loss_weight / n_crops)

        if not self.ibot_separate_head:
            total, losses = self._scored(
                *("dino_head", torch.cat([cls_rows, patch_rows]), [*cls_targets, *patch_targets]),
                torch.cat([cls_weights, patch_weights]),
                self.dino_loss if self.do_dino else self.ibot_patch_loss,
            )
            return total, losses[: len(cls_rows)], losses[len(cls_rows) :]
        total, patch_losses = self._scored("ibot_head", patch_rows, patch_targets, patch_weights, self.ibot_patch_loss)
        patch_targets.clear()  # as large as all patches' logits: neither the other head nor backward is to wait with it
        targets.patches = None
        cls_losses = patch_losses[:0]
        if self.do_dino:
            of_cls, cls_losses = self._scored("dino_head", cls_rows, cls_targets, cls_weights, self.dino_loss)
            total = total + of_cls
        return total, cls_losses, patch_losses

    def _scored(
        self, head: str, tokens: Tensor, targets: Sequence[Targets], weights: Tensor, loss: DINOLoss | iBOTPatchLoss
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies of a student head's predictions for tokens [N, D], and each: [N]."""

        def score(embedding: Tensor, direction: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
            return prototype_cross_entropy(embedding, direction, length, targets, weights, loss.student_temp)

        with self._precision("student", head):
            scored: tuple[Tensor, Tensor] = self._callable["student", head](tokens, score)
        return scored

    def _koleo_of_views(self, views: Tensor) -> Tensor:
        """Sum over views [2, N, D] of the loss of each."""
        return torch.stack([self.koleo_loss(view) for view in views]).sum()

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss`, scaled where the student computes in fp16."""
        (loss if self.fp16_scaler is None else self.fp16_scaler.scale(loss)).backward()

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """teacher <- m * teacher + (1 - m) * student, for every parameter that learns."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        learning = [(teacher, student) for teacher, student in pairs if student.requires_grad]
        lerp_([teacher for teacher, _ in learning], [student for _, student in learning], 1.0 - m)

    @torch.no_grad()
    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher put together from its shards, fp32 on the CPU; every process has to ask, the main one gets it.

        Adapters are merged: these are a plain network's tensors.
        """
        state = {}
        for name, value in self.teacher.state_dict().items():
            tensor = whole(value)
            if is_main_process():
                state[name] = tensor.detach().to("cpu", torch.float32)
        return merged(state, self.lora_scaling)

    @torch.no_grad()
    def whole_teacher_backbone(self) -> DinoVisionTransformer:
        """The teacher's backbone as a network that one process can use alone; every process has to ask for it."""
        backbone = self.teacher_backbone
        is_sharded = any(isinstance(parameter, DTensor) for parameter in backbone.parameters())
        is_compiled = self.cfg.train.compile_blocks != "none"  # for the batches of training alone
        if not (is_sharded or is_compiled or self.lora_scaling):
            return backbone
        copy = build_backbone(architecture(backbone)).to(self.device).requires_grad_(False)
        state = {name: whole(value) for name, value in backbone.state_dict().items()}
        copy.load_state_dict(merged(state, self.lora_scaling))
        return copy.eval()

    def apply_center_updates(self) -> None:
        """Finish the moving centers that still wait for their update, so that a checkpoint holds them."""
        for loss in (getattr(self, "dino_loss", None), getattr(self, "ibot_patch_loss", None)):
            if loss is not None:
                loss.apply_center_update()

    def get_params_groups(self) -> list[dict[str, Any]]:
        """What of the student learns, for the optimizer: groups of each sub-network, see train/param_groups.py."""
        groups: list[dict[str, Any]] = []
        for module in self.student.values():
            groups += fuse_params_groups(
                get_params_groups_with_decay(module, self.cfg.optim.layerwise_decay, self.cfg.optim.patch_embed_lr_mult)
            )
        return groups

    def _backbone(self, role: str, crops: Any, **kwargs: Any) -> Any:
        rests = role == "student" and self.backbone_is_frozen
        if self.uses_graphs:  # what earlier calls left in the graphs' memory has been read: the last norm copies it
            torch.compiler.cudagraph_mark_step_begin()
        with self._precision(role, "backbone"), torch.set_grad_enabled(torch.is_grad_enabled() and not rests):
            tokens = self._callable[role, "backbone"](crops, is_training=True, **kwargs)
        if rests:
            reshard(self.student["backbone"])  # no backward will
        return tokens

    def _masked_patches(self, images: Mapping[str, Any]) -> Tensor:
        """Which of the 2B * P patches a loss reads: [M], none without iBOT; with some more behind them where their
        number must be the same in each step."""
        indices: Tensor = images["mask_indices_list"]
        if not self.do_ibot:
            return indices[:0]
        if self.uses_graphs:
            return fill_up(indices, most_masked_patches(images, self.cfg.ibot.mask_ratio_min_max[1]))
        return indices

    def _of_masked(self, tokens: Mapping[str, Tensor], images: Mapping[str, Any]) -> Tensor:
        """The patch tokens [M, D] of `_masked_patches`, without what may stand behind them."""
        patch_tokens = tokens["x_norm_patchtokens"]
        return patch_tokens[: len(images["mask_indices_list"])] if self.uses_graphs else patch_tokens

    def _teacher_logits(self, cls_tokens: Tensor, masked_patches: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of CLS tokens and of masked patches; a shared head sees both in one call."""
        if self.do_ibot and not self.ibot_separate_head:
            with self._precision("teacher", "dino_head"):
                logits = self._callable["teacher", "dino_head"](torch.cat([cls_tokens, masked_patches]))
            cls_logits, patch_logits = logits.split([len(cls_tokens), len(masked_patches)])
            return (cls_logits if self.do_dino else None), patch_logits
        cls_logits = patch_logits = None
        if self.do_dino:
            with self._precision("teacher", "dino_head"):
                cls_logits = self._callable["teacher", "dino_head"](cls_tokens)
        if self.do_ibot:
            with self._precision("teacher", "ibot_head"):
                patch_logits = self._callable["teacher", "ibot_head"](masked_patches)
        return cls_logits, patch_logits

    def _precision(self, role: str, part: str) -> torch.autocast:
        name = self.cfg.compute_precision[role][part].mixed_precision.param_dtype
        return autocast(name, self.device.type)


def _joined(logits: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all parts; a lone part is not copied."""
    present = [part for part in logits if part is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return torch.cat(present)


def _of_the_whole_batch(loss: Callable[[Tensor], Tensor], own_features: Tensor, others: Tensor) -> Tensor:
    """`loss` of the features [2, N, D] of all parts, with the gradient that this part's own rows [2B, D] owe to it.

    Averaging over the n parts divides that gradient by n, though each part has only its own rows' share of it: so the
    gradient is taken n times, and the value once.
    """
    own = own_features.unflatten(0, (N_GLOBAL_CROPS, -1)).unsqueeze(0)  # [1, 2, B, D]
    everyone = torch.cat([own, others.to(own.dtype)])  # [n, 2, B, D]
    value = loss(everyone.transpose(0, 1).flatten(1, 2))  # of [2, n*B, D]
    return value.detach() + len(everyone) * (value - value.detach())
