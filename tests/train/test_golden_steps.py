"""Three whole steps (schedule, losses, clipping, AdamW, EMA) against upstream's numbers, for eight configurations."""

from typing import Any

import pytest
import torch

from dinov2.data.collate import assemble_batch
from dinov2.train.optimizer import LossScaler, StepGuard, build_optimizer, clip_gradients
from dinov2.train.schedules import StepSettings
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config
from dinov2.utils.numerics import fast_matmul_within

NAMES = (
    "dinobloom",
    "dinobloom_layerdecay",
    "dinobloom_centering",
    "dinobloom_sharedhead",
    "dinobloom_smoothrank",
    "dinov2_8local",
    "dinov2_8local_center_sharedhead",
    "dinov2_swiglu_reg4",
)
# Losses and gradient norms move by 1e-6 relative between one thread and two; Adam magnifies rounding where a gradient
# is about zero, so parameters are held to 1e-4 (tests/golden/README.md).
LOSS_RTOL, NORM_RTOL, PARAMETER_RTOL, ARRAY_ATOL = 1e-5, 1e-4, 1e-4, 2e-5

TINY = [
    *("student.arch=vit_small", "student.embed_dim=64", "student.depth=2", "student.num_heads=4"),
    *("student.patch_size=14", "student.drop_path_rate=0", "dino.head_n_prototypes=256", "ibot.head_n_prototypes=192"),
    *("dino.head_hidden_dim=128", "dino.head_bottleneck_dim=32", "ibot.head_hidden_dim=128"),
    *("ibot.head_bottleneck_dim=32", "crops.local_crops_size=98", "train.batch_size_per_gpu=4"),
    *("compute_precision.grad_scaler=false", "train.dataset_path=none"),
]
STYLES = {
    "dinobloom": [
        *("train.centering=sinkhorn_knopp", "ibot.separate_head=true", "optim.layerwise_decay=1.0"),
        *("crops.local_crops_number=0", "dino.loss_weight=0.5"),
    ],
    "dinov2": [
        *("train.centering=sinkhorn_knopp", "ibot.separate_head=true", "optim.layerwise_decay=0.9"),
        *("crops.local_crops_number=8", "dino.loss_weight=1.0"),
    ],
}


def config_of(golden: dict):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in golden["overrides"].items()]
    return load_run_config(None, TINY + STYLES[golden["style"]] + overrides)


def build(golden: dict, formulas) -> SSLMetaArch:
    model = SSLMetaArch(config_of(golden))
    for role in ("student", "teacher"):
        for part, module in getattr(model, role).items():
            formulas.fill_(module, f"{role}.{part}")
    return model


