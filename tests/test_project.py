"""The project's own files: metadata, what gets packaged, requirements, scripts."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dinov2
from dinov2.models.vision_transformer import vit_small

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
# Packages whose import name is not their name on PyPI.
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "pyyaml"}
EXTRAS = {
    "mlflow",
    "triton",
    "onnxruntime",
    "peft",
    "pyarrow",
    "tensorboard",
    "timm",
    "torchmil",
    "transformers",
    "umap",
    "wandb",
    "xformers",
}


def requirement_lines() -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [re.sub(r"\s*;.*", "", line).strip() for line in lines if line.strip()]


def setup_py(*arguments: str) -> str:
    """What setup.py prints when it is run from the repository root."""
    run = subprocess.run([sys.executable, "setup.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def project_files() -> list[Path]:
    """Files that are tracked or would be by `git add .`."""
    git = shutil.which("git")
    command = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = git and subprocess.run([git, *command], cwd=ROOT, capture_output=True, text=True)
    if not run or run.returncode != 0:
        pytest.skip("this copy of the project is not a git checkout that git will read")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_setup_names_the_distribution_and_the_version_of_the_package():
    assert setup_py("--name", "--version").split() == ["dinobloom", dinov2.__version__]


def test_build_has_every_module_and_config(tmp_path: Path):
    setup_py("-q", "build_py", "--build-lib", str(tmp_path))
    wanted = {"dinov2/py.typed"}
    for pattern in ("*.py", "*.yaml", "*.css", "*.js", "*.html", "*.jinja", "*.csv", "*.safetensors"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "dinov2").rglob(pattern)}
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert built == wanted


def test_torch_and_what_is_built_against_it_are_pinned_together():
    assert {"torch==2.10.0", "torchvision==0.25.0", "xformers==0.0.35"} <= set(requirement_lines())


def imported_distributions() -> dict[str, str]:
    """{package on PyPI: a line of dinov2/ that imports it}."""
    found = {}
    for path in sorted((ROOT / "dinov2").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"dinov2"}:
                found[DISTRIBUTIONS.get(name, name).lower()] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_import_is_a_requirement_and_every_requirement_is_imported():
    listed = {re.split(r"[^\w.-]", line)[0].lower() for line in requirement_lines()}
    imported = imported_distributions()
    assert {name: line for name, line in imported.items() if name not in listed | EXTRAS} == {}
    through_torch = {"tensorboard"}  # torch.utils.tensorboard imports it
    assert listed - imported.keys() == through_torch


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path):
    run = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def write_script(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("failing", ["", "all", "--system"])
def test_ci_runs_the_test_command_of_the_readme_and_the_system_tests_whatever_fails(tmp_path, failing):
    assert "bash scripts/test.sh  " in (ROOT / "README.md").read_text(encoding="utf-8")
    write_script(tmp_path / ".ci" / "run", (ROOT / ".ci" / "run").read_text())
    write_script(tmp_path / "tests" / "slurm" / "cluster.sh")  # nothing is missing
    for program in ("chromium", "chromedriver", "gcc", "nm"):
        write_script(tmp_path / "bin" / program)
    write_script(tmp_path / "scripts" / "test.sh", f'echo "${{*:-all}}" >> ran; [[ "${{*:-all}}" != "{failing}" ]]')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], env={**os.environ, "PATH": path})
    assert (tmp_path / "ran").read_text().split() == ["all", "--system"]
    assert bool(run.returncode) == bool(failing)


def test_no_path_of_one_machine():
    folders = b"|".join([b"work", b"root", b"lustre"])
    absolute = re.compile(rb"(?<![\w.~*}>-])/(?:" + folders + rb")/[\w.-]*")
    found = {
        str(path.relative_to(ROOT)): match.group().decode()
        for path in project_files()
        if b"\0" not in (content := path.read_bytes()) and (match := absolute.search(content))
    }
    assert not found


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    weights = {"teacher": {f"backbone.{k}": v for k, v in vit_small(patch_size=14).state_dict().items()}}
    torch.save(weights, "DinoBloom-S.pth")
    assert code.count('"dinobloom_s"') == 1  # which would be downloaded
    code = code.replace("dinobloom_s", "DinoBloom-S.pth")
    Image.new("RGB", (60, 50)).save("cell.png")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (1, 384)


def test_scripts_that_messages_and_documents_name_are_there():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "dinov2").rglob("*.py"))]
    named = {name for text in texts for name in re.findall(r"scripts/\w+\.(?:py|sh)", text)}
    assert named >= {"scripts/make_patch_lists.py", "scripts/quickstart.sh"}
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_a_list_is_made_from_folders_of_images(tmp_path):
    for name in ("b/2.PNG", "a/1.jpg", "a/.hidden.png", "a/notes.txt"):
        (tmp_path / "cells" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cells" / name).touch()
    command = [sys.executable, ROOT / "scripts" / "make_patch_lists.py"]
    output = tmp_path / "lists" / "all.txt"
    subprocess.run([*command, tmp_path / "cells", "--output", output], check=True, capture_output=True)
    assert output.read_text().splitlines() == [str(tmp_path / "cells" / name) for name in ("a/1.jpg", "b/2.PNG")]
    failed = subprocess.run([*command, tmp_path / "no", "--output", output], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "not a folder" in failed.stderr


@pytest.mark.slow
def test_quickstart_ends_with_features_better_than_untrained(tmp_path):
    environment = {**os.environ, "DINOBLOOM_VENV": sys.prefix}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), str(tmp_path / "out put")]
    done = subprocess.run(command, check=True, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert "histogram" in done.stdout.rsplit("Results:", 1)[1]  # the table is printed last
    results = json.loads((tmp_path / "out put" / "knn" / "results.json").read_text())["results"]
    knn = {name: results[name]["knn_20"]["accuracy"] for name in ("model", "untrained", "histogram")}
    assert knn["model"] > max(knn["untrained"], knn["histogram"]) + 0.2
