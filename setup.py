"""Package metadata. `pip install -e .` makes `import dinov2` work from any folder.

The pins in requirements.txt are what this project is tested with; as a library it must fit into environments that
already have a torch, so the pins become ranges here, and what the code can do without becomes an extra.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RANGES = {"torch": "torch>=2.10,<2.16", "torchvision": "torchvision>=0.25"}
OPTIONAL = {"tensorboard", "xformers"}


def read_version() -> str:
    """The version as written in dinov2/__init__.py; importing the package would need torch at build time."""
    source = (ROOT / "dinov2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise ValueError('dinov2/__init__.py: no line `__version__ = "..."`; setup.py takes the version from it')
    return match.group(1)


def read_requirements(name: str) -> dict[str, str]:
    """Requirement of each package in a requirements file, without comments and `-r` lines."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return {re.split(r"[^\w.-]", line)[0]: line for line in lines if line and not line.startswith("-")}


def read_readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


requirements = read_requirements("requirements.txt")
development = read_requirements("requirements-dev.txt")

setup(
    name="dinobloom",
    version=read_version(),
    description="DINOv2 self-distillation and evaluation for single blood and bone-marrow cells",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dinov2", "dinov2.*"]),
    package_data={
        "dinov2": [
            "py.typed",
            "configs/**/*.yaml",
            "eval/features/*.csv",
            "eval/pages/templates/*",
            "eval/protocol/*.csv",
            "hub/*.jinja",
            "hub/*.safetensors",
        ]
    },
    include_package_data=False,
    install_requires=[RANGES.get(name, line) for name, line in requirements.items() if name not in OPTIONAL],
    extras_require={
        "xformers": ["xformers>=0.0.35"],
        "lora": [development["peft"]],
        "mlflow": [development["mlflow-skinny"]],
        "parquet": [development["pyarrow"]],
        "plots": [],  # matplotlib is required now; the name stays for commands that ask for it
        "tensorboard": [requirements["tensorboard"]],
        "timm": [development["timm"]],
        "torchmil": ["torchmil>=1.0.2,<2"],
        "umap": [development["umap-learn"]],
        "wandb": ["wandb>=0.17"],
        "export": [development[name] for name in ("onnx", "onnxruntime", "onnxscript", "timm", "transformers")],
        "dev": list(development.values()),
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
