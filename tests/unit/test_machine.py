"""How much memory is available on the machine and within the limits of control groups."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tilewright import machine

MIB = 1 << 20
UNLIMITED = 0x7FFFFFFFFFFFF000
"""What version 1 has for a group without a limit."""


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory in the place of /sys/fs/cgroup, and a process in its root group."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    (tmp_path / "proc").mkdir()
    return tmp_path / "cgroup"


def process(group: str, mounts: Mapping[Path, str] | None = None) -> None:
    """Write /proc/self/cgroup, and /proc/self/mountinfo with the root of each mount point."""
    (machine.PROC / "cgroup").write_text(group)
    lines = (f"30 23 0:26 {root} {at} rw - cgroup x rw\n" for at, root in (mounts or {}).items())
    (machine.PROC / "mountinfo").write_text("".join(lines))


def fill(group: Path, limit: object, used: int = 0, files: int = 0) -> None:
    """The files of a group of version 2. limit, used and files, the file cache, in bytes."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    kept = f"inactive_file {files // 2}\nactive_file {files // 2}\n"
    (group / "memory.stat").write_text(f"anon {used - files}\n{kept}")


def fill_v1(group: Path, limit: int, used: int = 0, files: int = 0) -> None:
    """The files of a group of version 1, where ``total_`` also counts the groups inside."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    kept = f"total_inactive_file {files // 2}\ntotal_active_file {files // 2}\n"
    (group / "memory.stat").write_text(f"inactive_file 0\nactive_file 0\n{kept}")


def memory() -> tuple[float, float]:
    """The total and what is available, in MiB."""
    return machine.total_memory() / MIB, machine.available_memory() / MIB


def test_without_a_container_memory_is_that_of_the_machine(cgroup: Path) -> None:
    meminfo = Path("/proc/meminfo").read_text().split()
    total = int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    assert machine.total_memory() == pytest.approx(total, rel=0.01)
    assert 0 < machine.available_memory() < total


def test_a_group_without_a_limit_has_the_memory_of_the_machine(cgroup: Path) -> None:
    total = machine.total_memory()
    fill(cgroup, "max", 5 * MIB)
    fill_v1(cgroup / "memory", UNLIMITED, used=5 * MIB)
    assert machine.total_memory() == total
    assert machine.available_memory() > 16 * MIB


@pytest.mark.parametrize(("name", "filled"), [("", fill), ("memory", fill_v1)])
def test_a_container_has_its_limit_less_the_memory_in_use(cgroup, name, filled) -> None:
    filled(cgroup / name, 16 * MIB, used=12 * MIB)
    assert memory() == (16, 4)


@pytest.mark.parametrize(("name", "filled"), [("", fill), ("memory", fill_v1)])
def test_reclaimable_page_cache_counts_as_available(cgroup, name, filled) -> None:
    filled(cgroup / name, 16 * MIB, used=12 * MIB, files=10 * MIB)
    assert memory() == (16, 14)


def test_a_container_above_its_limit_has_no_available_memory(cgroup: Path) -> None:
    fill(cgroup, 16 * MIB, used=17 * MIB)
    assert machine.available_memory() == 0


def test_a_nested_group_is_found_by_the_process(cgroup: Path) -> None:
    process("0::/system.slice/job.scope\n")
    fill(cgroup / "system.slice" / "job.scope", 16 * MIB, used=4 * MIB)
    fill(cgroup / "system.slice" / "other.scope", 8 * MIB)
    assert memory() == (16, 12)


def test_the_lowest_limit_of_a_group_and_its_parents_holds(cgroup: Path) -> None:
    process("0::/slurm/job/step\n")
    fill(cgroup / "slurm" / "job" / "step", "max")
    fill(cgroup / "slurm" / "job", 16 * MIB, used=2 * MIB)
    # Less is left here, though the limit is higher: other jobs use it.
    fill(cgroup / "slurm", 32 * MIB, used=30 * MIB)
    assert memory() == (16, 2)


def test_a_nested_group_of_version_1(cgroup: Path) -> None:
    process("9:cpu,cpuacct:/other\n4:memory:/slurm/job\n1:name=systemd:/x\n")
    fill_v1(cgroup / "memory", UNLIMITED)
    fill_v1(cgroup / "memory" / "slurm" / "job", 16 * MIB, used=4 * MIB)
    fill_v1(cgroup / "memory" / "other", 8 * MIB)
    assert memory() == (16, 12)


def test_a_hybrid_host_has_the_memory_of_version_1(cgroup: Path) -> None:
    process("4:memory:/job\n0::/job\n", {cgroup / "unified": "/", cgroup / "memory": "/"})
    (cgroup / "unified" / "job").mkdir(parents=True)
    fill_v1(cgroup / "memory" / "job", 16 * MIB, used=4 * MIB)
    assert memory() == (16, 12)


@pytest.mark.parametrize(
    ("version", "mount", "filled"), [("0:", "", fill), ("4:memory", "memory", fill_v1)]
)
@pytest.mark.parametrize("inner", ["", "/worker"])
def test_a_container_that_sees_a_part_of_the_hosts_hierarchy(
    cgroup, version, mount, filled, inner
) -> None:
    process(f"{version}:/docker/0f3a{inner}\n", {cgroup / mount: "/docker/0f3a"})
    filled(cgroup / mount, 16 * MIB, used=1 * MIB)
    if inner:
        filled(cgroup / mount / "worker", 8 * MIB, used=4 * MIB)
    assert memory() == ((8, 4) if inner else (16, 15))


def test_a_process_outside_of_what_is_mounted_has_the_limit_of_the_mount(cgroup: Path) -> None:
    process("0::/../../job\n", {cgroup: "/"})
    fill(cgroup, 16 * MIB, used=4 * MIB)
    assert memory() == (16, 12)


def test_a_mount_point_whose_name_is_not_utf_8_changes_nothing(cgroup: Path) -> None:
    fill(cgroup, 300 * MIB, 100 * MIB)
    process("0::/\n", {cgroup: "/"})
    with (machine.PROC / "mountinfo").open("ab") as file:
        file.write(b"31 23 0:27 / /mnt/caf\xe9 rw - ext4 x rw\n")
    assert memory() == (300, 200)
