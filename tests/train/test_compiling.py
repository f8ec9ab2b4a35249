"""Compiled blocks: the same losses and gradients in a bounded number of graphs, and errors that say what is wrong."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch._dynamo.testing import CompileCounterWithBackend

from dinov2.data.collate import assemble_batch, draw_masks
from dinov2.data.masking import MaskingGenerator
from dinov2.train import compiling
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.compilers import has_cpp_compiler
from dinov2.utils.config import load_run_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LOCAL = ("crops.local_crops_number=2", "crops.local_crops_size=28")
DROPS = ("student.drop_path_rate=0.4",)
RISING = ("student.drop_path_rate=0.5", "student.drop_path_uniform=false", "student.depth=12")
NETWORKS = [(role, part) for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]


@pytest.fixture(autouse=True)
def _compiler_as_before():
    names = ("recompile_limit", "optimize_ddp")
    before = {name: getattr(torch._dynamo.config, name) for name in names}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


@pytest.fixture
def count(monkeypatch):
    """Puts in the compiler's place what runs each graph as it is; the object that is returned counts them."""

    def stand_in(backend: str = "eager") -> CompileCounterWithBackend:
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(compiling, "BACKEND", counter)
        return counter

    return stand_in


@pytest.fixture
def configure(tiny_overrides):
    """For 42-px crops of nine patches."""

    def settings(mode: str, *overrides: str) -> DictConfig:
        common = ["crops.global_crops_size=42", "crops.local_crops_number=0", "student.layerscale=1.0"]
        common += ["student.drop_path_rate=0", "ibot.separate_head=true", "ibot.mask_ratio_min_max=[0.1,0.7]"]
        mode = f"train.compile_blocks={mode}"
        return load_run_config(None, [*tiny_overrides("none"), *common, *overrides, mode])

    return settings


@pytest.fixture
def make(configure):
    """A model, always with the same weights."""

    def build(mode: str, *overrides: str) -> SSLMetaArch:
        torch.manual_seed(0)
        return SSLMetaArch(configure(mode, *overrides))

    return build


def batch_of(model: SSLMetaArch, seed: int, n_pictures: int = 4) -> dict:
    """Noise, with another number of masked patches for each of the seeds 0, 1, 2."""
    rng, crops = torch.Generator().manual_seed(seed), model.cfg.crops
    masks, upperbound = draw_masks(
        *(2 * n_pictures, model.cfg.ibot.mask_ratio_min_max, 0.5),
        *(MaskingGenerator(3, min_num_patches=1), np.random.default_rng(seed)),
    )

    def noise(n_views: int, size: int) -> list[torch.Tensor]:
        return [torch.randn(n_pictures, 3, size, size, generator=rng) for _ in range(n_views)]

    views = {"global_crops": noise(2, 42), "local_crops": noise(crops.local_crops_number, crops.local_crops_size)}
    return {**assemble_batch(views, masks, upperbound, torch.float32), "seed": seed}


Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]


