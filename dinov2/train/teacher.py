"""The teacher as a network of its own: gathered from its shards, with adapters merged."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2.distributed import is_main_process
from dinov2.fsdp.sharding import whole
from dinov2.hub.conversions import merged
from dinov2.models import architecture, build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.ssl_meta_arch import SSLMetaArch


@torch.no_grad()
def teacher_state(model: SSLMetaArch) -> dict[str, Tensor]:
    """Gather the teacher's tensors, fp32 on the CPU, as those of a plain network.

    Every process has to call this; the main one gets the tensors, the others an empty dictionary.
    """
    state = {}
    for name, value in model.teacher.state_dict().items():
        tensor = whole(value)
        if is_main_process():
            state[name] = tensor.detach().to("cpu", torch.float32)
    return merged(state, model.lora_scaling)


@torch.no_grad()
def whole_teacher_backbone(model: SSLMetaArch) -> DinoVisionTransformer:
    """Return the teacher's backbone as a network that one process can use alone; every process has to call this."""
    backbone = model.teacher_backbone
    is_sharded = any(isinstance(parameter, DTensor) for parameter in backbone.parameters())
    is_compiled = model.cfg.train.compile_blocks  # for the batches of training alone
    if not (is_sharded or is_compiled or model.lora_scaling):
        return backbone
    copy = build_backbone(architecture(backbone)).to(model.device).requires_grad_(False)
    state = {name: whole(value) for name, value in backbone.state_dict().items()}
    copy.load_state_dict(merged(state, model.lora_scaling))
    return copy.eval()
