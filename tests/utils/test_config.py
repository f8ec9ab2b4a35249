"""Strict configuration: every mistake is named, nothing is ignored in silence."""

import logging

import pytest

from dinov2.configs import CONFIG_FOLDER, dinov2_default_config
from dinov2.utils.config import differences, load_run_config, missing_keys, write_config

CUSTOM = CONFIG_FOLDER / "train" / "custom.yaml"

# What DinoBloom's published training file sets, with its stray keys under `train` and its cluster's path.
DINOBLOOMS_OWN = """
compute_precision:
  grad_scaler: true
  teacher: &networks
    backbone: &network
      sharding_strategy: SHARD_GRAD_OP
      mixed_precision: {param_dtype: fp16, reduce_dtype: fp16, buffer_dtype: fp32}
    dino_head: *network
    ibot_head: *network
  student: *networks
ibot: {separate_head: true}
data_transform: default
train:
  {batch_size_per_gpu: 120, num_workers: 124, OFFICIAL_EPOCH_LENGTH: 500, centering: sinkhorn_knopp,
   dataset_path: "HemaStandardDataset:root=/some/cluster/train_lists:shuffle=1",
   drop_path_rate: 0.4, ffn_layer: swiglufused, block_chunks: 0, num_register_tokens: 0}
teacher: {momentum_teacher: 0.994}
optim: {epochs: 200, weight_decay_end: 0.2, base_lr: 2.0e-04, warmup_epochs: 20, layerwise_decay: 1.0}
evaluation: {eval_period_iterations: 1000}
student: {arch: dinov2_vitb14, patch_size: 14}
crops: {global_crops_scale: [0.32, 1.0], local_crops_size: 98, local_crops_number: 1}
dino: {head_bottleneck_dim: 256, smooth_rank_loss_weight: 0.0}
"""


@pytest.fixture
def dinov2_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


def test_defaults_file_and_command_line_win_in_that_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {epochs: 7, base_lr: 1e-3}\nstudent: {}\n")
    cfg = load_run_config(file, ["optim.epochs=9"])
    assert (cfg.optim.epochs, cfg.optim.base_lr, cfg.optim.clip_grad) == (9.0, 1e-3, 3.0)
    assert dinov2_default_config.optim.epochs == 100.0


def test_dinoblooms_own_file_loads_and_names_what_it_ignores(tmp_path, dinov2_log):
    file = tmp_path / "custom.yaml"
    file.write_text(DINOBLOOMS_OWN)
    cfg = load_run_config(file)
    assert cfg.student.drop_path_rate == 0.3  # train.drop_path_rate=0.4 has no effect, as it never had
    assert cfg.train.batch_size_per_gpu == 120
    for key in ("drop_path_rate", "ffn_layer", "block_chunks", "num_register_tokens"):
        assert f"train.{key}=" in dinov2_log.text
    assert "crops.local_crops_number is 1" in dinov2_log.text


def test_custom_yaml_is_dinoblooms_recipe():
    cfg = load_run_config(CUSTOM)
    assert missing_keys(cfg) == ["train.dataset_path"]
    assert cfg.student.arch == "dinov2_vitb14"
    assert (cfg.crops.local_crops_number, cfg.dino.loss_weight) == (0, 0.5)
    assert (cfg.student.drop_path_rate, cfg.student.ffn_layer) == (0.0, "mlp")
    assert (cfg.optim.epochs, cfg.optim.base_lr, cfg.train.batch_size_per_gpu) == (200, 2e-4, 120)


