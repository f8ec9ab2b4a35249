"""Read the configuration of a run: defaults <- file <- command line, with checked keys, types and values.

Types are those of the defaults. The error of a mistake names the key, the value and what to write.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError

from dinov2.configs import CONFIG_FOLDER, dinov2_default_config
from dinov2.utils.files import PathLike, atomic_write, check_regular_file, local_path

logger = logging.getLogger("dinov2")

# keys of older files that are ignored with a warning; DinoBloom's own file has the last four under `train`
_IGNORED = {
    "train.compile_augmentation": "the workers augment, in one implementation",
    "train.cache_dataset": "images are read from the lists; there is no metadata cache to switch",
    **{
        f"train.{name}": "it never had an effect: DinoBloom's code does not read it, and ran with drop path 0, the MLP "
        f"and no registers; student.{name} has one"
        for name in ("drop_path_rate", "ffn_layer", "block_chunks", "num_register_tokens")
    },
}

# keys that a run sets itself, and what a user sets instead
_FILLED_IN = {
    **{"train.output_dir": "give --output-dir and --name", "optim.lr": "set optim.base_lr"},
    **{"train.metadata.n_values": "set train.metadata.column", "teacher.frozen": "set teacher.pretrained_weights"},
}

# example values for the types of keys with a null or empty default
_EXAMPLES: dict[str, Any] = {
    **dict.fromkeys(("train.image_size", "train.accumulation_steps", "train.global_batch_size"), 1),
    **dict.fromkeys(("student.embed_dim", "student.depth", "student.num_heads", "evaluation.keep_teachers"), 1),
    "train.wandb.entity": "team",
    "train.mlflow.tracking_uri": "http://localhost:5000",
    "train.metadata.column": "slide",
    "train.metadata.n_values": 2,
    "teacher.frozen": {"arch": "vit_small"},
    "train.balance.weights": {"bmc": 0.5, "acevedo": 2.0},
    "student.freeze": ["patch_embed", "pos_embed", "0-7"],
    "student.unfreeze": ["norm", "10-11"],
    "evaluation.datasets": [{"name": "pbc", "data": "/data/pbc"}],
}
# besides keys with a null default
_NULLABLE = {"MODEL.WEIGHTS", "student.pretrained_weights", "teacher.pretrained_weights", "student.layerscale"}
_SHARES = {"train.activation_checkpointing"}  # numbers that may also be false (none) or true (all)

_TYPE_NAMES = {
    **{int: "a whole number", float: "a number", str: "a text"},
    **{bool: "true or false", list: "a list", dict: "a mapping"},
}

_DTYPES = ("auto", "fp32", "bf16", "fp16")
_CHOICES: dict[str, Sequence[str]] = {  # by the key's ending
    "data_transform": ("default", "hema"),
    "compute_precision.fp32_matmul": ("fast", "exact"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.image_fit": ("crop", "pad", "squash"),
    "train.metadata.mode": ("suppress", "encourage"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglufused", "identity"),
    "optim.scaling_rule": ("sqrt_wrt_1024", "none"),
    ".sharding_strategy": ("auto", "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"),
    **dict.fromkeys((".param_dtype", ".reduce_dtype", ".buffer_dtype"), _DTYPES),
}

MOST_ALIASES = 20  # of a YAML file: aliases of aliases multiply, and fifty of them can fill the memory

# inclusive bounds of numbers and of members of lists: (low, high, patterns of keys); the first match is used
_LARGEST = 10**9  # of numbers without a closer limit
_BOUNDS: list[tuple[float, float, str]] = [
    (0, math.inf, "train.balance.temperature"),  # .inf: equal shares
    (0, 1, "train.max_bad_fraction train.activation_checkpointing student.drop_path_rate student.lora.dropout"),
    (0, 1, "lejepa.sigreg_weight"),
    (0, 1, "ibot.mask_* teacher.*momentum_teacher crops.*_crops_scale optim.adamw_beta*"),
    (0, 2**63 - 1, "train.seed"),
    (1e-4, _LARGEST, "teacher.*teacher_temp"),
    (0.01, 1, "train.center_crop"),
    (2, 2**24, "*.head_n_prototypes"),
    (1, 4096, "student.patch_size train.image_size"),
    (0, 4096, "crops.*_crops_size"),
    (1, 1000, "student.depth *.head_nlayers"),
    (0, 1000, "crops.local_crops_number"),
    (1, 2**16, "student.embed_dim student.num_heads lejepa.head_*"),
    (1, 2**20, "*batch_size* train.accumulation_steps"),
    (1, _LARGEST, "train.OFFICIAL_EPOCH_LENGTH train.log_period train.max_bad_steps_in_row *.keep_* evaluation.knn_k"),
    (0, _LARGEST, "*"),
]


def load_run_config(
    config_file: PathLike | None, overrides: Sequence[str] = (), resolve: Callable[[DictConfig], None] | None = None
) -> DictConfig:
    """Merge and check a run's configuration.

    Args:
        config_file: path or URL of a YAML with values that replace defaults; None for the defaults alone.
        overrides: `key.subkey=value` texts of the command line, which replace both.
        resolve: sets values that follow from others, before the values are checked against each other.
    """
    merged = dinov2_default_config.copy()
    layers = [("command line", dict(_read_override(text) for text in overrides))]
    if config_file is not None:
        layers.insert(0, (str(config_file), _read_yaml(local_path(config_file))))
    for origin, values in layers:
        for key, value in values.items():
            try:
                checked = _check_value(key, value)
            except (KeyError, ValueError) as error:
                raise type(error)(f"{origin}: {error.args[0]}") from error
            OmegaConf.update(merged, key, _escape(checked), force_add=False)
    if resolve is not None:
        resolve(merged)
    _check_together(merged)
    return merged


def read_config(file: Path, setting: str = "configuration") -> DictConfig:
    """Read a YAML file of settings, with its references resolved.

    Raises:
        ValueError: it is no YAML, holds no `section: key: value`, or refers to what it does not have.
    """
    try:
        text = check_regular_file(file, setting).read_text(encoding="utf-8")
        if sum(isinstance(token, AliasToken) for token in yaml.scan(text)) > MOST_ALIASES:
            raise ValueError(f"{setting}: {file} has more than {MOST_ALIASES} aliases (*name); write out their values")
        content = OmegaConf.create(text)
        OmegaConf.resolve(content)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{setting}: {file} is not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{setting}: {file} must hold `section: key: value`, found a {type(content).__name__}")
    return content


def missing_keys(cfg: DictConfig) -> list[str]:
    """Return the keys that are still `???`."""
    return sorted(OmegaConf.missing_keys(cfg))


def write_config(cfg: DictConfig, path: Path) -> None:
    """Write the merged configuration, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(OmegaConf.to_yaml(cfg))


