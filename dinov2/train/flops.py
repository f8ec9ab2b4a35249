"""How much arithmetic a training step is, and how much the device could do: the two sides of its utilisation.

Counted are the products of matrices, 2 operations for each multiplication and its addition: patch embedding, blocks,
heads and prototypes, forward for teacher and student and backward for the student. The rest of a step (norms,
activations, losses, Sinkhorn-Knopp, optimizer) takes time, but is about a hundredth of the arithmetic.

The count is of the work that the recipe asks for, whatever the implementation does: all tokens go through all blocks,
also where no loss reads what the last block makes of them; activations that are computed again in backward, and
features that accumulation computes ahead, count once. So images/s and utilisation of two implementations compare alike,
and an implementation that leaves out work nobody needs may show more than it really computed. Stochastic depth is part
of the recipe: a branch counts for the samples that take it.

Dimension key:  B pictures that this process has in a step, L local crops, N tokens of a crop, P patches of a crop,
                M masked patches, D embedding dim
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.distributed import get_world_size
from dinov2.layers.drop_path import n_kept_samples
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.ssl_meta_arch import SSLMetaArch

# Large enough for the best rate of a device, small enough for a fraction of a second
_SIDE_ON_CPU, _SIDE_ON_DEVICE = 1024, 8192
_SECONDS = 0.1  # of measuring on a CPU
_PRODUCTS_IN_ROW = 10  # on a device


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations in matrix products of one step of one process."""

    teacher: float
    student: float
    backward: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.backward


@dataclass
class _Work:
    """Adds up products in the order in which forward makes them."""

    forward: float = 0.0
    backward: float = 0.0
    has_gradient: bool = False  # whether anything learns that the next product's input depends on

    def multiply(self, weights: Iterable[tuple[str, nn.Parameter]], n_rows: float) -> None:
        """`n_rows` vectors go through each of the weight matrices, with which names are given."""
        for name, weight in weights:
            if weight.ndim > 1 and not name.endswith("weight_g"):  # that one holds the lengths of `weight_v`'s rows
                flops = 2 * n_rows * weight.numel()
                self.forward += flops
                # One product gives the gradient of the input, another one that of the weights
                self.backward += flops * (self.has_gradient + weight.requires_grad)
            self.has_gradient |= weight.requires_grad

    def attend(self, n_samples: float, n_tokens: int, dim: int) -> None:
        """Attention weights, and the sums that they weight: each has two factors, and so two gradients."""
        flops = 2 * 2 * n_samples * n_tokens**2 * dim
        self.forward += flops
        self.backward += 2 * flops * self.has_gradient


