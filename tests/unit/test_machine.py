"""How much memory is available on the machine and within a container's limit."""

from pathlib import Path

import pytest

from tilewright import machine

MIB = 1 << 20


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for the files of a control group."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def fill(container: Path, limit: str, used: int, files: int = 0) -> None:
    (container / "memory.max").write_text(f"{limit}\n")
    (container / "memory.current").write_text(f"{used}\n")
    kept = f"inactive_file {files // 2}\nactive_file {files // 2}\n"
    (container / "memory.stat").write_text(f"anon {used - files}\n{kept}")


def test_without_a_container_memory_is_that_of_the_machine(container: Path) -> None:
    meminfo = Path("/proc/meminfo").read_text().split()
    total = int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    assert machine.total_memory() == pytest.approx(total, rel=0.01)
    assert 0 < machine.available_memory() < total


def test_a_container_without_a_limit_has_the_memory_of_the_machine(container: Path) -> None:
    total = machine.total_memory()
    fill(container, "max", 5 * MIB)
    assert machine.total_memory() == total


def test_a_container_has_its_limit_less_the_memory_in_use(container: Path) -> None:
    fill(container, str(16 * MIB), used=12 * MIB)
    assert machine.total_memory() == 16 * MIB
    assert machine.available_memory() == 4 * MIB


def test_reclaimable_page_cache_counts_as_available(container: Path) -> None:
    fill(container, str(16 * MIB), used=12 * MIB, files=10 * MIB)
    assert machine.available_memory() == 14 * MIB


def test_a_container_above_its_limit_has_no_available_memory(container: Path) -> None:
    fill(container, str(16 * MIB), used=17 * MIB)
    assert machine.available_memory() == 0
