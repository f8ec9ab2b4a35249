"""Peak memory of this process, what malloc keeps, and what containers leave of a machine's."""

import platform
import subprocess
import sys

import pytest
import torch

from dinov2.utils import resources
from dinov2.utils.resources import PeakMemory, memory_limit, resident_memory, size_text

MIB = 2**20
CPU = torch.device("cpu")


def peak_is_reset() -> bool:
    with PeakMemory(CPU) as peak:
        pass
    return peak.bytes < 1.05 * resident_memory() + 8 * MIB


def test_the_peak_is_of_the_work_alone():
    torch.zeros(100 * MIB)  # 400 MiB that are freed again
    if not peak_is_reset():
        pytest.skip("the kernel does not reset the peak of a process")
    with PeakMemory(CPU) as nothing:
        pass
    for n in (64, 256, 64):  # a smaller one after a larger one counts as little as before
        with PeakMemory(CPU) as peak:
            block = torch.zeros(n * MIB // 4)
            block += 1
            del block
        assert peak.bytes - nothing.bytes == pytest.approx(n * MIB, abs=12 * MIB)


def test_the_peak_is_known_after_an_error():
    peak = PeakMemory(CPU)
    with pytest.raises(torch.OutOfMemoryError), peak:
        raise torch.OutOfMemoryError("made up")
    assert peak.bytes >= 10 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    script = """
import resource
import torch
from dinov2.utils.resources import keep_freed_memory

def work():
    for _ in range(10):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()  # for the whole process, so in one of its own
print(-(work() - work()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 25_000  # ten times 100 MB have 244,000 pages


def test_there_is_room_for_this_process_and_more():
    assert memory_limit(CPU) > resident_memory() > 10 * MIB


def test_where_the_system_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "PROC", tmp_path)
    with PeakMemory(CPU) as peak:
        pass
    assert peak.bytes > 10 * MIB
    assert memory_limit(CPU) > 10 * MIB


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Made-up /proc and cgroups: 100 MiB in use by the process, 1000 MiB available."""
    monkeypatch.setattr(resources, "PROC", tmp_path / "proc")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    pages = 100 * MIB // resources.os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "proc" / "self" / "statm").write_text(f"999999 {pages} 0 0 0 0 0")
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {1000 * 1024} kB\n")

    def set_up(groups, files):
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(text))
        return memory_limit(CPU) // MIB

    return set_up


def test_without_limits_the_machine_counts(machine):
    assert machine("0::/job\n", {"job/memory.max": "max\n", "job/memory.current": 1}) == 1100
    assert machine("", {}) == 1100


def test_the_limit_of_a_group_or_of_one_around_it_counts(machine):
    inner = {"a/b/memory.max": 900 * MIB, "a/b/memory.current": 300 * MIB, "a/b/memory.stat": "anon 1\n"}
    assert machine("0::/a/b\n", inner) == 700
    # what the kernel caches of files can go
    outer = {
        "a/memory.max": 500 * MIB,
        "a/memory.current": 400 * MIB,
        "a/memory.stat": f"anon 1\ninactive_file {50 * MIB}\n",
    }
    assert machine("0::/a/b\n", {**inner, **outer}) == 250


def test_in_a_container_the_top_group_counts(machine):
    files = {"memory.max": 300 * MIB, "memory.current": 500 * MIB, "memory.stat": ""}
    assert machine("0::/../elsewhere\n", files) == 100  # more than allowed is in use: nothing is left


def test_groups_of_version_1(machine):
    files = {
        "memory/job/memory.limit_in_bytes": 600 * MIB,
        "memory/job/memory.usage_in_bytes": 200 * MIB,
        "memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {10 * MIB}\n",
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 200 * MIB,
        "memory/memory.stat": "",
    }
    assert machine("5:cpu,cpuacct:/job\n4:memory:/job\n", files) == 510


def test_sizes_as_text():
    sizes = (14.9 * 2**30, 0.21 * 2**30, 11.8 * 2**10, 152 * MIB, 90 * MIB, 3)
    assert [size_text(n) for n in sizes] == ["14.9 GiB", "0.21 GiB", "11.8 KiB", "0.15 GiB", "90.0 MiB", "3 bytes"]


def test_more_workers_than_any_machine_has_are_not_started():
    with pytest.raises(ValueError, match="workers: 1,000,000,000 processes are more"):
        next(resources.parallel_map(str, [1, 2], 10**9))
