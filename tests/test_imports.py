"""Who may import whom inside dinov2/, and that every module imports on a bare CPU machine without a network."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "dinov2").rglob("*.py"))

# Imports go one way, from later rows to earlier ones. A package may always import itself.
BASE = {"distributed", "configs", "layers"}
MIDDLE = {"logging", "loss", "data", "fsdp"}
ALLOWED = {
    **{package: set() for package in BASE},
    "utils": {"configs", "distributed"},
    **{package: {"distributed", "utils"} for package in MIDDLE},
    "data": {"configs", "distributed", "utils"},  # the defaults of the augmentation stand in the default config
    "models": {"layers"},
    "hub": {"models", "utils", "data", "logging"},
    "eval": BASE | MIDDLE | {"utils", "models", "hub"},
    "train": BASE | MIDDLE | {"utils", "models", "hub", "eval"},
    "run": BASE | MIDDLE | {"utils", "models", "hub", "eval", "train"},
}
# Atomic writing knows nothing of this project and serves every package above the base.
FREE = {"dinov2.utils.files"}

# Imports every module where the optional packages are missing and the network answers nothing.
BARE_MACHINE = """
import importlib, sys

OPTIONAL = {"xformers", "tensorboard", "torchmil", "wandb", "timm", "transformers", "onnxruntime", "peft"}
OPTIONAL |= {"mlflow", "pyarrow", "umap", "triton"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        raise ConnectionError(f"{event}{arguments}: an import must not use the network")

sys.meta_path.insert(0, Missing())
sys.addaudithook(no_network)
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print("\\n".join(failed), file=sys.stderr)
sys.exit(bool(failed))
"""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """`data` for dinov2.data.datasets.labelled_cells; empty for dinov2 itself."""
    return (module.split(".") + [""])[1]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import of dinov2 in a file, function bodies included, relative imports resolved."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [parent, node.module]))
            # `from dinov2.utils import files` names a module, `from dinov2.utils.files import x` names what is in one
            names = [f"{source}.{a.name}" if is_module(f"{source}.{a.name}") else source for a in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == "dinov2")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_each_package_has_a_row():
    packages = {path.relative_to(ROOT / "dinov2").parts[0] for path in MODULES} - {"__init__.py"}
    assert packages <= set(ALLOWED), "a new package needs its row in ALLOWED"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path):
    package = package_of(module_name(path))
    free = FREE if package not in BASE else set()
    allowed = ALLOWED.get(package, set()) | {package, ""}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported_modules(path)
        if package_of(name) not in allowed and name not in free
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_device_comes_from_the_inputs(path: Path):
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    ]
    assert not calls, "use .to(device) with the device of an input"


def test_every_module_imports_without_extras_gpu_and_network(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, *map(module_name, MODULES)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
