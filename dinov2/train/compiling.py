"""Transformer blocks by torch.compile and as CUDA graphs, as `train.compile_blocks` says.

none    as they are
blocks  compiled, each for itself: blocks that are alike share what was compiled, a few graphs for any depth
graphs  the same, and on CUDA the kernels that a block starts are recorded once and then started together

With stochastic depth a block's two branches are compiled in its place: who skips them is drawn on the host between
them, and rates that differ from block to block would make as many graphs. Activations that are computed again in
backward are so within what is compiled, where the compiler sees both passes.

A recorded graph takes tensors of the same shapes at the same addresses each time. Shapes differ between steps in one
place, the last block's masked patches: they are filled up to a number that no step exceeds, by rows that are cut off
right after the backbone, since Sinkhorn-Knopp would balance them as if they were real.

Nothing here changes a result by more than rounding. (Dropout in LoRA's adapters draws other numbers when compiled.)

Dimension key:  B images, P patches per global crop, M masked patches in the batch, T tokens, D embedding dim
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinov2.layers.block import Block, Shapes
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.compilers import obstacle_to_compiling

logger = logging.getLogger("dinov2")

BACKEND: Any = "inductor"
# Graphs of one function that torch.compile keeps; beyond, it goes on without compiling. Student and teacher, frozen
# and learning blocks, with and without chosen rows, each in a few shapes, come to a dozen or two; the default is 8.
RECOMPILE_LIMIT = 64


def check_compilable(cfg: Any, device: torch.device, n_processes: int) -> None:
    """Refuse a `train.compile_blocks` that would fail, or do nothing, in the first step.

    Raises:
        ValueError: which setting stands against it, or what the machine lacks.
    """
    mode = cfg.train.compile_blocks
    if mode == "none":
        return
    if mode == "graphs":
        against = _obstacle_to_graphs(cfg, device, n_processes)
        if against is not None:
            raise ValueError(f"train.compile_blocks=graphs {against}")
    missing = obstacle_to_compiling(device)
    if missing is not None:
        raise ValueError(f"train.compile_blocks={mode}: {missing}. train.compile_blocks=none does without")


def _obstacle_to_graphs(cfg: Any, device: torch.device, n_processes: int) -> str | None:
    if device.type != "cuda":
        return f"records CUDA graphs, and the run is on {device.type}; set train.compile_blocks=none"
    if cfg.student.drop_path_rate > 0:
        return (
            f"needs student.drop_path_rate=0, found {cfg.student.drop_path_rate}: who skips a branch is drawn on the "
            "host, which a recorded graph does not come back to; set train.compile_blocks=blocks"
        )
    if (cfg.train.accumulation_steps or 1) > 1:
        return (
            f"needs train.accumulation_steps=1, found {cfg.train.accumulation_steps}: gradients lie in memory that the "
            "next part's graph takes again; make one part fit, or set train.compile_blocks=blocks"
        )
    strategies = {role: cfg.compute_precision[role].backbone.sharding_strategy for role in ("student", "teacher")}
    sharded = [role for role, strategy in strategies.items() if strategy != "NO_SHARD"]
    if n_processes > 1 and sharded:
        key = f"compute_precision.{sharded[0]}.backbone.sharding_strategy"
        return (
            f"needs {key}=NO_SHARD where there are several processes, found {strategies[sharded[0]]}: gathered weights "
            "lie elsewhere each time; change it, or set train.compile_blocks=blocks"
        )
    return None


def compile_blocks(backbones: Iterable[DinoVisionTransformer], with_graphs: bool) -> None:
    """Have the blocks compiled when they are next called, each kind of call once.

    To be called before the networks are spread over processes. Names in state dicts stay, and copies of a block run
    compiled with their own weights.

    Args:
        with_graphs: replay them as CUDA graphs; inputs must keep their shapes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # It would cut a large block in pieces so that DDP sends gradients in between: DDP does that between blocks, and
    # what is computed again in backward cannot be cut
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {"backend": BACKEND}
    if with_graphs:
        options |= {"mode": "reduce-overhead", "dynamic": False}
    whole = torch.compile(Block.forward, **options)
    branches = {
        (name, again): torch.compile(_computed_again(function) if again else function, **options)
        for name, function in (("_attention_branch", Block._attention_branch), ("_ffn_branch", Block._ffn_branch))
        for again in (False, True)
    }
    for backbone in backbones:
        for block in backbone.each_block():
            assert isinstance(block, Block), f"a backbone's blocks are no {type(block).__name__}"
            if block.sample_drop_ratio == 0:
                block.forward = _Compiled(block, whole, marks_rows=not with_graphs)  # type: ignore[method-assign]
                continue
            for name in ("_attention_branch", "_ffn_branch"):
                setattr(block, name, _Compiled(block, branches[name, block.checkpoint_activations]))
            block.branches_checkpoint = block.checkpoint_activations
    logger.info("torch.compile makes kernels of the blocks: the first steps take a minute or two longer")


class _Compiled:
    """A method of a block, in the method's place, by a compiled function that all blocks share.

    The module's own hooks, sharding's among them, stay outside of what is compiled.
    """

    def __init__(self, block: Block, function: Callable[..., Any], marks_rows: bool = False) -> None:
        self.block, self.function, self.marks_rows = block, function, marks_rows

    def __call__(self, x: Any, shapes: Shapes | None = None, rows: Tensor | None = None) -> Any:
        if rows is None:
            return self.function(self.block, x, shapes)
        if self.marks_rows:  # their number differs from step to step: compile for any, from the first step on
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return self.function(self.block, x, shapes, rows)


def _computed_again(branch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`branch`, whose inner values are computed again in backward instead of kept."""

    def run(block: Block, x: Tensor, shapes: Shapes) -> Tensor:
        if not torch.is_grad_enabled():
            return branch(block, x, shapes)
        out: Tensor = checkpoint(branch, block, x, shapes, use_reentrant=False)
        return out

    return run


def most_masked_patches(images: Mapping[str, Any], highest_mask_ratio: float) -> int:
    """A number that M exceeds in no batch with these settings, the same for each of them.

    Args:
        images: batch dict of `dinov2.data.collate`; its `upperbound` is that of the whole step, of all processes.
        highest_mask_ratio: the upper one of ibot.mask_ratio_min_max.
    """
    n_crops, n_patches = images["collated_masks"].shape
    return min(int(images["upperbound"]), n_crops * math.ceil(n_patches * highest_mask_ratio))


def fill_up(indices: Tensor, n: int) -> Tensor:
    """[M] to [n], with the first patch in what is added."""
    assert len(indices) <= n, f"{len(indices)} masked patches, more than the {n} that there can be"
    return F.pad(indices, (0, n - len(indices)))
