"""DINOv2 self-distillation for blood and bone-marrow cells, as DinoBloom uses it (arXiv 2304.07193, 2404.05022)."""

__version__ = "0.1.0"
