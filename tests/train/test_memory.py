"""What steps take in memory, what checkpointed blocks save, and the search for the largest batch."""

import pytest
import torch

from dinov2.train import memory
from dinov2.train.batches import build_dataset, resolve_batch_size
from dinov2.train.memory import (
    StepCost,
    StepTrials,
    batch_sizes,
    estimate_memory_gib,
    largest_by_extrapolation,
    largest_by_trying,
    settled,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from dinov2.utils.config import load_run_config

MIB = 2**20


@pytest.fixture
def make(picture_list, tiny_overrides):
    """Configuration, network and pictures of a tiny run."""
    folder = picture_list()

    def build(*overrides):
        cfg = load_run_config(None, tiny_overrides(folder, *overrides), lambda cfg: resolve_batch_size(cfg.train, 1))
        torch.manual_seed(0)
        return cfg, SSLMetaArch(cfg), build_dataset(cfg)

    return build


@pytest.fixture
def run(picture_list, tiny_overrides, tmp_path):
    folder = picture_list()

    def go(*arguments):
        # the fixture's overrides first, so that a test's own win
        return main(["--output-dir", str(tmp_path / "out"), "--name", "run", *tiny_overrides(folder, *arguments)])

    return go


# --- measured -------------------------------------------------------------------------------------------------------


def test_the_peak_grows_by_what_more_images_keep(make):
    # Wide enough that pictures, and what malloc keeps of earlier tests' memory, are little beside the activations
    cfg, model, dataset = make(
        *("student.embed_dim=256", "student.num_heads=4", "student.depth=4"),
        *("crops.global_crops_size=112", "crops.local_crops_number=0"),
    )
    trials = StepTrials(cfg, model, dataset)
    fewer, most = (trials.step(settled_to(cfg, n)) for n in (8, 72))
    estimates = [estimate_memory_gib(settled_to(cfg, n), model) * 1024 * MIB for n in (8, 72)]
    expected = estimates[1] - estimates[0]
    assert 0.5 * expected < most.peak - fewer.peak < 3 * expected
    assert most.n_images == 72
    assert most.images_per_second > 0
    assert set(most.losses) == {"dino_global_crops_loss", "koleo_loss", "ibot_loss"}


def settled_to(cfg, n):
    changed = cfg.copy()
    changed.train.batch_size_per_gpu = changed.train.global_batch_size = n
    return changed


@pytest.mark.parametrize(
    ("overrides", "measured_at", "n_images"),
    [
        ([], 4, 4),
        (["train.batch_size_per_gpu=2"], 4, 2),  # KoLeo could not compare one with one
        (["train.global_batch_size=2", "train.accumulation_steps=2"], 2, 1),
        (["train.batch_size_per_gpu=12", "ibot.separate_head=true"], 8, 12),
    ],
)
def test_dry_run_tells_measured_and_estimated_memory(run, tmp_path, capfd, overrides, measured_at, n_images):
    assert run("--dry-run", *overrides) == 0
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if "memory    measured" in line]
    assert f"at {measured_at} images (estimated from shapes:" in line
    assert "an image, " in line
    assert f"a prototype; {n_images} images need " in line
    assert not (tmp_path / "out").exists()


def test_dry_run_does_not_try_on_a_cpu_what_would_not_fit(run, monkeypatch, capfd):
    tried = []
    step = StepTrials.step
    monkeypatch.setattr(
        StepTrials, "step", lambda self, cfg: tried.append(cfg.train.batch_size_per_gpu) or step(self, cfg)
    )
    monkeypatch.setattr(memory, "memory_room", lambda device: 1)
    assert run("--dry-run", "train.batch_size_per_gpu=64") == 1
    told = capfd.readouterr().err
    assert "train.batch_size_per_gpu=64 does not fit" in told
    assert "64 images would need about" in told
    assert max(tried) == 8


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
        parts = next(memory.TrainBatches(cfg, dataset, torch.device("cpu")).starting_at())
        losses = model.forward_backward(parts, teacher_temp=0.05)
        return losses, {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}

    losses, gradients = learn(0)
    for share in (0.5, 1):
        again_losses, again = learn(share)
        torch.testing.assert_close(again_losses, losses)
        torch.testing.assert_close(again, gradients)


def test_checkpointed_blocks_lower_the_estimate(make):
    estimates = []
    for share in (0, 0.5, 1):
        cfg, model, _ = make(f"train.activation_checkpointing={share}", "student.depth=12")
        estimates.append(estimate_memory_gib(settled_to(cfg, 2**14), model))
    assert estimates[0] > 1.3 * estimates[1] > 1.3**2 * estimates[2]


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
        return StepCost(n, n, peak, 1.0, {})

    return step


