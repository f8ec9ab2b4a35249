"""Configuration of a run: defaults <- file <- command line, with strict keys, types and values.

A mistake is an error that names the key, what was found and what would be right; nothing is ignored in silence.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.configs import CONFIG_FOLDER, dinov2_default_config
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

# DinoBloom's own custom.yaml has these under `train`, where its code never read them; its file still loads.
_NEVER_READ = {f"train.{key}" for key in ("drop_path_rate", "ffn_layer", "block_chunks", "num_register_tokens")}

# What a run fills in itself, and what a user sets instead.
_FILLED_IN = {"train.output_dir": "give --output-dir and --name", "optim.lr": "set optim.base_lr"}

# Keys of DINOv2 and DinoBloom files that have no counterpart here, with the reason.
_RETIRED = {"train.cache_dataset": "pictures are read from the lists; there is no metadata cache to switch"}

# Keys that this package had, with what is written instead.
_TEACHERS_CELLS = "evaluation.datasets=[{name: <name>, train: <cells to learn from>, test: <cells to be judged by>}]"
_REPLACED = {"evaluation.train_data": _TEACHERS_CELLS, "evaluation.test_data": _TEACHERS_CELLS}

# Lists of mappings; what these may hold is checked where they are used.
_MAPPINGS = {"evaluation.datasets": "[{name: pbc, data: /data/pbc}]"}

# Lists of any length, of words; a number counts as one.
_WORDS = {
    "student.freeze": "[patch_embed, pos_embed, 0-7]",
    "student.unfreeze": "[norm, 10-11]",
    "student.lora.targets": "[attn.qkv, attn.proj]",
}

# Mappings of names, which nobody knows beforehand, to numbers.
_NUMBERS_BY_NAME = {"train.balance.weights": "{bmc: 0.5, acevedo: 2}"}

# Shares from 0 to 1 that may also be said as false (none) or true (all).
_SHARES = {"train.activation_checkpointing"}

# What a key may hold besides null, where the default is null.
_NULLABLE: dict[str, type] = {
    "train.image_size": int,
    "train.accumulation_steps": int,
    "train.global_batch_size": int,
    "train.wandb.entity": str,
    "MODEL.WEIGHTS": str,
    "student.pretrained_weights": str,
    "student.embed_dim": int,
    "student.depth": int,
    "student.num_heads": int,
    "student.layerscale": float,
    "evaluation.keep_teachers": int,
}

_COMMAND_LINE = "command line"

_DTYPES = ("auto", "fp32", "bf16", "fp16")
_CHOICES: dict[str, Sequence[str]] = {
    "data_transform": ("default", "hema"),
    "compute_precision.fp32_matmul": ("fast", "exact"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.image_fit": ("crop", "pad", "squash"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglufused", "identity"),
    "optim.scaling_rule": ("sqrt_wrt_1024", "none"),
    "sharding_strategy": ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"),
    "param_dtype": _DTYPES,
    "reduce_dtype": _DTYPES,
    "buffer_dtype": _DTYPES,
}

# Inclusive bounds (low, high) of numbers and of the members of lists; None: unbounded.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "train.batch_size_per_gpu": (1, None),
    "train.accumulation_steps": (1, None),
    "train.global_batch_size": (1, None),
    "train.OFFICIAL_EPOCH_LENGTH": (1, None),
    "train.num_workers": (0, None),
    "train.image_size": (1, None),
    "train.max_bad_fraction": (0, 1),
    "train.max_bad_steps_in_row": (1, None),
    "train.max_rollbacks": (0, None),
    "train.max_loss_spike": (0, None),
    "train.hang_timeout_seconds": (0, None),
    "train.activation_checkpointing": (0, 1),
    "train.saveckp_freq": (0, None),
    "train.milestone_freq": (0, None),
    "train.keep_checkpoints": (1, None),
    "train.log_period": (1, None),
    "dino.loss_weight": (0, None),
    "dino.koleo_loss_weight": (0, None),
    "dino.smooth_rank_loss_weight": (0, None),
    "dino.head_n_prototypes": (2, None),
    "dino.head_nlayers": (1, None),
    "ibot.loss_weight": (0, None),
    "ibot.mask_sample_probability": (0, 1),
    "ibot.mask_ratio_min_max": (0, 1),
    "ibot.head_n_prototypes": (2, None),
    "ibot.head_nlayers": (1, None),
    "student.patch_size": (1, None),
    "student.drop_path_rate": (0, 1),
    "student.depth": (1, None),
    "student.num_register_tokens": (0, None),
    "student.lora.rank": (0, None),
    "student.lora.alpha": (0, None),
    "student.lora.dropout": (0, 1),
    "teacher.momentum_teacher": (0, 1),
    "teacher.final_momentum_teacher": (0, 1),
    "teacher.teacher_temp": (1e-4, None),
    "teacher.warmup_teacher_temp": (1e-4, None),
    "optim.epochs": (0, None),
    "optim.base_lr": (0, None),
    "optim.clip_grad": (0, None),
    "optim.freeze_backbone_iterations": (0, None),
    "crops.global_crops_scale": (0, 1),
    "crops.local_crops_scale": (0, 1),
    "crops.local_crops_number": (0, None),
    "evaluation.eval_period_iterations": (0, None),
    "evaluation.knn_k": (1, None),
    "evaluation.keep_teachers": (1, None),
    "evaluation.batch_size": (1, None),
}


def load_run_config(
    config_file: str | Path | None,
    overrides: Sequence[str] = (),
    resolve: Callable[[DictConfig], None] | None = None,
) -> DictConfig:
    """Merge and check a run's configuration.

    Args:
        config_file: YAML with what differs from the defaults; None for the defaults alone.
        overrides: `key.subkey=value` texts of the command line, which win.
        resolve: called with the merged values, to replace those that follow from others, before they are checked
            against each other.

    Raises:
        FileNotFoundError: no such file.
        KeyError: an unknown key; the message names the nearest valid one.
        ValueError: an unreadable file or a value of the wrong type or range.
    """
    merged = dinov2_default_config.copy()
    layers: list[tuple[str, DictConfig]] = []
    if config_file is not None:
        layers.append((str(config_file), _read_yaml(Path(config_file))))
    if overrides:
        layers.append((_COMMAND_LINE, _read_overrides(overrides)))
    for origin, layer in layers:
        if origin != _COMMAND_LINE:
            _drop_never_read(layer, origin)
        for key, value in _leaves(layer):
            checked = _checked(key, value, origin)
            OmegaConf.update(merged, key, _escaped(checked), force_add=False)
    if resolve is not None:
        resolve(merged)
    _check_together(merged)
    return merged


def missing_keys(cfg: DictConfig) -> list[str]:
    """Keys that are still `???`."""
    return sorted(OmegaConf.missing_keys(cfg))


def write_config(cfg: DictConfig, path: Path) -> None:
    """Write the merged configuration, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(OmegaConf.to_yaml(cfg))


