"""Maps of what a network sees in an image: on tensors (`patch_maps`) and of image files (`cells`)."""
