"""Kernel features, each found by using it: version numbers and config files lie about containers and
backports, a system call that just worked does not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from whimbrel.agent.doctor.findings import Finding, Verdict
from whimbrel.agent.memory.userfault import PAGE, Category, Feature, PagemapScanner, Userfault

TRY_TIMEOUT_S = 10.0
PIPE_BYTES_WANTED = 1 << 30
_USERFAULTFD_NR = {"x86_64": 323}
_UFFD_USER_MODE_ONLY = 1
_SOFT_DIRTY_BIT = 1 << 55
_UPGRADE = "Boot a kernel >= 6.7 with CONFIG_USERFAULTFD=y (Debian: bookworm-backports, trixie or newer)."


def write_tracking() -> Finding:
    """userfaultfd write protection and PAGEMAP_SCAN together: protect, write a page, find that page."""
    name = "dirty tracking (userfaultfd-wp + PAGEMAP_SCAN)"
    try:
        number = _USERFAULTFD_NR[platform.machine()]
    except KeyError:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found=f"machine {platform.machine()}",
            cost="no pre-copy: whimbrel injects system calls on x86_64 only",
            remedy="Use an x86_64 host.",
        )
    try:
        dirty = _protect_write_scan(number)
    except OSError as error:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found=f"{error}",
            cost="no pre-copy, so no short downtime",
            remedy=f"{_UPGRADE} Under a container: allow userfaultfd in its seccomp profile.",
        )
    if dirty != [1]:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found=f"expected page 1 to be reported written, kernel reported {dirty}",
            cost="writes would be missed: memory would be wrong at the target",
            remedy=_UPGRADE,
        )
    return Finding(name=name, verdict=Verdict.OK, found="one written page of four found, re-protected")


def _protect_write_scan(syscall_number: int) -> list[int]:
    """Numbers of the pages (of four) that are reported written after page 1 was."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(syscall_number, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"userfaultfd(): {os.strerror(ctypes.get_errno())}")
    fault = Userfault(fd)
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(anchor)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for page in range(4):
            memory[page * PAGE] = 1
        fault.handshake(
            Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP
        )
        fault.register_wp(start, start + 4 * PAGE)
        scanner = PagemapScanner()
        wanted = Category.PRESENT | Category.SWAPPED

        def written() -> list[tuple[int, int]]:
            return scanner.scan(
                pagemap, start, start + 4 * PAGE, required=Category.WRITTEN, any_of=wanted, protect=True
            )

        written()
        memory[PAGE] = 2
        return [(page - start) // PAGE for first, last in written() for page in range(first, last, PAGE)]
    finally:
        os.close(pagemap)
        fault.close()
        del anchor
        memory.close()


def soft_dirty() -> Finding:
    """A page just written must carry the bit, where the kernel has it."""
    name = "soft-dirty (CRIU's own tracking)"
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        memory[0] = 1
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(ctypes.addressof(anchor) // PAGE * 8)
            (entry,) = struct.unpack("<Q", pagemap.read(8))
    except OSError as error:
        entry = 0
        found = str(error)
    else:
        found = "present" if entry & _SOFT_DIRTY_BIT else "kernel without CONFIG_MEM_SOFT_DIRTY"
    finally:
        del anchor
        memory.close()
    if entry & _SOFT_DIRTY_BIT:
        return Finding(name=name, verdict=Verdict.OK, found=found)
    return Finding(
        name=name,
        verdict=Verdict.LIMITED,
        found=found,
        cost="plain `criu pre-dump` would not work; whimbrel does not need it",
    )


def namespaces() -> Finding:
    """A capsule is a pid and a mount namespace (optionally a network namespace too)."""
    name = "pid, mount and net namespaces"
    try:
        done = subprocess.run(
            ["unshare", "--pid", "--mount", "--net", "--fork", "--mount-proc", "true"],
            capture_output=True,
            text=True,
            timeout=TRY_TIMEOUT_S,
            check=False,
        )
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if not problem:
        return Finding(name=name, verdict=Verdict.OK, found="created and left again")
    return Finding(
        name=name,
        verdict=Verdict.MISSING,
        found=problem,
        cost="workloads cannot be started in a capsule",
        remedy="Run as root with CAP_SYS_ADMIN, util-linux installed, and user.max_*_namespaces > 0.",
    )


def cgroup_root() -> Path | None:
    """Where cgroup v2 is mounted (also beside v1 in hybrid mode); None: nowhere."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if after.split()[0] == "cgroup2":
                return Path(before.split()[4])
    return None


def cgroup_freezer() -> Finding:
    """Makes a cgroup, freezes a process in it, thaws and removes it."""
    name = "cgroup v2 with freezer"
    root = cgroup_root()
    if root is None:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found="no cgroup2 in /proc/self/mountinfo",
            cost="a frozen source could thaw by accident and run twice: migrations are refused",
            remedy="mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    folder = root / f"whimbrel-doctor-{os.getpid()}"
    child: subprocess.Popen[bytes] | None = None
    problem = ""
    try:
        folder.mkdir()
        child = subprocess.Popen(["sleep", "60"])
        (folder / "cgroup.procs").write_text(str(child.pid))
        (folder / "cgroup.freeze").write_text("1")
        deadline = time.monotonic() + 2.0
        while not (frozen := "frozen 1" in (folder / "cgroup.events").read_text()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        (folder / "cgroup.freeze").write_text("0")
        if not frozen:
            problem = "cgroup.freeze was written, but cgroup.events did not say frozen within 2 s"
    except OSError as error:
        problem = str(error)
    finally:
        if child is not None:
            child.kill()
            child.wait(TRY_TIMEOUT_S)
        _remove_cgroup(folder)
    if problem:
        return Finding(
            name=name,
            verdict=Verdict.MISSING,
            found=problem,
            cost="a frozen source could thaw by accident and run twice: migrations are refused",
            remedy=f"Run as root with {root} mounted read-write.",
        )
    return Finding(name=name, verdict=Verdict.OK, found=f"{root}: a process was frozen and thawed")


def _remove_cgroup(folder: Path) -> None:
    deadline = time.monotonic() + 2.0
    while folder.exists() and time.monotonic() < deadline:
        with suppress(OSError):  # EBUSY until the killed child has left it
            folder.rmdir()
            return
        time.sleep(0.005)


def pipe_limits() -> Finding:
    name = "pipe limits"
    size = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    soft = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    found = f"pipe-max-size {size}, pipe-user-pages-soft {soft}"
    if size >= PIPE_BYTES_WANTED and soft == 0:
        return Finding(name=name, verdict=Verdict.OK, found=found)
    return Finding(
        name=name,
        verdict=Verdict.LIMITED,
        found=found,
        cost="CRIU's own page server of lazy pages can fail with EPERM in tee; whimbrel serves pages itself",
        remedy="sysctl fs.pipe-max-size=1073741824 fs.pipe-user-pages-soft=0",
    )


def nftables() -> Finding:
    """Needed only to keep established TCP connections alive."""
    name = "nftables"
    try:
        done = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, timeout=TRY_TIMEOUT_S, check=False
        )
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if not problem:
        return Finding(name=name, verdict=Verdict.OK, found="nft lists tables")
    return Finding(
        name=name,
        verdict=Verdict.LIMITED,
        found=problem,
        cost="established TCP connections of a workload cannot be locked while it is dumped",
        remedy="apt-get install nftables; kernel with CONFIG_NF_TABLES",
    )
