"""Distribute a network over processes: FSDP2 for sharded weights, DDP for copies.

FSDP2 (`fully_shard`) keeps parameter names and makes DTensors. The functions below, for weights outside a forward pass
(the teacher's moving average, norms, files), accept DTensors and plain tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dinov2.distributed import get_world_size

SHARDED = ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")

_COMPRESS: dict[torch.dtype, Callable[..., Any]] = {
    torch.bfloat16: default_hooks.bf16_compress_hook,
    torch.float16: default_hooks.fp16_compress_hook,
}


def make_mesh(strategy: str, device_type: str, n_nodes: int) -> DeviceMesh:
    """Arrange the processes in one dimension, or for HYBRID_SHARD as nodes (copies) x processes of a node (shards)."""
    world_size = get_world_size()
    if strategy == "HYBRID_SHARD" and n_nodes > 1:
        if world_size % n_nodes:
            raise ValueError(
                f"sharding_strategy HYBRID_SHARD needs equally many processes on each node, found {world_size} on "
                f"{n_nodes}; set FULL_SHARD instead"
            )
        return init_device_mesh(device_type, (n_nodes, world_size // n_nodes), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shard `module` in place, with each of `blocks` as its own unit, so that one block is gathered at a time.

    Args:
        param_dtype: type of the blocks' gathered weights; weights outside the blocks (embeddings, the last norm) are
            small and stay fp32, since they enter the residual stream.
        reduce_dtype: type in which gradients are summed.
        reshard_after_forward: free a unit's gathered weights after its forward, and gather them again for backward.
    """
    gathered = None if param_dtype == torch.float32 else param_dtype
    own_blocks = list(blocks)
    for unit in (*own_blocks, module):
        # inputs keep their type: autocast chooses the type of each operation, as without sharding
        policy = MixedPrecisionPolicy(
            param_dtype=None if own_blocks and unit is module else gathered,
            reduce_dtype=reduce_dtype,
            cast_forward_inputs=False,
        )
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)


def replicate(module: nn.Module, *, reduce_dtype: torch.dtype) -> DistributedDataParallel:
    """Wrap `module` in DDP, which averages gradients over the processes."""
    device = next(module.parameters()).device
    wrapped = DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    if reduce_dtype in _COMPRESS:
        wrapped.register_comm_hook(None, _COMPRESS[reduce_dtype])
    return wrapped


def without_gradient_sync(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context for a micro-batch whose gradients are all-reduced with those of a later one.

    It has an effect on DDP only. Sharded gradients are reduced for each micro-batch: whole gradients would need the
    memory that sharding saves.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of a sharded network after a forward without backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gather_whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from its shards; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Update targets <- targets + weight * (sources - targets) in place, for any sharding of either side."""
    matched = [_match_layout(target, source) for target, source in zip(targets, sources, strict=True)]
    torch._foreach_lerp_(local_shards(targets), local_shards(matched), weight)


def _match_layout(target: Tensor, source: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return gather_whole(source)
    layout = target.device_mesh, target.placements
    if isinstance(source, DTensor) and (source.device_mesh, source.placements) == layout:
        return source
    # every process has the whole source, so there is no communication
    return distribute_tensor(gather_whole(source), *layout, src_data_rank=None)


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor, in the same memory; operations on DTensors take the host longer."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the 2-norm of all entries of `tensors`, sharded alike: 0-d, the same on every process."""
    norm, first = nn.utils.get_total_norm(local_shards(tensors)), tensors[0]
    if not isinstance(first, DTensor):
        return norm
    squares = norm.square()
    dist.all_reduce(squares, group=first.device_mesh.get_group("shard"))
    return squares.sqrt()
