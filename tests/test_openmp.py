"""What importing the package sets: how OpenMP's threads wait, and a name for users without one."""

import ast
import getpass
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dinov2

ROOT = Path(__file__).parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COMMANDS = sorted(
    path
    for folder in ("dinov2", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_imports_dinov2_before_torch(path):
    imported = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imported += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append((node.module or "").partition(".")[0])
    first = next((name for name in imported if name in ("dinov2", "torch", "torchvision", "sklearn")), "dinov2")
    assert first == "dinov2"


def spin_count_of(code: str, **variables: str) -> str:
    """Return the spin count that libgomp itself reports when it is loaded; a passive policy means 0."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if not (found := re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)):
        pytest.skip("this PyTorch does not use libgomp")
    return found[1]


def test_the_spin_count_takes_effect():
    assert spin_count_of("import dinov2.train.train") == str(dinov2.OPENMP_SPIN_COUNT)


@pytest.mark.parametrize(
    ("variables", "count"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_the_users_choice_wins(variables, count):
    assert spin_count_of("import dinov2, torch", **variables) == count


def test_a_user_without_a_passwd_entry_gets_a_name(monkeypatch):
    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    dinov2.name_the_user()
    assert getpass.getuser() == str(os.getuid())  # torch's caches ask for it
    monkeypatch.setenv("USER", "me")
    dinov2.name_the_user()
    assert getpass.getuser() == "me"
