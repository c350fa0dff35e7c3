"""What can be known before the first page moves: can this workload be checkpointed, does it fit there?

Only looks: nothing here touches the workload beyond reading /proc. Every problem names what was expected,
what was found, and the remedy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from whimbrel.agent.capsule.capsule import FILES_MOUNT
from whimbrel.agent.memory.maps import read_maps
from whimbrel.events.commands import FileFact, SourceAssessment, TargetAssessment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from whimbrel.agent.capsule.capsule import Capsule
    from whimbrel.events.records import WorkloadSpec

_DIGEST_BYTES_MAX: Final = 64 << 20
_FILES_MAX: Final = 2000
_NOT_CARRIED: Final = (f"{FILES_MOUNT}/", "/proc/", "/sys/", "/dev/shm/")
_IO_URING: Final = (
    "expected files and mappings that CRIU can dump, found an io_uring; "
    "turn io_uring off in the service (uvloop, nginx, PostgreSQL 18 each have a setting)"
)
_HARMLESS_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


def assess_source(command_id: str, capsule: Capsule) -> SourceAssessment:
    """Reads the workload's processes; raises ProcessLookupError where there is none."""
    pids = capsule.cgroup.pids()
    if not pids:
        raise ProcessLookupError(f"workload {capsule.workload} has no process")
    problems: dict[str, None] = {}
    files: dict[str, FileFact] = {}
    threads = memory = shared = 0
    seen_shared: set[int] = set()
    for pid in pids:
        try:
            threads += len(os.listdir(f"/proc/{pid}/task"))
            mappings = read_maps(pid)
            memory += _status_bytes(pid, "RssAnon:")
            for mapping in mappings:
                if mapping.permissions[3] == "s" and _is_memory_name(mapping.name):
                    if mapping.inode not in seen_shared:
                        seen_shared.add(mapping.inode)
                        shared += mapping.end - mapping.start
                    continue
                problem = _mapping_problem(mapping.name)
                if problem:
                    problems[f"{capsule.workload} pid {pid}: {problem}"] = None
                elif mapping.name.startswith("/") and mapping.inode:
                    _add_file(files, pid, mapping.name, executable="x" in mapping.permissions, writable=False)
            for problem in _open_files(pid, files):
                problems[f"{capsule.workload} pid {pid}: {problem}"] = None
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
    return SourceAssessment(
        command=command_id,
        processes=len(pids),
        threads=threads,
        memory_bytes=memory,
        shared_bytes=shared,
        files=tuple(files[path] for path in sorted(files)[:_FILES_MAX]),
        problems=tuple(problems),
    )


def _is_memory_name(name: str) -> bool:
    return name.startswith(("/memfd:", "/dev/zero", "/SYSV", "/dev/shm/"))


def _mapping_problem(name: str) -> str | None:
    if name.startswith("anon_inode:[io_uring]"):
        return _IO_URING
    if name.startswith("/dev/") and not _is_memory_name(name) and name not in ("/dev/null", "/dev/zero"):
        return f"expected ordinary memory, found a mapping of the device {name}; release it before the move"
    if name.startswith("/anon_hugepage"):
        return (
            "expected 4 KiB or transparent huge pages, found reserved huge pages (MAP_HUGETLB); "
            "use transparent huge pages instead"
        )
    return None


def _open_files(pid: int, files: dict[str, FileFact]) -> Iterable[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{fd}"
        try:
            path = os.readlink(link)
            status = os.stat(link)
        except OSError:
            continue
        if path.startswith("anon_inode:[io_uring]"):
            yield f"fd {fd}: {_IO_URING}"
        elif stat.S_ISREG(status.st_mode) and path.startswith("/") and not path.startswith("/memfd:"):
            if path.endswith(" (deleted)") or path.startswith(_NOT_CARRIED):
                continue
            try:
                with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                    flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
            except FileNotFoundError:
                continue  # closed since; the others are still to be looked at
            _add_file(files, pid, path, executable=False, writable=flags & os.O_ACCMODE != os.O_RDONLY)
        elif (
            stat.S_ISCHR(status.st_mode)
            and path not in _HARMLESS_DEVICES
            and not path.startswith(("/dev/pts/", "/dev/ptmx"))
        ):
            yield f"fd {fd}: expected no devices, found {path} open; close it before the move"


def _add_file(files: dict[str, FileFact], pid: int, path: str, *, executable: bool, writable: bool) -> None:
    if path.endswith(" (deleted)") or path.startswith(f"{FILES_MOUNT}/"):
        return
    known = files.get(path)
    if known is not None and writable and not known.writable:
        # One descriptor that reads must not hide another that writes: its size may change any moment.
        known = files[path] = msgspec.structs.replace(known, writable=True)
    if known is not None and (known.digest or not executable):
        return
    try:
        inside = Path(f"/proc/{pid}/root{path}")
        size = inside.stat().st_size
        digest = _digest(inside, size) if executable else ""
    except OSError:
        return
    writable = writable or (known is not None and known.writable)
    files[path] = FileFact(path=path, size_bytes=size, digest=digest, writable=writable)


def _digest(path: Path, size: int) -> str:
    if size > _DIGEST_BYTES_MAX:
        return ""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _status_bytes(pid: int, key: str) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith(key)), 0)


def assess_target(
    command_id: str, capsule: Capsule, spec: WorkloadSpec, files: Iterable[FileFact]
) -> TargetAssessment:
    """Whether `spec` could live here with these files."""
    problems: list[str] = []
    if capsule.exists():
        problems.append(
            f"expected no workload named {spec.name} on this host, found one at {capsule.folder}; "
            f"stop it there, or run whimbrel doctor --clean if it is left over"
        )
    for fact in files:
        problem = _file_problem(fact)
        if problem:
            problems.append(problem)
    if spec.port is not None:
        problem = _port_problem(spec.port)
        if problem:
            problems.append(problem)
    return TargetAssessment(command=command_id, problems=tuple(problems))


def _file_problem(fact: FileFact) -> str | None:
    path = Path(fact.path)
    try:
        size = path.stat().st_size
    except OSError as error:
        return (
            f"{fact.path}: expected the file of {fact.size_bytes} bytes that the workload uses, found "
            f"{errno.errorcode.get(error.errno or 0, error)}; install it here, or put it on shared storage"
        )
    if fact.writable:
        return None
    if size != fact.size_bytes:
        return (
            f"{fact.path}: expected {fact.size_bytes} bytes as at the source, found {size} bytes; "
            "install the same version on both hosts"
        )
    if fact.digest and (digest := _digest(path, size)) and digest != fact.digest:
        return (
            f"{fact.path}: expected {fact.digest[:19]}… as at the source, found {digest[:19]}…; "
            "install the same version on both hosts"
        )
    return None


def _port_problem(port: int) -> str | None:
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
        except OSError as error:
            if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                continue  # a host without IPv6
            return (
                f"expected TCP port {port} free on this host, found it in use ({error.strerror}); "
                f"see who: ss -ltnp 'sport = :{port}'"
            )
    return None