def count_step_flops(
    model: SSLMetaArch, n_masked: float | None = None, *, backbone_is_frozen: bool = False
) -> StepFlops:
    """The matrix products of one step of this process, of all its parts.

    Args:
        model: on any device; its configuration says how many pictures, crops and parts there are.
        n_masked: M; by default what the masks' settings give on average.
        backbone_is_frozen: as in the first `optim.freeze_backbone_iterations` steps.
    """
    cfg = model.cfg
    n_pictures = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps
    n_shares = get_world_size() * cfg.train.accumulation_steps
    sides = [(N_GLOBAL_CROPS, cfg.crops.global_crops_size)]
    if model.n_local_crops > 0:
        sides.append((model.n_local_crops, cfg.crops.local_crops_size))
    batches = [(n_crops * n_pictures, (side // cfg.student.patch_size) ** 2) for n_crops, side in sides]
    n_cls = sum(n_crops for n_crops, _ in batches)
    n_global, n_patches = batches[0]
    if not model.do_ibot:
        n_masked = 0
    elif n_masked is None:
        n_masked = n_global * n_patches * _masked_share(cfg)

    teacher = _Work()
    _add_backbone(teacher, model.teacher_backbone, batches[:1], 1)
    _add_heads(teacher, model, model.teacher, n_global, n_masked)
    student = _Work()
    backbone = model.student["backbone"]
    assert isinstance(backbone, DinoVisionTransformer), "build_model_from_cfg gives nothing else"
    _add_backbone(student, backbone, batches, n_shares)
    if backbone_is_frozen:
        student.backward, student.has_gradient = 0.0, False
    _add_heads(student, model, model.student, n_cls, n_masked)
    return StepFlops(teacher.forward, student.forward, student.backward)


def _masked_share(cfg: Any) -> float:
    """Of the patches of all global crops; the ratios of those with a mask are spread evenly over their range."""
    n_all = N_GLOBAL_CROPS * cfg.train.global_batch_size
    n_with_mask = int(n_all * cfg.ibot.mask_sample_probability)
    return n_with_mask / n_all * sum(cfg.ibot.mask_ratio_min_max) / 2


def _add_backbone(work: _Work, backbone: DinoVisionTransformer, batches: list[tuple[int, int]], n_shares: int) -> None:
    """`batches`: (crops, P) of each size of crops."""
    work.multiply(backbone.patch_embed.named_parameters(), sum(n_crops * n_patches for n_crops, n_patches in batches))
    work.has_gradient |= any(parameter.requires_grad for parameter in backbone.parameters(recurse=False))
    n_more = 1 + backbone.num_register_tokens
    for block in backbone.each_block():
        rate = getattr(block, "sample_drop_ratio", 0.0) if block.training else 0.0
        # (samples that take a branch, N)
        taken = [
            (n_crops * n_kept_samples(n_crops * n_shares, rate) / (n_crops * n_shares), n_patches + n_more)
            for n_crops, n_patches in batches
        ]
        n_rows = sum(n_samples * n_tokens for n_samples, n_tokens in taken)
        for name, part in block.named_children():
            if name != "attn":
                work.multiply(part.named_parameters(), n_rows)
                continue
            work.multiply(_inside(part, "qkv"), n_rows)
            for n_samples, n_tokens in taken:
                work.attend(n_samples, n_tokens, backbone.embed_dim)
            work.multiply(_inside(part, "proj"), n_rows)


def _inside(attention: nn.Module, layer: str) -> Iterable[tuple[str, nn.Parameter]]:
    """Weights of one of the attention's two layers, adapters included."""
    return ((name, weight) for name, weight in attention.named_parameters() if name.startswith(f"{layer}."))


def _add_heads(work: _Work, model: SSLMetaArch, networks: nn.ModuleDict, n_cls: int, n_masked: float) -> None:
    features_learn = work.has_gradient
    rows = {name: 0.0 for name in networks if name != "backbone"}
    if model.do_dino:
        rows["dino_head"] += n_cls
    if model.do_ibot:
        rows["ibot_head" if model.ibot_separate_head else "dino_head"] += n_masked
    for name, n_rows in rows.items():
        work.has_gradient = features_learn
        work.multiply(networks[name].named_parameters(), n_rows)


@torch.no_grad()
def measured_matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """The best rate, in FLOP/s, at which the device multiplies large square matrices.

    A measurement and not the data sheet's number: it has this machine's clock, cores and libraries in it, and the
    precision that float32 products are set to. It takes less than half a second on a CPU and some hundredths of one on
    a GPU, whose clock may fall when it has to keep that up.

    Args:
        device: cpu or cuda.
        dtype: of the factors, and of the product.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    side = _SIDE_ON_DEVICE * 2 // dtype.itemsize if is_cuda else _SIDE_ON_CPU
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    # Numbers as they occur in training: a GPU multiplies zeros at a higher clock
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    with torch.autocast(device.type, enabled=False):
        seconds = _seconds_on_cuda(a, b, out) if is_cuda else _seconds_on_cpu(lambda: torch.mm(a, b.T, out=out))
    return 2 * side**3 / seconds


def _seconds_on_cpu(product: Callable[[], Tensor]) -> float:
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() + best < ends:
        started = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - started)
    return best


def _seconds_on_cuda(a: Tensor, b: Tensor, out: Tensor) -> float:
    best = float("inf")
    for _ in range(3):  # the first time also chooses a kernel
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(a.device))
        for _ in range(_PRODUCTS_IN_ROW):
            torch.mm(a, b.T, out=out)
        end.record(torch.cuda.current_stream(a.device))
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / _PRODUCTS_IN_ROW)
    return best
