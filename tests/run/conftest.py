"""SLURM's commands for tests without a cluster: programs that note what they were asked and answer from files."""

from pathlib import Path

import pytest

SBATCH = """#!/bin/sh
cp "$1" "{folder}/submitted.sh"
if [ -f "{folder}/refusal" ]; then cat "{folder}/refusal" >&2; exit 1; fi
echo "Submitted batch job 7"
"""
SCONTROL = """#!/bin/sh
echo "$@" >>"{folder}/asked"
# each line of the file is one answer; the last one stays
[ "$(wc -l <"{folder}/answers")" -gt 1 ] && answer=$(head -n 1 "{folder}/answers") && sed -i 1d "{folder}/answers" \
    || answer=$(cat "{folder}/answers")
echo "$answer"
"""


class FakeSlurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": "#!/bin/sh\n"}.items():
            self.program(name, text.format(folder=folder))
        (folder / "asked").touch()
        self.answer("")

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def submitted(self) -> list[str] | None:
        """Lines of the script that sbatch got."""
        file = self.folder / "submitted.sh"
        return file.read_text().splitlines() if file.is_file() else None

    def refuse(self, text: str) -> None:
        (self.folder / "refusal").write_text(text)

    def asked(self) -> list[str]:
        """Arguments of all calls of scontrol."""
        return (self.folder / "asked").read_text().splitlines()

    def answer(self, *jobs: str) -> None:
        """What scontrol tells of the job, time after time."""
        (self.folder / "answers").write_text("".join(f"JobId=7 {job}\n" for job in jobs))


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return FakeSlurm(folder)