def differences(ours: DictConfig, theirs: DictConfig, prefixes: Sequence[str] = ("",)) -> dict[str, tuple[Any, Any]]:
    """Find the keys below `prefixes` whose values differ: {key: (ours, theirs)}, None for a missing key."""
    a, b = (dict(_iterate_values(OmegaConf.to_container(cfg, resolve=True), _defaults())) for cfg in (ours, theirs))
    keys = [key for key in sorted(a.keys() | b.keys()) if key.startswith(tuple(prefixes))]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        known = sorted(str(file.relative_to(CONFIG_FOLDER)) for file in (CONFIG_FOLDER / "train").glob("*.yaml"))
        raise FileNotFoundError(f"--config-file: no file at {str(path)!r}; the package has {known} in {CONFIG_FOLDER}")
    content = OmegaConf.to_container(read_config(path, "--config-file"))
    values = dict(_iterate_values(content, _defaults()))
    for key in sorted(values.keys() & _IGNORED.keys()):
        logger.warning("%s: %s=%s is ignored: %s", path, key, values.pop(key), _IGNORED[key])
    return values


def _read_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or text.startswith("-"):
        raise ValueError(f"command line: {text!r} is neither a known option nor of the form key.subkey=value")
    if key in _FILLED_IN:
        raise ValueError(f"command line: {key} is filled in by the run; {_FILLED_IN[key]} instead")
    if isinstance(_defaults().get(key), str) and value != "null":
        return key, value  # a path or name is not parsed: it may contain # or a leading zero
    if isinstance(_EXAMPLES.get(key), (list, dict)):
        # {name:pbc} needs no quotes in a shell, but is a mapping in YAML only with a space
        value = re.sub(r"([{,]\s*[\w.-]+):(?=\S)", r"\1: ", value)
    try:
        content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)
    except (
        YAMLError,
        OmegaConfBaseException,
        ValueError,
    ) as error:  # ValueError: bytes that are not UTF-8, 5000 digits
        raise ValueError(f"command line: cannot read {text!r}: {error}") from error
    mapping, _, name = key.rpartition(".")
    if isinstance(_EXAMPLES.get(mapping), dict):  # one entry of a mapping with the user's own names
        return mapping, {name: content["value"]}
    return key, content["value"]