def step(model: SSLMetaArch, batch: dict) -> Outcome:
    """Losses and gradients."""
    model.zero_grad(set_to_none=True)
    losses = model.forward_backward(batch, teacher_temp=0.07)
    gradients = {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return {name: loss.item() for name, loss in losses.items()}, whole


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        tolerance = 1e-5 * theirs[1][name].abs().max().item() + 1e-5
        torch.testing.assert_close(gradient, theirs[1][name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("overrides", [(), (*DROPS, *LOCAL)], ids=["whole blocks", "branches"])
def test_a_compiled_step_that_computes_again_is_the_plain_step(make, count, overrides):
    counter = count("aot_eager")  # which decides what is computed again
    plain, compiled = make("none", *overrides), make("blocks", "train.activation_checkpointing=0.5", *overrides)
    names = compiled.state_dict().keys()
    compiled.prepare_for_distributed_training()
    assert compiled.state_dict().keys() == names == plain.state_dict().keys()
    for seed in (0, 1):
        batch = batch_of(plain, seed)
        assert_same(step(compiled, batch), step(plain, batch))
    assert 3 <= counter.frame_count <= 8


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [(("student.block_chunks=1", "student.num_register_tokens=2"), (4, 4, 5, 3)), (RISING, (4, 4))],
    ids=["whole blocks", "branches"],
)
def test_the_number_of_graphs_depends_on_neither_depth_nor_masks_nor_batch(make, count, overrides, sizes):
    counter, counts, n_masked = count(), [], []
    plain, compiled = make("none", *overrides), make("blocks", *overrides)
    compiled.prepare_for_distributed_training()
    for seed, n_pictures in enumerate(sizes):
        batch = batch_of(plain, seed, n_pictures)
        assert_same(step(compiled, batch), step(plain, batch))
        counts.append(counter.frame_count)
        n_masked.append(len(batch["mask_indices_list"]))
    assert n_masked[0] != n_masked[1]
    assert counts[0] <= 8
    assert counts[1] <= counts[0] + 1  # a branch's second number of rows
    assert counts[-1] <= 2 * counts[1] + 1  # the number of pictures is found to vary
    assert len(set(counts[2:])) <= 1


@pytest.mark.parametrize(("strategy", "overrides"), [("FULL_SHARD", DROPS), ("NO_SHARD", ())])
def test_spread_over_processes(make, count, strategy, overrides):
    counter = count()
    settings = [f"compute_precision.{role}.{part}.sharding_strategy={strategy}" for role, part in NETWORKS]
    expected = make("none", *overrides)
    batch = batch_of(expected, 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make("blocks", *settings, *overrides)
        model.prepare_for_distributed_training()
        assert_same(step(model, batch), step(expected, batch))
    finally:
        dist.destroy_process_group()
    assert 3 <= counter.frame_count <= 8  # DDP cuts none of them


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_copied_block_runs_compiled_with_its_own_weights(make, count, drop_path):
    counter = count()
    model = make("blocks", f"student.drop_path_rate={drop_path}")
    model.prepare_for_distributed_training()
    block = next(iter(model.student["backbone"].each_block()))
    twin = copy.deepcopy(block)
    torch.nn.init.zeros_(twin.attn.proj.weight), torch.nn.init.zeros_(twin.mlp.fc2.weight)
    torch.nn.init.zeros_(twin.attn.proj.bias), torch.nn.init.zeros_(twin.mlp.fc2.bias)
    x = torch.randn(4, 5, 32)
    assert torch.equal(twin(x), x)
    assert not torch.equal(block(x), x)
    assert counter.frame_count > 0
    assert [y.shape for y in block([x, x[:, :3]])] == [x.shape, (4, 3, 32)]


def test_the_judged_teacher_is_not_compiled(make, count):
    counter = count()
    plain, model = make("none"), make("blocks")
    model.prepare_for_distributed_training()
    assert plain.whole_teacher_backbone() is plain.teacher_backbone
    pictures = torch.randn(3, 3, 42, 42)
    with torch.no_grad():
        expected = plain.teacher_backbone(pictures)
        torch.testing.assert_close(model.whole_teacher_backbone()(pictures), expected)
    assert counter.frame_count == 0


@pytest.mark.parametrize(
    "overrides",
    [LOCAL, ("train.centering=sinkhorn_knopp",), ("ibot.separate_head=false",), ("ibot.loss_weight=0",)],
)
def test_rows_that_keep_the_shapes_static_change_nothing(make, overrides):
    plain, filled = (make("none", *overrides) for _ in range(2))
    filled.uses_graphs = True  # as far as a CPU can
    n_rows = []
    for role in ("student", "teacher"):
        filled.get_submodule(f"{role}.backbone.norm").register_forward_hook(lambda _m, _i, out: n_rows.append(len(out)))
    n_masked = set()
    for seed in (0, 1, 2):
        batch = batch_of(plain, seed)
        n_masked.add(len(batch["mask_indices_list"]))
        assert_same(step(filled, batch), step(plain, batch))
    assert len(n_masked) > 1
    # of the student's global and local crops, and the teacher's global ones
    assert len(set(n_rows)) == (2 if overrides == LOCAL else 1)


def test_a_share_of_the_batch_is_filled_up_no_further_than_its_own_crops_allow():
    images = {"collated_masks": torch.zeros(8, 9, dtype=torch.bool), "upperbound": 1000}
    assert compiling.most_masked_patches(images, 0.7) == 8 * 7
    assert compiling.most_masked_patches({**images, "upperbound": 20}, 0.7) == 20
    assert compiling.fill_up(torch.tensor([3, 5]), 4).tolist() == [3, 5, 0, 0]
    with pytest.raises(AssertionError, match="2 masked patches, more than the 1"):
        compiling.fill_up(torch.tensor([3, 5]), 1)


def obstacle(cfg: DictConfig, device: torch.device, *overrides: str, n_processes: int = 1) -> str:
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    with pytest.raises(ValueError, match=f"train.compile_blocks={cfg.train.compile_blocks}") as caught:
        compiling.check_compilable(cfg, device, n_processes)
    return str(caught.value)


def test_what_graphs_cannot_go_with_is_told(configure, make):
    cfg = configure("graphs")
    assert "and the run is on cpu; set train.compile_blocks=none" in obstacle(cfg, CPU)
    assert "needs student.drop_path_rate=0, found 0.4" in obstacle(cfg, CUDA, *DROPS)
    assert "needs train.accumulation_steps=1, found 2" in obstacle(cfg, CUDA, "train.accumulation_steps=2")
    text = obstacle(cfg, CUDA, n_processes=2)
    assert "compute_precision.student.backbone.sharding_strategy=NO_SHARD" in text
    assert "found SHARD_GRAD_OP" in text
    text = obstacle(cfg, CUDA, "compute_precision.student.backbone.sharding_strategy=NO_SHARD", n_processes=2)
    assert "compute_precision.teacher.backbone.sharding_strategy=NO_SHARD" in text
    with pytest.raises(ValueError, match="records CUDA graphs"):
        make("graphs").prepare_for_distributed_training()


def test_what_the_machine_lacks_is_told(configure, monkeypatch):
    cfg, graphs = configure("blocks", *DROPS), configure("graphs")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/compiler")
    compiling.check_compilable(graphs, CUDA, n_processes=1)
    compiling.check_compilable(cfg, CPU, n_processes=2)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no C compiler was found; install gcc" in obstacle(graphs, CUDA)
    assert "no C++ compiler was found; install g++" in obstacle(cfg, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    assert "Old GPU is older than compute capability 7.0" in obstacle(cfg, CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "triton is missing" in obstacle(cfg, CUDA)
    monkeypatch.setattr(torch._dynamo, "is_dynamo_supported", lambda: False)
    text = obstacle(cfg, CPU)
    assert "torch.compile of PyTorch" in text
    assert "train.compile_blocks=none does without" in text
    cfg.train.compile_blocks = "none"
    compiling.check_compilable(cfg, CPU, n_processes=1)


def test_other_values_are_refused():
    with pytest.raises(ValueError, match=r"train.compile_blocks must be one of none, blocks, graphs, found 'yes'"):
        load_run_config(None, ["train.compile_blocks=yes"])


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("with_graphs", [False, True])
def test_the_real_compiler(make, with_graphs):
    """A block, whole and by branches; the settings for CUDA graphs are taken, though a CPU has none."""
    for drop_path in (0.0, 0.5):
        plain, model = (make("blocks", "student.depth=1", f"student.drop_path_rate={drop_path}") for _ in range(2))
        compiling.compile_blocks([model.student["backbone"]], with_graphs)
        x, outcomes = torch.randn(4, 5, 32), []
        for each in (plain, model):
            (block,) = each.student["backbone"].each_block()
            torch.manual_seed(1)
            out = block(x)
            out.square().sum().backward()
            outcomes.append([out.detach(), *(parameter.grad for parameter in block.parameters())])
        for expected, found in zip(*outcomes, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
