"""Statistics that fall when features collapse, and the monitor that warns of it: what it finds, when it is silent."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dinov2.configs import CONFIG_FOLDER
from dinov2.data.collate import assemble_batch
from dinov2.train.monitor import CollapseMonitor, feature_statistics, prototype_use
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import load_run_config

RECIPES = CONFIG_FOLDER / "train"


# ---- statistics of a step


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_effective_rank_is_the_participation_ratio_of_the_covariance(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, shape[1]) + 5
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy(), rowvar=False))
    expected = eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()
    assert feature_statistics(features)["effective_rank"].item() == pytest.approx(expected, rel=1e-4)


def test_effective_rank_counts_directions_whatever_the_scale():
    directions = torch.cat([torch.eye(3, 16), -torch.eye(3, 16)])
    for scale in (1e-20, 1.0, 1e15):
        assert feature_statistics(directions * scale)["effective_rank"].item() == pytest.approx(3.0)
    line = torch.linspace(-1, 1, 9)[:, None] * torch.arange(1.0, 6.0) + 2
    assert feature_statistics(line)["effective_rank"].item() == pytest.approx(1.0)


def test_spread_is_one_on_the_sphere_and_zero_for_equal_features():
    gaussian = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_statistics(gaussian)["feature_spread"].item() == pytest.approx(1.0, abs=0.01)
    lengths = torch.linspace(1, 9, 2000)[:, None]  # which do not matter
    assert feature_statistics(gaussian * lengths)["feature_spread"].item() == pytest.approx(1.0, abs=0.01)
    assert feature_statistics(torch.ones(8, 4) * lengths[:8])["feature_spread"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
def test_statistics_of_equal_features_are_finite_and_say_so(value):
    found = feature_statistics(torch.full((64, 192), value))
    assert found["effective_rank"].item() <= 1.0 + 1e-4
    assert found["feature_spread"].item() == pytest.approx(0.0, abs=1e-5)


def test_statistics_are_float32_under_autocast_and_nan_goes_through():
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    expected = feature_statistics(features.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = feature_statistics(features)
    for name, value in found.items():
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float32, (), False)
        assert value.item() == expected[name].item()
    spoilt = feature_statistics(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    assert all(value.isnan() for value in spoilt.values())


def test_statistics_never_wait_for_the_device():
    # a tensor without data cannot be read back: whatever asks for a value, or a shape that depends on one, fails on it
    with FakeTensorMode():
        features = torch.empty(8, 4)
        with pytest.raises(DataDependentOutputException):
            features.sum().item()
        choices = torch.empty(8, dtype=torch.int64)
        values = [*feature_statistics(features).values(), prototype_use(choices, 4), prototype_use(choices[:0], 4)]
    assert [(value.shape, value.dtype) for value in values] == [((), torch.float32)] * 4


def test_prototype_use_by_hand():
    choices = torch.tensor([0, 0, 1, 0])
    assert prototype_use(choices, 3).item() == pytest.approx(2 / 3)  # the first and second of three prototypes
    assert prototype_use(choices[:2], 3).item() == pytest.approx(1 / 2)  # one of the two that two rows can have
    assert prototype_use(torch.arange(5), 5).item() == 1.0
    assert prototype_use(choices[:0], 3).isnan()


# ---- the monitor

SMALL_DINOBLOOM = [
    *("train.batch_size_per_gpu=32", "train.OFFICIAL_EPOCH_LENGTH=20", "optim.warmup_epochs=2"),
    *("ibot.separate_head=true", "train.centering=sinkhorn_knopp"),
]


def config(*overrides: str, recipe: str | None = "custom.yaml"):
    random_start = ["train.dataset_path=none", "student.pretrained_weights=null"]
    return load_run_config(recipe and RECIPES / recipe, [*random_start, *overrides])


def small_config(n_prototypes: int, *overrides: str):
    heads = [f"{head}.head_n_prototypes={n_prototypes}" for head in ("dino", "ibot")]
    return config(*SMALL_DINOBLOOM, *heads, *overrides)


def rows_of(n: int, n_prototypes: int, cls=1.0, patch=1.0, n_local_crops: int = 0, start: int = 0, **statistics):
    """`n` rows as the log shows them. Each value is a constant or (at the start, at the end); losses are in ln K."""
    rng = np.random.default_rng(start)
    column = {name: np.linspace(*np.broadcast_to(value, 2), n) for name, value in statistics.items()}
    cls_loss, patch_loss = (
        np.geomspace(*np.broadcast_to(loss, 2), n) * math.log(n_prototypes) * rng.normal(1, 0.002, n)
        for loss in (cls, patch)
    )
    column["dino_global_crops_loss"] = cls_loss / (1 + n_local_crops)
    if n_local_crops:
        column["dino_local_crops_loss"] = cls_loss * n_local_crops / (1 + n_local_crops)
    column["ibot_loss"] = patch_loss / 2 * 0.5  # half of the crops have a mask
    column["koleo_loss"] = np.linspace(0.5, 0.01, n)
    return [{"iteration": start + i, **{k: float(v[i]) for k, v in column.items()}} for i in range(n)]


def series(values: list[float], every: int) -> np.ndarray:
    return np.interp(np.arange(len(values) * every), np.arange(len(values)) * every + every / 2, values)


HEALTHY = {"effective_rank": 5.0, "feature_spread": 0.85, "prototype_use": 0.9, "patch_prototype_use": 0.73}
MARKS = {
    "uniform": "the CLS loss (global and local crops together) is {} not below",
    "CLS vanishes": "the CLS loss (global and local crops together) is {} not above",
    "patches vanish": "the patch loss",
    "rank": "the effective rank",
    "spread": "the spread",
    "prototypes": "first choice of an image",
    "patch prototypes": "first choice of a masked patch",
}


def kinds(texts: list[str]) -> list[str]:
    """Which signs the warnings are of."""
    found = []
    for text in texts:
        matching = [kind for kind, mark in MARKS.items() if all(part in text for part in mark.split("{}"))]
        assert len(matching) == 1, text
        found += matching
    return found


def check_by_tens(monitor: CollapseMonitor, rows) -> list[str]:
    return [text for i in range(0, len(rows), 10) for text in monitor.check(rows[i : i + 10])]


# The seven runs from scratch on blood cells that are known to have collapsed: the shape of their losses (of ln K), as
# far as it was written down. All are found. The CLS loss gives six of them away; the patch loss only the fifth, since a
# fall by a fifth or a quarter is what it does in a run that learns.
COLLAPSED = {
    "K=4096, layer scale 1e-5, base lr 4e-3": (4096, 600, [], {}, ["uniform"]),
    "K=256, layer scale 1e-5": (256, 300, [], {"patch": 0.99}, ["uniform"]),
    "K=256, layer scale 1.0, base lr 2e-3": (256, 200, [], {"patch": (1.0, 0.97)}, ["uniform"]),
    "temperature 0.04, momentum 0.95": (256, 200, [], {"patch": (1.0, 0.8)}, ["uniform"]),
    "the same with softmax centering": (
        *(256, 200, ["train.centering=centering"]),
        *({"cls": (1.0, 0.8), "patch": (1.0, 0.02)}, ["patches vanish"]),
    ),
    "K=64, momentum 0.90, KoLeo 0.5, base lr 8e-3": (64, 200, [], {"patch": (1.0, 0.75)}, ["uniform"]),
    "K=1024, six local crops": (
        *(1024, 160, ["crops.local_crops_number=6", "crops.local_crops_size=56"]),
        *({"patch": (1.0, 0.9), "n_local_crops": 6}, ["uniform"]),
    ),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_runs_that_collapsed_are_found_from_their_losses(name, caplog):
    n_prototypes, n, overrides, shape, expected = COLLAPSED[name]
    rows = rows_of(n, n_prototypes, **shape)
    with caplog.at_level(logging.WARNING, "dinov2"):
        texts = check_by_tens(CollapseMonitor(small_config(n_prototypes, *overrides), n), rows)
    assert kinds(texts) == expected
    assert [record.getMessage() for record in caplog.records] == texts  # logged, each once
    assert f"ln {n_prototypes} = {math.log(n_prototypes):.4g}" in texts[0]


def test_a_warning_says_number_limit_iterations_meaning_and_what_to_try():
    cfg = small_config(256, "optim.base_lr=0.004")
    [text] = CollapseMonitor(cfg, 300).check(rows_of(300, 256))
    assert "is 5.54" in text
    assert "not below 5.49" in text
    assert "iterations 100 to 119" in text
    assert "does not learn to tell them apart" in text
    for advice in (
        "student.layerscale=1.0 (now 1e-05",
        "down to 0.02 (now 0.04 and 0.07)",
        "a larger batch (now 32 images a step)",
        "fewer prototypes (dino.head_n_prototypes=256 for 64 crops a step)",
        "a higher optim.base_lr (now 0.004)",
        "student.pretrained_weights",
        "configs/train/small_from_scratch.yaml",
    ):
        assert advice in text, advice
    assert (RECIPES / "small_from_scratch.yaml").is_file()


def test_a_run_from_weights_has_other_advice():
    cfg = small_config(64, "student.pretrained_weights=vits14.pth")
    [text] = CollapseMonitor(cfg, 300).check(rows_of(300, 64))
    assert "too high a one undoes the weights" in text
    for absent in ("layerscale", "released weights", "small_from_scratch"):
        assert absent not in text


# Means of twenty iterations each, recorded on blood cells (K = 256, batch 32, losses in nats).
LEARNS = {
    "cls": [5.689, 5.461, 5.327, 5.188, 5.063, 5.005, 4.895, 4.803, 4.751, 4.696, 4.647, 4.558, 4.506, 4.561, 4.462],
    "patch": [5.706, 5.494, 5.396, 5.303, 5.181, 5.127, 5.051, 4.953, 4.873, 4.831, 4.718, 4.694, 4.69, 4.707, 4.633],
    "effective_rank": [1.85, 2.05, 3.41, 4.04, 4.38, 4.67, 4.47, 4.71, 4.92, 5.14, 5.25, 5.61, 5.67, 6.11, 6.48],
    "feature_spread": [0.159, 0.422, 0.678, 0.813, 0.848, 0.859, 0.859, 0.856, 0.857, 0.868, 0.868, 0.878, 0.88, 0.88],
    "prototype_use": [0.758, 0.814, 0.909, 0.909, 0.908, 0.909, 0.913, 0.906, 0.916, 0.905, 0.916, 0.918, 0.915, 0.92],
    "patch_prototype_use": [0.735, 0.744, 0.728, 0.732, 0.729, 0.735, 0.731, 0.743, 0.741, 0.753, 0.738, 0.733, 0.731],
}
UNIFORM = {  # DinoBloom's recipe at layer scale 1e-5
    "cls": [5.705, 5.576, 5.551, 5.548, 5.547, 5.546, 5.546, 5.546, 5.546, 5.546, 5.546, 5.546, 5.546, 5.546, 5.546],
    "patch": [5.732, 5.472, 5.434, 5.458, 5.453, 5.474, 5.458, 5.466, 5.462, 5.471, 5.472, 5.468, 5.472, 5.472, 5.474],
    "effective_rank": [1.16, 1.13, 1.21, 1.32, 1.4, 1.51, 1.67, 1.82, 2.07, 2.17, 2.28, 2.33, 2.36, 2.36, 2.5],
    "feature_spread": [0.0, 0.006, 0.029, 0.07, 0.136, 0.211, 0.287, 0.346, 0.387, 0.431, 0.448, 0.468, 0.481, 0.484],
    "prototype_use": [0.183, 0.173, 0.18, 0.239, 0.256, 0.28, 0.291, 0.295, 0.323, 0.338, 0.348, 0.349, 0.359, 0.354],
    "patch_prototype_use": [0.671, 0.641, 0.604, 0.577, 0.555, 0.541, 0.521, 0.53, 0.52, 0.513, 0.514, 0.516, 0.518],
}
ONE_FOR_ALL = {  # layer scale 1.0, temperature 0.04, softmax centering
    "cls": [4.793, 3.937, 3.34, 4.348, 4.627, 4.667, 2.867, 3.271],
    "patch": [4.859, 3.982, 3.567, 2.895, 2.286, 2.439, 2.397, 2.4],
    "effective_rank": [1.99, 3.95, 5.44, 6.34, 6.86, 7.46, 7.57, 7.93],
    "feature_spread": [0.522, 0.718, 0.791, 0.83, 0.872, 0.9, 0.916, 0.917],
    "prototype_use": [0.113, 0.039, 0.03, 0.048, 0.051, 0.057, 0.025, 0.049],
    "patch_prototype_use": [0.149, 0.067, 0.07, 0.057, 0.058, 0.083, 0.089, 0.095],
}


@pytest.mark.parametrize(
    ("recorded", "expected"), [(LEARNS, []), (UNIFORM, ["uniform"]), (ONE_FOR_ALL, ["prototypes"])]
)
def test_recorded_runs_are_told_apart(recorded, expected):
    columns = {name: series(values, 20) for name, values in recorded.items()}
    columns["dino_global_crops_loss"], columns["ibot_loss"] = columns.pop("cls"), columns.pop("patch") / 4
    n = min(map(len, columns.values()))
    rows = [{"iteration": i, **{name: float(column[i]) for name, column in columns.items()}} for i in range(n)]
    assert kinds(check_by_tens(CollapseMonitor(small_config(256), n), rows)) == expected


@pytest.mark.parametrize(
    ("recipe", "n", "cls", "patch"),
    [
        ("small_with_prototypes.yaml", 1200, [5.7, 5.1, 4.7, 4.4, 4.2, 4.0, 3.9, 3.85, 3.8], [5.6, 4.8, 4.3, 4.0, 3.9]),
        # from released weights: fresh heads start at ln 65,536 = 11.09, patches stay near it for most of the run
        ("custom.yaml", 100_000, [11.4, 10.6, 9.9, 9.3, 8.9, 8.6, 8.4], [11.3, 11.2, 11.1, 11.0, 10.8, 10.6, 10.4]),
    ],
)
def test_a_run_that_learns_is_not_warned_of(recipe, n, cls, patch):
    noise = np.random.default_rng(0).normal(0, 0.15, (2, n))
    cls, patch = (np.interp(np.linspace(0, len(v) - 1, n), range(len(v)), v) for v in (cls, patch))
    rank = np.linspace(2, 12, n)
    monitor = CollapseMonitor(config(recipe=recipe), n)
    for start in range(0, n, 50):
        rows = [
            {
                **HEALTHY,
                "iteration": i,
                "dino_global_crops_loss": cls[i] + noise[0, i],
                "ibot_loss": (patch[i] + noise[1, i]) / 4,
                "effective_rank": rank[i],
            }
            for i in range(start, start + 50)
        ]
        assert monitor.check(rows) == []


@pytest.mark.parametrize(
    ("n", "overrides", "startup", "window"),
    [
        (100_000, [], 10_000, 500),  # DinoBloom's: the warm-up of 20 x 500, which is a tenth
        (10_000, [], 2_500, 200),  # a quarter of a run that never ends its warm-up
        (1_000_000, ["optim.warmup_epochs=200"], 20_000, 500),  # not a GPU-week
        (1_000, ["optim.warmup_epochs=0"], 100, 20),
        (300, ["optim.warmup_epochs=0.02"], 100, 20),
    ],
)
def test_the_start_up_phase_is_silent_and_ends_early(n, overrides, startup, window):
    monitor = CollapseMonitor(config(*overrides), n)
    collapsed = {"effective_rank": 1.0, "feature_spread": 0.0, "prototype_use": 0.0, "patch_prototype_use": 0.0}
    losses = {"dino_global_crops_loss": math.log(65536), "ibot_loss": 0.01}
    rows = [{"iteration": i, **losses, **collapsed} for i in range(startup + window)]
    assert monitor.check(rows[:-1]) == []
    everything = ["uniform", "patches vanish", "rank", "spread", "prototypes", "patch prototypes"]
    assert sorted(kinds(monitor.check(rows[-1:]))) == sorted(everything)


def test_a_run_shorter_than_the_start_up_phase_is_never_checked():
    assert CollapseMonitor(small_config(256), 100).check(rows_of(100, 256)) == []


@pytest.mark.parametrize(
    ("statistic", "good", "bad", "kind"),
    [
        ("effective_rank", 4.0, 1.2, "rank"),
        ("feature_spread", 0.5, 0.02, "spread"),
        ("prototype_use", 0.6, 0.02, "prototypes"),
        ("patch_prototype_use", 0.4, 0.01, "patch prototypes"),
    ],
)
def test_statistics_below_their_limits_are_warned_of_once_and_again_after_recovery(statistic, good, bad, kind, caplog):
    monitor = CollapseMonitor(small_config(256), 1000)
    found = []
    for phase, value in enumerate((good, bad, bad, good, bad)):
        rows = rows_of(200, 256, cls=0.8, patch=0.8, start=200 * phase, **{**HEALTHY, statistic: value})
        with caplog.at_level(logging.INFO, "dinov2"):
            found.append(kinds(check_by_tens(monitor, rows)))
    assert found == [[], [kind], [], [], [kind]]
    assert sum("has recovered" in record.getMessage() for record in caplog.records) == 1


def test_losses_are_warned_of_again_only_after_they_had_recovered():
    monitor = CollapseMonitor(small_config(256), 2000)
    for phase, (cls, patch, expected) in enumerate(
        [
            (1.0, 0.9, ["uniform"]),
            (0.985, 0.9, []),  # hovering below the limit is no recovery
            (1.0, 0.9, []),
            (0.9, 0.05, ["patches vanish"]),
            (1.0, 0.11, ["uniform"]),
            (0.05, 0.05, ["CLS vanishes"]),
            (0.5, 0.5, []),
            (0.05, 0.05, ["CLS vanishes", "patches vanish"]),
        ]
    ):
        rows = rows_of(240, 256, cls=cls, patch=patch, start=200 + 240 * phase, **HEALTHY)
        assert sorted(kinds(check_by_tens(monitor, rows))) == expected, phase
        assert ("uniform_cls" in monitor.signs_seen()) is (cls > 0.98), phase


def test_single_noisy_values_are_no_findings():
    rows = rows_of(400, 256, cls=0.95, patch=0.8, **HEALTHY)
    for row in rows[::7]:
        row.update(dino_global_crops_loss=5.6, effective_rank=1.0, feature_spread=0.0, prototype_use=0.02)
    assert check_by_tens(CollapseMonitor(small_config(256), 400), rows) == []


def test_absent_and_nan_values_are_passed_over():
    rows = rows_of(400, 256, cls=1.0, patch=0.8, **HEALTHY, smooth_rank_loss=1.0)
    for i, row in enumerate(rows):
        if i % 3:  # statistics of one step in three
            for name in HEALTHY:
                del row[name]
        else:
            row["effective_rank"] = 1.1
        if i % 3:
            row["dino_global_crops_loss"] = math.nan if i % 2 else math.inf
    texts = check_by_tens(CollapseMonitor(small_config(256), 400), rows)
    assert kinds(texts) == ["uniform", "rank"]
    assert "iterations 100 to 119" in texts[1]
    few = [{"iteration": i, "effective_rank": 1.1} if i % 5 == 0 else {"iteration": i} for i in range(400)]
    assert CollapseMonitor(small_config(256), 400).check(few) == []  # four values in each window
    logged = [{"iteration": i, "patch_prototype_use": 0.01} if i % 10 == 9 else {"iteration": i} for i in range(400)]
    assert kinds(CollapseMonitor(small_config(256), 400).check(logged)) == ["patch prototypes"]  # two in each window
    without_losses = [{"iteration": i} for i in range(400)]
    assert CollapseMonitor(small_config(256, "dino.loss_weight=0"), 400).check(without_losses) == []


def test_a_patch_loss_of_nothing_masked_is_no_collapse():
    rows = [{"iteration": i, "ibot_loss": 0.0} for i in range(400)]
    assert CollapseMonitor(small_config(256), 400).check(rows) == []
    unmasked = small_config(256, "ibot.mask_sample_probability=0")
    assert CollapseMonitor(unmasked, 400).check([{**row, "ibot_loss": 0.01} for row in rows]) == []


def test_without_prototypes_only_features_are_checked_and_no_advice_is_about_them(lejepa_alone):
    cfg = config(*SMALL_DINOBLOOM, *lejepa_alone)
    rows = [{"iteration": i, "sigreg_loss": 2.0, "effective_rank": 5.0, "feature_spread": 0.8} for i in range(400)]
    assert CollapseMonitor(cfg, 400).check(rows) == []
    texts = CollapseMonitor(cfg, 400).check([{**row, "effective_rank": 1.0, "feature_spread": 0.0} for row in rows])
    assert kinds(texts) == ["rank", "spread"]
    assert all("lejepa.sigreg_weight (now 0.05)" in text and "prototype" not in text for text in texts)


def test_few_images_are_not_checked_for_how_they_spread():
    alike = {"effective_rank": 1.0, "feature_spread": 0.05, "prototype_use": 0.02, "patch_prototype_use": 0.01}
    rows = rows_of(300, 256, cls=0.8, patch=0.8, **alike)
    assert CollapseMonitor(small_config(256, "train.batch_size_per_gpu=4"), 300).check(rows) == []
    assert len(CollapseMonitor(small_config(256, "train.batch_size_per_gpu=8"), 300).check(rows)) == 4


def test_one_prototype_for_all_is_found_where_it_is_more_than_the_usual_limit():
    cfg = small_config(8, "train.batch_size_per_gpu=8")
    for n_used, expected in ((1, ["prototypes", "patch prototypes"]), (2, [])):
        use = {"prototype_use": n_used / 8, "patch_prototype_use": n_used / 8}
        rows = rows_of(300, 8, cls=0.8, patch=0.8, **{**HEALTHY, **use})
        assert kinds(CollapseMonitor(cfg, 300).check(rows)) == expected


def test_a_resumed_monitor_warns_as_the_unbroken_one():
    cfg = small_config(256)
    rows = [
        *rows_of(130, 256, cls=0.9, patch=0.9, **HEALTHY),
        *rows_of(130, 256, cls=1.0, patch=0.9, start=130, **{**HEALTHY, "effective_rank": 1.2}),
        *rows_of(140, 256, cls=0.8, patch=(0.9, 0.01), start=260, **HEALTHY),
        *rows_of(100, 256, cls=1.0, patch=0.9, start=400, **HEALTHY),
    ]
    expected = check_by_tens(CollapseMonitor(cfg, 500), rows)
    assert kinds(expected) == ["uniform", "rank", "patches vanish", "uniform"]
    for stop in range(0, 500, 17):
        first, second = CollapseMonitor(cfg, 500), CollapseMonitor(cfg, 500)
        texts = check_by_tens(first, rows[:stop])
        state = first.state_dict()
        assert all(type(value) in (int, float) for value in state.values())
        second.load_state_dict(json.loads(json.dumps(state)))
        assert texts + check_by_tens(second, rows[stop:]) == expected, stop
    anew = CollapseMonitor(cfg, 500)
    check_by_tens(anew, rows)
    anew.load_state_dict({})  # of a run that had no monitor
    assert anew.state_dict() == CollapseMonitor(cfg, 500).state_dict()


# ---- the losses of the real model

TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=14", "student.layerscale=1.0e-05", "crops.global_crops_size=56", "crops.local_crops_size=28"),
    *("dino.head_n_prototypes=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8"),
    *("ibot.head_n_prototypes=48", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8"),
    *("train.batch_size_per_gpu=8", "train.centering=sinkhorn_knopp"),
]


def batch(n_local_crops: int, n_masked_crops: int) -> dict:
    generator = torch.Generator().manual_seed(n_local_crops)
    masks = torch.zeros(16, 16, dtype=torch.bool)
    masks[:n_masked_crops, 3:9] = True
    crops = {
        "global_crops": list(torch.randn(16, 3, 56, 56, generator=generator).chunk(2)),
        "local_crops": [torch.randn(8, 3, 28, 28, generator=generator) for _ in range(n_local_crops)],
    }
    return assemble_batch(crops, masks, 96, torch.float32)


@pytest.mark.parametrize("n_local_crops", [0, 3])
@pytest.mark.parametrize("separate_head", [True, False])
@pytest.mark.parametrize("mask_probability", [0.5, 0.25])
def test_uniform_predictions_of_the_real_model_are_shown_as_ln_k(n_local_crops, separate_head, mask_probability):
    cfg = config(
        *TINY,
        *(f"crops.local_crops_number={n_local_crops}", f"ibot.separate_head={separate_head}"),
        f"ibot.mask_sample_probability={mask_probability}",
        recipe=None,
    )
    torch.manual_seed(0)
    model = SSLMetaArch(cfg)
    with torch.no_grad():  # a student that gives every prototype the same score
        for name, module in model.student.items():
            if name != "backbone":
                module.last_layer.weight_g.zero_()
    losses = model.forward_backward(batch(n_local_crops, int(16 * mask_probability)), teacher_temp=0.07)
    shown = {name: value.item() for name, value in losses.items()}

    [text] = CollapseMonitor(cfg, 200).check([{"iteration": i, **shown} for i in range(200)])
    assert f"is {math.log(32):.4g}, not below" in text  # the CLS loss, in nats
    # the patch loss too: at 0.09 of ln K it vanishes, at 0.11 it does not
    for share, is_found in ((0.09, True), (0.11, False)):
        rows = [{"iteration": i, "ibot_loss": share * shown["ibot_loss"]} for i in range(200)]
        texts = CollapseMonitor(cfg, 200).check(rows)
        assert bool(texts) is is_found
        if is_found:
            expected = share * math.log(48 if separate_head else 32)
            assert f"is {expected:.4g}, not above" in texts[0]


@pytest.mark.parametrize(("n_local_crops", "separate_head"), [(0, True), (2, False)])
def test_an_untrained_network_that_stays_as_it_is_is_found(n_local_crops, separate_head):
    cfg = config(*TINY, f"crops.local_crops_number={n_local_crops}", f"ibot.separate_head={separate_head}", recipe=None)
    torch.manual_seed(0)
    model = SSLMetaArch(cfg)
    inputs = batch(n_local_crops, 8)
    targets = []
    model.teacher["dino_head"].register_forward_hook(lambda _m, _i, logits: targets.append(logits[:16]))
    rows = []
    for iteration in range(3):
        losses = model.forward_backward(inputs, teacher_temp=0.07)
        rows.append({"iteration": iteration, **{name: value.item() for name, value in losses.items()}})
    tokens = model.teacher_backbone(inputs["collated_global_crops"], is_training=True)["x_norm_clstoken"]
    statistics = {name: value.item() for name, value in feature_statistics(tokens).items()}
    choices = model.dino_loss.sinkhorn_knopp_teacher(targets[-1], 0.07).argmax(dim=1)
    use = prototype_use(choices, cfg.dino.head_n_prototypes).item()
    assert statistics["feature_spread"] < 0.01  # at layer scale 1e-5 all images are alike
    assert 0 < use <= 1
    stays = [{**rows[i % 3], **statistics, "prototype_use": use, "iteration": i} for i in range(200)]
    assert {"uniform", "spread"} <= set(kinds(CollapseMonitor(cfg, 200).check(stays)))