def _iterate_values(content: Any, known: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all values that are no sections; without `known`, an empty mapping is a value."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known and (value or known):
            yield from _iterate_values(value, known, f"{key}.")
        else:
            yield key, value


@cache
def _defaults() -> dict[str, Any]:
    return dict(_iterate_values(OmegaConf.to_container(dinov2_default_config)))


def _escape(value: Any) -> Any:
    """Escape texts that look like interpolations, which are resolved already."""
    if isinstance(value, list):
        return [_escape(member) for member in value]
    if isinstance(value, dict):
        return {key: _escape(member) for key, member in value.items()}
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _check_value(key: str, value: Any) -> Any:
    """Check a value and return it as the default's type; the error describes the mistake."""
    if key not in _defaults():
        raise KeyError(_unknown_key_text(key))
    default = _defaults()[key]
    if value == default == "???" or (value is None and (default is None or key in _NULLABLE)):
        return value
    if value == "???":
        raise ValueError(f"{key} has no value; give it one, or leave the key out for its default, {default}")
    if key in _SHARES and isinstance(value, bool):
        value = float(value)
    example = _EXAMPLES.get(key, default)
    try:
        result = _convert(value, example)
    except TypeError as error:
        like = f"like {example}".replace("'", "") if isinstance(example, list | dict) else f"(default: {default})"
        text = "nothing (null)" if value is None else repr(value)
        raise ValueError(f"{key} must be {_TYPE_NAMES[type(example)]} {like}, found {text}") from error
    for ending, choices in _CHOICES.items():
        if key.endswith(ending) and result not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, found {result!r}")
    low, high = next((low, high) for low, high, keys in _BOUNDS if any(fnmatchcase(key, name) for name in keys.split()))
    members = result if isinstance(result, list) else result.values() if isinstance(result, dict) else [result]
    for member in members:
        if type(member) in (int, float) and not low <= member <= high:  # true for NaN
            limits = f"between {low} and {high}" if high == 1 or member > high else f"at least {low}"
            raise ValueError(f"{key} must be {limits}, found {result}")
    return result


def _convert(value: Any, example: Any) -> Any:
    """Convert `value` to the type of `example`; lists of fractional numbers must have its length."""
    if type(value) is type(example):
        if isinstance(example, list):
            if isinstance(example[0], float) and len(value) != len(example):
                raise TypeError
            # in a list of words a number is a word
            words = [str(member) if type(member) is int else member for member in value]
            return [_convert(member, example[0]) for member in (words if isinstance(example[0], str) else value)]
        if isinstance(example, dict) and isinstance(next(iter(example.values())), float):
            return {str(name): _convert(number, 1.0) for name, number in value.items()}
        return value
    if isinstance(example, float) and type(value) is int:
        return float(value)
    if type(example) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise TypeError


def _unknown_key_text(key: str) -> str:
    valid = list(_defaults())
    elsewhere = [known for known in valid if known.rpartition(".")[2] == key.rpartition(".")[2]]
    if elsewhere:
        return f"unknown config key {key}; it exists as {' and '.join(elsewhere[:3])}"
    if any(known.startswith(f"{key}.") for known in valid):
        return f"config key {key} is a section, not a value; set one of its keys"
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "configs/ssl_default_config.yaml lists all keys"
    return f"unknown config key {key}; {hint}"


def _check_together(cfg: DictConfig) -> None:
    """Check the rules between keys."""
    if cfg.crops.local_crops_number == 1:
        logger.warning(
            "crops.local_crops_number is 1: here that is one local crop. If you mean none, as DinoBloom does with 1, "
            "set crops.local_crops_number=0 and dino.loss_weight=%s, its effective value",
            cfg.dino.loss_weight / 2,
        )
    for is_broken, text in _rules(cfg):
        if is_broken:
            raise ValueError(text)


def _rules(cfg: DictConfig) -> Iterator[tuple[bool, str]]:
    """Yield (True if a rule is broken, its error message)."""
    patch, n_compared = cfg.student.patch_size, cfg.train.batch_size_per_gpu
    if cfg.dino.koleo_loss_distributed:
        n_compared = cfg.train.global_batch_size or n_compared * (cfg.train.accumulation_steps or 1)
    for key in ["crops.global_crops_size", *["crops.local_crops_size"] * (cfg.crops.local_crops_number > 0)]:
        size = OmegaConf.select(cfg, key)
        near = max(patch, round(size / patch) * patch)
        yield size != near, f"{key} must be a multiple of student.patch_size={patch}, found {size}; {near} is near"
    for key in ("crops.global_crops_scale", "crops.local_crops_scale", "ibot.mask_ratio_min_max"):
        low, high = OmegaConf.select(cfg, key)
        yield low > high, f"{key} must be [smallest, largest], found [{low}, {high}]"
    n_steps = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    yield (
        n_steps > _LARGEST,
        f"optim.epochs={cfg.optim.epochs:g} of train.OFFICIAL_EPOCH_LENGTH={cfg.train.OFFICIAL_EPOCH_LENGTH} steps are "
        f"more than {_LARGEST:,} steps; lower one of them",
    )
    weights = {cfg.MODEL.WEIGHTS, cfg.student.pretrained_weights} - {None, ""}
    yield (
        len(weights) > 1,
        "MODEL.WEIGHTS and student.pretrained_weights name different files; set one of them, and the other to null",
    )
    yield (
        cfg.student.lora.rank and not cfg.student.lora.alpha,
        "student.lora.alpha is 0: adapters would have no effect; set student.lora.rank=0 for none",
    )
    yield (
        cfg.dino.loss_weight == cfg.lejepa.loss_weight == 0
        and not (cfg.ibot.loss_weight and cfg.ibot.mask_sample_probability)
        and not cfg.teacher.pretrained_weights,
        "dino.loss_weight, ibot.loss_weight (or ibot.mask_sample_probability) and lejepa.loss_weight are all 0: "
        "nothing is learned; set one of them, or teacher.pretrained_weights",
    )
    yield (
        cfg.train.center_crop != 1 and cfg.train.image_fit != "crop",
        f"train.center_crop={cfg.train.center_crop} needs train.image_fit=crop, found {cfg.train.image_fit}; set "
        "train.center_crop=1 to keep whole images",
    )
    yield (
        cfg.train.metadata.column is not None and not cfg.train.metadata.weight,
        "train.metadata.weight is 0: the column would have no effect; set train.metadata.column=null for none",
    )
    yield (
        cfg.teacher.pretrained_weights and not cfg.teacher.distillation_loss_weight,
        "teacher.distillation_loss_weight is 0: nothing is distilled; set teacher.pretrained_weights=null for none",
    )
    yield (
        cfg.dino.koleo_loss_weight > 0 and n_compared < 2,
        "dino.koleo_loss_weight needs two images to compare: train.batch_size_per_gpu must be at least 2",
    )
