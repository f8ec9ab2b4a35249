"""Folder of the configuration files, and the default configuration."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONFIG_FOLDER = Path(__file__).parent


def load_config(config_name: str) -> DictConfig:
    """Read `configs/<config_name>.yaml` (for instance "train/custom") without the defaults."""
    config = OmegaConf.load(CONFIG_FOLDER / f"{config_name}.yaml")
    assert isinstance(config, DictConfig), f"{config_name}.yaml must hold a mapping"
    return config


dinov2_default_config = load_config("ssl_default_config")
