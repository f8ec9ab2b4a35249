"""Our tensors under transformers' and timm's names and back, held against the real transformers and timm."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from dinov2.hub import conversions
from dinov2.models import architecture, build_backbone

TINY = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "img_size": 56,
    "layerscale": 1.0,
    "block_chunks": 0,
}
KINDS = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "gated": {"ffn_layer": "swiglufused"},
    "gated, registers": {"ffn_layer": "swiglufused", "num_register_tokens": 4},
    "another mlp ratio": {"mlp_ratio": 2.0},
    "another gated ratio": {"ffn_layer": "swiglufused", "mlp_ratio": 3.0},
    "another patch size, three registers": {"patch_size": 7, "num_register_tokens": 3},
}
RELEASED = [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


@pytest.fixture
def tiny(formulas):
    def build(**settings):
        return formulas.fill_(build_backbone({**TINY, **settings}), "conversions").eval()

    return build


def hugging_face_network(known):
    config_class, network_class = Dinov2Config, Dinov2Model
    if known["num_register_tokens"]:
        config_class, network_class = Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    return network_class(config_class(**conversions.hugging_face_config(known))).eval()


def timm_network(known):
    name, arguments = conversions.timm_arguments(known)
    return timm.create_model(name, **arguments).eval()


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def all_tokens(model, images):
    features = model.forward_features(images)
    parts = (features["x_norm_clstoken"][:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_files_that_transformers_writes(kind, tiny, tmp_path):
    model = tiny(**KINDS[kind])
    theirs = hugging_face_network(architecture(model))
    theirs.save_pretrained(tmp_path)
    assert shapes(conversions.to_hugging_face(model.state_dict())) == shapes(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_tensors_give_transformers_features(kind, tiny, tmp_path, formulas):
    model = tiny(**KINDS[kind])
    theirs = formulas.fill_(hugging_face_network(architecture(model)), "theirs")
    images = formulas.sym("x", (2, 3, 56, 56), 2)
    for state in (theirs.state_dict(), conversions.to_hugging_face(conversions.from_hugging_face(theirs.state_dict()))):
        model.load_state_dict(conversions.to_own_names(state))
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(all_tokens(model, images), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_timms_tensors_give_timms_features(kind, tiny, formulas):
    model = tiny(**KINDS[kind])
    theirs = formulas.fill_(timm_network(architecture(model)), "theirs")
    own = conversions.to_own_names(theirs.state_dict())
    model.load_state_dict({**own, "mask_token": model.mask_token})
    images = formulas.sym("x", (2, 3, 56, 56), 2)
    expected = theirs.forward_features(images)
    torch.testing.assert_close(all_tokens(model, images), expected, rtol=0, atol=2e-5)
    assert shapes(conversions.to_timm(model.state_dict())) == shapes(theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_nothing_changes(kind, tiny, formulas):
    model = tiny(**KINDS[kind])
    state = model.state_dict()
    back = conversions.to_own_names(conversions.to_hugging_face(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    images = formulas.sym("x", (2, 3, 56, 56), 2)
    before = all_tokens(model, images)
    model.load_state_dict({**conversions.to_own_names(conversions.to_timm(state)), "mask_token": state["mask_token"]})
    torch.testing.assert_close(all_tokens(model, images), before, rtol=0, atol=2e-6)


def test_our_own_names_stay(tiny):
    for settings in KINDS.values():
        state = tiny(**settings).state_dict()
        assert list(conversions.to_own_names(state)) == list(state)


@pytest.mark.parametrize("arch", RELEASED)
def test_released_networks_have_a_place_for_every_tensor(arch):
    description = {"arch": arch, "layerscale": 1.0, "block_chunks": 0, "img_size": 224}
    with torch.device("meta"):
        model = build_backbone(description)
        of_timm, of_transformers = timm_network(architecture(model)), hugging_face_network(architecture(model))
    state = model.state_dict()
    assert shapes(conversions.to_timm(state)) == shapes(of_timm.state_dict())
    assert shapes(conversions.from_hugging_face(of_transformers.state_dict())) == shapes(state)
    assert shapes(conversions.from_hugging_face(conversions.to_hugging_face(state))) == shapes(state)
    # no argument but these: the name says it all
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[arch[len("dinov2_vit")]]
    name = f"vit_{size}_patch14{'_reg4' if arch.endswith('_reg') else ''}_dinov2"
    assert conversions.timm_arguments(architecture(model)) == (name, {"img_size": 224, "num_classes": 0})


def test_what_a_network_lacks_is_filled_with_what_does_nothing(tiny, formulas):
    bare = tiny(layerscale=None, qkv_bias=False, proj_bias=False, ffn_bias=False)
    theirs = timm_network(architecture(bare))
    theirs.load_state_dict(conversions.to_timm(bare.state_dict()))
    images = formulas.sym("x", (2, 3, 56, 56), 2)
    torch.testing.assert_close(theirs.forward_features(images), all_tokens(bare, images), rtol=0, atol=2e-5)
    full = tiny(layerscale=1.0)
    full.load_state_dict(conversions.from_hugging_face(conversions.to_hugging_face(bare.state_dict())))
    torch.testing.assert_close(all_tokens(full, images), all_tokens(bare, images), rtol=0, atol=2e-6)


def test_a_classifier_around_the_network_is_left_out(tiny):
    known = architecture(tiny())
    classifier = Dinov2ForImageClassification(Dinov2Config(**conversions.hugging_face_config(known), num_labels=3))
    own = conversions.to_own_names(classifier.state_dict())
    assert shapes(own) == shapes(tiny().state_dict())


def test_lost_and_unknown_tensors_are_left_for_the_caller_to_find(tiny):
    state = tiny().state_dict()
    theirs = conversions.to_hugging_face(state)
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    theirs["encoder.layer.1.surprise"] = torch.ones(1)
    own = conversions.to_own_names(theirs)
    assert state.keys() - own.keys() == {"blocks.1.attn.qkv.bias"}
    assert own.keys() - state.keys() == {
        "blocks.1.attention.attention.query.bias",
        "blocks.1.attention.attention.value.bias",
        "blocks.1.surprise",
    }
    of_timm = conversions.to_timm(tiny(num_register_tokens=4).state_dict())
    del of_timm["pos_embed"]
    assert "reg_token" in conversions.to_own_names(of_timm)


def test_position_embeddings_are_used_as_they_are(tiny, formulas):
    """At the size that is stated, neither library interpolates: a shift by one patch would show."""
    model = tiny(img_size=98)
    images = formulas.sym("x", (1, 3, 98, 98), 2)
    known = architecture(model)
    of_timm, of_transformers = timm_network(known), hugging_face_network(known)
    assert of_timm.pos_embed.shape == model.pos_embed.shape
    of_timm.load_state_dict(conversions.to_timm(model.state_dict()))
    torch.testing.assert_close(of_timm.forward_features(images), all_tokens(model, images), rtol=0, atol=2e-5)
    position = of_transformers.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 49, 64), 98, 98)
    assert position is of_transformers.embeddings.position_embeddings


def test_what_transformers_cannot_hold(tiny):
    known = {**architecture(tiny()), "mlp_ratio": 2.5}
    with pytest.raises(ValueError, match=r"whole multiples.*mlp_ratio 2\.5"):
        conversions.hugging_face_config(known)


def test_files_keep_no_tensor_as_part_of_another(tiny, tmp_path):
    """safetensors refuses tensors that share memory; transformers reads what it wrote."""
    model = tiny()
    Dinov2Config(**conversions.hugging_face_config(architecture(model))).save_pretrained(tmp_path)
    save_file(conversions.to_hugging_face(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    loaded, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, Dinov2Model)
    assert not any(found.values())
