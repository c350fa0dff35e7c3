"""Privileges, programs and space of this machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

from whimbrel.agent.criu.find import CriuMissing, find_criu
from whimbrel.agent.doctor.findings import Finding, Verdict

CRIU_TIMEOUT_S = 30.0
STORE_DIR = Path("/dev/shm")
STORE_BYTES_WANTED = 1 << 30
CLOCK_ERROR_MS_MAX = 500.0
_CAPABILITIES = {
    "CAP_SYS_ADMIN": (21, "namespaces, mounts, cgroups and CRIU"),
    "CAP_SYS_PTRACE": (19, "memory of workloads cannot be read"),
    "CAP_NET_ADMIN": (12, "sockets cannot be restored"),
    "CAP_KILL": (5, "workloads of other users cannot be stopped"),
    "CAP_DAC_OVERRIDE": (1, "files of other users cannot be read"),
    "CAP_SETUID": (7, "restored processes cannot get their user back"),
}
_OPTIONAL_CAPABILITIES = {
    "CAP_SYS_RESOURCE": (24, "hard limits of a workload (RLIMIT_NOFILE, …) cannot be raised again"),
}


def kernel() -> Finding:
    release = platform.release()
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    found = f"{platform.system()} {release} {platform.machine()}"
    if numbers >= (6, 7):
        return Finding(name="kernel", verdict=Verdict.OK, found=found)
    return Finding(
        name="kernel",
        verdict=Verdict.LIMITED,
        found=found,
        cost="PAGEMAP_SCAN came with 6.7; what was tried below decides",
        remedy="Boot a newer kernel where a line below says missing.",
    )


def privileges() -> list[Finding]:
    findings = [
        Finding(name="root", verdict=Verdict.OK, found="uid 0")
        if os.geteuid() == 0
        else Finding(
            name="root",
            verdict=Verdict.MISSING,
            found=f"uid {os.geteuid()}",
            cost="CRIU, cgroups and namespaces need root",
            remedy="Run the agent as root (sudo whimbrel …).",
        )
    ]
    effective = _effective_capabilities()
    absent = [name for name, (bit, _) in _CAPABILITIES.items() if not effective >> bit & 1]
    costs = "; ".join(_CAPABILITIES[name][1] for name in absent)
    findings.append(
        Finding(
            name="capabilities",
            verdict=Verdict.MISSING,
            found=f"without {', '.join(absent)}",
            cost=costs,
            remedy="Start without dropping them (docker: --privileged; systemd: CapabilityBoundingSet=).",
        )
        if absent
        else Finding(name="capabilities", verdict=Verdict.OK, found=f"all {len(_CAPABILITIES)} needed")
    )
    for name, (bit, cost) in _OPTIONAL_CAPABILITIES.items():
        if effective >> bit & 1:
            findings.append(Finding(name=name, verdict=Verdict.OK, found="present"))
        else:
            findings.append(
                Finding(
                    name=name,
                    verdict=Verdict.LIMITED,
                    found="absent",
                    cost=cost,
                    remedy="Grant it to the agent if workloads change their limits.",
                )
            )
    return findings


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def criu() -> Finding:
    """The very CRIU an agent would run, and what its own check says of this kernel."""
    try:
        binary = find_criu()
    except CriuMissing as error:
        return Finding(
            name="CRIU",
            verdict=Verdict.MISSING,
            found=str(error),
            cost="nothing can be checkpointed",
            remedy="In a checkout: make setup (unpacks CRIU 4.2 privately on Debian). Elsewhere: Fedora dnf "
            "install criu; Arch pacman -S criu; Ubuntu ppa:criu/ppa; or WHIMBREL_CRIU=/path/to/criu.",
        )
    try:
        done = subprocess.run(
            [binary.path, "check"], capture_output=True, text=True, timeout=CRIU_TIMEOUT_S, check=False
        )
        problem = (done.stderr or done.stdout).strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = [str(error)]
    if problem:
        return Finding(
            name="CRIU",
            verdict=Verdict.MISSING,
            found=f"{binary.version} at {binary.path}; `criu check`: {problem[0]}",
            cost="checkpoints would fail",
            remedy="Run `criu check -v4` as root; its first error names the kernel option.",
        )
    return Finding(
        name="CRIU", verdict=Verdict.OK, found=f"{binary.version} at {binary.path}; criu check: looks good"
    )


def store_space() -> Finding:
    """The page store at a target lives on tmpfs, and so does the memory it becomes."""
    name = "tmpfs for page stores"
    try:
        with open("/proc/self/mountinfo") as mounts:
            on_tmpfs = any(line.split()[4] == str(STORE_DIR) and " - tmpfs " in line for line in mounts)
        stat = os.statvfs(STORE_DIR)
    except OSError as error:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found=str(error),
            cost="a target has nowhere to put pages",
            remedy=f"mount -t tmpfs tmpfs {STORE_DIR}",
        )
    free = stat.f_bavail * stat.f_frsize
    found = f"{STORE_DIR}: {free / (1 << 30):.1f} GiB free" + ("" if on_tmpfs else ", not a tmpfs")
    if on_tmpfs and free >= STORE_BYTES_WANTED:
        return Finding(name=name, verdict=Verdict.OK, found=found)
    return Finding(
        name=name,
        verdict=Verdict.LIMITED,
        found=found,
        cost="workloads larger than this cannot move here"
        + ("" if on_tmpfs else ", and pages go through a disk"),
        remedy=f"mount -o remount,size=80% {STORE_DIR}",
    )


class _Timex(ctypes.Structure):
    """The head of struct timex; the kernel writes at most 208 bytes."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock() -> Finding:
    """Commit deadlines are wall-clock times agreed between hosts."""
    name = "clock"
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    error_ms = timex.maxerror / 1000
    unsynchronised = 0x40
    if state >= 0 and not timex.status & unsynchronised and error_ms <= CLOCK_ERROR_MS_MAX:
        return Finding(name=name, verdict=Verdict.OK, found=f"synchronised, error at most {error_ms:.1f} ms")
    return Finding(
        name=name,
        verdict=Verdict.LIMITED,
        found="the kernel's clock is not marked as synchronised",
        cost="hosts whose clocks differ by seconds decline each other's commands as expired; "
        "within one machine it does not matter",
        remedy="Run an NTP client: apt-get install chrony",
    )