@pytest.mark.parametrize("right", [1, 2, 3, 7, 8, 9, 12, 31, 64, 100, 1000])
def test_trying_finds_the_largest_batch(right):
    tried = []
    found = largest_by_trying(made_up_step(10, 1, tried, limit=10 + right), range(1, 2**16))
    assert right - max(0, right // 32) <= found <= right
    assert len(tried) == len(set(tried)) < 20
    assert max(tried) <= max(8, 2 * right)


def test_trying_finds_all_or_nothing_where_that_is_so():
    assert largest_by_trying(made_up_step(10, 1, [], limit=5), range(1, 100)) is None
    assert largest_by_trying(made_up_step(10, 1, [], limit=500), range(1, 100)) == 99
    assert largest_by_trying(made_up_step(10, 1, [], limit=500), [4]) == 4


def test_trying_keeps_to_the_sizes_that_there_are():
    tried = []
    sizes = [1, 2, 3, 5, 6, 10, 15, 30]
    assert largest_by_trying(made_up_step(0, 1, tried, limit=14), sizes) == 10
    assert set(tried) <= set(sizes)


def extrapolate(step, limit, fixed=100, per_image=7, sizes=range(2, 2**16)):
    return largest_by_extrapolation(step, sizes, limit, lambda n: fixed + per_image * n)


def test_extrapolation_finds_the_largest_batch_from_small_steps():
    tried = []
    assert extrapolate(made_up_step(100, 7, tried), limit=1000) == 128
    assert tried == [2, 4, 8]
    sizes = [1, 2, 3, 5, 6, 10, 15, 30]
    assert extrapolate(made_up_step(0, 7, tried := []), limit=100, fixed=0, sizes=sizes) == 10
    assert set(tried) <= set(sizes)


def test_extrapolation_waits_until_the_growth_is_steady():
    tried = []

    def step(n):  # up to 16 images the optimizer's step is the peak
        tried.append(n)
        return StepCost(n, n, max(1000, 760 + 15 * n), 1.0, {})

    assert extrapolate(step, limit=10_000, fixed=700, per_image=14) == 616
    assert tried == [2, 4, 8, 16, 32, 64]


def test_growth_that_is_too_small_to_be_seen_is_not_taken_for_none():
    assert extrapolate(made_up_step(1000, 0, tried := []), limit=10_000, fixed=700, per_image=100) == 212
    assert max(tried) <= 64


def test_extrapolation_never_tries_what_may_not_fit():
    assert extrapolate(made_up_step(100, 7, tried := []), limit=100) is None
    assert tried == []
    assert extrapolate(made_up_step(100, 50, tried := []), limit=310) == 4
    assert tried == [2, 4]
    assert extrapolate(made_up_step(300, 50, tried := []), limit=310) is None
    assert extrapolate(made_up_step(100, 50, tried := []), limit=310, sizes=[4]) == 4
    assert extrapolate(made_up_step(100, 50, tried := []), limit=290, sizes=[4]) is None


def test_sizes_follow_from_what_the_run_has_to_keep():
    def sizes(*overrides):
        return batch_sizes(load_run_config(None, overrides))

    assert sizes()[0] == 2  # KoLeo compares pictures
    assert sizes("dino.koleo_loss_weight=0")[0] == 1
    assert sizes("train.accumulation_steps=3")[0] == 1
    assert sizes("train.global_batch_size=12") == [1, 2, 3, 4, 6, 12]
    assert sizes("train.global_batch_size=12", "dino.koleo_loss_distributed=false") == [2, 3, 4, 6, 12]
    assert sizes("train.global_batch_size=12", "train.accumulation_steps=3") == [4]
    cfg = settled(load_run_config(None, ["train.global_batch_size=12"]), 4)
    assert (cfg.train.batch_size_per_gpu, cfg.train.accumulation_steps) == (4, 3)
    cfg = settled(load_run_config(None, ["train.accumulation_steps=3"]), 4)
    assert (cfg.train.accumulation_steps, cfg.train.global_batch_size) == (3, 12)


def test_the_command_prints_the_override_and_writes_nothing(run, tmp_path, monkeypatch, capfd):
    room = 4 * 2**30
    monkeypatch.setattr(memory, "memory_room", lambda device: room)
    assert run("--find-batch-size", "dino.head_n_prototypes=4096") == 0
    told = capfd.readouterr()
    key, _, found = told.out.strip().partition("=")
    assert key == "train.batch_size_per_gpu"
    assert 64 < int(found) < memory.MAX_IMAGES  # of a network this small
    assert f"add train.batch_size_per_gpu={found} to the command" in told.err
    assert "images/s besides decoding" in told.err
    assert "10 % stay free" in told.err
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_when_nothing_fits(run, monkeypatch, capfd):
    monkeypatch.setattr(memory, "memory_room", lambda device: MIB)
    assert run("--find-batch-size") == 1
    told = capfd.readouterr()
    assert told.out == ""
    assert "not even the smallest batch fits" in told.err


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