def differences(ours: DictConfig, theirs: DictConfig, prefixes: Sequence[str] = ("",)) -> dict[str, tuple[Any, Any]]:
    """Keys below `prefixes` whose values differ: {key: (ours, theirs)}; a key that one side lacks counts as None."""
    a, b = dict(_leaves(ours)), dict(_leaves(theirs))
    keys = [key for key in sorted(a.keys() | b.keys()) if key.startswith(tuple(prefixes))]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        known = sorted(str(file.relative_to(CONFIG_FOLDER)) for file in (CONFIG_FOLDER / "train").glob("*.yaml"))
        raise FileNotFoundError(f"--config-file: no file at {str(path)!r}; the package has {known} in {CONFIG_FOLDER}")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"--config-file: {path} is not readable as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"--config-file: {path} must hold `section: key: value`, found a {type(config).__name__}")
    return config


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    layer: Any = OmegaConf.create()
    defaults = _defaults()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or text.startswith("-"):
            raise ValueError(f"{_COMMAND_LINE}: {text!r} is neither a known option nor of the form key.subkey=value")
        if key in _FILLED_IN:
            raise ValueError(f"{_COMMAND_LINE}: {key} is filled in by the run; {_FILLED_IN[key]} instead")
        if isinstance(defaults.get(key), str) and value != "null":
            # a path or name is meant as it stands, also with # or a leading zero, which YAML reads otherwise
            OmegaConf.update(layer, key, value.replace("${", "\\${"), force_add=True)
            continue
        if key in _MAPPINGS or key in _NUMBERS_BY_NAME:
            # {name:pbc} needs no quotes in a shell, but is a mapping to YAML only with a space
            text = re.sub(r"([{,]\s*[\w.-]+):(?=\S)", r"\1: ", text)
        try:
            layer = OmegaConf.merge(layer, OmegaConf.from_dotlist([text]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{_COMMAND_LINE}: cannot read {text!r}: {error}") from error
    return layer


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves, and mappings of names to numbers."""
    for key in map(str, config):
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(config, key):
            yield name, "???"
            continue
        value = config[key]
        if isinstance(value, DictConfig) and name not in _NUMBERS_BY_NAME:
            yield from _leaves(value, f"{name}.")
        else:
            is_config = isinstance(value, (DictConfig, ListConfig))
            yield name, OmegaConf.to_container(value, resolve=True) if is_config else value


def _escaped(value: Any) -> Any:
    """As a configuration is to hold it: a layer's interpolations are resolved; what still looks like one is text."""
    if isinstance(value, list):
        return [_escaped(member) for member in value]
    if isinstance(value, dict):
        return {key: _escaped(member) for key, member in value.items()}
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _drop_never_read(layer: DictConfig, origin: str) -> None:
    for key in sorted(_NEVER_READ | _RETIRED.keys()):
        section, name = key.split(".")
        if isinstance(layer.get(section), DictConfig) and name in layer[section]:
            value = layer[section].pop(name)
            if key in _RETIRED:
                logger.warning("%s: %s=%s is ignored: %s", origin, key, value, _RETIRED[key])
            else:
                logger.warning(
                    "%s: %s=%s never had an effect (DinoBloom's code does not read it, and ran with drop path 0, the "
                    "MLP and no registers) and is ignored; student.%s has one, and is %s unless it is set",
                    *(origin, key, value, name, _defaults()[f"student.{name}"]),
                )


def _defaults() -> dict[str, Any]:
    return dict(_leaves(dinov2_default_config))


def _checked(key: str, value: Any, origin: str) -> Any:
    """The value as the default's type, or an error that says what is wrong with it."""
    defaults = _defaults()
    if key in _REPLACED:
        raise KeyError(f"{origin}: {key} is no longer a key; write {_REPLACED[key]} instead")
    if key not in defaults:
        raise KeyError(f"{origin}: {_unknown_key_text(key, list(defaults))}")
    default = defaults[key]
    if value == "???":
        return value
    if key in _MAPPINGS:
        return _as_mappings(key, value, origin)
    if key in _NUMBERS_BY_NAME:
        return _as_numbers_by_name(key, value, origin)
    if key in _WORDS:
        return _as_words(key, value, origin)
    if key in _SHARES and isinstance(value, bool):
        value = float(value)
    expected = _NULLABLE.get(key, type(default))
    if value is None:
        if key in _NULLABLE:
            return None
        raise ValueError(f"{origin}: {key} must be {_type_text(default, expected)}, found nothing (null)")
    if isinstance(default, list):
        if not isinstance(value, list) or (key != "evaluation.knn_k" and len(value) != len(default)):
            raise ValueError(f"{origin}: {key} must be {_type_text(default, list)}, found {value!r}")
        result: Any = [_as_type(key, member, type(default[0]), default, origin) for member in value]
    else:
        result = _as_type(key, value, expected, default, origin)
    _check_choice(key, result, origin)
    _check_bounds(key, result, origin)
    return result


def _as_mappings(key: str, value: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(member, dict) for member in value):
        raise ValueError(f"{origin}: {key} must be a list of mappings like {_MAPPINGS[key]}, found {value!r}")
    return value


def _as_words(key: str, value: Any, origin: str) -> list[str]:
    if not isinstance(value, list) or not all(type(member) in (str, int) for member in value):
        raise ValueError(f"{origin}: {key} must be a list like {_WORDS[key]}, found {value!r}")
    return [str(member) for member in value]


def _as_numbers_by_name(key: str, value: Any, origin: str) -> dict[str, float]:
    if not isinstance(value, dict) or not all(type(number) in (int, float) for number in value.values()):
        raise ValueError(f"{origin}: {key} must give numbers to names, like {_NUMBERS_BY_NAME[key]}, found {value!r}")
    return {str(name): float(number) for name, number in value.items()}


def _as_type(key: str, value: Any, expected: type, default: Any, origin: str) -> Any:
    is_bool = isinstance(value, bool)
    if expected is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    if expected is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, expected) and (expected is bool) == is_bool:
        return value
    raise ValueError(
        f"{origin}: {key} must be {_type_text(default, expected)}, found {value!r} ({type(value).__name__})"
    )


def _type_text(default: Any, expected: type) -> str:
    if isinstance(default, list):
        return f"a list like {default}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return f"{names[expected]} (default: {default})"


def _unknown_key_text(key: str, valid: list[str]) -> str:
    for outer, example in _MAPPINGS.items():
        if key.startswith(f"{outer}."):
            return f"config key {outer} is a list of mappings, not a section; write {outer}={example}"
    name = key.rsplit(".", 1)[-1]
    elsewhere = [candidate for candidate in valid if candidate.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"unknown config key {key}; it exists as {' and '.join(elsewhere[:3])}"
    if any(candidate.startswith(f"{key}.") for candidate in valid):
        return f"config key {key} is a section, not a value; set one of its keys"
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; configs/ssl_default_config.yaml lists all keys"
    return f"unknown config key {key}{hint}"


def _check_choice(key: str, value: Any, origin: str) -> None:
    choices = _CHOICES.get(key) or _CHOICES.get(key.rsplit(".", 1)[-1])
    if choices and value not in choices:
        raise ValueError(f"{origin}: {key} must be one of {', '.join(choices)}, found {value!r}")


def _check_bounds(key: str, value: Any, origin: str) -> None:
    if key not in _BOUNDS or value is None:
        return
    low, high = _BOUNDS[key]
    for number in value if isinstance(value, list) else [value]:
        if (low is not None and number < low) or (high is not None and number > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{origin}: {key} must be {limits}, found {value}")


def _check_together(cfg: DictConfig) -> None:
    """Rules between keys."""
    if cfg.crops.local_crops_number == 1:
        logger.warning(
            "crops.local_crops_number is 1: here that is one local crop. If 1 was meant as DinoBloom means it (none), "
            "set crops.local_crops_number=0 and dino.loss_weight=%s, its effective value",
            cfg.dino.loss_weight / 2,
        )
    patch = cfg.student.patch_size
    sizes = {"crops.global_crops_size": cfg.crops.global_crops_size}
    if cfg.crops.local_crops_number > 0:
        sizes["crops.local_crops_size"] = cfg.crops.local_crops_size
    for key, size in sizes.items():
        if size < patch or size % patch:
            nearest = max(patch, round(size / patch) * patch)
            raise ValueError(f"{key} must be a multiple of student.patch_size={patch}, found {size}; {nearest} is near")
    if cfg.MODEL.WEIGHTS and cfg.student.pretrained_weights and cfg.MODEL.WEIGHTS != cfg.student.pretrained_weights:
        raise ValueError(
            "MODEL.WEIGHTS and student.pretrained_weights name different files; set one of them, and the other to null"
        )
    if cfg.student.lora.rank and not cfg.student.lora.alpha:
        raise ValueError("student.lora.alpha is 0: adapters would have no effect; set student.lora.rank=0 for none")
    for key, (low, high) in {
        "crops.global_crops_scale": cfg.crops.global_crops_scale,
        "crops.local_crops_scale": cfg.crops.local_crops_scale,
        "ibot.mask_ratio_min_max": cfg.ibot.mask_ratio_min_max,
    }.items():
        if low > high:
            raise ValueError(f"{key} must be [smallest, largest], found [{low}, {high}]")
    if cfg.dino.loss_weight == 0 and cfg.ibot.loss_weight == 0:
        raise ValueError("dino.loss_weight and ibot.loss_weight are both 0: nothing would be learned; set one of them")
    compared = cfg.train.batch_size_per_gpu
    if cfg.dino.koleo_loss_distributed:
        compared = cfg.train.global_batch_size or compared * (cfg.train.accumulation_steps or 1)
    if cfg.dino.koleo_loss_weight > 0 and compared < 2:
        raise ValueError(
            "dino.koleo_loss_weight needs two pictures to compare: train.batch_size_per_gpu must be at least 2"
        )
