"""What steps take in arithmetic and memory, what checkpointed blocks save, and the search for the largest batch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2.train import dry_run
from dinov2.train.batches import TrainBatches, build_dataset
from dinov2.train.dry_run import (
    StepCost,
    StepTrials,
    batch_sizes,
    count_step_flops,
    largest_by_extrapolation,
    largest_that_fits,
    measured_matmul_rate,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config
from dinov2.utils.resources import resident_memory

MIB = 2**20


@pytest.fixture
def make(image_list, configured):
    """Configuration, network and images of a tiny run."""
    folder = image_list()

    def build(*overrides):
        cfg = configured(*overrides, lists=folder)
        torch.manual_seed(0)
        return cfg, SSLMetaArch(cfg), build_dataset(cfg)

    return build


@pytest.fixture
def run(run):
    """Run train.py; returns the exit code."""
    return lambda *arguments: run(*arguments)[0]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_matrix_products_by_hand(make):
    overrides = ("student.drop_path_rate=0", "crops.local_crops_number=0", "ibot.loss_weight=0")
    cfg, model, _ = make(*overrides, "student.depth=2", "train.accumulation_steps=3", "train.global_batch_size=12")
    n_crops, backbone = 2 * 4, model.student["backbone"]
    n_patches = (cfg.crops.global_crops_size // cfg.student.patch_size) ** 2
    n_tokens, dim = n_patches + 1 + backbone.num_register_tokens, backbone.embed_dim

    def products(module, n_rows):
        weights = [p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("weight_g")]
        return 2 * n_rows * sum(weight.numel() for weight in weights)

    patches = products(backbone.patch_embed, n_crops * n_patches)
    blocks = products(backbone.blocks, n_crops * n_tokens) + 2 * 2 * 2 * n_crops * n_tokens**2 * dim
    forward = patches + blocks + products(model.student["dino_head"], n_crops)
    backward = 2 * forward - patches  # the images need no gradient
    assert count_step_flops(cfg) == 3 * (forward + forward + backward)
    assert count_step_flops(cfg, backbone_is_frozen=True) < 3 * 2.5 * forward


def test_a_real_step_computes_about_what_is_counted(make):
    cfg, model, dataset = make("student.drop_path_rate=0", "student.depth=6", "crops.local_crops_number=2")
    (images,) = next(TrainBatches(cfg, dataset, model.device).starting_at())
    with FlopCounterMode(display=False) as counter:
        model.forward_backward(images, teacher_temp=0.05)
    # the real step may leave out tokens of the last block that no loss reads
    assert 0.75 * count_step_flops(cfg) < counter.get_total_flops() < 1.1 * count_step_flops(cfg)


def test_flops_without_a_teacher_are_those_of_a_real_step(make, lejepa_alone):
    cfg, model, dataset = make(*lejepa_alone, "student.drop_path_rate=0", "crops.local_crops_number=2")
    (images,) = next(TrainBatches(cfg, dataset, model.device).starting_at())
    model.sigreg_loss.n_slices = 1  # a tiny network takes less than its slices, which are not counted
    with FlopCounterMode(display=False) as counter:
        model.forward_backward(images, teacher_temp=0.05)
    assert 0.75 * count_step_flops(cfg) < counter.get_total_flops() < 1.1 * count_step_flops(cfg)


@pytest.mark.parametrize("overrides", [["student.lora.rank=2"], ["student.drop_path_rate=0.5"]])
def test_what_needs_no_gradient_or_is_dropped_is_not_counted(make, overrides):
    if "lora" in overrides[0]:
        pytest.importorskip("peft")
    whole, less = (count_step_flops(make("student.drop_path_rate=0", *more)[0]) for more in ([], overrides))
    assert 0.4 * whole < less < 0.95 * whole


def test_the_rate_is_that_of_the_product_that_was_timed(monkeypatch):
    seconds = iter([0.0, 9.0] + [n + over for n in range(9) for over in (0.0, 0.5)])  # the first product warms up
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(seconds))
    assert measured_matmul_rate("cpu", torch.float32) == 2 * 1024**3 / 0.5


# --- measured -------------------------------------------------------------------------------------------------------


def with_batch_size(cfg, n):
    changed = cfg.copy()
    changed.train.batch_size_per_gpu = changed.train.global_batch_size = n
    return changed


def test_the_peak_grows_by_what_more_images_keep_and_less_with_checkpointed_blocks(make):
    # Wide enough that images, and what malloc keeps of earlier tests' memory, are little beside the activations
    def measure(share):
        cfg, model, dataset = make(
            *(
                "student.embed_dim=128",
                "student.num_heads=2",
                "student.depth=12",
                f"train.activation_checkpointing={share}",
            ),
            *("crops.global_crops_size=112", "crops.local_crops_number=0"),
        )
        trials = StepTrials(cfg, model, dataset)
        return [trials.step(with_batch_size(cfg, n)) for n in (8, 40)]

    fewer, most = measure(0)
    # what the inputs of a block's linear maps and of its attention take alone, of both crops
    least = (40 - 8) * 2 * 65 * 128 * 4 * 12 * (1 + 3 + 1 + 1 + 4)
    assert least < most.peak - fewer.peak < 6 * least
    assert most.n_images == 40
    assert most.seconds > 0
    assert most.before < most.peak
    assert set(most.losses) == {"dino_global_crops_loss", "koleo_loss", "ibot_loss"}
    again_fewer, again_most = measure(1)
    assert again_most.peak - again_fewer.peak < 0.85 * (most.peak - fewer.peak)


@pytest.mark.parametrize(
    ("overrides", "n_images"),
    [
        ([], 4),
        (["train.batch_size_per_gpu=2"], 2),  # KoLeo could not compare one with one
        (["train.global_batch_size=2", "train.accumulation_steps=2"], 1),
        (["train.batch_size_per_gpu=12", "ibot.separate_head=true"], 12),
    ],
)
def test_dry_run_logs_parameters_flops_memory_and_seconds(run, tmp_path, capfd, overrides, n_images):
    assert run("--dry-run", *overrides) == 0
    log = capfd.readouterr().err
    (line,) = [line for line in log.splitlines() if "memory    measured" in line]
    assert f": {n_images} images need " in line
    assert " for each image; there are " in line
    assert "| backbone.blocks " in log
    assert "in matrix products of a step" in log
    (losses,) = [line for line in log.splitlines() if "one step works: " in line]
    assert all(f"{name}_loss " in losses for name in ("dino_global_crops", "koleo", "ibot"))
    assert "s without decoding, so the run at least" in log
    assert not (tmp_path / "out").exists()


def test_dry_run_does_not_try_on_a_cpu_what_would_not_fit(run, monkeypatch, capfd):
    tried = []
    step = StepTrials.step
    monkeypatch.setattr(
        StepTrials, "step", lambda self, cfg: tried.append(cfg.train.batch_size_per_gpu) or step(self, cfg)
    )
    monkeypatch.setattr(dry_run, "memory_limit", lambda device: 1)
    assert run("--dry-run", "train.batch_size_per_gpu=64") == 1
    log = capfd.readouterr().err
    assert "train.batch_size_per_gpu=64 does not fit" in log
    assert "64 images would need about" in log
    assert max(tried) == 8


def test_dry_run_of_a_gpu_that_is_too_small_says_so(run, monkeypatch, capfd):
    def step(*_):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(StepTrials, "step", step)
    assert run("--dry-run") == 1
    log = capfd.readouterr().err
    assert "4 images do not fit, and fewer do not either" in log
    assert "train.batch_size_per_gpu=4 does not fit; --find-batch-size" in log


@pytest.mark.parametrize("is_here", [True, False])
def test_a_dry_run_ends_on_all_ranks_when_one_runs_out_of_memory(run, monkeypatch, capfd, is_here):
    def step(*_):
        raise torch.OutOfMemoryError("made up")

    asked = []
    monkeypatch.setattr(dry_run.distributed, "any_rank", lambda condition: asked.append(condition) or True)
    if is_here:
        monkeypatch.setattr(dry_run, "forward_backward", step)
    assert run("--dry-run") == 1
    assert asked == [is_here]
    assert "train.batch_size_per_gpu=4 does not fit" in capfd.readouterr().err


# --- activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "marks"),
    [
        ("false", [False] * 4),
        ("0", [False] * 4),
        ("0.25", [True, False, False, False]),
        ("0.5", [True, True, False, False]),
        ("0.6", [True, True, True, False]),
        ("true", [True] * 4),
        ("1", [True] * 4),
    ],
)
@pytest.mark.parametrize("chunks", [0, 2])
def test_the_share_marks_the_first_blocks(make, value, marks, chunks):
    _, model, _ = make(f"train.activation_checkpointing={value}", "student.depth=4", f"student.block_chunks={chunks}")
    assert [block.checkpoint_activations for block in model.student["backbone"].each_block()] == marks
    assert not any(block.checkpoint_activations for block in model.teacher["backbone"].each_block())


def test_checkpointed_blocks_change_no_loss_and_no_gradient(make):
    def learn(share):
        cfg, model, dataset = make(
            *(f"train.activation_checkpointing={share}", "student.depth=4", "student.drop_path_rate=0.3")
        )
        (images,) = next(TrainBatches(cfg, dataset, torch.device("cpu")).starting_at())
        losses = model.forward_backward(images, teacher_temp=0.05)
        return losses, {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}

    losses, gradients = learn(0)
    for share in (0.5, 1):
        again_losses, again = learn(share)
        torch.testing.assert_close(again_losses, losses)
        torch.testing.assert_close(again, gradients)


@pytest.mark.parametrize(("value", "message"), [("1.5", "between 0 and 1, found 1.5"), ("half", "must be a number")])
def test_a_share_that_is_none_is_an_error_that_names_the_key(value, message):
    with pytest.raises(
        ValueError, match=f"train.activation_checkpointing must be .*{message.removeprefix('must be ')}"
    ):
        load_run_config(None, [f"train.activation_checkpointing={value}"])


# --- the finder -----------------------------------------------------------------------------------------------------


def made_up_step(fixed, per_image, tried, limit=None):
    """As of a machine on which a step needs fixed + per_image * B bytes; beyond `limit` it is out of memory."""

    def step(n):
        tried.append(n)
        peak = fixed + per_image * n
        if limit is not None and peak > limit:
            raise torch.OutOfMemoryError("made up")
        return StepCost(n, n, fixed, peak, 1.0, {})

    return step


def test_a_size_that_does_not_fit_gives_way_to_smaller_ones():
    assert largest_that_fits(made_up_step(10, 1, tried := [], limit=100), range(1, 121)) == 87
    assert tried == [120, 108, 97, 87]
    assert largest_that_fits(made_up_step(0, 1, [], limit=14), [1, 2, 3, 5, 6, 10, 15, 30]) == 10
    assert largest_that_fits(made_up_step(10, 1, [], limit=5), range(1, 100)) is None
    assert largest_that_fits(made_up_step(10, 1, [], limit=500), [4]) == 4


def test_extrapolation_finds_the_largest_batch_from_small_steps():
    sizes = range(2, 2**16)
    assert largest_by_extrapolation(made_up_step(100, 7, tried := []), sizes, 1000) == 128
    assert tried == [2, 4, 8, 16]
    sizes = [1, 2, 3, 5, 6, 10, 15, 30]
    assert largest_by_extrapolation(made_up_step(0, 7, tried := []), sizes, 100) == 10
    assert set(tried) <= set(sizes)


def test_extrapolation_waits_until_the_growth_is_that_of_the_images():
    tried = []

    def step(n):  # up to 16 images the optimizer's step is the peak
        tried.append(n)
        return StepCost(n, n, 700, max(1000, 760 + 15 * n), 1.0, {})

    assert largest_by_extrapolation(step, range(2, 2**16), 10_000) == 616
    assert tried == [2, 4, 8, 16, 32, 64]


def test_growth_that_is_small_is_not_taken_for_none():
    assert largest_by_extrapolation(made_up_step(1000, 1, tried := []), range(2, 2**16), 10_000) == 9000
    assert max(tried) == 512


def test_extrapolation_never_tries_what_may_not_fit():
    sizes = range(2, 2**16)
    assert largest_by_extrapolation(made_up_step(100, 50, tried := []), sizes, 310) == 4
    assert tried == [2, 4]
    assert largest_by_extrapolation(made_up_step(300, 50, tried := []), sizes, 310) is None
    assert tried == [2]
    assert largest_by_extrapolation(made_up_step(100, 50, tried := []), [4], 310) == 4
    assert largest_by_extrapolation(made_up_step(100, 50, tried := []), [4], 290) is None

    def step(n):  # most of what a step adds is not the images', which sizes that are safe cannot show
        return StepCost(n, n, 100, 300 + n, 1.0, {})

    assert largest_by_extrapolation(step, sizes, 480) == 3
    assert largest_by_extrapolation(step, sizes, 510) == 15


def test_sizes_follow_from_what_the_run_has_to_keep():
    def sizes(*overrides):
        return batch_sizes(load_run_config(None, overrides))

    assert sizes()[0] == 2  # KoLeo compares images
    assert sizes("dino.koleo_loss_weight=0")[0] == 1
    assert sizes("train.accumulation_steps=3")[0] == 1
    assert sizes("train.global_batch_size=12") == [1, 2, 3, 4, 6, 12]
    assert sizes("train.global_batch_size=12", "dino.koleo_loss_distributed=false") == [2, 3, 4, 6, 12]
    assert sizes("train.global_batch_size=12", "train.accumulation_steps=3") == [4]
    cfg = dry_run._set_batch_size(load_run_config(None, ["train.global_batch_size=12"]), 4)
    assert (cfg.train.batch_size_per_gpu, cfg.train.accumulation_steps) == (4, 3)
    cfg = dry_run._set_batch_size(load_run_config(None, ["train.accumulation_steps=3"]), 4)
    assert (cfg.train.accumulation_steps, cfg.train.global_batch_size) == (3, 12)


def test_the_command_prints_the_override_and_writes_nothing(run, tmp_path, monkeypatch, capfd):
    room = resident_memory() + 2**29
    monkeypatch.setattr(dry_run, "memory_limit", lambda device: room)
    assert run("--find-batch-size", "dino.head_n_prototypes=4096") == 0
    output = capfd.readouterr()
    key, _, found = output.out.strip().partition("=")
    assert key == "train.batch_size_per_gpu"
    assert 64 < int(found) < dry_run.MAX_IMAGES  # of a network this small
    assert f"add train.batch_size_per_gpu={found} to the command" in output.err
    assert "images/s without decoding" in output.err
    assert "10 % stay free" in output.err
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_when_nothing_fits(run, monkeypatch, capfd):
    monkeypatch.setattr(dry_run, "memory_limit", lambda device: MIB)
    assert run("--find-batch-size") == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert "not even the smallest batch fits" in output.err


def test_several_processes_are_an_error(run, monkeypatch, capfd):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert run("--find-batch-size") == 2
    assert "--find-batch-size works in one process, found 2" in capfd.readouterr().err


def test_one_thing_at_a_time(run, capfd):
    with pytest.raises(SystemExit) as stop:
        run("--find-batch-size", "--dry-run")
    assert stop.value.code == 2
    assert "give one of them" in capfd.readouterr().err