@pytest.mark.parametrize("file", sorted((CONFIG_FOLDER / "train").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_packaged_config_loads(file):
    load_run_config(file)


@pytest.mark.parametrize(
    ("override", "error", "text"),
    [
        ("optim.epocs=3", KeyError, "did you mean optim.epochs"),
        ("train.layerscale=1", KeyError, "it exists as student.layerscale"),
        ("nonsense=1", KeyError, "ssl_default_config.yaml lists all keys"),
        ("dino=3", KeyError, "is a section"),
        ("optim.epochs=many", ValueError, "optim.epochs must be a number"),
        ("train.seed=0.5", ValueError, "train.seed must be a whole number"),
        ("train.batch_size_per_gpu=true", ValueError, "must be a whole number"),
        ("ibot.separate_head=1", ValueError, "must be true or false"),
        ("train.batch_size_per_gpu=0", ValueError, "must be at least 1"),
        ("train.max_bad_fraction=2", ValueError, "between 0 and 1"),
        ("train.center_crop=0", ValueError, "train.center_crop must be between 0.01 and 1, found 0"),
        ("train.center_crop=1.5", ValueError, "train.center_crop must be between 0.01 and 1, found 1.5"),
        ("train.center_crop=null", ValueError, "train.center_crop must be a number"),
        ("crops.global_crops_scale=0.5", ValueError, r"must be a list like \[0.32, 1.0\]"),
        ("crops.global_crops_scale=[1.0,0.3]", ValueError, "smallest, largest"),
        ("data_transform=hemma", ValueError, "one of default, hema"),
        ("compute_precision.student.backbone.mixed_precision.param_dtype=fp8", ValueError, "auto, fp32, bf16, fp16"),
        ("crops.global_crops_size=225", ValueError, "multiple of student.patch_size=16, found 225; 224 is near"),
        ("optim.clip_grad=null", ValueError, "found nothing"),
        ("optim.lr=1", ValueError, "set optim.base_lr"),
        ("train.drop_path_rate=0.1", KeyError, "it exists as student.drop_path_rate"),
        ("--epochs", ValueError, "neither a known option nor"),
        ("evaluation.datasets=cells", ValueError, r"a list like \[\{name: pbc, data: /data/pbc\}\], found 'cells'"),
        ("evaluation.datasets=[cells]", ValueError, r"a list like \[\{name"),
        ("evaluation.datasets=null", ValueError, r"a list like \[\{name"),
        ("evaluation.datasets={name: a, data: b}", ValueError, r"a list like \[\{name"),
        ("evaluation.datasets.name=a", KeyError, "did you mean evaluation.datasets"),
        ("student.depth=deep", ValueError, "student.depth must be a whole number"),
        ("student.freeze=norm", ValueError, r"a list like \[patch_embed"),
        ("train.balance.weights={a:b}", ValueError, r"a mapping like \{bmc: 0.5"),
        ("evaluation.keep_teachers=0", ValueError, "must be at least 1"),
        (
            "crops.global_crops_size=99999999999999999999",
            ValueError,
            "global_crops_size must be between 0 and 4096",
        ),
        ("train.batch_size_per_gpu=99999999999999999999", ValueError, "between 1 and 1048576"),
        ("train.seed=99999999999999999999", ValueError, "train.seed must be between 0"),
        ("student.num_heads=0", ValueError, "student.num_heads must be at least 1"),
        ("optim.base_lr=.inf", ValueError, "between 0 and 1000000000, found inf"),
        ("optim.clip_grad=-.inf", ValueError, "optim.clip_grad must be at least 0"),
        ("train.balance.weights={a: .inf}", ValueError, "train.balance.weights must be between"),
        ("optim.epochs=1000000000", ValueError, "optim.epochs=1e.09 of train.OFFICIAL_EPOCH_LENGTH=1250 steps"),
        (f"student.depth={'9' * 5000}", ValueError, "cannot read 'student.depth=9"),
        ("optim.epochs=\udce9", ValueError, "cannot read 'optim.epochs="),
        ("student.arch=???", ValueError, "student.arch has no value.* its default, vit_large"),
        ("evaluation.datasets=" + "[" * 3000, ValueError, "cannot read"),
    ],
)
def test_mistakes_are_errors_that_help(override, error, text):
    with pytest.raises(error, match=text):
        load_run_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a\n  b: *a\n", "not readable as YAML"),  # holds itself
        ("a: &a [x]\n" + "b: &a [*a, *a, *a]\n" * 9, "more than 20 aliases"),
        ("train: " + "{a: " * 3000, "not readable as YAML"),
        ("train:\n\t- x: [\n", "not readable as YAML"),
        ("\0", "not readable as YAML"),
        ("1: 2\n", "unknown config key 1"),
        ("student:\n  arch: ???\n", "student.arch has no value"),
        ("train: null\n", "train is a section"),
    ],
)
def test_a_broken_config_file_is_an_error_that_names_it(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises((ValueError, KeyError), match=message) as raised:
        load_run_config(tmp_path / "mine.yaml")
    assert str(tmp_path / "mine.yaml") in str(raised.value)


@pytest.mark.parametrize("text", ["/a/my cells #2/lists", "/a/x: y", "0123", "1e3", "[odd", "${HOME}/x", "a=b"])
def test_texts_of_the_command_line_are_taken_as_they_stand(text):
    assert load_run_config(None, [f"train.dataset_path={text}"]).train.dataset_path == text


def test_a_number_where_a_file_should_have_text_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text("student: {pretrained_weights: 0123}")
    with pytest.raises(ValueError, match=r"student\.pretrained_weights must be a text"):
        load_run_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[{name:b m,data:/a/b,linear:true,knn_k:[1,5]}]",
        "[{name: b m, data: /a/b, linear: true, knn_k: [1, 5]}]",
        '[{"name": "b m", "data": "/a/b", "linear": true, "knn_k": [1, 5]}]',
    ],
)
def test_data_sets_on_the_command_line(text, tmp_path):
    expected = [{"name": "b m", "data": "/a/b", "linear": True, "knn_k": [1, 5]}]
    cfg = load_run_config(None, [f"evaluation.datasets={text}"])
    assert cfg.evaluation.datasets == expected
    write_config(cfg, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml").evaluation.datasets == expected


def test_data_sets_of_a_file_keep_texts_that_look_like_interpolations(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("evaluation:\n  datasets:\n  - name: a\n    data: /x/\\${y}/b\n")
    cfg = load_run_config(file)
    write_config(cfg, tmp_path / "config.yaml")
    for found in (cfg, load_run_config(tmp_path / "config.yaml")):
        assert found.evaluation.datasets[0].data == "/x/${y}/b"


def test_two_weight_files_are_an_error():
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS and student\.pretrained_weights"):
        load_run_config(None, ["MODEL.WEIGHTS=a.pth", "student.pretrained_weights=b.pth"])


@pytest.mark.parametrize(
    ("content", "text"), [("a: [1", "not readable as YAML"), ("- 1\n- 2\n", "must hold"), ("\x00", "not readable")]
)
def test_files_that_are_no_config(tmp_path, content, text):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=text):
        load_run_config(file)


def test_a_missing_file_names_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train/custom\.yaml"):
        load_run_config(tmp_path / "none.yaml")


def test_written_config_reads_back_the_same(tmp_path):
    cfg = load_run_config(CUSTOM, ["student.depth=2", "train.dataset_path=x"])
    write_config(cfg, tmp_path / "config.yaml")
    again = load_run_config(tmp_path / "config.yaml")
    assert differences(cfg, again) == {}
    changed = load_run_config(tmp_path / "config.yaml", ["student.depth=3"])
    assert differences(changed, again, ["student."]) == {"student.depth": (3, 2)}


def test_an_infinite_temperature_of_the_balance_is_allowed():
    assert load_run_config(None, ["train.balance.temperature=.inf"]).train.balance.temperature == float("inf")


def test_a_smaller_centre_needs_the_fit_crop():
    assert load_run_config(None, ["train.center_crop=0.65"]).train.center_crop == 0.65
    with pytest.raises(ValueError, match=r"train\.center_crop=0\.65 needs train\.image_fit=crop, found pad"):
        load_run_config(None, ["train.center_crop=0.65", "train.image_fit=pad"])
