"""The doctor on this machine, with and without what it looks for; and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whimbrel.agent.doctor import Finding, Verdict, blocking, probe
from whimbrel.agent.doctor.kernel import cgroup_root

SRC = Path(__file__).resolve().parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
TIMEOUT_S = 60


def doctor(*wrapper: str) -> tuple[int, dict[str, Finding]]:
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "whimbrel", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] == (done.returncode == 0)
    return done.returncode, {found["name"]: Finding(**found) for found in said["findings"]}


def test_every_lack_says_what_it_costs() -> None:
    findings = probe()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.found
        if finding.verdict is not Verdict.OK:
            assert finding.cost
        if finding.verdict is Verdict.MISSING:
            assert finding.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_dropping_a_capability_is_noticed_and_exits_1() -> None:
    code, findings = doctor("setpriv", "--bounding-set", "-sys_ptrace,-kill", "--")
    assert code == 1
    lacking = findings["capabilities"]
    assert lacking.verdict == Verdict.MISSING
    assert "CAP_SYS_PTRACE" in lacking.found
    assert "CAP_KILL" in lacking.found
    assert lacking.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_without_namespaces_and_cgroups_the_trials_themselves_fail() -> None:
    _, findings = doctor("setpriv", "--bounding-set", "-sys_admin", "--")
    assert findings["pid, mount and net namespaces"].verdict == Verdict.MISSING
    assert findings["CRIU"].verdict == Verdict.MISSING


def test_it_leaves_no_cgroup_behind() -> None:
    probe()
    root = cgroup_root()
    assert root is not None
    assert not list(root.glob(f"whimbrel-doctor-{os.getpid()}*"))


def test_blocking_is_what_is_missing_and_no_more() -> None:
    made = [Finding(name=verdict, verdict=verdict, found="x", cost="y", remedy="z") for verdict in Verdict]
    assert [finding.name for finding in blocking(made)] == [Verdict.MISSING]
