"""What `torch.hub.load(<this folder>, <name>, source="local")` finds: `dinobloom_b`, `dinov2_vits14_reg` and so on."""

from dinov2.hub.backbones import ENTRY_POINTS

dependencies = ["torch", "filelock", "huggingface_hub", "iopath", "numpy", "omegaconf", "PIL", "safetensors"]

globals().update(ENTRY_POINTS)
