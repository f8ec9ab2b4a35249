"""The count of a step's matrix products, against PyTorch's own count of the operators that really ran."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2.train.batches import TrainBatches, build_dataset, resolve_batch_size
from dinov2.train.flops import count_step_flops, measured_matmul_rate
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config


@pytest.fixture
def make(picture_list, tiny_overrides):
    """Network and batch of a tiny run, by the modules, whose operators PyTorch counts."""
    folder = picture_list()

    def build(*overrides):
        more = ("student.drop_path_rate=0", *overrides)
        cfg = load_run_config(None, tiny_overrides(folder, *more), lambda cfg: resolve_batch_size(cfg.train, 1))
        torch.manual_seed(0)
        model = SSLMetaArch(cfg)
        for networks in (model.student, model.teacher):
            for block in networks["backbone"].each_block():
                block.lean, block.attn.backend = False, "explicit"
        (images,) = next(TrainBatches(cfg, build_dataset(cfg), model.device).starting_at())
        return model, images

    return build


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_backbone_is_counted_as_pytorch_counts_it(make):
    """The whole of it, all tokens asked for: heads and last blocks of a step leave out what no loss reads."""
    model, images = make("crops.local_crops_number=0", "ibot.loss_weight=0")
    for parameter in (p for name, net in model.student.items() if name != "backbone" for p in net.parameters()):
        parameter.requires_grad_(False)
    crops = images["collated_global_crops"]
    backbone = model.student["backbone"]

    def forward():
        return backbone.forward_features(crops)["x_norm_patchtokens"].sum()

    whole = count_step_flops(model)
    without_heads = [_heads_alone(model, len(crops))] * 2
    of_forward = counted(forward)
    assert whole.teacher - without_heads[0] == pytest.approx(of_forward, rel=1e-6)
    assert whole.student - without_heads[1] == pytest.approx(of_forward, rel=1e-6)
    of_both = counted(lambda: forward().backward())
    # heads that do not learn pass one gradient on
    assert whole.backward - without_heads[1] == pytest.approx(of_both - of_forward, rel=1e-6)


def _heads_alone(model, n_rows):
    weights = [p for n, p in model.student["dino_head"].named_parameters() if p.ndim > 1 and not n.endswith("weight_g")]
    return 2 * n_rows * sum(weight.numel() for weight in weights)


def test_a_step_computes_no_more_than_is_counted_and_most_of_it(make):
    """Products of the fused cross-entropy are ordinary ones, so PyTorch sees them too."""
    model, images = make("student.depth=6", "crops.local_crops_number=0")
    n_masked = len(images["mask_indices_list"])
    ran = counted(lambda: model.forward_backward([images], teacher_temp=0.05))
    asked_for = count_step_flops(model, n_masked=n_masked).total
    assert 0.75 * asked_for < ran <= asked_for


def test_a_frozen_backbone_has_no_backward(make):
    model, _ = make()
    frozen, whole = (count_step_flops(model, backbone_is_frozen=is_frozen) for is_frozen in (True, False))
    assert frozen.student == whole.student
    assert frozen.backward < 0.2 * whole.backward


def test_more_of_a_step_is_more_arithmetic(make):
    totals = [
        count_step_flops(make(*overrides)[0]).total
        for overrides in (["crops.local_crops_number=0"], ["crops.local_crops_number=2"], ["student.depth=4"])
    ]
    assert totals == sorted(totals)


def test_the_rate_is_that_of_the_product_that_was_timed(monkeypatch):
    monkeypatch.setattr("dinov2.train.flops._seconds_on_cpu", lambda product: [product(), 0.5][1])
    assert measured_matmul_rate("cpu", torch.float32) == 2 * 1024**3 / 0.5
