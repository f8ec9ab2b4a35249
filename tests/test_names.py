"""Names, import paths and signatures that code written for DINOv2 and DinoBloom relies on."""

import importlib
import inspect

import pytest

NAMES = {
    "dinov2.models.vision_transformer": "DinoVisionTransformer vit_small vit_base vit_large vit_giant2",
    "dinov2.layers": "Attention MemEffAttention Block NestedTensorBlock DINOHead PatchEmbed Mlp SwiGLUFFN "
    "SwiGLUFFNFused",
    "dinov2.loss": "DINOLoss iBOTPatchLoss KoLeoLoss",
    "dinov2.train.ssl_meta_arch": "SSLMetaArch",
    "dinov2.configs": "dinov2_default_config",
    "dinov2.data": "make_dataset make_data_loader SamplerType MaskingGenerator collate_data_and_cast "
    "DataAugmentationDINO DataAugmentationHEMA",
    "dinov2.models": "build_model build_model_from_cfg",
}

# leading parameters, in upstream's order; ours may follow
SIGNATURES = {
    "dinov2.models.vision_transformer:DinoVisionTransformer": "img_size patch_size in_chans embed_dim depth num_heads "
    "mlp_ratio qkv_bias ffn_bias proj_bias drop_path_rate drop_path_uniform init_values embed_layer act_layer block_fn "
    "ffn_layer block_chunks num_register_tokens interpolate_antialias interpolate_offset",
    "dinov2.models.vision_transformer:vit_small": "patch_size num_register_tokens",
    "dinov2.layers:Attention": "dim num_heads qkv_bias proj_bias attn_drop proj_drop",
    "dinov2.layers:PatchEmbed": "img_size patch_size in_chans embed_dim norm_layer flatten_embedding",
    "dinov2.layers:Mlp": "in_features hidden_features out_features act_layer drop bias",
    "dinov2.layers:SwiGLUFFN": "in_features hidden_features out_features act_layer drop bias",
    "dinov2.layers:DINOHead": "in_dim out_dim use_bn nlayers hidden_dim bottleneck_dim mlp_bias",
    "dinov2.loss:DINOLoss": "out_dim student_temp center_momentum",
    "dinov2.loss:iBOTPatchLoss": "patch_out_dim student_temp center_momentum",
    "dinov2.data:make_dataset": "dataset_str transform target_transform",
    "dinov2.data:make_data_loader": "dataset batch_size num_workers shuffle seed sampler_type sampler_size "
    "sampler_advance drop_last persistent_workers collate_fn",
    "dinov2.data:MaskingGenerator": "input_size num_masking_patches min_num_patches max_num_patches min_aspect "
    "max_aspect",
    "dinov2.data:collate_data_and_cast": "samples_list mask_ratio_tuple mask_probability dtype n_tokens mask_generator",
    "dinov2.data:DataAugmentationDINO": "global_crops_scale local_crops_scale local_crops_number global_crops_size "
    "local_crops_size",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_upstream_has_them(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("place", SIGNATURES)
def test_signatures_begin_as_upstreams(place):
    module, name = place.split(":")
    expected = SIGNATURES[place].split()
    assert (
        list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)[: len(expected)] == expected
    )