def batch_of(iteration: int, n_local: int, formulas) -> dict:
    key, n_crops, n_tokens = f"img{iteration}", 8, 256
    masks = torch.zeros(n_crops, n_tokens, dtype=torch.bool)
    probs = torch.linspace(0.1, 0.5, n_crops // 2 + 1, dtype=torch.float64).tolist()
    for i in range(n_crops // 2):
        n_masked = int(n_tokens * (probs[i] + probs[i + 1]) / 2)
        order = torch.from_numpy(formulas.u01(f"{key}/mask/{i}", n_tokens)).argsort(stable=True)
        masks[2 * i, order[:n_masked]] = True
    upperbound = sum(int(n_tokens * p) for p in probs[1:])
    crops = {
        "global_crops": list(formulas.sym(f"{key}/global", (8, 3, 224, 224), 2).chunk(2)),
        "local_crops": list(formulas.sym(f"{key}/local", (n_local * 4, 3, 98, 98), 2).chunk(n_local))
        if n_local
        else [],
    }
    return assemble_batch(crops, masks, upperbound, torch.float32)


def without_key_bias(name: str, value: torch.Tensor) -> torch.Tensor:
    """The key third of qkv.bias has a gradient of mathematically zero, so Adam moves it by rounding alone."""
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, third = value.chunk(3)
    return torch.cat([query, third])


def checksums(module: torch.nn.Module, formulas) -> list[float]:
    sums = torch.zeros(3, dtype=torch.float64)
    for name, value in module.named_parameters():
        sums += torch.tensor(formulas.checksum(without_key_bias(name, value)), dtype=torch.float64)
    return sums.tolist()


def cls_tokens(kept: list[Any]) -> torch.Tensor:
    """CLS tokens [2B, D] of the global crops, whose features come first where there are local crops."""
    features = kept[0][0] if isinstance(kept[0], list) else kept[0]
    return features["x_norm_clstoken"].detach()


def close_checksum(actual, expected, rtol):
    # the plain sum may cancel to almost nothing: it is held to the scale of the sum of magnitudes
    scale = torch.tensor([expected[1], expected[1], expected[2]], dtype=torch.float64)
    difference = (torch.tensor(actual, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (difference <= rtol * scale).all(), f"{actual} is not {expected}"


@pytest.fixture
def fp32_matmul(request):
    """As train.py sets it: the fast path is the default of a run, exact products are a key away."""
    with fast_matmul_within(request.param == "fast"):
        yield


@pytest.mark.parametrize(
    ("name", "fp32_matmul"),
    [*((name, "fast") for name in NAMES), ("dinobloom", "exact"), ("dinov2_8local_center_sharedhead", "exact")],
    indirect=["fp32_matmul"],
)
def test_three_steps(name, fp32_matmul, golden_json, golden_arrays, formulas):
    golden = golden_json["steps"][name]
    model = build(golden, formulas)
    n_local = model.n_local_crops
    optimizer = build_optimizer(model.cfg.optim, model.get_params_groups())
    shape = ("lr_multiplier", "wd_multiplier", "is_last_layer")
    for ours, theirs in zip(optimizer.param_groups, golden["groups"], strict=True):
        assert [ours[key] for key in shape] == pytest.approx([theirs[key] for key in shape])
        assert [len(ours["params"]), sum(p.numel() for p in ours["params"])] == [theirs["n_params"], theirs["numel"]]

    kept = []
    hook = model.student.backbone.register_forward_hook(lambda _m, _i, output: kept.append(output))
    for iteration, step in enumerate(golden["steps"]):
        batch = batch_of(iteration, n_local, formulas)
        assert batch["upperbound"] == step["upperbound"]
        assert int(batch["n_masked_patches"]) == step["n_masked"]
        StepSettings(step["lr"], step["last_layer_lr"], step["wd"], step["mom"], step["teacher_temp"]).apply_to(
            optimizer
        )
        optimizer.zero_grad()
        kept.clear()
        losses = model.forward_backward(batch, teacher_temp=step["teacher_temp"])

        expected = dict(step["losses"])
        if golden["style"] == "dinobloom":
            expected["dino_global_crops_loss"] *= 2  # upstream spreads the loss over a local crop that is not there
        assert losses.keys() == expected.keys()
        for key, value in expected.items():
            assert losses[key].item() == pytest.approx(value, rel=LOSS_RTOL, abs=1e-6), key
        group_norms = [
            torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
            for group in optimizer.param_groups
        ]
        assert group_norms == pytest.approx(step["grad_norm_per_group"], rel=NORM_RTOL)
        assert [n for n, p in model.student.named_parameters() if p.grad is None] == step["grad_none"]
        assert batch["collated_masks"].sum(dim=1).tolist() == step["mask_counts"]
        close_checksum(formulas.checksum(cls_tokens(kept)), step["cls"], PARAMETER_RTOL)
        norms = clip_gradients(model.student, max_norm=3.0)
        assert {k: v.item() for k, v in norms.items()} == pytest.approx(step["module_grad_norm_preclip"], rel=NORM_RTOL)
        optimizer.step()
        model.update_teacher(step["mom"])
        for role in ("student", "teacher"):
            for part, sums in step[role].items():
                close_checksum(checksums(getattr(model, role)[part], formulas), sums, PARAMETER_RTOL)
        if iteration == 0:
            parameters = dict(model.student.named_parameters())
            after_clip = {n: p.grad.norm().item() for n, p in parameters.items()}
            for parameter, norm in step["per_grad_step0_postclip_norm"].items():
                assert after_clip[parameter] == pytest.approx(norm, rel=1e-3, abs=1e-6), parameter
            for parameter, sums in step["per_param_after_step0"].items():
                value = without_key_bias(parameter, parameters[parameter])
                close_checksum(formulas.checksum(value), sums, PARAMETER_RTOL)
    hook.remove()

    if f"step/{name}/cls_final" in golden_arrays:
        final = torch.from_numpy(golden_arrays[f"step/{name}/cls_final"])
        torch.testing.assert_close(cls_tokens(kept), final, rtol=0, atol=10 * ARRAY_ATOL)  # after two Adam steps
    arrays = {k.split("/", 3)[-1]: v for k, v in golden_arrays.items() if k.startswith(f"step/{name}/student/")}
    parameters = dict(model.student.named_parameters())
    for parameter, value in arrays.items():
        ours = without_key_bias(parameter, parameters[parameter].detach())
        torch.testing.assert_close(ours, torch.from_numpy(value), rtol=0, atol=ARRAY_ATOL)


@pytest.mark.parametrize("name", ["dinobloom", "dinov2_8local"])
def test_bf16_is_near_fp32(name, golden_json, formulas):
    """Losses of upstream's own first step within 1 %, and gradients in fp32's direction."""
    golden = golden_json["steps"][name]
    models = {dtype: build(golden, formulas) for dtype in ("fp32", "bf16")}
    for role in ("student", "teacher"):
        for part in models["bf16"].cfg.compute_precision[role].values():
            part.mixed_precision.param_dtype = "bf16"
    step, losses, gradients = golden["steps"][0], {}, {}
    for dtype, model in models.items():
        losses[dtype] = model.forward_backward(batch_of(0, model.n_local_crops, formulas), step["teacher_temp"])
        gradients[dtype] = torch.cat([p.grad.double().flatten() for p in model.student.parameters() if p.requires_grad])
    for key, value in losses["fp32"].items():
        assert losses["bf16"][key].item() == pytest.approx(value.item(), rel=0.01), key
    assert not torch.equal(gradients["bf16"], gradients["fp32"])
    assert torch.cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0) > 0.9995


GPU_CASES = {  # tolerance of losses, and of the norms of gradients
    "fp32": (1e-4, 1e-3),
    "fp32 compiled": (1e-4, 1e-3),
    "bf16": (0.01, 0.05),
    "bf16 compiled": (0.01, 0.05),
    "fp16": (0.005, 0.02),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("name", ["dinobloom", "dinov2_8local"])
def test_a_step_on_a_gpu_is_near_upstream(name, case, golden_json, formulas):
    """Losses and norms are near upstream's first step on a CPU; AdamW moves no weight by more than its rate."""
    precision, *compiled = case.split()
    loss_tolerance, norm_tolerance = GPU_CASES[case]
    golden = golden_json["steps"][name]
    step, model = golden["steps"][0], build(golden, formulas).cuda()
    for role in ("student", "teacher"):
        for part in model.cfg.compute_precision[role].values():
            part.mixed_precision.param_dtype = precision
    if compiled:
        model.cfg.train.compile_blocks = True
        model.prepare_for_distributed_training()
    scaler = LossScaler(scale=1024.0).to(model.device) if precision == "fp16" else None
    model.fp16_scaler = scaler
    optimizer = build_optimizer(model.cfg.optim, model.get_params_groups())
    StepSettings(step["lr"], step["last_layer_lr"], step["wd"], step["mom"], step["teacher_temp"]).apply_to(optimizer)
    before = {key: value.clone() for key, value in model.student.named_parameters()}
    batch = batch_of(0, model.n_local_crops, formulas)
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    with fast_matmul_within(False, model.device):
        losses = model.forward_backward(batch, step["teacher_temp"])
    if scaler is not None:
        scaler.unscale_(optimizer)
    norms = clip_gradients(model.student, max_norm=3.0)
    guard = StepGuard(model.device)
    guard.step(optimizer, losses, norms, scaler)
    model.update_teacher(step["mom"])

    expected = dict(step["losses"])
    if golden["style"] == "dinobloom":
        expected["dino_global_crops_loss"] *= 2  # upstream spreads the loss over a local crop that is not there
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=loss_tolerance, abs=1e-3)
    norms = {key: value.item() for key, value in norms.items()}
    assert norms == pytest.approx(step["module_grad_norm_preclip"], rel=norm_tolerance)
    moved = [(value - before[key]).abs().max().item() for key, value in model.student.named_parameters()]
    assert 0 < max(moved) <= 1.1 * max(group["lr"] for group in optimizer.param_groups)
