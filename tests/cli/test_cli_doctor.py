"""``tilewright doctor``: this machine and the plugins' own checks."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugin_distributions as dists
import pytest
import torch
from plugin_distributions import Install

from tilewright.cli import main
from tilewright_tools import doctor


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Install]:
    with dists.on_path(tmp_path / "site") as install:
        yield install


MACHINE = {
    "python",
    "torch",
    "threads",
    "cpu",
    "memory",
    "model cache",
    "working folder",
    "models by name",
    "output encoding",
}


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


def with_checks(source: str) -> dists.Distribution:
    head = "\n    from tilewright.types import Check\n\n    @hookimpl\n    def doctor_checks():\n"
    return dists.sampler("acme-x", "x", dists.LIKELIEST + head + f"        {source}\n")


def of_plugin(checks: list[dict[str, Any]], about: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in checks if check["about"] == about}


def test_a_machine_without_problems_passes(capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = examined(capsys)
    assert {check["name"] for check in checks if check["about"] == "machine"} == MACHINE
    assert [check for check in checks if check["status"] == "failed"] == []
    assert code == 0
    assert all(check["advice"] for check in checks if check["status"] != "ok")


def test_the_report_lists_each_check_with_its_advice(
    capsys: pytest.CaptureFixture[str], site: Install
) -> None:
    site(dists.GOOD, dists.BROKEN_IMPORT)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("warning  executor acme-bag:bag: bags: 1")
    assert lines[start + 1].split() == ["->", "buy", "more"]
    assert "ok       observer acme-bag:tally: loads: version 0.3" in lines
    (broken,) = [line for line in lines if line.startswith("failed")]
    assert broken.startswith("failed   sampler acme-broken:broken: loads: ")
    assert lines[-1].endswith(" 1 failed")


@pytest.mark.parametrize(
    "broken", [dists.BROKEN_IMPORT, dists.EXITS, dists.STALE, dists.OTHER_API, dists.MISSPELT_HOOK]
)
def test_a_plugin_that_does_not_load_is_a_failed_check(
    capsys: pytest.CaptureFixture[str], site: Install, broken: dists.Distribution
) -> None:
    site(broken)
    code, checks = examined(capsys)
    assert code == 1
    ((name, _),) = broken.plugins["sampler"].items()
    found = of_plugin(checks, f"sampler {broken.name}:{name}")
    assert found["loads"]["status"] == "failed"
    assert found["loads"]["advice"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise RuntimeError('no device')", "RuntimeError: no device ("),
        ("raise SystemExit", "SystemExit ("),
        ("return ['fine']", "TypeError: doctor_checks() must return Check objects, found 'fine'"),
        ("return 3", "TypeError: 'int' object is not iterable"),
    ],
)
def test_a_check_that_raises_is_a_failed_check(
    capsys: pytest.CaptureFixture[str], site: Install, source: str, found: str
) -> None:
    site(with_checks(source))
    code, checks = examined(capsys)
    own = of_plugin(checks, "sampler acme-x:x")
    assert code == 1
    assert own["loads"]["status"] == "ok"
    assert own["doctor_checks"]["status"] == "failed"
    assert own["doctor_checks"]["found"].startswith(found)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_the_exit_code_says_whether_a_check_failed(
    capsys: pytest.CaptureFixture[str], site: Install, status: str, code: int
) -> None:
    site(with_checks(f"return [Check(name='own', status='{status}', found='it', advice='do')]"))
    assert examined(capsys)[0] == code


def test_a_name_claimed_by_two_distributions_is_a_warning(
    capsys: pytest.CaptureFixture[str], site: Install
) -> None:
    site(*dists.RIVALS)
    code, checks = examined(capsys)
    assert code == 0
    found = of_plugin(checks, "sampler acme-two:rival")["loads"]
    assert found["status"] == "warning"
    assert "claimed by acme-one 1.5 and by acme-two 2.0" in found["found"]


def test_without_torch_the_other_checks_still_run(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise OSError('libtorch_cpu.so: cannot open shared object')"
    )
    done = dists.run("-m", "tilewright", "doctor", "--json", site=tmp_path)
    assert done.code == 1, done.err
    machine = of_plugin(json.loads(done.out), "machine")
    assert machine.keys() == MACHINE - {"threads", "cpu"}
    assert machine["torch"]["status"] == "failed"
    assert "libtorch_cpu.so" in machine["torch"]["found"]
    assert "pip install" in machine["torch"]["advice"]


def test_more_threads_than_cpus_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0})
    torch.set_num_threads(2)
    try:
        check = doctor.threads()
    finally:
        torch.set_num_threads(1)
    assert (check.status, check.advice[:17]) == ("warning", "set OMP_NUM_THREA")


def test_low_memory_and_low_disk_space_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "LOW_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "LOW_DISK", 1 << 60)
    for check in (doctor.memory(), doctor.disk("model cache", tmp_path / "not" / "there")):
        assert check.status == "warning"
        assert check.advice


@pytest.mark.parametrize(("encoding", "status"), [("utf-8", "ok"), ("ascii", "warning")])
def test_an_output_encoding_without_unicode_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, encoding: str, status: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert doctor.output_encoding().status == status


def test_output_printed_by_plugins_is_not_in_the_json(
    capsys: pytest.CaptureFixture[str], site: Install
) -> None:
    site(with_checks("print('checking')"))
    _, checks = examined(capsys)
    assert of_plugin(checks, "sampler acme-x:x").keys() == {"loads"}
